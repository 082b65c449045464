"""Put what was read and checked into the live objects: bytes, optimizers' states, extras, buffers, what is frozen."""

from __future__ import annotations

import functools
import logging
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fxckpt.compat import module_state
from fxckpt.compat.modules import every_module, extra_state_modules
from fxckpt.compat.spread import gradient_like, is_spread, like, local, spread_alike
from fxckpt.compat.unreduced import hold_back
from fxckpt.errors import LayoutMismatch
from fxckpt.graph.model.book import traces
from fxckpt.loading.match import OF_THE_SAME_SHAPE, Match, empty_buffer
from fxckpt.loading.schema import Saved
from fxckpt.loading.target import Target
from fxckpt.optim.contract.contract import NOTHING
from fxckpt.optim.given import given_to, what_changed
from fxckpt.run import extra_state
from fxckpt.run.module_values import ModuleValues
from fxckpt.run.run import Run
from fxckpt.saving.inventory import COMPLEX_OF, TORCH_DTYPES, storable, stored_box, take
from fxckpt.saving.plan import source_items
from fxckpt.store.boxes import Box
from fxckpt.store.names import MODEL, OPTIMIZER, state_key
from fxckpt.store.reader import Reader
from fxckpt.store.record import Place, TensorRecord

log: logging.Logger = logging.getLogger("fxckpt")

NO_LOOPS: Mapping[str, Any] = {"epoch": 0, "batch": 0, "inside": None, "sources": []}
"""What a record of an earlier version says of loops."""

State = dict[str, Any]
"""What an optimizer keeps for one parameter, or a record says of it, or a parameter group holds."""


def read_tensors(reader: Reader, tensors: Mapping[tuple[str, str], torch.Tensor], whole_files: bool = True) -> None:
    """Verify the files of tensors while reading them into place, a file at a time. Of DTensors this rank's part is read. Where
    there are such, or not ``whole_files`` are asked for, of each file only what is needed."""
    writable = {key: storable(t) for key, t in tensors.items()}
    boxes = boxes_of(tensors)
    for file in (MODEL, OPTIMIZER):
        with landed({key: t for key, t in writable.items() if key[0] == file}) as landing:
            items = dict(zip(landing, source_items(list(landing.values()))))
            reader.read_into(items, file, boxes=None if whole_files and not boxes else boxes)


def boxes_of(tensors: Mapping[Place, torch.Tensor]) -> dict[Place, Box]:
    """Which parts of DTensors this rank has, as files have them."""
    return {place: (box.offset, box.shape) for place, t in tensors.items() if (box := stored_box(t)) is not None}


@contextmanager
def landed(tensors: Mapping[tuple[str, str], torch.Tensor]) -> Iterator[dict[tuple[str, str], torch.Tensor]]:
    """Tensors in host memory to read into: these, or in place of what lies on a device others, of which it is copied there behind
    the block."""
    landing = {key: t if t.device.type == "cpu" else _on_host(t.shape, t.dtype) for key, t in tensors.items()}
    with torch.no_grad():
        yield landing
        for key, tensor in tensors.items():
            if landing[key] is not tensor:
                tensor.copy_(landing[key])


def _on_host(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """One to read into, wherever the script has new tensors made."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def read_later(reader: Reader, later: Sequence[TensorRecord]) -> dict[str, torch.Tensor]:
    """New tensors by key, for those whose owners are not known yet; they are few: buffers and frozen parameters."""
    held = {t.key: _on_host(t.shape, TORCH_DTYPES[t.dtype]) for t in later}
    if held:
        reader.read_into({(MODEL, key): source_items([t])[0] for key, t in held.items()}, MODEL)
    return held


def make_states(saved: Saved, match: Match, target: Target) -> list[dict[int, State]]:
    """Make every optimizer's state as the record describes it, by its parameter's id, and add its tensors, still empty, to
    what is read. A live tensor that is just so is kept, so that no second copy exists during a rollback."""
    check_contracts(saved, target)
    out = []
    for index, (old, opt) in enumerate(zip(saved.optimizers, target.optimizers)):
        states: dict[int, State] = {}
        for group in opt.param_groups:
            for param in group["params"]:
                name = match.states.get(target.inventory.name_of(param))
                if name is not None and name in old["state"]:
                    places = {key: saved.places.get(state_key(index, key, name)) for key in old["state"][name]["keys"]}
                    states[id(param)] = make_state(places, old["state"][name], param, group, opt.state.get(param, {}), match)
        out.append(states)
    return out


def make_state(
    places: Mapping[str, TensorRecord | None], description: State, param: torch.Tensor, group: State, live: State, match: Match
) -> State:
    """The state of one parameter. ``places``: where each value lies in a file; None: it is a plain one of the record."""
    made: State = {}
    for key, place in places.items():
        if place is None:
            made[key] = description["plain"][key]
            continue
        device = torch.device("cpu") if lies_on_host(key, len(place.shape), description, group) else param.device
        shape = _shape_of(place, key in description["complex"])
        is_alike = shape == tuple(param.shape) and (shape or key in OF_THE_SAME_SHAPE)  # 0-dim: not each is
        of = param if is_spread(param) and is_alike else None
        made[key] = state_tensor(place, description["strides"].get(key), live.get(key), key in description["complex"], device, of)
        match.tensors[OPTIMIZER, place.key] = made[key]
    return made


def lies_on_host(key: str, dim: int, description: State, group: State) -> bool:
    """Is this state kept in host memory, wherever its parameter lies? Else it lies beside it. Step counts follow torch's own rule
    (``Optimizer._process_value_according_to_param_policy``): on the device for fused and capturable optimizers only."""
    if key == "step" and not dim:
        return not (group.get("fused") or group.get("capturable"))
    return key in description.get("host", ())


def state_tensor(
    place: TensorRecord,
    strides: Sequence[int] | None,
    live: Any,
    is_complex: bool,
    device: torch.device,
    of: torch.Tensor | None = None,
) -> torch.Tensor:
    """An uninitialised tensor as the record describes it, or the live one if it is just so. ``of``: the DTensor that it is spread
    over ranks as."""
    shape, dtype = _shape_of(place, is_complex), TORCH_DTYPES[place.dtype]
    dtype = COMPLEX_OF[place.dtype] if is_complex and not dtype.is_complex else dtype
    shape = shape if of is None else tuple(local(of).shape)
    wanted = (shape, dtype, strides_for(shape, strides), device)
    found = local(live)
    fits = isinstance(found, torch.Tensor) and (tuple(found.shape), found.dtype, found.stride(), found.device) == wanted
    if fits and spread_alike(live, of):
        return live
    made = torch.empty_strided(shape, wanted[2], dtype=dtype, device=device)
    return made if of is None else like(made, of)


def _shape_of(place: TensorRecord, is_complex: bool) -> tuple[int, ...]:
    """Of the tensor that was stored, be it in pairs of reals."""
    in_pairs = is_complex and not TORCH_DTYPES[place.dtype].is_complex
    return tuple(place.shape)[:-1] if in_pairs else tuple(place.shape)


def strides_for(shape: tuple[int, ...], strides: Sequence[int] | None) -> tuple[int, ...]:
    """Those of the record where they are for such a shape, else row-major ones."""
    if strides is not None and len(strides) == len(shape):
        dense = sorted((stride, size) for size, stride in zip(shape, strides) if size > 1)
        inner = [math.prod(size for _, size in dense[:at]) for at in range(len(dense))]
        if 0 not in shape and inner == [stride for stride, _ in dense]:  # states of torch's optimizers are dense
            return tuple(strides)
    return torch.empty(shape, device="meta").stride()


def apply_optimizers(saved: Saved, states: Sequence[Mapping[int, State]], match: Match, target: Target) -> None:
    """Give every optimizer its groups' settings, its state, what else it keeps, its gradients' presence, and the gradients that
    waited for a step."""
    for index, (old, made, opt) in enumerate(zip(saved.optimizers, states, target.optimizers)):
        _apply_state(old, made, opt)
        if not _fits(old, opt):
            if "own" in old:
                log.warning("fxckpt: what %s keeps beside its parameters' state is left out: its groups differ", old["class"])
        else:
            target.contracts[index].restore(old.get("own", NOTHING), functools.partial(_apply_state, old, made, opt))
        present, waiting, lain = set(old["gradients"]), old.get("accumulated", {}), old.get("accumulated_as", {})
        for param in (p for live in opt.param_groups for p in live["params"]):
            stored = match.stored.get(target.inventory.name_of(param))
            if (held := waiting.get(stored)) is not None:
                param.grad = _waited(held, param, lain.get(stored))
                if param.grad is None:
                    log.warning("fxckpt: the gradient of %s that waited for a step is left out: it lay otherwise", stored)
            else:
                param.grad = None
            if param.grad is None and stored in present:  # to an optimizer a gradient of zeros is not the same as none
                param.grad = torch.zeros_like(param)


def give_back_what_was_held(saved: Saved, match: Match, target: Target) -> None:
    """Have FSDP2 hold back the gradients that it had not reduced when the checkpoint was taken, and no others."""
    held, lay = saved.early.get("held_back", {}), saved.early.get("held_back_as", {})
    names = {
        id(p): match.stored.get(target.inventory.name_of(p))
        for o in target.optimizers
        for g in o.param_groups
        for p in g["params"]
    }
    wanted = {param: (held[name], lay.get(name, "")) for param, name in names.items() if name in held}
    done = set() if target.model is None else hold_back(target.model, wanted)
    if lost := sorted(str(names[param]) for param in wanted.keys() - done):
        log.warning("fxckpt: gradients that FSDP2 had not reduced are left out, as ranks lie otherwise now: those of %s",
                    ", ".join(lost[:5]) + (" ..." if lost[5:] else ""))  # fmt: skip


def _waited(held: torch.Tensor, param: torch.Tensor, lay: str | None) -> torch.Tensor | None:
    """A stored gradient that waited for a step, beside its parameter; None if it cannot be that one's."""
    part, shape = held.to(param.device), local(param).shape
    if not held.is_sparse and held.shape == shape:
        part = torch.empty_like(local(param)).copy_(held)
    found: torch.Tensor | None = gradient_like(part, param, lay)
    return found


def _apply_state(old: State, made: Mapping[int, State], opt: torch.optim.Optimizer) -> None:
    """The settings of its groups, and the state of its parameters. The containers stay: another optimizer may have them, too."""
    opt.state.clear()
    for group, live in zip(old["groups"], opt.param_groups):
        _apply_settings(group["settings"], live)
        for param in live["params"]:
            if id(param) in made:
                opt.state[param] = made[id(param)]


def _fits(old: State, opt: torch.optim.Optimizer) -> bool:
    """Are there as many parameters as there were? What an optimizer keeps of its own names them by their places."""
    return [len(g["params"]) for g in old["groups"]] == [len(g["params"]) for g in opt.param_groups]


def check_contracts(saved: Saved, target: Target) -> None:
    """Raise LayoutMismatch where what an optimizer kept of its own has no place in the live one."""
    for old, opt, contract in zip(saved.optimizers, target.optimizers, target.contracts):
        if _fits(old, opt):
            contract.check(old.get("own", NOTHING))


def _apply_settings(settings: Mapping[str, Any], group: dict[str, Any]) -> None:
    """Set them. A tensor that fits is filled, as a captured graph may read it."""
    for key, value in settings.items():
        live = group.get(key)
        if isinstance(value, torch.Tensor) and isinstance(live, torch.Tensor) and value.shape == live.shape:
            live.copy_(value)
        else:
            group[key] = value


def set_buffers(match: Match, target: Target) -> None:
    """Set the buffers that had no value or another shape, and were read into new tensors. Raises LayoutMismatch if a module does
    not take what it said it would."""
    for module, attribute, made in match.filled:
        setattr(module, attribute, made)
    with torch.no_grad():
        for live, made in match.resized:
            live.resize_(made.shape).copy_(made)
    modules = {} if target.model is None else dict(every_module(target.model))
    for name, values in match.asked.items():
        try:
            module_state.fill(modules[name], values)
        except Exception as error:
            raise LayoutMismatch(f"{name}: its own _load_from_state_dict raised {type(error).__name__}: {error}") from error


def _give_contracts_back(saved: Mapping[str, Mapping[str, Any]], model: torch.nn.Module) -> None:
    """Let modules take what their own state dicts had added. Raises LayoutMismatch where one raises."""
    modules = dict(every_module(model))
    for name, entries in saved.items():
        if (module := modules.get(name)) is None:
            log.warning("fxckpt: the checkpoint has state of a module %r, which this model has not: %s", name, ", ".join(entries))
            continue
        try:
            module_state.give_back(module, entries)
        except Exception as error:
            what = f"{name or 'the model'}: its own load_state_dict raised {type(error).__name__}: {error}"
            raise LayoutMismatch(what) from error


def check_extras(saved: Saved, target: Target) -> None:
    """Raise LayoutMismatch for a plain value that cannot become in place what was stored, before anything is touched."""
    values = {**saved.early["extra"], **saved.late}
    wrong = [
        f"  extra[{e.name!r}]: {why}" for e in target.extras if e.name in values and (why := e.misfit(values[e.name])) is not None
    ]
    if wrong:
        raise LayoutMismatch("\n".join(["plain values of extra= are of another kind than in the checkpoint:", *wrong]))


def apply_extras(saved: Saved, target: Target) -> None:
    """Set extras, module extra state and transient buffers, and the random generators last: these only where no loop of ours
    will, so that what a script draws in between is what it drew in its first life."""
    early, values = saved.early, {**saved.early["extra"], **saved.late}
    in_a_loop = early.get("loops", NO_LOOPS)["inside"] is not None
    for each in target.extras:
        if each.name in values and not (in_a_loop and each.is_generator()):
            each.set(values[each.name])
    if target.model is not None:
        for name, module in extra_state_modules(target.model):
            if name in early["modules"]:
                module.set_extra_state(early["modules"][name])
        _apply_transient({**early["buffers"], **early.get("remote", {})}, target, dict(every_module(target.model)))
        _give_contracts_back(early.get("contracts", {}), target.model)
    if target.optimizers and not in_a_loop:
        extra_state.set_random_state(early["random"])


def apply_loops(saved: Saved, target: Target, run: Run) -> None:
    """Tell a run's loops where they stand."""
    run.loops.load_state_dict(saved.early.get("loops", NO_LOOPS), _WayBack(saved, target, run.capture.values))


class _WayBack:
    """What a script does again on its way to the loop that a checkpoint was taken in, undone there."""

    def __init__(self, saved: Saved, target: Target, of_modules: ModuleValues):
        values = {**saved.early["extra"], **saved.late}
        self._random, self._optimizers = saved.early["random"], target.optimizers
        self._extras = [(each, values[each.name]) for each in target.extras if each.name in values]
        self._kept: list[list[dict[str, Any]]] = []
        self._modules, self._generators, self._numbers = of_modules, saved.early.get("generators", {}), of_modules.numbers()

    def generators(self) -> None:
        for each, value in self._extras:
            if each.is_generator():
                each.set(value)
        self._modules.set_generators(self._generators)
        extra_state.set_random_state(self._random)

    def keep(self) -> None:
        self._numbers = self._modules.numbers()
        self._kept = [given_to(opt) for opt in self._optimizers]

    def undo(self, where: str) -> None:
        self._modules.set_numbers(self._numbers)
        before = [given_to(opt) for opt in self._optimizers]
        for opt, groups in zip(self._optimizers, self._kept):
            for group, settings in zip(opt.param_groups, groups):
                _apply_settings({key: value for key, value in settings.items() if group.get(key) != value}, group)
        for each, value in self._extras:
            if each.done_again():
                each.set(value)
        changed = {each for old, new in zip(self._kept, before) for each in what_changed(old, new)}
        if changed:
            log.warning("fxckpt: what the script set again %s is put back as it was: %s", where, ", ".join(sorted(changed)))


def _apply_transient(saved: Mapping[str, torch.Tensor], target: Target, modules: Mapping[str, torch.nn.Module]) -> None:
    """Set the buffers that are in no state dict. One that is not set yet, has another shape by now (a cache that grew), or
    whose elements share memory (it was expanded) is replaced."""
    for name, value in saved.items():
        buffer = target.inventory.transient.get(name)
        if buffer is None:
            if (empty := empty_buffer(modules, name)) is not None:
                setattr(*empty, value)
            continue
        shared = buffer.layout is torch.strided and any(
            stride == 0 and size > 1 for size, stride in zip(buffer.shape, buffer.stride())
        )
        if shared or (value.shape, value.dtype) != (buffer.shape, buffer.dtype):
            owner, _, attribute = name.rpartition(".")
            setattr(modules[owner], attribute, value.to(buffer.device))
            continue
        with torch.inference_mode(buffer.is_inference()), torch.no_grad():  # inference tensors change in that mode only
            buffer.copy_(value)


def freeze(frozen: Sequence[str] | None, step: int, match: Match, target: Target) -> None:
    """Let parameters require a gradient as they did at ``step``, when the checkpoint was taken, and say what changes: a script
    that unfreezes layers ``if step == 1000`` does not come there again. ``frozen`` is None in records of earlier versions."""
    if frozen is None:
        return
    changed: dict[bool, list[str]] = {True: [], False: []}
    for name, param in {**target.inventory.trained, **target.inventory.frozen}.items():
        stored = match.stored.get(name)
        wanted = stored not in frozen
        if stored is not None and param.requires_grad != wanted:
            param.requires_grad_(wanted)
            changed[wanted].append(name)
    for wanted, found in changed.items():
        _say("these parameters are " + ("trained" if wanted else "frozen"), step, found)


def set_modes(evaluating: Sequence[str] | None, step: int, target: Target) -> None:
    """Put modules into training and eval mode as at ``step``, and say which change, for the same reason. Without a model nobody
    knows them. ``evaluating`` is None in records of earlier versions, and of runs without a model."""
    if evaluating is None or target.model is None:
        return
    for training, found in module_state.set_modes(target.model, set(evaluating)).items():
        _say("these modules are in " + ("training" if training else "eval") + " mode", step, found)


def set_values(saved: Saved, run: Run) -> None:
    """Give modules back the numbers and generators that they keep in attributes. Records of earlier versions have none."""
    if "numbers" in saved.early:
        run.capture.values.set_numbers(saved.early["numbers"])
    if saved.early.get("loops", NO_LOOPS)["inside"] is None:  # else the loop does that, as with all generators
        run.capture.values.set_generators(saved.early.get("generators", {}))


def _say(what: str, step: int, found: Sequence[str]) -> None:
    """Say what of the live objects was changed to what it was then."""
    if found:
        log.warning("fxckpt: %s again, as at step %d: %s", what, step, ", ".join(found[:5]) + (" ..." if found[5:] else ""))


class LateOwners:
    """Restored tensors whose owners are not known yet: without a model, only the compiler shows buffers and frozen parameters.
    They are handed over inside the backend's call, before the graph runs for the first time. Somebody has to keep this.
    ``transient``: values of buffers that are in no state dict."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        transient: Mapping[str, torch.Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
    ):
        self._tensors, self._transient, self._optimizers = dict(tensors), dict(transient), optimizers
        traces.listeners.append(weakref.WeakMethod(self._hand_over))
        self._hand_over()

    def _hand_over(self, trace: object = None) -> None:
        """Copy what now has an owner of that name. Raises LayoutMismatch where it has another shape or type."""
        if not (self._tensors or self._transient):
            return
        seen = take(None, self._optimizers, traces)
        with torch.no_grad():
            for name, tensor in {**seen.buffers, **seen.frozen}.items():
                if (held := self._tensors.pop(name, None)) is not None:
                    _fill_late(name, _like(storable(tensor), held), held)
            for name, tensor in seen.transient.items():
                if (held := self._transient.pop(name, None)) is not None:
                    _fill_late(name, tensor, held)


def _like(live: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """A complex one as pairs of reals if an earlier version stored it so."""
    return torch.view_as_real(live) if live.is_complex() and held.dtype is torch.float32 else live


def _fill_late(name: str, live: torch.Tensor, held: torch.Tensor) -> None:
    """Set a tensor that a graph is about to read; one that is empty still takes the stored shape."""
    if live.layout is torch.strided and not live.numel() and live.dtype == held.dtype:
        live.resize_(held.shape)
    if (held.shape, held.dtype) != (live.shape, live.dtype):
        what = f"checkpoint {held.dtype}{list(held.shape)}, live {live.dtype}{list(live.shape)}"
        raise LayoutMismatch(f"{name}: {what}. With model= a buffer is replaced, or asked of its module")
    live.copy_(held)
