"""What goes into a checkpoint beside the layers of a step, and when it is taken.

at a boundary                   everything
in a loop without boundaries
    at the end of opt.step()    buffers, random generators, data loaders and other extras that change before a backward
    when the step closes        schedulers, scalers and all other extras, param_groups, which gradients exist
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from fxckpt.compat.dynamo import limits_reached
from fxckpt.compat.module_state import mixed_modes, state_of
from fxckpt.compat.modules import tensors_of
from fxckpt.compat.optimizers import plain_class
from fxckpt.compat.ranks import rank, world_size
from fxckpt.compat.spread import arrived, lies_as, local
from fxckpt.compat.unreduced import held_back, holding
from fxckpt.errors import SetupError
from fxckpt.graph.model.book import traces
from fxckpt.optim.contract.contract import Contract
from fxckpt.run import extra_state
from fxckpt.run.arrangement import Arrangement
from fxckpt.run.clock import StepClock
from fxckpt.run.emitting import snapshot
from fxckpt.run.module_values import ModuleValues, Values, named
from fxckpt.run.plain_loop import Marks, PlainLoop, mark, mark_buffer
from fxckpt.run.strays import Strays
from fxckpt.saving.guard import fingerprint, glimpse
from fxckpt.saving.in_flight import InFlight
from fxckpt.store.typed_json import encode_state

log: logging.Logger = logging.getLogger("fxckpt")

_LIMIT_REACHED = (
    "fxckpt: Dynamo has reached its recompile limit: a function (its own warning names it) runs eagerly from now on. A "
    "resumed run counts anew: it may compile where this one ran eagerly, with other bits. Mark what changes as dynamic "
    "(torch._dynamo.mark_dynamic, or a tensor in place of an int), or raise torch._dynamo.config.recompile_limit"
)


class LoopState(Protocol):
    """What is asked of the loops."""

    def state_dict(self) -> dict[str, Any]:
        """Where they stand."""

    def loaders(self) -> list[Any]:
        """What they go over."""

    def unknown_loaders_matter(self) -> bool:
        """May the batches come from elsewhere?"""


class Capture:
    """Takes a run's state beside parameters and optimizer state: ``early`` at the end of a step, ``late`` when it closes."""

    def __init__(self, extras: Sequence[extra_state.Extra], arrangement: Arrangement, clock: StepClock):
        self.extras: Sequence[extra_state.Extra] = extras
        self._arrangement, self._emitter, self._clock = arrangement, arrangement.emitter, clock
        self.loops: LoopState | None = None  # where the script's loops stand; it comes later
        self._strays = Strays(arrangement, extras)
        self.values: ModuleValues = ModuleValues()
        self.plain: PlainLoop = PlainLoop(self._look_everywhere)
        self._snapshots: dict[str, torch.Tensor] = {}  # of buffers at the end of a step
        self._early: tuple[Any, dict[str, Any]] = (None, {})
        # Of each optimizer, the parameters that had gradients when a step closed, and the gradients that wait for its next step.
        self._present: list[dict[str, torch.Tensor | None]] = [{} for _ in arrangement.steppers]
        self._given = [encode_state(stepper.given, {}, "given") for stepper in arrangement.steppers]
        self._described: dict[int, tuple[int, Any]] = {}  # optimizer -> (binding, its states' description, encoded)
        optimizers = [] if arrangement.emitter.engine is None else [stepper.opt for stepper in arrangement.steppers]
        self.contracts: list[Contract] = [Contract(opt, tensors_of(arrangement.model)) for opt in optimizers]
        self._notes: dict[str, float] = {}  # metrics for the next record
        self.noting: threading.RLock = threading.RLock()
        self._limits: int | None = limits_reached()  # None: it was said that one was reached since
        self._said_modes = self._saw_beside = False
        self._holding: tuple[tuple[int, int], ...] = ()  # what FSDP2 held back at the end of the step

    def start(self) -> None:
        """The process is where a resumed one begins to train, but that nothing was loaded yet: extras are not asked."""
        self._arrangement.look_for_names()
        self.values.begin(self._arrangement.model)
        self.plain.start({**self._look_at_tensors(True), **self.values.marks()})

    def restart(self) -> None:
        """A load has ended, with a checkpoint or without one."""
        self._arrangement.look_for_names()
        before = extra_state.random_state()  # a state_dict() may draw
        marks = self._look_everywhere(True)
        extra_state.set_random_state(before)
        self.plain.start(marks)

    def look(self) -> Marks:
        """Marks of what the head of an epoch may change and nobody puts back where it is done again, in a run that takes
        checkpoints."""
        if self._emitter.engine is None:
            return {}
        kept = [each for each in self.extras if not each.early and not each.done_again()]
        return self._look_at_tensors(False) | {("extra", each.name): mark(each.get()) for each in kept}

    def moving(self) -> set[str]:
        """At the first boundary: the frozen parameters that the iteration changed (an average of the weights)."""
        return self.plain.changed_since_start("parameter") & self._arrangement.inventory.frozen.keys()

    def _look_everywhere(self, parameters: bool) -> Marks:
        """As ``_look``, and of numbers among the attributes of modules."""
        return self._look(parameters) | self.values.marks()

    def let_go(self) -> None:
        """Nothing is captured any more: the extras are the script's alone."""
        self.extras = ()
        self._strays.let_go()

    def _look(self, parameters: bool) -> Marks:
        """Marks of all that may change outside ``opt.step()`` and can be seen to."""
        found = self._look_at_tensors(parameters)
        return found | {("extra", each.name): mark(each.get()) for each in self.extras if not each.early}

    def _look_at_tensors(self, parameters: bool) -> Marks:
        """Those of buffers, and of parameters if asked for."""
        inventory = self._arrangement.inventory
        inventory.renew()
        found: Marks = {("buffer", n): mark_buffer(t) for n, t in [*inventory.buffers.items(), *inventory.transient.items()]}
        if parameters:
            both = [*inventory.trained.items(), *inventory.frozen.items()]
            found |= {("parameter", name): (mark(p), glimpse(p)) for name, p in both}
        return found

    def _is_early(self, extra: extra_state.Extra) -> bool:
        """Is it taken at the end of a step, where that is no boundary?"""
        return extra.early or self.plain.is_early("extra", extra.name)

    # -- at the end of a step ----------------------------------------------------------------------------------------

    def early(self, pending: InFlight) -> None:
        """Emit frozen parameters, and take what is early: a snapshot of buffers that change in the next forward, where nothing
        can wait, and the state that a record holds."""
        layout, inventory, model = pending.layout, self._arrangement.inventory, self._arrangement.model
        for number in layout.number("frozen"):
            self._emitter.hand_over(pending, number, [e.tensor for e in layout.layers[number].entries])
        pending.guard.note_versions()
        keys = [e.key for number in layout.number("buffers") for e in layout.layers[number].entries]
        live = {**inventory.buffers, **inventory.frozen}
        kind = {key: "buffer" if key in inventory.buffers else "parameter" for key in keys}
        self._snapshots = {key: snapshot(live[key], key) for key in keys if self.plain.is_early(kind[key], key)}
        self._warn_of_what_is_lost()
        tensors: dict[str, Any] = {}
        numbers, generators = self.values.take()
        early = {
            "random": extra_state.random_state(),
            "extra": {e.name: e.get() for e in self.extras if self._is_early(e)},
            "buffers": self._transient(early=True),
            **({"modules": {}} if model is None else state_of(model)),
            "numbers": self._numbers(numbers, early=True),
            "generators": generators,
            **self._held_back(),
        }
        encoded = encode_state(early, tensors, "early")
        encoded["remote"] = self._encode_remote(pending, tensors)
        self._early, pending.captured = (encoded, tensors), True
        if layout.beside and not self._saw_beside:
            self._saw_beside = True
            pending.beside = {name: fingerprint(tensor) for name, tensor in layout.beside.items()}

    def _held_back(self) -> dict[str, Any]:
        """Gradients that FSDP2 has not reduced yet, this rank's own: at the end of a step those that the step did not see."""
        model = self._arrangement.model
        self._holding = holding(model)
        known = self._arrangement.inventory.name_by_id  # of what an optimizer trains
        held = [] if model is None else [(known[id(p)], grad, lay) for p, grad, lay in held_back(model) if id(p) in known]
        if not held:
            return {}
        return {"held_back": {name: grad for name, grad, _ in held}, "held_back_as": {name: lay for name, _, lay in held}}

    def has_gone_on(self) -> bool:
        """Has a backward been made since the end of the step, of which FSDP2 holds the gradients back? No hook hears of those."""
        return holding(self._arrangement.model) != self._holding

    def _transient(self, early: bool) -> dict[str, torch.Tensor]:
        """The non-persistent buffers in host memory that are taken at the end of a step, or those that are not."""
        found = self._arrangement.inventory.transient
        return {n: t for n, t in found.items() if self.plain.is_early("buffer", n) == early and not self._is_remote(t)}

    def _numbers(self, found: Values, early: bool) -> Values:
        """The numbers among the attributes of modules that are taken at the end of a step, or those that are not."""
        is_early = self.plain.is_early
        return {m: {k: v for k, v in each.items() if is_early("number", named(m, k)) == early} for m, each in found.items()}

    def _warn_of_what_is_lost(self) -> None:
        """Say once what a resumed run will not have as this one had it."""
        if self._limits is not None and limits_reached() > self._limits:
            self._limits = None
            log.warning(_LIMIT_REACHED)
        if self._arrangement.model is None and not self._said_modes and (mixed := mixed_modes(traces.models.alive())):
            self._said_modes = True
            some = ", ".join(mixed[:5]) + (" ..." if mixed[5:] else "")
            log.warning(
                "fxckpt: without model= no checkpoint says that these modules are in another mode than their model: %s", some
            )

    def _encode_remote(self, pending: InFlight, tensors: dict[str, Any]) -> Any:
        """Non-persistent buffers on devices: room for them now, their values when the device has copied them."""
        found = {}
        for name, buffer in self._arrangement.inventory.transient.items():
            if not self._is_remote(buffer):
                continue
            before = set(tensors)
            found[name] = encode_state(torch.empty(buffer.shape, dtype=buffer.dtype), tensors, f"early/remote/{name}")
            for key in set(tensors) - before:
                tensors[key] = self._emitter.later(buffer)
        return found

    def _is_remote(self, buffer: torch.Tensor) -> bool:
        """Is it copied by its device, later? A sparse one is copied at once: how long it is, only the device knows."""
        return buffer.layout is torch.strided and self._emitter.is_remote(buffer)

    # -- when it closes ----------------------------------------------------------------------------------------------

    def look_at_gradients(self) -> None:
        """Note which gradients exist, and keep those that wait for a later step of their optimizer. Only in the thread that
        trains, or in autograd's own: elsewhere a backward may be setting one at this moment."""
        present = []
        for stepper in self._arrangement.steppers:
            waits, grads = stepper.accumulated, [(m.name, m.param.grad) for m in stepper.bindings.members]
            # A sparse one that was used is as good as none.
            present.append({n: g if waits else None for n, g in grads if g is not None and (waits or not local(g).is_sparse)})
        self._present = present

    def replaced(self, pending: InFlight, at_rest: bool) -> str | None:
        """The name of a buffer that has no place in this checkpoint as it is now: it is gone, or has another type or shape. And,
        where another checkpoint can be taken (``at_rest``), of a frozen parameter that another one has replaced."""
        layout, inventory = pending.layout, self._arrangement.inventory
        inventory.renew()
        live, taken = {**inventory.buffers, **inventory.frozen}, self._snapshots if pending.captured else {}
        buffers = [e for number in layout.number("buffers") for e in layout.layers[number].entries if e.key not in taken]
        full = layout.full or layout  # a record of the journal has none, and takes it that they are as they were
        frozen = [e for number in full.number("frozen") for e in full.layers[number].entries] if at_rest else []
        for entry in (*buffers, *frozen):
            now = live.get(entry.key)
            if now is None or _kind(now) != _kind(entry.tensor):
                return entry.key
        moved = (e.key for e in frozen if local(live[e.key]).data_ptr() != local(e.tensor).data_ptr())
        return next(moved, None)

    def hand_over_rest(self, pending: InFlight) -> None:
        """Emit what is copied only now: layers that change behind their step, and buffers, those that were early as they were."""
        layout, inventory = pending.layout, self._arrangement.inventory
        for number, waited in pending.guard.deferred:
            self._emitter.hand_over(pending, number, waited, copied=True)
        live, snapshots = {**inventory.buffers, **inventory.frozen}, self._snapshots
        for number in layout.number("buffers"):
            layer = layout.layers[number]
            keys = [e.key for e in layer.mine(layer.entries)]
            copies = [snapshots[key] if key in snapshots else snapshot(live[key], key) for key in keys]
            self._emitter.hand_over_copies(pending, number, copies)
        self._snapshots = {}

    def late(self, pending: InFlight) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields of the checkpoint's record, and the tensors of its extra state."""
        early, tensors = self._early
        if pending.link is not None:
            tensors |= pending.link.tensors
        inventory = self._arrangement.inventory
        early["buffers"] |= encode_state(self._transient(early=False), tensors, "early/buffers")
        for module, values in self._numbers(self.values.numbers(), early=False).items():
            early["numbers"].setdefault(module, {}).update(encode_state(values, tensors, "early/numbers"))
        early["loops"] = encode_state({} if self.loops is None else self.loops.state_dict(), tensors, "loops")
        early["frozen"] = [n for n, p in {**inventory.trained, **inventory.frozen}.items() if not p.requires_grad]
        if self._arrangement.summed is not None:
            early["summed"] = self._arrangement.summed
        loops = self.loops
        self._strays.look(loops.loaders() if loops is not None and loops.unknown_loaders_matter() else None)
        late = {e.name: e.get() for e in self.extras if not self._is_early(e)}
        optimizers = [self._optimizer_record(i, tensors) for i in range(len(self._arrangement.steppers))]
        fields = {
            "step": pending.step,
            "iteration": self._clock.iteration_of(pending.step),
            "updates": self._clock.applied.promise(),
            "time": time.time(),
            "world_size": world_size(),
            "rank": rank(),
            "layers": pending.layout.records(pending.step),
            "ties": dict(inventory.ties),
            "optimizers": optimizers,
            "state": {"early": early, "late": encode_state(late, tensors, "late"), **self._emitter.saver.about.to_state()},
        }
        with self.noting:
            fields["metrics"], self._notes = self._notes, {}
        self._present = [dict.fromkeys(each) for each in self._present]
        return fields, tensors

    def _optimizer_record(self, index: int, tensors: dict[str, Any]) -> dict[str, Any]:
        """What of an optimizer is not in a file of tensors, encoded: its groups, plain state values, which gradients exist, and
        those that wait for a later step of it: it steps at every fourth iteration, and another optimizer leads."""
        stepper = self._arrangement.steppers[index]
        members = iter(stepper.bindings.members)
        groups = []
        for group in stepper.opt.param_groups:
            settings = {k: v for k, v in group.items() if k not in ("params", "param_names")}
            groups.append({"params": [next(members).name for _ in group["params"]], "settings": settings})
        if stepper.bindings.number != self._described.get(index, (None,))[0] or any(m.plain for m in stepper.bindings.members):
            states = {m.name: m.describe() for m in stepper.bindings.members if m.state}
            self._described[index] = (stepper.bindings.number, encode_state(states, tensors, f"optimizers/{index}/state"))
        record = {
            "class": plain_class(stepper.opt).__name__,
            "groups": encode_state(groups, tensors, f"optimizers/{index}/groups"),
            "state": self._described[index][1],  # for hundreds of tensors this is worth making once
            "gradients": list(self._present[index]),
            "given": self._given[index],
        }
        if (own := self.contracts[index].capture()) is not None:
            record["own"] = encode_state(own, tensors, f"optimizers/{index}/own")
        if waiting := {name: grad for name, grad in self._present[index].items() if grad is not None}:
            parts = {name: arrived(grad) for name, grad in waiting.items()}
            record["accumulated"] = encode_state(parts, tensors, f"optimizers/{index}/gradients")
            if spread := {name: here for name, grad in waiting.items() if (here := lies_as(grad)) is not None}:
                record["accumulated_as"] = spread
        return record

    def note(self, metrics: Mapping[str, Any]) -> None:
        """Metrics for the record of the checkpoint that closes next. Raises SetupError for what is not one number."""
        noted = {name: _as_float(name, value) for name, value in metrics.items()}
        with self.noting:
            self._notes = {**self._notes, **noted}


def _kind(tensor: torch.Tensor) -> object:
    """What a checkpoint's layout takes for given of a buffer."""
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout


def _as_float(name: str, value: Any) -> float:
    """A metric's value. Raises SetupError for what is not one number."""
    try:
        if isinstance(value, str):
            raise TypeError("a string")
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise SetupError(f"note({name}=...) takes a number or a tensor with one element, not {value!r:.100}") from error
