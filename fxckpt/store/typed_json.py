"""Python values as JSON that brings back exactly what it was given, without pickle.

Plain JSON turns ``MultiStepLR``'s ``Counter({30: 1})`` into ``{"30": 1}``: no error, and another learning rate after a resume.
Here ``null``, booleans, numbers, strings, arrays and objects with string keys mean themselves, and everything else is an object
whose key ``"!"`` names its kind.

Tensors and arrays are copied at the time of the call, so that what is stored is the state of that moment however late it is
written; they go to ``state.safetensors``, and the JSON holds their key.
"""

from __future__ import annotations

import base64
import importlib
import json
import math
import struct
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fxckpt.errors import Corrupt, StateError
from fxckpt.store import names
from fxckpt.store.checks import is_text
from fxckpt.store.dtypes import OF_TORCH, PARTS, item_size, raw_tensor

MAX_DEPTH = 64
"""Values nested deeper, or containing themselves, are refused. Each level is at most three levels of JSON."""

_SAFE_INT = 1 << 53  # larger ones are tagged: readers that keep numbers as doubles would change them

_FACTORIES = {None: "", int: "int", float: "float", list: "list", dict: "dict", set: "set", str: "str", tuple: "tuple",
              bool: "bool", deque: "deque", Counter: "Counter"}  # fmt: skip
_FACTORY_NAMES = {name: factory for factory, name in _FACTORIES.items()}


def encode_state(value: Any, tensors: dict[str, Any], path: str = "") -> Any:
    """``value`` as JSON-able data; copies of its tensors and arrays are added to ``tensors`` under keys made from ``path``.
    Raises ``StateError``, naming the path, for a value that it could not bring back exactly."""
    return _Encoder(tensors).encode(value, path, 0)


class Unkept(dict[str, Any]):
    """For ``encode_state`` where only its verdict is asked for: each copy of a tensor is forgotten at once."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, None)


def _join(path: str, name: Any) -> str:
    """The path of an element; text that is not valid Unicode is escaped, as a path is also a safetensors key."""
    try:
        text = name if type(name) is str else repr(name)
    except ValueError:  # an int of more digits than Python prints
        text = f"a {type(name).__name__}"
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return f"{path}/{text}" if path else text


class _Encoder:
    """One call of ``encode_state``; with ``tensors=None`` it encodes a key, where no tensor can be."""

    def __init__(self, tensors: dict[str, Any] | None):
        self._tensors = tensors

    def encode(self, value: Any, path: str, depth: int) -> Any:
        """One value, by its exact type: a subclass (an enum, a namedtuple) would come back as something else."""
        if depth > MAX_DEPTH:
            raise StateError(f"{path}: nested more than {MAX_DEPTH} levels deep, or it contains itself")
        known = _ENCODERS.get(type(value))
        if known is not None:
            return known(self, value, path, depth)
        if type(value) in (np.str_, np.bytes_):  # as a str and bytes: numpy's own bytes lose trailing NULs
            plain = value[:]  # not item(), which loses them too
            return {"!": "numpy.text", "v": _ENCODERS[type(plain)](self, plain, path, depth)}
        if isinstance(value, np.generic) and value.dtype.kind not in "OVUS":
            return {"!": "numpy", "dtype": value.dtype.str, "v": value.tobytes().hex()}
        if type(value) is np.ndarray and value.dtype.kind not in "OV":
            key = self._store(np.array(value, order="C", copy=True), path)
            return {"!": "array", "key": key, "dtype": value.dtype.str, "shape": list(value.shape)}
        torch = sys.modules.get("torch")
        if torch is not None and hasattr(torch, "Tensor"):
            if type(value) in (torch.dtype, torch.device):
                return {"!": f"torch.{type(value).__name__}", "v": str(value).removeprefix("torch.")}
            if type(value) is torch.Size:
                return {"!": "torch.Size", "v": [int(size) for size in value]}
            if type(value) in (torch.Tensor, torch.nn.Parameter):
                return self._tensor(torch, value, path)
        raise StateError(
            f"{path or 'the state'}: a {type(value).__module__}.{type(value).__qualname__} cannot be stored without pickle. "
            "Numbers, strings, bytes, lists, tuples, sets, dicts, arrays and tensors can; or give its owner a state_dict() of "
            "these"
        )

    def _tensor(self, torch: Any, value: Any, path: str) -> Any:
        """A torch tensor; its copy on the CPU goes to ``tensors``."""
        if value.layout is torch.sparse_coo and value.device.type != "meta":
            return self._sparse(torch, value.detach(), path)
        name = str(value.dtype).removeprefix("torch.")
        if value.layout is not torch.strided or value.device.type == "meta" or name not in {**OF_TORCH, **PARTS}:
            what = f"{value.layout}, {value.dtype}, on {value.device}"
            raise StateError(f"{path}: only dense and COO tensors of plain number types can be stored, not one that is {what}")
        copy = value.detach().to("cpu", copy=True).resolve_conj().resolve_neg().contiguous()
        node: dict[str, Any] = {"!": "torch", "key": self._store(copy, path), "dtype": name, "shape": list(value.shape)}
        if value.device.type != "cpu":
            node["device"] = str(value.device)
        if type(value) is torch.nn.Parameter:
            node["parameter"] = True
        if value.is_leaf and value.requires_grad:
            node["requires_grad"] = True
        return node

    def _sparse(self, torch: Any, value: Any, path: str) -> Any:
        """A sparse tensor in coordinates, such as the momentum of a sparse embedding: its two dense ones."""
        indices = self._tensor(torch, value._indices(), _join(path, "indices"))
        values = self._tensor(torch, value._values(), _join(path, "values"))
        shape, coalesced = list(value.shape), value.is_coalesced()
        return {"!": "torch.sparse", "indices": indices, "values": values, "shape": shape, "coalesced": coalesced}

    def _store(self, copy: Any, path: str) -> str:
        """Add a tensor under a key nobody has yet: ``{"a/b": t}`` and ``{"a": {"b": t}}`` have the same path."""
        if self._tensors is None:
            raise StateError(f"{path}: a tensor or array cannot be a key or an element of a set")
        key, count = path or "value", 1
        while key in self._tensors:
            count += 1
            key = f"{path}#{count}"
        self._tensors[key] = copy
        return key

    def _list(self, value: Any, path: str, depth: int) -> list:
        """The elements in order, each with its index in the path."""
        return [self.encode(element, _join(path, index), depth + 1) for index, element in enumerate(value)]

    def _set(self, value: Any, path: str, depth: int) -> Any:
        """The elements in an order that does not depend on the process's hash seed."""
        elements = [_Encoder(None).encode(element, path, depth + 1) for element in value]
        return {"!": type(value).__name__, "v": sorted(elements, key=json.dumps)}

    def _dict(self, value: dict, path: str, depth: int) -> Any:
        """An object when its keys are text, in which no key can be mistaken for a tag; else pairs."""
        if "!" in value or not all(map(is_text, value)):
            return {"!": "dict", "v": self._pairs(value, path, depth)}
        return {key: self.encode(item, _join(path, key), depth + 1) for key, item in value.items()}

    def _pairs(self, value: Mapping, path: str, depth: int) -> list:
        """Keys and values in order; keys keep their type."""
        items = [(key, item, _join(path, key)) for key, item in value.items()]
        return [[_Encoder(None).encode(key, at, depth + 1), self.encode(item, at, depth + 1)] for key, item, at in items]

    def _defaultdict(self, value: defaultdict, path: str, depth: int) -> Any:
        """Pairs and the default's name, if it is a builtin type or none."""
        factory = value.default_factory
        if not (factory is None or isinstance(factory, type)) or factory not in _FACTORIES:
            raise StateError(f"{path}: a defaultdict of {factory!r} cannot be stored; builtin types as default can")
        return {"!": "defaultdict", "of": _FACTORIES[factory], "v": self._pairs(value, path, depth)}


def _hex(kind: str, raw: bytes) -> dict[str, str]:
    return {"!": kind, "v": raw.hex()}


_ENCODERS: Mapping[type, Callable[[_Encoder, Any, str, int], Any]] = {
    type(None): lambda self, value, path, depth: None,
    bool: lambda self, value, path, depth: value,
    int: lambda self, value, path, depth: value if -_SAFE_INT < value < _SAFE_INT else {"!": "int", "v": hex(value)},
    # Finite ones as their shortest exact decimal; NaN (with its payload) and infinities by their bits.
    float: lambda self, value, path, depth: value if math.isfinite(value) else _hex("float", struct.pack(">d", value)),
    str: lambda self, value, path, depth: value if is_text(value) else _hex("str", value.encode("utf-8", "surrogatepass")),
    complex: lambda self, value, path, depth: _hex("complex", struct.pack(">dd", value.real, value.imag)),
    bytes: lambda self, value, path, depth: {"!": "bytes", "v": base64.b64encode(value).decode()},
    bytearray: lambda self, value, path, depth: {"!": "bytearray", "v": base64.b64encode(value).decode()},
    range: lambda self, value, path, depth: {"!": "range", "v": list(map(hex, (value.start, value.stop, value.step)))},
    list: _Encoder._list,
    tuple: lambda self, value, path, depth: {"!": "tuple", "v": self._list(value, path, depth)},
    deque: lambda self, value, path, depth: {"!": "deque", "max": value.maxlen, "v": self._list(value, path, depth)},
    set: _Encoder._set,
    frozenset: _Encoder._set,
    dict: _Encoder._dict,
    OrderedDict: lambda self, value, path, depth: {"!": "OrderedDict", "v": self._pairs(value, path, depth)},
    Counter: lambda self, value, path, depth: {"!": "Counter", "v": self._pairs(value, path, depth)},
    defaultdict: _Encoder._defaultdict,
}  # fmt: skip


def decode_state(value: Any, tensors: Mapping[str, Any], path: str = names.COMMIT) -> Any:
    """What ``encode_state`` was given. ``tensors``: as it filled them, or as ``Reader.state_tensors`` returns them. Tensors are
    new, and on their device if this machine has it, else on the CPU. Malformed data raises ``Corrupt``."""
    try:
        return _Decoder(tensors).decode(value)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, struct.error) as error:
        raise Corrupt(path, f"the stored state is malformed: {type(error).__name__}: {error}") from error


class _Decoder:
    """One call of ``decode_state``."""

    def __init__(self, tensors: Mapping[str, Any]):
        self._tensors = tensors

    def decode(self, value: Any) -> Any:
        """One value; objects without ``"!"`` are dicts."""
        if type(value) is list:
            return [self.decode(element) for element in value]
        if type(value) is not dict:
            return value
        if "!" not in value:
            return {key: self.decode(item) for key, item in value.items()}
        return _DECODERS[value["!"]](self, value)

    def _pairs(self, node: dict) -> list[tuple[Any, Any]]:
        """Keys and values; a key given twice is an error."""
        pairs = [(self.decode(key), self.decode(item)) for key, item in _list_of(node)]
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key is given twice")
        return pairs

    def _elements(self, node: dict) -> list[Any]:
        """What a container holds: never what a range stands for, which a few bytes make as long as memory."""
        return self.decode(_list_of(node))

    def _scalar(self, node: dict) -> np.generic:
        (scalar,) = np.frombuffer(bytes.fromhex(node["v"]), np.dtype(node["dtype"]))
        return scalar

    def _text(self, node: dict) -> np.generic:
        plain = self.decode(node["v"])
        if type(plain) not in (str, bytes):
            raise TypeError(f"text is a {type(plain).__name__}")
        return np.str_(plain) if type(plain) is str else np.bytes_(plain)

    def _bytes_of(self, node: dict, nbytes: int) -> bytearray:
        """A private copy of a stored tensor's bytes, whose number must be what its type and shape take."""
        raw = raw_tensor(self._tensors[node["key"]])
        if raw.data.nbytes != nbytes:
            raise ValueError(f"{node['key']!r} has {raw.data.nbytes} bytes, not {nbytes}")
        return bytearray(raw.data)

    def _array(self, node: dict) -> np.ndarray:
        dtype, shape = np.dtype(node["dtype"]), tuple(node["shape"])
        if dtype.kind in "OV" or (dtype.itemsize == 0 and 0 not in shape):
            raise ValueError(f"an array of {dtype} and shape {shape}")
        raw = self._bytes_of(node, dtype.itemsize * math.prod(shape))
        return np.frombuffer(raw, dtype).reshape(shape) if raw else np.empty(shape, dtype)

    def _tensor(self, node: dict) -> Any:
        """A torch tensor, with its class, device and ``requires_grad``."""
        torch, name, shape = _torch_module(), node["dtype"], tuple(node["shape"])
        item = 2 * item_size(PARTS[name]) if name in PARTS else item_size(OF_TORCH[name])
        raw, dtype = self._bytes_of(node, item * math.prod(shape)), getattr(torch, name)
        if raw:
            tensor = torch.frombuffer(raw, dtype=torch.uint8).view(dtype).reshape(shape)
        else:
            tensor = torch.empty(shape, dtype=dtype)
        device = torch.device(node.get("device", "cpu"))
        if device.type == "cuda" and (device.index or 0) < torch.cuda.device_count():
            tensor = tensor.to(device)  # else it stays on the CPU: a checkpoint of eight GPUs loads on a machine with one
        if node.get("parameter"):
            return torch.nn.Parameter(tensor, requires_grad=node.get("requires_grad", False))
        return tensor.requires_grad_() if node.get("requires_grad") else tensor

    def _sparse(self, node: dict) -> Any:
        """A sparse tensor; RuntimeError for coordinates outside of it."""
        indices, values = self.decode(node["indices"]), self.decode(node["values"])
        make, shape = _torch_module().sparse_coo_tensor, tuple(node["shape"])
        return make(indices, values, shape, check_invariants=True, is_coalesced=bool(node["coalesced"]))


def _list_of(node: dict) -> list[Any]:
    """The JSON list of a container."""
    if type(node["v"]) is not list:
        raise TypeError(f"the elements of a {node['!']} are a {type(node['v']).__name__}")
    return node["v"]


def _torch_module() -> Any:
    """torch, imported only when the state holds something of it."""
    return importlib.import_module("torch")


def _dtype(name: str) -> Any:
    """A torch dtype by name, and nothing else that torch has by that name."""
    found = getattr(_torch_module(), name)
    if type(found) is not _torch_module().dtype:
        raise ValueError(f"torch.{name} is not a dtype")
    return found


_DECODERS: Mapping[str, Callable[[_Decoder, dict], Any]] = {
    "int": lambda self, node: int(node["v"], 16),
    "float": lambda self, node: struct.unpack(">d", bytes.fromhex(node["v"]))[0],
    "str": lambda self, node: bytes.fromhex(node["v"]).decode("utf-8", "surrogatepass"),
    "complex": lambda self, node: complex(*struct.unpack(">dd", bytes.fromhex(node["v"]))),
    "bytes": lambda self, node: base64.b64decode(node["v"], validate=True),
    "bytearray": lambda self, node: bytearray(base64.b64decode(node["v"], validate=True)),
    "range": lambda self, node: range(*(int(n, 16) for n in node["v"])),
    "tuple": lambda self, node: tuple(self._elements(node)),
    "deque": lambda self, node: deque(self._elements(node), node["max"]),
    "set": lambda self, node: set(self._elements(node)),
    "frozenset": lambda self, node: frozenset(self._elements(node)),
    "dict": lambda self, node: dict(self._pairs(node)),
    "OrderedDict": lambda self, node: OrderedDict(self._pairs(node)),
    "Counter": lambda self, node: Counter(dict(self._pairs(node))),
    "defaultdict": lambda self, node: defaultdict(_FACTORY_NAMES[node["of"]], self._pairs(node)),
    "numpy": _Decoder._scalar,
    "numpy.text": _Decoder._text,
    "array": _Decoder._array,
    "torch": _Decoder._tensor,
    "torch.sparse": _Decoder._sparse,
    "torch.dtype": lambda self, node: _dtype(node["v"]),
    "torch.device": lambda self, node: _torch_module().device(node["v"]),
    "torch.Size": lambda self, node: _torch_module().Size(_list_of(node)),
}
