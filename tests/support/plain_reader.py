"""A reader of checkpoint stores written from docs/format.md alone: standard library only, not a line of fxckpt.

python -I plain_reader.py STORE      prints the newest checkpoint that verifies, as JSON
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import re
import struct
import sys

SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4,
         "F32": 4, "I64": 8, "U64": 8, "F64": 8}  # fmt: skip
MEMBERS = {"sha256", "format", "store_id", "generation", "parent", "step", "iteration", "updates", "time", "world_size", "rank",
           "files", "layers", "ties", "optimizers", "state", "name"}  # fmt: skip


class Damaged(Exception):
    """What does not match."""


def need(condition: bool, what: str) -> None:
    if not condition:
        raise Damaged(what)


def _table() -> list[int]:
    out = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        out.append(byte)
    return out


TABLE = _table()


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def _once(pairs: list) -> dict:
    need(len(dict(pairs)) == len(pairs), "a key is there twice")
    return dict(pairs)


def _no_constant(text: str) -> None:
    raise Damaged(f"{text} is not JSON")


def read_record(path: str, name: str = "commit.json", sha256: str | None = None) -> dict:
    """A record, its digest compared as bytes before it is parsed; that of a part has another one in ``commit.json``."""
    with open(os.path.join(path, name), "rb") as file:
        raw = file.read()
    need(sha256 in (None, hashlib.sha256(raw).hexdigest()), f"the digest of {name}")
    need(raw[:77] == b'{"sha256":"' + hashlib.sha256(raw[77:]).hexdigest().encode() + b'",', "the digest")
    need(raw[77:86] == b'"format":', "the second member")
    record = json.loads(raw.decode("ascii"), object_pairs_hook=_once, parse_constant=_no_constant)
    need(record["format"] in (1, 3, 4), "a newer format")
    return record


def read_file(path: str, file: dict) -> bytes:
    """A data file whose size and chunks are those of the record."""
    with open(os.path.join(path, file["name"]), "rb") as stream:
        data = stream.read()
    need(len(data) == file["nbytes"] and len(data) % 4096 == 0, f"the size of {file['name']}")
    n = file["chunk_bytes"]
    found = [crc32c(data[at : at + n]) for at in range(0, len(data), n)]
    need(found == file["crc32c"], f"a chunk of {file['name']}")
    return data


def tensors_of(data: bytes) -> dict[str, tuple[str, list[int], int, int]]:
    """Name → (type, shape, begin and end in the file)."""
    (n,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + n], object_pairs_hook=_once)
    header.pop("__metadata__", None)
    out = {}
    for name, entry in header.items():
        begin, end = (8 + n + offset for offset in entry["data_offsets"])
        items = 1
        for length in entry["shape"]:
            items *= length
        need(end - begin == items * SIZES[entry["dtype"]] and end <= len(data), f"the place of {name}")
        need(begin % SIZES[entry["dtype"]] == 0, f"the alignment of {name}")
        out[name] = (entry["dtype"], entry["shape"], begin, end)
    return out


def read_checkpoint(path: str) -> tuple[dict, dict[str, dict[str, tuple[str, list[int], bytes]]]]:
    """Record, and the tensors of each file as (type, shape, bytes). Raises ``Damaged``, ``OSError``."""
    record = read_record(path)
    need(record["format"] == 1, "one of several ranks")
    files = {}
    for file in record["files"]:
        data = read_file(path, file)
        found = tensors_of(data)
        recorded = {
            t["key"]: (t["dtype"], t["shape"], t["begin"], t["begin"] + t["nbytes"])
            for layer in record["layers"]
            for t in layer["tensors"]
            if t["file"] == file["name"]
        }
        need(file["name"] == "state.safetensors" or found == recorded, f"the header of {file['name']}")
        files[file["name"]] = {name: (dtype, shape, data[begin:end]) for name, (dtype, shape, begin, end) in found.items()}
    return record, files


def kind_of(name: str) -> str:
    """``model`` of ``model-00002-of-00004.safetensors``."""
    return re.sub(r"(-\d+-of-\d+)?\.safetensors$", "", name)


def read_together(path: str) -> dict[str, tuple[str, list[int], bytes]]:
    """All tensors of the model and the optimizers that ranks wrote together, by ``model/<key>`` or ``optimizer/<key>``."""
    first = read_record(path)
    need(first["rank"] == 0 and len(first["parts"]) == first["world_size"] - 1, "not all parts")
    records = [first] + [read_record(path, part["name"], part["sha256"]) for part in first["parts"]]
    boxes: dict[str, list] = {}
    for record in records:
        files = {file["name"]: read_file(path, file) for file in record["files"] if not file["name"].endswith(".json")}
        headers = {name: tensors_of(data) for name, data in files.items()}
        listed = [t for layer in record["layers"] for t in layer["tensors"]]
        for t in (t for t in listed if kind_of(t["file"]) != "own"):
            end = t["begin"] + t["nbytes"]
            need(headers[t["file"]][t["key"]] == (t["dtype"], t["shape"], t["begin"], end), f"the header of {t['file']}")
            boxes.setdefault(f"{kind_of(t['file'])}/{t['key']}", []).append((t, files[t["file"]][t["begin"] : end]))
    return {key: gathered(found) for key, found in boxes.items()}


def gathered(boxes: list) -> tuple[str, list[int], bytes]:
    """One tensor out of its boxes, (as recorded, bytes) each."""
    first = boxes[0][0]
    if first.get("whole") is None:
        need(len(boxes) == 1, f"{first['key']} is in two parts")
        return first["dtype"], first["shape"], boxes[0][1]
    whole, item, count = first["whole"], SIZES[first["dtype"]], 0
    strides = [item]
    for size in reversed(whole[1:]):
        strides.insert(0, strides[0] * size)
    elements = 1
    for size in whole:
        elements *= size
    data, seen = bytearray(elements * item), bytearray(elements)
    for tensor, raw in boxes:
        need(tensor["whole"] == whole and tensor["dtype"] == first["dtype"], f"the boxes of {first['key']}")
        for number, index in enumerate(itertools.product(*map(range, tensor["shape"]))):
            at = sum((begin + i) * stride for begin, i, stride in zip(tensor["offset"], index, strides))
            need(not seen[at // item], f"an element of {first['key']} is in two boxes")
            data[at : at + item], seen[at // item] = raw[number * item : (number + 1) * item], 1
            count += 1
    need(count == elements, f"not all of {first['key']} is there")
    return first["dtype"], whole, bytes(data)


def newest(store: str) -> tuple[str, dict, dict]:
    """Path, record and tensors of the newest generation that verifies."""
    paths = [os.path.join(store, name) for name in os.listdir(store) if re.fullmatch(r"step-\d{9,}(-g\d+)?", name)]
    named = os.path.join(store, "named")
    if os.path.isdir(named):
        paths += [os.path.join(named, name) for name in os.listdir(named) if not name.endswith((".partial", ".bad", ".tmp"))]
    found = []
    for path in paths:
        try:
            found.append((path, *read_checkpoint(path)))
        except (Damaged, OSError, ValueError, KeyError, struct.error) as error:
            print(f"{path} does not verify: {error!r}", file=sys.stderr)
    need(bool(found), "no checkpoint verifies")
    return max(found, key=lambda each: each[1]["generation"])


def decode(value, tensors: dict) -> object:
    """An encoded value; tensors and arrays as (type, shape, bytes), sets of numpy and torch as tagged tuples."""
    if isinstance(value, list):
        return [decode(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    if "!" not in value:
        return {key: decode(each, tensors) for key, each in value.items()}
    kind, v = value["!"], value.get("v")
    if kind == "int":
        return int(v, 16)
    if kind in ("float", "complex"):
        numbers = struct.unpack(f">{len(v) // 16}d", bytes.fromhex(v))
        return numbers[0] if kind == "float" else complex(*numbers)
    if kind == "str":
        return bytes.fromhex(v).decode("utf-8", "surrogatepass")
    if kind in ("bytes", "bytearray"):
        return base64.b64decode(v)
    if kind in ("tuple", "set", "frozenset", "deque"):
        return {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": list}[kind](decode(each, tensors) for each in v)
    if kind == "range":
        return range(*(int(each, 16) for each in v))
    if kind in ("dict", "OrderedDict", "Counter", "defaultdict"):
        return {decode(key, tensors): decode(each, tensors) for key, each in v}
    if kind in ("array", "torch"):
        dtype, _, data = tensors[value["key"]]
        return (value["dtype"], value["shape"], dtype, data)
    if kind == "torch.sparse":
        return tuple(decode(value[part], tensors) for part in ("indices", "values"))
    need(kind in ("numpy", "numpy.text", "torch.dtype", "torch.device", "torch.Size"), f"an unknown kind {kind!r}")
    return (kind, value.get("dtype"), v)


def main(store: str) -> None:
    path, record, files = newest(store)
    tensors = {
        file: {name: [dtype, shape, hashlib.sha256(data).hexdigest()] for name, (dtype, shape, data) in each.items()}
        for file, each in files.items()
    }
    state = {part: decode(record[part], files["state.safetensors"]) for part in ("state", "optimizers")}
    print(
        json.dumps(
            {
                "path": path,
                "members": sorted(record),
                "step": record["step"],
                "generation": record["generation"],
                "ties": record["ties"],
                "tensors": tensors,
                "extra": sorted(state["state"]["late"]),
                "lr": state["optimizers"][0]["groups"][0]["settings"]["lr"],
                "ours": sorted(name for name in sys.modules if name.split(".")[0] in ("fxckpt", "torch", "numpy")),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
