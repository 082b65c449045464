"""The contract of one optimizer: what it keeps beside its state and groups, captured as a step closes, and given back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from fxckpt.compat.optimizers import complete, has_own_contract, is_stock, plain_class
from fxckpt.errors import LayoutMismatch, SetupError
from fxckpt.optim.contract.pack import Packer, Unstorable, is_torchs_own
from fxckpt.optim.contract.unpack import Unpacker, is_optimizer
from fxckpt.optim.held import HeldWeakly

WAY_OUT = (
    "Give the class state_dict() and load_state_dict() that keep what of it training changes, as numbers, strings, containers "
    "and tensors: a subclass of a few lines will do"
)

NOTHING: Mapping[str, Any] = {
    "optimizer": {"groups": [], "state": {"dict": []}, "attributes": {}}, "tensors": [], "shared": [], "objects": {}
}  # fmt: skip
"""What is restored where nothing was captured."""


class Contract:
    """Looks at an optimizer once at the start, so that what no checkpoint can hold is refused before training.

    ``ours``: tensors that checkpoints hold anyway, those of the model, by ``id``.
    """

    opt: HeldWeakly = HeldWeakly()

    def __init__(self, opt: torch.optim.Optimizer, ours: Iterable[int] = ()):
        complete(opt)
        self.opt = opt
        self._ours = frozenset(ours)
        packer = Packer(opt, self._ours)
        self._pack(packer)
        self._made_of = packer.made_of
        self._initial = self._names()
        self._captured = False

    def capture(self) -> dict[str, Any] | None:
        """What it keeps now, for ``encode_state``; None if there is nothing. Raises SetupError for what cannot be stored."""
        self._captured, opt = True, self.opt
        if is_stock(opt) and not self._names() and not has_own_contract(opt) and all(map(_is_tensor, opt.state)):
            return None  # as for most: what follows looks at every parameter
        packer = Packer(opt, self._ours, self._made_of)
        body, shared = self._pack(packer), _shared(opt)
        if not shared and not body["state"]["dict"] and not body["attributes"] and "contract" not in body:
            return None
        return {"optimizer": body, "tensors": packer.tensors, "shared": shared, "objects": packer.made_of}

    def _names(self) -> set[str]:
        """Of its attributes, less those of torch."""
        return {name for name in vars(self.opt) if not is_torchs_own(self.opt, name)}

    @property
    def _name(self) -> str:
        return f"this {plain_class(self.opt).__name__} (of {plain_class(self.opt).__module__})"

    def _pack(self, packer: Packer) -> dict[str, Any]:
        """Attributes first: of a tensor that the contract has as well, they say whose it is."""
        try:
            state, attributes = packer.foreign(self.opt), packer.attributes(self.opt)
            return {"groups": [], "state": state, "attributes": attributes, **(packer.contract(self.opt) or {})}
        except Unstorable as error:
            raise SetupError(f"{self._name} keeps {error}: no checkpoint can hold that. {WAY_OUT}") from None

    def check(self, own: Mapping[str, Any]) -> None:
        """Raise LayoutMismatch unless this optimizer has what ``own``, of a checkpoint, is to be given to."""
        for path, kind in own["objects"].items():
            if self._made_of.get(path) != kind:
                found = self._made_of.get(path, "nothing")
                raise LayoutMismatch(f"{self._name} has {found} in {path}, where the checkpoint has a {kind}: build it as before")

    def restore(self, own: Mapping[str, Any], again: Callable[[], None]) -> None:
        """Give back what ``capture`` found. State and groups are restored already; ``again`` does so once more, after the class
        did what it does in its own ``load_state_dict``."""
        body, opt = own["optimizer"], self.opt
        unpacker = Unpacker(opt, own["tensors"])
        if "contract" in body:
            unpacker.contract(opt, *body["contract"])
            again()
        unpacker.entries(opt.state, body["state"]["dict"])
        params = [p for group in opt.param_groups for p in group["params"]]
        for (first, key), *others in own["shared"]:
            for index, name in others:
                opt.state[params[index]][name] = opt.state[params[first]][key]
        for name in self._names() - self._initial - body["attributes"].keys() if self._captured else ():
            del vars(opt)[name]  # made after the step that was loaded
        unpacker.attributes(opt, body["attributes"])


def is_own(value: Any, params: int) -> bool:
    """Is it what ``Contract.capture`` gives, of an optimizer of so many parameters?"""
    if (
        type(value) is not dict
        or set(value) != {"optimizer", "tensors", "shared", "objects"}
        or type(value["tensors"]) is not list
    ):
        return False
    body, count = value["optimizer"], len(value["tensors"])
    return (
        all(map(_is_tensor, value["tensors"]))
        and is_optimizer(body, params, count)
        and "dict" in body["state"]
        and type(value["objects"]) is dict
        and all(type(kind) is str for kind in value["objects"].values())
        and type(value["shared"]) is list
        and all(
            type(same) is list and len(same) > 1 and all(_is_place(each, params) for each in same) for same in value["shared"]
        )
    )


def _is_place(value: Any, params: int) -> bool:
    return type(value) is list and len(value) == 2 and type(value[0]) is int and 0 <= value[0] < params and type(value[1]) is str


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _shared(opt: torch.optim.Optimizer) -> list[list[list[Any]]]:
    """The tensors that stand in several places of ``opt.state``, by their places: parameter and key. PyTorch's have none."""
    if is_stock(opt):
        return []
    places: dict[int, list[list[Any]]] = {}
    for i, param in enumerate(p for group in opt.param_groups for p in group["params"]):
        for key, value in opt.state.get(param, {}).items() if param in opt.state else ():
            if isinstance(value, torch.Tensor):
                places.setdefault(id(value), []).append([i, key])
    return [same for same in places.values() if len(same) > 1]
