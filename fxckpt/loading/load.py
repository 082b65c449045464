"""``load``: put a checkpoint back into the live objects of a run, or weights into a model for inference.

Nothing live is touched before the record and the layout were checked, and no byte before its chunk was verified. What has
something to lose is touched only after a first pass has verified every chunk of every file; see ``load``.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fxckpt.compat.modules import every_module, extra_state_modules, unwrap_model
from fxckpt.compat.optimizers import plain_class
from fxckpt.config import disabled
from fxckpt.errors import Corrupt, LayoutMismatch, NoCheckpoint, SetupError
from fxckpt.graph.model.book import traces
from fxckpt.loading.schema import check_decoded, check_encoded
from fxckpt.run import extra_state
from fxckpt.run.run import Run, live_runs, the_run
from fxckpt.saving.inventory import DTYPES, TORCH_DTYPES, Inventory, storable, take
from fxckpt.saving.plan import MODEL, OPTIMIZER, source_items, state_key
from fxckpt.store import names
from fxckpt.store.reader import Candidate, Reader, candidates
from fxckpt.store.record import Record, TensorRecord, decode_state

log = logging.getLogger("fxckpt")


@dataclass(frozen=True)
class Restored:
    """What ``load`` did.

    ``step``: ``opt.step()`` attempts so far; ``iteration``: turns of ``fxckpt.steps``, else ``step``; ``updates``: steps
    that were applied. ``path``: the checkpoint, None if there was none. ``layers``: names of the layers restored.
    ``missing``: live names the checkpoint lacks; ``unexpected``: names in it that nothing live has; ``skipped``: newer
    checkpoints that did not verify, with the reason.
    """

    step: int = 0
    iteration: int = 0
    updates: int = 0
    path: Path | None = None
    layers: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass
class Target:
    """What is restored into: live tensors by name, optimizers, extras; ``run`` when one is registered."""

    inventory: Inventory
    optimizers: Sequence[torch.optim.Optimizer]
    extras: Sequence[extra_state.Extra]
    asked: bool  # for extras: else those of the checkpoint are nobody's business
    run: Run | None
    model: torch.nn.Module | None


_PARTIALLY_LOADED = (
    "\nThe model now holds parts of a corrupt checkpoint and this run takes no step with it: build the model, the "
    "optimizer and the run anew to start over."
)


@dataclass
class Mapped:
    """Which stored tensor goes where, found before anything is touched."""

    tensors: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)  # live name of a trained parameter -> its stored name, if it fits
    later: list[TensorRecord] = field(default_factory=list)  # wait for the compiler to show who owns them
    filled: list[tuple[torch.nn.Module, str, torch.Tensor]] = field(default_factory=list)  # buffers that are None still
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@torch.inference_mode(False)  # what is made here is trained, wherever it was called
def load(
    dir: str | os.PathLike | None = None,
    *,
    model: torch.nn.Module | None = None,
    optimizer: Any = None,
    extra: Mapping[str, Any] | None = None,
    step: int | None = None,
    name: str | None = None,
    strict: bool = True,
) -> Restored:
    """Restore the newest verified checkpoint, in place.

    Without arguments: of the run that ``compile_step`` registered, into its model, optimizers and extras; before the first
    forward or later, compiled or not. With ``dir`` and ``model`` only: weights for inference. ``step`` or ``name`` asks for
    a certain checkpoint, and raises if that one is corrupt or not there.

    Every chunk is verified before a byte of it is used. A run that has not stepped yet is read in one pass; whatever holds
    something of value (a run that has trained, a model without a run) is only touched after the whole checkpoint verified.

    Returns ``Restored``; its ``step`` is 0 when there is no checkpoint yet.

    Raises:
        LayoutMismatch: the model, optimizer or extras differ from the checkpoint (``strict=False``: what fits is loaded,
            the rest is listed). Corrupt: the checkpoint asked for, or every one there is, does not verify.
        NoCheckpoint: no such step or name. NotAStore: the directory holds something else. SetupError: several runs.
    """
    if disabled():
        log.warning("fxckpt is off (FXCKPT_DISABLE=1): nothing was loaded")
        return Restored()
    target, directory = _target(dir, model, optimizer, extra)
    if target.run is not None:
        target.run.drop_open("load() replaces the state")
        target.run.saver.flush(None)
    skipped: list[tuple[str, str]] = []
    for _ in range(10):  # a trainer that writes there may recycle what we look at
        vanished = False
        for found in _choose(candidates(directory), step, name, directory):
            try:
                if isinstance(found, Corrupt):
                    raise found
                return _restore(found, target, strict, skipped)
            except Corrupt as error:
                if step is not None or name is not None:
                    raise
                log.error("fxckpt: %s; looking for an older checkpoint", error)
                if (entry := (str(getattr(found, "path", error.path)), str(error))) not in skipped:
                    skipped.append(entry)
            except NoCheckpoint:
                vanished = True
                break
        if not vanished:
            break
    if skipped:
        why = "\n".join(f"  {path}: {reason}" for path, reason in skipped)
        raise Corrupt(
            directory,
            f"none of its checkpoints verifies:\n{why}"
            + (_PARTIALLY_LOADED if target.run is not None and target.run.partially_loaded else ""),
        )
    log.info("fxckpt: no checkpoint in %r yet: a fresh start", directory)
    if target.run is not None and _is_own(target.run, directory):
        target.run.store.mark_loaded(None)
    return Restored()


def _target(dir, model, optimizer, extra) -> tuple[Target, str]:
    """Find what to restore into, and from where."""
    dir = None if dir is None else os.fsdecode(dir)
    given = [] if optimizer is None else list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    run = next((o.ckpt._run for o in given if hasattr(o, "ckpt")), None)
    if run is None and not given and dir is None:
        run = the_run()
    if run is None and not given and model is None:
        matching = [r for r in live_runs if os.path.abspath(r.directory) == os.path.abspath(dir)]
        if len(matching) != 1:
            raise SetupError(f"load({dir!r}): no run checkpoints there; pass model= (and optimizer=) to say what to load into")
        run = matching[0]
    if run is not None:
        extras = extra_state.extras(extra) if extra is not None else run.extras
        module = run.model if model is None else unwrap_model(model)
        inventory = take(module, run.optimizers, traces)
        return Target(inventory, run.optimizers, extras, True, run, module), run.directory if dir is None else dir
    if dir is None:
        raise SetupError("say which directory to load from")
    module = None if model is None else unwrap_model(model)
    inventory = take(module, given, traces)
    return Target(inventory, given, extra_state.extras(extra), extra is not None, None, module), dir


def _choose(found: list, step: int | None, name: str | None, directory: str) -> list:
    """Newest first; only those of the step or name that was asked for."""
    if step is None and name is None:
        return found
    chosen = [
        c
        for c in found
        if (
            _is_about(c, step, name, directory)
            if isinstance(c, Corrupt)
            else step in (None, c.record.step) and name in (None, c.record.name)
        )
    ]
    if not chosen:
        there = ", ".join(str(c.record.name or c.record.step) for c in found if isinstance(c, Candidate)) or "none"
        raise NoCheckpoint(
            f"{directory}: no checkpoint {f'of step {step}' if name is None else f'named {name!r}'}; there is: {there}"
        )
    newest = max(chosen, key=_generation)
    for each in chosen:
        if isinstance(each, Corrupt) and each is not newest:
            log.warning("fxckpt: another checkpoint of step %s is damaged: %s", step, each)
    return [newest]


def _is_about(error: Corrupt, step: int | None, name: str | None, directory: str) -> bool:
    """Does a damaged record lie in the directory of the step or name that was asked for?"""
    at = os.path.relpath(os.path.dirname(error.path), os.path.abspath(directory))
    return at == os.path.join(names.NAMED, name) if name is not None else step is not None and names.step_of(at) == step


def _generation(found: Candidate | Corrupt) -> int:
    """To find the newest of one step. Of a damaged one its directory's name tells, where it was not the first of its step."""
    if isinstance(found, Candidate):
        return found.record.generation
    return names.generation_of(os.path.basename(os.path.dirname(found.path)))


def _restore(found: Candidate, target: Target, strict: bool, skipped: list) -> Restored:
    """Check, verify, then apply one checkpoint."""
    reader = Reader(found.path)
    record, path = reader.record, str(reader.path / names.COMMIT)
    check_encoded(record, path)
    mapped = _map(record, target)
    _check(mapped, record, target, strict)
    once = strict and target.run is not None and target.run.attempts == 0  # nothing trained is at stake yet
    if not once:
        reader.verify()
    raw = reader.state_tensors()
    optimizers = decode_state(record.optimizers, raw)
    early = decode_state(record.state["early"], raw)
    late = decode_state(record.state["late"], raw)
    check_decoded(optimizers, early, late, _optimizer_places(record), state_key, path)
    states = _make_states(record, optimizers, mapped, target)
    writable = {key: storable(t) for key, t in mapped.tensors.items()}
    _read_tensors(reader, writable, target.run if once else None)
    for module, attribute, made in mapped.filled:
        setattr(module, attribute, made)
    _apply_optimizers(optimizers, states, mapped, target)
    _apply_extras(early, late, target)
    if target.run is not None:
        _freeze(early.get("frozen"), record, mapped, target)
        _continue(target.run, record, mapped, reader)
    if skipped:
        log.warning("fxckpt: continuing from %s; newer ones did not verify", found.path)
    layers = tuple(layer.name for layer in record.layers)
    log.info("fxckpt: restored step %d from %s", record.step, found.path)
    return Restored(
        record.step,
        record.iteration,
        record.updates,
        found.path,
        layers,
        tuple(mapped.missing),
        tuple(mapped.unexpected),
        tuple(skipped),
    )


def _read_tensors(reader: Reader, live: Mapping[tuple[str, str], torch.Tensor], fresh: Run | None) -> None:
    """Read tensors into place. What lies on a device is read to the host first, one file at a time.

    ``fresh``: a run that has not stepped, for which this is the first and only reading. Should a chunk prove bad halfway, an
    older checkpoint overwrites all of the same tensors; if there is none, the run takes no step with the mixture.
    """
    if fresh is not None:
        fresh.partially_loaded = (
            "a checkpoint proved corrupt while it was being loaded, and no other one could be loaded after it"
        )
    for file in (MODEL, OPTIMIZER):
        mine = {key: t for key, t in live.items() if key[0] == file}
        landing = {key: t if t.device.type == "cpu" else torch.empty(t.shape, dtype=t.dtype) for key, t in mine.items()}
        with torch.no_grad():
            reader.read_into({key: source_items([t])[0] for key, t in landing.items()}, file)
            for key, tensor in mine.items():
                if landing[key] is not tensor:
                    tensor.copy_(landing[key])
    if fresh is not None:
        fresh.partially_loaded = None


# -- what goes where ------------------------------------------------------------------------------------------------


def _map(record: Record, target: Target) -> Mapped:
    """Match stored model tensors with live ones: by name, or for optimizers without a model by position."""
    out = Mapped()
    inventory = target.inventory
    live = {**inventory.trained, **inventory.frozen, **inventory.buffers}
    positions = _by_position(record, target) if target.model is None else {}
    stored = {t.key: t for layer in record.layers for t in layer.tensors if t.file == MODEL}
    modules = {} if target.model is None else dict(every_module(target.model))
    aliases = {**record.ties, **{v: k for k, v in record.ties.items()}}
    for key, tensor in stored.items():
        name = positions.get(key, key)
        if name not in live and aliases.get(name) in live:
            name = aliases[name]
        if name in live:
            _match(out, (MODEL, key), tensor, name, live.pop(name))
        elif target.model is None and target.run is not None:
            out.later.append(tensor)
        elif (empty := _empty_buffer(modules, name)) is not None and tensor.dtype in TORCH_DTYPES:
            device = next((t.device for t in target.model.parameters()), None)
            made = torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype], device=device)
            out.tensors[MODEL, key] = made
            out.filled.append((*empty, made))
        else:
            out.unexpected.append(key)
    shared = {alias for alias, name in inventory.ties.items() if name not in live}
    out.missing += [name for name in live if name not in shared]
    return out


def _empty_buffer(modules: Mapping[str, torch.nn.Module], name: str) -> tuple[torch.nn.Module, str] | None:
    """The module, and the attribute, of a buffer that was registered as None and has not been set by a forward yet."""
    owner, _, attribute = name.rpartition(".")
    module = modules.get(owner)
    empty = module is not None and attribute in module._buffers and module._buffers[attribute] is None
    return (module, attribute) if empty else None


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


def _match(out: Mapped, key: tuple[str, str], stored: TensorRecord, name: str, tensor: torch.Tensor) -> None:
    """Note the pair if shape and type agree, the difference if not."""
    real = storable(tensor)
    if tuple(real.shape) != tuple(stored.shape) or DTYPES[real.dtype] != stored.dtype:
        out.wrong.append(f"{name}: checkpoint {stored.dtype}{list(stored.shape)}, live {DTYPES[real.dtype]}{list(real.shape)}")
        return
    out.tensors[key] = tensor
    out.stored[name] = key[1]


def _places(record: Record) -> dict[str, tuple[int, int]]:
    """Optimizer and group of each stored name."""
    return {
        name: (i, g)
        for i, saved in enumerate(record.optimizers)
        for g, group in enumerate(saved["groups"])
        for name in group["params"]
    }


def _check(mapped: Mapped, record: Record, target: Target, strict: bool) -> None:
    """Raises LayoutMismatch, listing names and shapes side by side, unless what differs may be left out."""
    problems = [f"  {line}" for line in mapped.wrong]
    if strict:
        problems += [f"  {name}: not in the checkpoint" for name in mapped.missing]
        problems += [f"  {name}: only in the checkpoint" for name in mapped.unexpected]
    if target.optimizers:
        problems += _optimizer_problems(record, target, mapped, strict)
    saved = set(_extra_names(record))
    for each in target.extras:
        if each.name not in saved:
            mapped.missing.append(f"extra/{each.name}")
            problems += [f"  extra[{each.name!r}]: not in the checkpoint"] if strict else []
    unused = [f"extra/{name}" for name in sorted(saved - {e.name for e in target.extras})] if target.asked else []
    mapped.unexpected += unused
    if strict and target.run is not None:
        problems += [f"  {name}: only in the checkpoint" for name in unused]
    hard = problems if strict else [p for p in problems if p.strip() not in mapped.wrong]
    mapped.missing += [] if strict else [line.split(":")[0] for line in mapped.wrong]
    if hard:
        raise LayoutMismatch("the checkpoint of step {} does not fit:\n{}".format(record.step, "\n".join(hard)))


def _extra_names(record: Record) -> Iterable[str]:
    """Names of the extras in a record, without decoding their values."""
    return [*record.state["early"]["extra"], *record.state["late"]]


def _optimizer_problems(record: Record, target: Target, mapped: Mapped, strict: bool) -> list[str]:
    """Optimizers and groups must be the same, or the state cannot be given to anyone; and what is in them, unless only what
    fits is asked for and names say whose it is."""
    saved, live = record.optimizers, target.optimizers
    if len(saved) != len(live):
        return [f"  optimizers: checkpoint {len(saved)}, live {len(live)}"]
    out = []
    for i, (old, opt) in enumerate(zip(saved, live)):
        if old["class"] != plain_class(opt).__name__:
            out.append(f"  optimizer {i}: checkpoint {old['class']}, live {plain_class(opt).__name__}")
        sizes = [len(g["params"]) for g in old["groups"]], [len(g["params"]) for g in opt.param_groups]
        if sizes[0] != sizes[1] and (strict or target.model is None or len(sizes[0]) != len(sizes[1])):
            out.append(f"  optimizer {i}: parameters per group: checkpoint {sizes[0]}, live {sizes[1]}")
            if len(sizes[0]) > len(sizes[1]):
                out.append(
                    "  groups that the optimizer got in training must be there before the load: fxckpt.latest(dir) says "
                    "which step will be loaded, so that the script can call add_param_group first"
                )
    return out + (_moved(record, target, mapped) if strict else [])


def _moved(record: Record, target: Target, mapped: Mapped) -> list[str]:
    """Parameters that are in another optimizer or group than they were, whose settings are not theirs."""
    before, out = _places(record), []
    for i, opt in enumerate(target.optimizers):
        for g, group in enumerate(opt.param_groups):
            for name in map(target.inventory.name_of, group["params"]):
                was = before.get(mapped.stored.get(name, ""), (i, g))
                if was != (i, g):
                    out.append(f"  {name}: checkpoint optimizer {was[0]}, group {was[1]}; live optimizer {i}, group {g}")
    return out


# -- applying -------------------------------------------------------------------------------------------------------


def _optimizer_places(record: Record) -> dict[str, TensorRecord]:
    """The tensors of optimizer state, by their keys in the file."""
    return {t.key: t for layer in record.layers for t in layer.tensors if t.file == OPTIMIZER}


def _make_states(record: Record, saved: Sequence[dict], mapped: Mapped, target: Target) -> list[dict[int, dict[str, Any]]]:
    """Make every optimizer's state as the record describes it, empty, and add its tensors to what is read.

    A live tensor of the same shape, type and strides is kept, so that no second copy exists during a rollback.
    """
    places = _optimizer_places(record)
    out = []
    for index, (old, opt) in enumerate(zip(saved, target.optimizers)):
        states: dict[int, dict[str, Any]] = {}
        for live in opt.param_groups:
            for param in live["params"]:
                stored = mapped.stored.get(target.inventory.name_of(param))
                if stored not in old["state"]:
                    continue
                description, made = old["state"][stored], {}
                for key in description["keys"]:
                    place = places.get(state_key(index, key, stored))
                    if place is None:
                        made[key] = description["plain"][key]
                        continue
                    device = _device_of_state(key, place, description, param, live)
                    made[key] = _state_tensor(
                        place,
                        description["strides"].get(key),
                        opt.state.get(param, {}).get(key),
                        key in description["complex"],
                        device,
                    )
                    mapped.tensors[OPTIMIZER, place.key] = made[key]
                states[id(param)] = made
        out.append(states)
    return out


def _device_of_state(
    key: str, place: TensorRecord, description: Mapping[str, Any], param: torch.Tensor, group: Mapping[str, Any]
) -> torch.device:
    """Where a state belongs: with its parameter, unless it was kept on the host. Step counts follow torch's own rule
    (``Optimizer._process_value_according_to_param_policy``): on the device for fused and capturable optimizers only."""
    if key == "step" and not place.shape:
        beside = bool(group.get("fused") or group.get("capturable"))
    else:
        beside = key not in description.get("host", ())
    return param.device if beside else torch.device("cpu")


def _state_tensor(place: TensorRecord, strides, live: Any, is_complex: bool, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor as the record describes it, or the live one if it is just so."""
    shape, dtype = tuple(place.shape), TORCH_DTYPES[place.dtype]
    if is_complex:
        shape, dtype = shape[:-1], torch.complex64 if dtype == torch.float32 else torch.complex128
    like = torch.empty(shape, dtype=dtype, device="meta")
    strides = tuple(strides) if strides is not None and _is_dense(shape, strides) else like.stride()
    if isinstance(live, torch.Tensor) and (tuple(live.shape), live.dtype, live.stride(), live.device) == (
        shape,
        dtype,
        strides,
        device,
    ):
        return live
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether these strides take no more memory than the elements: states of torch's optimizers have no others."""
    if len(shape) != len(strides):
        return False
    return sum((size - 1) * stride for size, stride in zip(shape, strides)) < max(math.prod(shape), 1)


def _apply_optimizers(saved: Sequence[dict], states: Sequence[dict], mapped: Mapped, target: Target) -> None:
    """Give every optimizer its groups' settings, its state, its gradients' presence, and those that waited for a step."""
    for old, made, opt in zip(saved, states, target.optimizers):
        present, waiting = set(old["gradients"]), old.get("accumulated", {})
        opt.state.clear()
        for group, live in zip(old["groups"], opt.param_groups):
            for key, value in group["settings"].items():
                old_value = live.get(key)
                if isinstance(value, torch.Tensor) and isinstance(old_value, torch.Tensor) and value.shape == old_value.shape:
                    live[key].copy_(value)
                else:
                    live[key] = value
            for param in live["params"]:
                if id(param) in made:
                    opt.state[param] = made[id(param)]
                stored = mapped.stored.get(target.inventory.name_of(param))
                if (held := waiting.get(stored)) is not None and held.shape == param.shape:
                    param.grad = held.to(param.device) if held.is_sparse else torch.empty_like(param).copy_(held)
                else:  # to an optimizer a gradient of zeros is not the same as none
                    param.grad = torch.zeros_like(param) if stored in present else None


def _apply_extras(early: dict, late: dict, target: Target) -> None:
    """Set extras, module extra state and transient buffers, and the random generators last."""
    values = {**early["extra"], **late}
    for each in target.extras:
        if each.name in values:
            each.set(values[each.name])
    if target.model is not None:
        for name, module in extra_state_modules(target.model):
            if name in early["modules"]:
                module.set_extra_state(early["modules"][name])
        _apply_transient({**early["buffers"], **early.get("remote", {})}, target)
    if target.optimizers:
        extra_state.set_random_state(early["random"])


def _apply_transient(saved: Mapping[str, torch.Tensor], target: Target) -> None:
    """Set the buffers that are in no state dict. One that is not set yet, or has another shape by now (a cache that grew), is
    replaced; so is one whose elements share memory (it was expanded)."""
    modules = dict(every_module(target.model))
    for name, value in saved.items():
        buffer = target.inventory.transient.get(name)
        if buffer is None:
            if (empty := _empty_buffer(modules, name)) is not None:
                setattr(*empty, value)
            continue
        shared = any(stride == 0 and size > 1 for size, stride in zip(buffer.shape, buffer.stride()))
        if shared or (value.shape, value.dtype) != (buffer.shape, buffer.dtype):
            owner, _, attribute = name.rpartition(".")
            setattr(modules[owner], attribute, value.to(buffer.device))
            continue
        with torch.inference_mode(buffer.is_inference()), torch.no_grad():  # inference tensors change in that mode only
            buffer.copy_(value)


def _freeze(frozen: Sequence[str] | None, record: Record, mapped: Mapped, target: Target) -> None:
    """Let parameters require a gradient as they did when the checkpoint was taken: a script that unfreezes layers ``if step ==
    1000`` does not come there again. What changes is said. ``frozen`` is None in records of earlier versions."""
    if frozen is None:
        return
    changed: dict[bool, list[str]] = {True: [], False: []}
    for name, param in {**target.inventory.trained, **target.inventory.frozen}.items():
        stored = mapped.stored.get(name)
        wanted = stored not in frozen
        if stored is not None and param.requires_grad != wanted:
            param.requires_grad_(wanted)
            changed[wanted].append(name)
    for wanted, found in changed.items():
        if found:
            log.warning(
                "fxckpt: %s %s, as at step %d: %s%s",
                "these parameters are trained" if wanted else "these parameters are frozen",
                "again",
                record.step,
                ", ".join(found[:5]),
                " ..." if found[5:] else "",
            )


def _continue(run: Run, record: Record, mapped: Mapped, reader: Reader) -> None:
    """The run goes on from this checkpoint: its clock, its lineage, and what the compiler has yet to claim."""
    run.attempts, run.updates, run.iteration = record.step, record.updates, record.iteration
    run.schedule.started(record.step, run.stall_seconds())
    run.settled()
    run.saver.last_handed_over = run.saver.last_committed = record.step  # durable: it was just read
    for stepper in run.steppers:
        stepper.invalidate()
    if _is_own(run, os.path.dirname(reader.path) if record.name is None else os.path.dirname(reader.path.parent)):
        run.store.mark_loaded(record.generation)
    run.unclaimed = _hold(mapped.later, reader)
    if run.unclaimed:
        run.wait_for_owners()


def _is_own(run: Run, directory: str | os.PathLike) -> bool:
    """Whether this is the store that the run writes to. What is loaded from another one begins a lineage here, and does not
    stand in for what lies here and was not loaded."""
    return run.store is not None and os.path.realpath(directory) == os.path.realpath(run.directory)


def _hold(later: Sequence[TensorRecord], reader: Reader) -> dict[str, torch.Tensor]:
    """Read tensors whose owners are not known yet; they are few without a model: buffers and frozen parameters."""
    held = {t.key: torch.empty(t.shape, dtype=TORCH_DTYPES[t.dtype]) for t in later}
    if held:
        reader.read_into({(MODEL, key): source_items([t])[0] for key, t in held.items()}, MODEL)
    return held
