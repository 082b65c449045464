"""Which stored tensor goes where, found before anything is touched, and what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fxckpt.compat.module_state import takes_shapes
from fxckpt.compat.modules import every_module
from fxckpt.compat.optimizers import SCHEDULER_NOTES, plain_class
from fxckpt.compat.spread import is_spread, local
from fxckpt.errors import LayoutMismatch
from fxckpt.loading.target import Target
from fxckpt.saving.inventory import DTYPES, TORCH_DTYPES, is_position, storable, storable_as, stored_box
from fxckpt.saving.ownership import check_names
from fxckpt.store.about import imported
from fxckpt.store.names import MODEL, OPTIMIZER, state_key
from fxckpt.store.record import Record, TensorRecord

"""What schedulers put into a group."""

OF_THE_SAME_SHAPE = {
    "acc_delta", "ax", "exp_avg", "exp_avg_sq", "exp_inf", "grad_avg", "max_exp_avg_sq", "momentum_buffer", "prev", "square_avg",
    "step_size", "sum",
}  # fmt: skip
"""What classes of torch.optim keep for a parameter in its shape."""


@dataclass
class Match:
    """Stored tensors and their live ones, and the names of those that have none."""

    tensors: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)  # by file and key
    stored: dict[str, str] = field(default_factory=dict)  # live name of a trained parameter -> its stored name, if it fits
    states: dict[str, str] = field(default_factory=dict)  # the same -> its name in the record of the optimizers
    later: list[TensorRecord] = field(default_factory=list)  # wait for the compiler to show who owns them
    filled: list[tuple[torch.nn.Module, str, torch.Tensor]] = field(default_factory=list)  # buffers that are None still
    resized: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # empty buffers, and what they become
    asked: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)  # module -> buffers that it sets itself
    places: dict[str, str] = field(default_factory=dict)  # stored -> live name of what went by its place in the optimizers
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    unfit: dict[str, tuple[TensorRecord, torch.Tensor]] = field(default_factory=dict)  # of another shape or type, by live name
    wrong: list[str] = field(default_factory=list)  # of another shape or type: lines of a message


def match_tensors(record: Record, target: Target) -> Match:
    """Match stored model tensors with live ones: by name, or for optimizers without a model by position."""
    out = Match()
    inventory = target.inventory
    live = {**inventory.trained, **inventory.frozen, **inventory.buffers}
    positions = out.places = _by_position(record, target) if target.model is None else {}
    modules = {} if target.model is None else dict(every_module(target.model))
    aliases = {**record.ties, **{name: alias for alias, name in record.ties.items()}}
    began = imported(record)
    equal = {} if began is None else began.get("equal", {})
    if began is not None:  # other programs store a tie under any of its names, or under all of them
        aliases |= inventory.ties
    for key, tensor in {tensor.key: tensor for tensor in record.tensors(MODEL)}.items():
        name = positions.get(key, key)
        if name not in live and aliases.get(name) in live:
            name = aliases[name]
        if name in live:
            _match(out, key, tensor, name, live.pop(name))
        elif target.model is None and target.run is not None:
            out.later.append(tensor)
        elif (empty := empty_buffer(modules, name)) is not None and tensor.dtype in TORCH_DTYPES:
            device = next((param.device for param in modules[""].parameters()), None)  # the first parameter's
            made = torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype], device=device)
            out.tensors[MODEL, key] = made
            out.filled.append((*empty, made))
        elif began is None or not _is_second_name(key, out.stored.get(inventory.ties.get(key, key)), equal):
            out.unexpected.append(key)
    _resize_buffers(out, inventory.buffers, modules)
    shared = {alias for alias, name in inventory.ties.items() if name not in live}
    out.missing += [name for name in live if name not in shared]
    out.states = {**out.stored, **(_import_places(record, target) if began is not None else {})}
    return out


def _is_second_name(key: str, matched: str | None, equal: Mapping[str, str]) -> bool:
    """Is it another name of the tensor that went to the same live one as ``matched``, and did both have the same bits?"""
    return matched is not None and equal.get(key, key) == equal.get(matched, matched)


def _import_places(record: Record, target: Target) -> dict[str, str]:
    """Live name -> stored name of the optimizers' state that an import has by its places only, as torch itself goes by."""
    out: dict[str, str] = {}
    for saved, opt in zip(record.optimizers, target.optimizers):
        for group, live in zip(saved["groups"], opt.param_groups):
            for name, param in zip(group["params"], live["params"]):
                if is_position(name):
                    out[target.inventory.name_of(param)] = name
    return out


def _match(out: Match, key: str, stored: TensorRecord, name: str, tensor: torch.Tensor) -> None:
    """Note the pair: among the ``unfit`` unless shape and type agree."""
    real = storable_as(tensor, stored.dtype)
    if _shape(tensor, real) != tuple(stored.shape) or DTYPES[real.dtype] != stored.dtype:
        out.unfit[name] = stored, tensor
        return
    out.tensors[MODEL, key] = tensor
    out.stored[name] = key


def _resize_buffers(out: Match, buffers: Mapping[str, torch.Tensor], modules: Mapping[str, torch.nn.Module]) -> None:
    """What becomes of the ``unfit``: a buffer takes the stored shape if its module says so, or if it is empty still, as lazily
    sized ones are until the first forward. All else does not fit."""
    made: dict[str, dict[str, torch.Tensor]] = {}  # by module and attribute
    for name, (stored, live) in out.unfit.items():
        if name in buffers and stored.dtype in TORCH_DTYPES and name.rpartition(".")[0] in modules:
            owner, _, attribute = name.rpartition(".")
            new = torch.zeros(stored.shape, dtype=TORCH_DTYPES[stored.dtype], device=live.device)
            made.setdefault(owner, {})[attribute] = new
    out.asked = {owner: new for owner, new in made.items() if takes_shapes(modules[owner], new)}
    for name, (stored, live) in out.unfit.items():
        owner, _, attribute = name.rpartition(".")
        value = made.get(owner, {}).get(attribute)
        if value is not None and owner not in out.asked and not live.numel():
            if live.dtype == value.dtype:
                out.resized.append((live, value))
            else:
                out.filled.append((modules[owner], attribute, value))
        elif value is None or owner not in out.asked:
            real = storable(live)
            shape = list(_shape(live, real))
            out.wrong.append(f"{name}: checkpoint {_shown(stored)}, live {DTYPES[real.dtype]}{shape}")
            continue
        out.tensors[MODEL, stored.key] = value


def _shape(live: torch.Tensor, real: torch.Tensor) -> tuple[int, ...]:
    """That of a live tensor as a record has it, of a DTensor the whole's. ``real``: what of it a file can hold."""
    return (*live.shape, *real.shape[local(live).dim() :]) if is_spread(live) else tuple(real.shape)


def relaid(match: Match, record: Record) -> str | None:
    """A tensor of which this rank had another part when the checkpoint was written; None: each lies where it lay."""
    for stored in record.tensors(MODEL):
        live = match.tensors.get((MODEL, stored.key))
        box = None if live is None else stored_box(live)
        is_part = box is not None and not box.is_whole and 0 not in box.shape
        wrote = {(each.offset, each.shape) for each in stored.pieces}
        if (is_part or wrote) and not (box is not None and (0 in box.shape or (box.offset, box.shape) in wrote)):
            return stored.key
    return None


def _shown(stored: TensorRecord) -> str:
    """Type and shape, for a message."""
    return f"{stored.dtype}{list(stored.shape)}"


def empty_buffer(modules: Mapping[str, torch.nn.Module], name: str) -> tuple[torch.nn.Module, str] | None:
    """Module and attribute of a buffer that was registered as None and has not been set by a forward yet."""
    owner, _, attribute = name.rpartition(".")
    module = modules.get(owner)
    if module is None or attribute not in module._buffers or module._buffers[attribute] is not None:
        return None
    return module, attribute


def _by_position(record: Record, target: Target) -> dict[str, str]:
    """Stored name -> live name, by the place in the optimizers' groups; none if the names say it themselves."""
    out: dict[str, str] = {}
    if set(_places(record)) == set(target.inventory.trained):
        return out
    for saved, opt in zip(record.optimizers, target.optimizers):
        for group, live in zip(saved["groups"], opt.param_groups):
            for name, param in zip(group["params"], live["params"]):
                out[name] = target.inventory.name_of(param)
    return out


def _places(record: Record) -> dict[str, tuple[int, int]]:
    """Optimizer and group of each stored name."""
    groups = [((i, g), group) for i, saved in enumerate(record.optimizers) for g, group in enumerate(saved["groups"])]
    return {name: place for place, group in groups for name in group["params"]}


def check_match(match: Match, record: Record, target: Target, strict: bool) -> None:
    """Raise LayoutMismatch, listing names and shapes side by side, unless what differs may be left out. Then it is added to
    what is ``missing`` and ``unexpected``."""
    hard: list[str] = []
    check_names(match.places)
    if strict:
        hard += [f"  {line}" for line in match.wrong]
        hard += [f"  {name}: not in the checkpoint" for name in match.missing]
        hard += [f"  {name}: only in the checkpoint" for name in match.unexpected]
    if target.optimizers:
        hard += _optimizer_problems(record, target, match, strict)
    hard += _extra_problems(record, target, match, strict)
    if not strict:
        match.missing += [line.split(":")[0] for line in match.wrong]
    if hard:
        raise LayoutMismatch("\n".join([f"the checkpoint of step {record.step} does not fit:", *hard]))


def _extra_problems(record: Record, target: Target, match: Match, strict: bool) -> list[str]:
    """Extras that only one of both has, which are noted; problems if they must fit."""
    saved = {*record.state["early"]["extra"], *record.state["late"]}  # names: the values are not decoded yet
    strict = strict and imported(record) is None  # it has no extras, and they stay as the script made them
    live = [each.name for each in target.extras]
    missing = [name for name in live if name not in saved]
    unused = sorted(saved - set(live)) if target.asked else []
    match.missing += [f"extra/{name}" for name in missing]
    match.unexpected += [f"extra/{name}" for name in unused]
    out = [f"  extra[{name!r}]: not in the checkpoint" for name in missing]
    if target.run is not None:
        out += [f"  extra/{name}: only in the checkpoint" for name in unused]
    return out if strict else []


def _optimizer_problems(record: Record, target: Target, match: Match, strict: bool) -> list[str]:
    """Optimizers and groups must be the same, or the state cannot be given to anyone; and what is in them, unless only what
    fits is asked for and names say whose it is."""
    saved, live = record.optimizers, target.optimizers
    if not saved and imported(record) is not None:
        return []  # it has none, and they stay as the script made them
    if len(saved) != len(live):
        return [f"  optimizers: checkpoint {len(saved)}, live {len(live)}"]
    out = []
    for i, (old, opt) in enumerate(zip(saved, live)):
        if not old["class"] and imported(record) is not None:
            out += _import_problems(i, old, record, target)
        elif old["class"] != plain_class(opt).__name__:
            out.append(f"  optimizer {i}: checkpoint {old['class']}, live {plain_class(opt).__name__}")
        sizes = [len(g["params"]) for g in old["groups"]], [len(g["params"]) for g in opt.param_groups]
        if sizes[0] != sizes[1] and (strict or target.model is None or len(sizes[0]) != len(sizes[1])):
            out.append(f"  optimizer {i}: parameters per group: checkpoint {sizes[0]}, live {sizes[1]}")
            if len(sizes[0]) > len(sizes[1]):
                out.append("  groups that the optimizer got in training must be there before the load: fxckpt.latest(dir) says "
                           "which step will be loaded, so that the script can call add_param_group first")  # fmt: skip
    return out + (_moved(record, target, match) if strict else [])


def _import_problems(index: int, old: Mapping[str, Any], record: Record, target: Target) -> list[str]:
    """A state dict does not say of which class it is, and by its places a state may be another parameter's: then its settings are
    not this class's, or its shapes not the parameters'."""
    opt = target.optimizers[index]
    out, places = [], {tensor.key: tensor for tensor in record.tensors(OPTIMIZER)}
    for g, (group, live) in enumerate(zip(old["groups"], opt.param_groups)):
        if foreign := sorted(set(group["settings"]) - set(live) - SCHEDULER_NOTES):
            name = plain_class(opt).__name__
            out.append(
                f"  optimizer {index}, group {g}: the import has {', '.join(foreign)}, which {name} has not: of another class"
            )
        for name, param in zip(group["params"], live["params"]):
            shape = _shape(param, storable(param))
            for key in OF_THE_SAME_SHAPE.intersection(old["state"].get(name, {}).get("keys", ())):
                place = places.get(state_key(index, key, name))
                if place is not None and tuple(place.shape) != shape:
                    live_name = target.inventory.name_of(param)
                    out.append(f"  {live_name}: the import's {key} at this place is {_shown(place)}, the parameter {list(shape)}")
    return out


def _moved(record: Record, target: Target, match: Match) -> list[str]:
    """Parameters that are in another optimizer or group than they were, whose settings are not theirs."""
    before, out = _places(record), []
    for i, opt in enumerate(target.optimizers):
        for g, group in enumerate(opt.param_groups):
            for name in map(target.inventory.name_of, group["params"]):
                was = before.get(match.stored.get(name, ""), (i, g))
                if was != (i, g):
                    out.append(f"  {name}: checkpoint optimizer {was[0]}, group {was[1]}; live optimizer {i}, group {g}")
    return out
