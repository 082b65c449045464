"""One run: its optimizers, one store, and the clock of steps between them.

A step is complete ("closes") later than ``opt.step()`` returns, because a scheduler, a scaler or an EMA changes after
it: when the first gradient of the next backward arrives, at the next ``opt.step()``, or at ``flush``, ``save``,
``shutdown``, ``end_step`` and the next turn of ``fxckpt.steps``. What is captured when:

    during opt.step()   parameters and optimizer state, layer by layer (the ops of the StepGraph)
    at its end          buffers, random generators, data loaders: the next batch may be drawn before the next forward
    when it closes      schedulers, scalers and all other extras, param_groups, which gradients exist

With several optimizers the last one of the list leads: a checkpoint is taken at its step, of all of them.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from fxckpt.compat import cuda
from fxckpt.compat.dynamo import untraced
from fxckpt.compat.modules import extra_state_modules, unwrap_model
from fxckpt.compat.optimizers import count_skipped_attempts, plain_class, stock_step
from fxckpt.compat.ranks import rank, world_size
from fxckpt.compat.tensors import gradient_accumulator, set_grad_mode
from fxckpt.config import Config
from fxckpt.errors import Cancelled, FxckptError, SaveFailed, SetupError, StoreError
from fxckpt.graph import ops
from fxckpt.graph.model.arrivals import FirstBackward
from fxckpt.graph.model.book import traces
from fxckpt.graph.model.layers import gradient_order, group_layers, layer_edges
from fxckpt.optim import rehearsal
from fxckpt.optim.stepper import Stepper
from fxckpt.run import extra_state
from fxckpt.run.schedule import Schedule
from fxckpt.saving import plan, tracing
from fxckpt.saving.inventory import Inventory, shared_memory, storable, take
from fxckpt.saving.saver import SLICE, InFlight, Saver
from fxckpt.store.record import encode_state

log = logging.getLogger("fxckpt")

live_runs: weakref.WeakSet[Run] = weakref.WeakSet()
"""The runs that ``compile_step`` made and that are still alive: a run lives as long as its optimizers do."""


class Run:
    """What one ``compile_step`` call registers. The user's handle on it is ``opt.ckpt``."""

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        directory: str,
        model: torch.nn.Module | None,
        extra: Mapping[str, Any] | None,
        config: Config,
        engine,
        store,
        devices: cuda.Devices | None = None,
    ):
        self.optimizers, self.directory, self.config = list(optimizers), directory, config
        self.model = None if model is None else unwrap_model(model)
        self.extras = extra_state.extras(extra)
        self.engine, self.store = engine, store
        self.saver = Saver(engine, store, max_async=config.max_async)
        self.schedule = Schedule(config.every)
        self.steppers = [Stepper(opt, config.update, self._name_of) for opt in self.optimizers]
        self._stepper_of = {id(stepper.opt): stepper for stepper in self.steppers}
        self.number = ops.register_port(self)
        self.devices = devices or cuda.Devices()
        self.ordinals = self.devices.all_of(p for opt in optimizers for g in opt.param_groups for p in g["params"])
        self.attempts = self.iteration = 0
        self.applied = cuda.Applied()
        self.inventory = Inventory()
        self.unclaimed: dict[str, Any] = {}  # restored tensors whose owners the compiler has not shown yet
        self.loops = False  # fxckpt.steps was used: it counts iterations
        self.partially_loaded: str | None = None  # why the live tensors are a mixture that must not be trained
        self.in_iteration = False  # inside a turn of fxckpt.steps: only its end closes a step
        self.ending: Any = None  # a signals.Finisher whose signal came: the next checkpoint that is complete is the last
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._current: InFlight | None = None  # being emitted, inside opt.step()
        self._open: InFlight | None = None  # emitted, its step not closed yet
        self._notes: dict[str, float] = {}  # metrics for the next record
        self._early: tuple[Any, dict[str, Any]] = (None, {})
        self._layout: plan.Layout | None = None
        self._layout_key: Any = None
        self._changed_outside: set[str] = set()
        self._arranged: Any = None
        self.stopped = self._store_checked = self._said_order = False
        self._stepping = threading.RLock()  # a step, or what another thread may do only between two
        # Of each optimizer, the parameters that had gradients when a step closed, and the gradients that wait for its next step.
        self._present: list[dict[str, torch.Tensor | None]] = [{} for _ in self.optimizers]
        self._capturable = False  # all that a checkpoint takes could be captured at least once
        self._unsaid = True  # tensors were bound since a step was described
        self._announced: list[Any] = []  # the bindings that were described last
        self._said: set[tuple[int, str]] = set()
        self._callback_error: Exception | None = None  # what on_layer raised in this step
        self._hooked: dict[int, Any] = {}
        self._described: dict[int, tuple[int, Any]] = {}  # optimizer -> (binding, its states' description, encoded)
        self._watch_scalers(extra)
        self.tracing: tracing.Tracing | None = None
        tracing.from_environment(self)
        self._first_backward = None if engine is None else FirstBackward(self.optimizers)
        live_runs.add(self)
        weakref.finalize(self, Saver.abandon, self.saver).atexit = False  # at exit, shutdown has run already

    def trained(self) -> set[int]:
        """The ids of the parameters of its optimizers."""
        return {id(p) for opt in self.optimizers for group in opt.param_groups for p in group["params"]}

    # -- names, layers, graphs --------------------------------------------------------------------------------------

    def _name_of(self, param: torch.Tensor) -> str:
        return self.inventory.name_of(param)

    def refresh(self, copies: bool = True) -> None:
        """Bind whatever was replaced since the last step, and write the StepGraphs if names, order or state changed.

        ``copies``: also where only a copy would notice (``Stepper.stale``).
        """
        if self._first_backward is not None:
            self._learn_arrivals()
        stale = [s for s in self.steppers if s.stale(copies)]
        key = self._arrangement()
        if not stale and key == self._arranged:
            return
        if self.engine is not None:
            self.fence_all()  # copies under way still read the old tensors
        self.inventory = take(self.model, self.optimizers, traces)
        sharing = shared_memory({**self.inventory.trained, **self.inventory.frozen})
        for stepper in self.steppers if key != self._arranged else stale:
            stepper.bind(sharing)
        self._unsaid = True
        self._arrange()
        self._hook_gradients()
        self._arranged = self._arrangement()

    def _look_for_names(self) -> None:
        """Before a checkpoint: bind anew if a parameter moved in its model (``torch.nn.utils.prune`` renames it)."""
        if self.model is None:
            return
        self.inventory = take(self.model, self.optimizers, traces)
        if any(self.inventory.trained.get(m.name) is not m.param for stepper in self.steppers for m in stepper.members):
            for stepper in self.steppers:
                stepper.invalidate()

    def _learn_arrivals(self) -> None:
        """Tell the book in which order gradients arrived, once they have."""
        seen = self._first_backward.order()
        if seen:
            self._first_backward.stop()
            self._first_backward = None
            traces.arrived(seen, self.model)

    def _arrangement(self) -> Any:
        """Changes when names or the order may have become known; the order is kept once a checkpoint was taken."""
        return (self.saver.started > 0 and not self.inventory.positional) or traces.version

    def _arrange(self) -> None:
        """Number the layers of all optimizers in the engine's order (see plan.engine_layers) and write their graphs."""
        number = 0
        for stepper in self.steppers:
            named = [(m.name, m.param) for m in stepper.members]
            order = gradient_order(named, traces)
            layers = group_layers(order, self.config.layer)
            number += any(m.counts() for m in stepper.members)
            stepper.arrange(layers, layer_edges(layers, traces, named), number, order)
            number += len(layers)
        self._layout = self._layout_key = None  # it keeps the tensors of the old bindings alive

    def _hook_gradients(self) -> None:
        """Have autograd tell when a gradient of the next backward arrives; see gradient_accumulator."""
        this = weakref.ref(self)

        def hook(index: int) -> Callable:
            @untraced
            def arrived(*_: Any) -> None:
                run = this()
                if run is None:
                    return
                run.saver.progress_ticks += 1
                if run._open is not None and not run.in_iteration:
                    run.close_step(in_backward=True)
                run.steppers[index].accumulated = True

            return arrived

        for index, stepper in enumerate(self.steppers):
            arrived = hook(index)
            for param in (m.param for m in stepper.members):
                if not param.requires_grad:
                    continue
                node = gradient_accumulator(param)  # another one after param.data changed its type
                if self._hooked.get(id(param)) is not node:
                    node.register_prehook(arrived)
                    self._hooked[id(param)] = node  # the hook lives as long as the node does

    def _watch_scalers(self, extra: Mapping[str, Any] | None) -> None:
        """A GradScaler that finds an inf does not call ``step``; count the attempt where the scaler decides."""
        this = weakref.ref(self)

        def skipped() -> None:
            run = this()
            if run is not None:
                run._attempt_skipped()

        for value in (extra or {}).values():
            if isinstance(value, torch.amp.GradScaler):
                count_skipped_attempts(value, self.optimizers[-1], skipped)

    def wait_for_owners(self) -> None:
        """Without a model, give restored buffers and frozen parameters to their owners when the compiler shows them:
        inside the first backend call, before the forward runs."""
        traces.listeners.append(weakref.WeakMethod(self._claim))
        self._claim()

    def _claim(self, trace: Any = None) -> None:
        """Copy what now has an owner of that name, shape and type."""
        if not self.unclaimed:
            return
        seen = take(None, self.optimizers, traces)
        with torch.no_grad():
            for name, tensor in {**seen.buffers, **seen.frozen}.items():
                held, live = self.unclaimed.get(name), storable(tensor)
                if held is not None and (held.shape, held.dtype) == (live.shape, live.dtype):
                    live.copy_(self.unclaimed.pop(name))

    # -- stepping ---------------------------------------------------------------------------------------------------

    @property
    def updates(self) -> int:
        """Attempts that were applied; waits for the device where it may have skipped one."""
        return self.applied.now()

    @updates.setter
    def updates(self, count: int) -> None:
        self.applied.set(count)

    @property
    def active(self) -> bool:
        """Checkpoints are taken: the run was not shut down, and this is not a forked child."""
        return self.engine is not None and not self.stopped and os.getpid() == self._pid

    def step(self, opt: torch.optim.Optimizer, closure: Callable | None = None) -> Any:
        """What ``opt.step()`` runs, between its hooks."""
        if os.getpid() != self._pid or self.engine is None:
            return stock_step(opt)(opt) if closure is None else stock_step(opt)(opt, closure)
        if self.ordinals and self.devices.capturing():
            raise SetupError(
                "opt.step() was called while a CUDA graph is captured: a replay runs no Python, so fxckpt would "
                "neither guard the copies of a checkpoint nor take one. Capture forward and backward, and call "
                "opt.step() outside."
            )
        if torch.is_inference_mode_enabled():  # state made in it could be changed nowhere else, and has no version counter
            with torch.inference_mode(False):
                return self.step(opt, closure)
        with self._stepping:
            self.saver.trainer = threading.current_thread()
            self.saver.progress_ticks += 1
            return self._step(opt, closure)

    def _step(self, opt: torch.optim.Optimizer, closure: Callable | None) -> Any:
        """One attempt, with the clock of steps around it. What it does when nothing is to be done costs each step: little, and
        as few calls as can be, for after a backward pass all of this code is cold."""
        if self.partially_loaded is not None:
            self._refuse_mixture()
        if not (self._store_checked or self.stopped):
            self._check_store()
        stepper = self._stepper_of[id(opt)]
        leads = stepper is self.steppers[-1]
        if leads or not self.in_iteration:
            self._before_step()
        stepper.stepped = True
        if len(self.steppers) > 1:
            self._check_turns(stepper, leads)
        if self._found_inf(opt):
            if leads:
                self.attempts += 1
            return None
        started, tracer = time.monotonic_ns(), self.saver.tracer
        try:
            loss = self._advance(stepper, closure, leads)
        except BaseException as error:
            self._abort(f"opt.step() raised {type(error).__name__}")
            self._watch_again()
            stepper.abandon()
            raise
        if tracer is not None:
            tracer.add(f"opt.step() {self.attempts}", tracing.STEPS, started, step=self.attempts)
        return loss

    def _check_turns(self, stepper: Stepper, leads: bool) -> None:
        """With several optimizers: does the one that leads step after the others? Say so if not."""
        if not leads and self._open is not None and self.in_iteration:
            self._open.give_up(f"{type(stepper.opt).__name__} stepped after it in the same turn")
            self._open = None
        elif not leads or all(other.stepped for other in self.steppers):
            return
        if not self._said_order:
            self._said_order = True
            log.warning(
                "fxckpt: checkpoints are taken at the step of the last optimizer of the list, the %s; another one has "
                "not stepped before it. If it steps later in the same iteration, its step is not in the checkpoint: "
                "put the optimizer that steps last at the end of the list",
                type(self.optimizers[-1]).__name__,
            )

    def _refuse_mixture(self) -> None:
        raise SetupError(
            f"the model holds parts of a corrupt checkpoint: {self.partially_loaded}. Build the model, the optimizer and the "
            "run anew."
        )

    def _before_step(self) -> None:
        """Close the step before this one, and raise what went wrong since, if the user asked for that."""
        if self.in_iteration and self._open is not None:
            self._open.give_up("opt.step() ran again before the turn of fxckpt.steps ended")
            self._open = None
        self.close_step()
        if self.config.on_error == "raise":
            self.saver.raise_unreported()

    def _attempt_skipped(self) -> None:
        self._before_step()
        self.attempts += 1

    def _advance(self, stepper: Stepper, closure: Callable | None, leads: bool) -> Any:
        """One update, with a checkpoint if one is due."""
        opt, loss, due, copying = stepper.opt, None, leads and self._is_due(), self.engine.pending()
        if due:
            self._look_for_names()
        self.refresh(due or copying)
        scaled = getattr(opt, "grad_scale", None) is not None or getattr(opt, "found_inf", None) is not None
        whole = stepper.whole is not None or scaled
        if closure is not None and not whole and stepper.rehearsal is not None:
            whole = not stepper.rehearsal.takes_closure_first(stepper.members)
        if closure is not None and not whole:
            with torch.enable_grad():
                loss = closure()
            self.refresh()
            closure = rehearsal.evaluated(closure, loss)
        self._look_for_changes(stepper)  # after the closure, whose forward may change what is being copied
        if not whole and stepper.rehearsal is not None:
            whole = not stepper.rehearse(closure is not None)
        if whole:
            self.fence_all()
            stepper.halfway = True
            with stepper.compared():
                loss = stock_step(opt)(opt) if closure is None else stock_step(opt)(opt, closure)
            self.refresh()
        elif first := stepper.needs_stock():
            self.fence_all()
            stepper.halfway = True
            stepper.run_stock(first)
            self.refresh()
        if self._unsaid or stepper.rehearsal is not None:
            self._announce()
        enabled = torch.is_grad_enabled()
        set_grad_mode(False)
        try:
            pending = self._begin() if due else None
            if not whole:
                stepper.halfway = True
                stepper.run(self.number if copying or pending is not None else None)
            stepper.halfway = stepper.accumulated = False
            if leads:
                self.attempts += 1
                found = getattr(opt, "found_inf", None)
                self.applied.add(self.devices.later(found) if scaled and self._is_remote(found) else None)
            if pending is not None:
                if whole:
                    self._emit_stepper(stepper, pending)
                self._emit_rest(pending, stepper)
        finally:
            set_grad_mode(enabled)
        if self._callback_error is not None:
            self._raise_callback_error()
        return loss

    def _raise_callback_error(self) -> None:
        """Raise what ``on_layer`` raised, now that all layers were updated: half a step is nothing to go on from."""
        error, self._callback_error = self._callback_error, None
        if error is not None:
            self.drop_open("on_layer raised")
            raise error

    def _is_remote(self, tensor: Any) -> bool:
        """Is it a tensor on a device?"""
        return isinstance(tensor, torch.Tensor) and self.devices.of(tensor) is not None

    def _found_inf(self, opt: torch.optim.Optimizer) -> bool:
        """Did a GradScaler that lets the optimizer decide (``_step_supports_amp_scaling``) find an inf? Then nothing runs.

        Where the answer is on a device, the kernels there read it, and the host never waits for it: a checkpoint of such
        a step holds the state as it was, and its record's ``updates`` is known when it is committed.
        """
        found = getattr(opt, "found_inf", None)
        return found is not None and not self._is_remote(found) and bool(found.item())

    def _is_due(self) -> bool:
        """Does the step that is about to run begin a checkpoint? Ask once a step: the schedule counts."""
        if self.stopped:
            return False
        stalled = 0.0 if self.schedule.waits else self.stall_seconds()  # what every=N does not ask costs a look at the engine
        return bool(self.ending) or self.schedule.due(self.attempts + 1, stalled)

    def _begin(self) -> InFlight | None:
        """Begin the checkpoint of the step that is about to run."""
        if not self.schedule.waits and not self.ending and self.saver.flying() >= self.config.max_async:
            self.saver.skipped += 1
            return None
        try:
            pending = self.saver.begin(self.attempts + 1, self._current_layout(), wait=True)
        except (SaveFailed, StoreError, OSError) as error:
            self.saver.note_failure(self.attempts + 1, error)  # raised, if at all, at the next step: this one is half done
            self.schedule.started(self.attempts + 1, self.stall_seconds())
            return None
        self.schedule.started(self.attempts + 1, self.stall_seconds())
        pending.turn, self._current = self.in_iteration, pending
        return pending

    def _check_store(self) -> None:
        """Raises StoreNotLoaded before the first checkpoint would join others that were never looked at."""
        if self.store is not None:
            self.store.require_loaded()
        self._store_checked = True

    def _current_layout(self) -> plan.Layout:
        """The plan for the tensors as they are bound now; made anew when one was replaced."""
        self.inventory = take(self.model, self.optimizers, traces)
        fixed = tuple((n, t.data_ptr()) for n, t in self.inventory.frozen.items())
        moving = tuple((n, t.shape, t.dtype) for n, t in self.inventory.buffers.items())
        key = (tuple(s.bound for s in self.steppers), fixed, moving, frozenset(self._changed_outside))
        if key != self._layout_key or self._layout is None:
            if self._layout is not None:
                self.fence_all()  # layer numbers change their meaning
            layers = plan.engine_layers(self.steppers, self.inventory, self._changed_outside)
            self._open_devices(e.tensor for layer in layers for e in layer.entries)
            self._layout = plan.make_layout(self.engine, layers, self.config.chunk_mb << 20, self._changed_outside, self._sources)
            self._layout_key = key
        return self._layout

    def _open_devices(self, tensors: Iterable[torch.Tensor]) -> None:
        """Make the engine ready for every device that the run's tensors lie on now."""
        self.ordinals |= self.devices.all_of(tensors)
        for ordinal in sorted(self.ordinals):
            self.engine.open_device(ordinal, self.devices.driver)

    def _sources(self, tensors: Sequence[torch.Tensor]):
        """What the engine reads: addresses, and the device of each. None if that must be copied in memory first: a device
        copies whole ranges, and files are in row-major order."""
        from fxckpt.engine import Sources

        devices = [self.devices.of(t) for t in tensors]
        if any(device is not None and not t.is_contiguous() for t, device in zip(tensors, devices)):
            return None
        return Sources(plan.source_items(tensors), devices)

    def _streams(self) -> dict[int, int]:
        """The stream that each device trains on now."""
        return self.devices.streams(self.ordinals) if self.ordinals else {}

    def _emit_stepper(self, stepper: Stepper, pending: InFlight) -> None:
        """Emit all layers of an optimizer that did not run through its graph in this checkpoint."""
        counted = len(stepper.layer_tensors()) - len(stepper.layers)
        for offset, tensors in enumerate(stepper.layer_tensors()):
            self.emit(stepper.first_layer - counted + offset, tensors)

    def _emit_rest(self, pending: InFlight, stepped: Stepper | None) -> None:
        """The other optimizers' layers, and what is captured at the end of ``opt.step()``."""
        for stepper in self.steppers:
            if stepper is not stepped:
                self._emit_stepper(stepper, pending)
        pending.note_versions()
        with self._lock:  # a backward that goes on in another thread closes it only when all is captured
            if not self.in_iteration:
                try:
                    self._capture_early(pending)
                except Exception as error:
                    self._not_captured(pending, error)
            self._current, self._open = None, pending

    def _capture_early(self, pending: InFlight) -> None:
        """Emit frozen parameters, snapshot the buffers (they change in the next forward, where nothing can wait) and encode
        the early state."""
        for number, tensors in pending.deferred:
            self._hand_over(pending, number, tensors, copied=True)
        for number in pending.layout.number("frozen"):
            self._hand_over(pending, number, [e.tensor for e in pending.layout.layers[number].entries])
        pending.note_versions()
        for number in pending.layout.number("buffers"):
            names = [e.key for e in pending.layout.layers[number].entries]
            live = {**self.inventory.buffers, **self.inventory.frozen}
            copies = [storable(live[name], name).contiguous().clone() for name in names]
            pending.keep += copies
            pending.emit(number, self._sources(copies), self._streams())
        tensors: dict[str, Any] = {}
        early = {
            "random": extra_state.random_state(),
            "extra": {e.name: e.get() for e in self.extras if e.early},
            "buffers": {n: t for n, t in self.inventory.transient.items() if not self._is_remote(t)},
            "modules": self._module_states(),
        }
        encoded = encode_state(early, tensors, "early")
        encoded["remote"] = self._encode_remote(pending, tensors)
        self._early, pending.captured = (encoded, tensors), True

    def _encode_remote(self, pending: InFlight, tensors: dict[str, Any]) -> Any:
        """Non-persistent buffers on devices: room for them now, their values when the device has copied them."""
        found = {}
        for name, buffer in self.inventory.transient.items():
            if not self._is_remote(buffer):
                continue
            before = set(tensors)
            found[name] = encode_state(torch.empty(buffer.shape, dtype=buffer.dtype), tensors, f"early/remote/{name}")
            for key in set(tensors) - before:
                pending.late[key] = self.devices.later(buffer)
        return found

    def _module_states(self) -> dict[str, Any]:
        if self.model is None:
            return {}
        return {name: module.get_extra_state() for name, module in extra_state_modules(self.model)}

    # -- closing ----------------------------------------------------------------------------------------------------

    def close_step(self, in_backward: bool = False) -> None:
        """The state after the last optimizer step is complete: capture what changes after it, and hand it over.

        Whether a gradient exists is asked in the thread that trains, or by autograd itself (``in_backward``), for elsewhere a
        backward may be setting it at this moment. Another thread takes what was found there last.
        """
        with self._lock:
            pending, self._open = self._open, None
            if pending is None or pending.given_up is not None or not self.active:
                return
            try:
                if not pending.captured:
                    self._capture_early(pending)
                self._check(pending)
                if in_backward or self._may_ask_gradients():
                    self._present = [
                        {
                            m.name: grad if s.accumulated else None
                            for m in s.members
                            if (grad := m.param.grad) is not None and (s.accumulated or not grad.is_sparse)
                        }
                        for s in self.steppers
                    ]  # a sparse one that was used is as good as none
                record, tensors = self._record(pending)
                self._present = [dict.fromkeys(each) for each in self._present]
            except plan.Changed as error:
                self._discard(pending, error)
                return
            except Exception as error:
                if pending.given_up is None:  # else it ended meanwhile, for a reason of its own
                    self._not_captured(pending, error)
                return
            except BaseException:
                pending.give_up("its state could not be captured")
                raise
            pending.close(record, tensors)
            self._capturable = True
        if self.ending is not None:
            self.ending.step_closed()

    def _may_ask_gradients(self) -> bool:
        """Is this the thread that trains, or has that one ended?"""
        return threading.current_thread() is self.saver.trainer or not self.saver.trainer.is_alive()

    def _not_captured(self, pending: InFlight, error: Exception) -> None:
        """An object of ``extra=`` raised, or has state that cannot be stored. At the first checkpoint that is a wrong setup, and
        raised; once it could be captured it is a failed save, of which training does not die."""
        pending.give_up(f"its state could not be captured: {error}")
        if not self._capturable:
            raise error
        self.saver.note_failure(pending.step, error)

    def _check(self, pending: InFlight) -> None:
        """All layers emitted (a dropped op would go unseen otherwise), and nothing changed since in place."""
        layout = pending.layout
        if pending.copy.emitted() != len(layout.layers):
            raise FxckptError(
                f"step {pending.step}: {pending.copy.emitted()} of {len(layout.layers)} layers were emitted; "
                "was dead code elimination run on the StepGraph?"
            )
        for number in layout.number("update"):
            layout.compare(pending, number)
        if replaced := [name for stepper in self.steppers for name in stepper.replaced()]:
            raise plan.Changed(
                f"{replaced[0]!r} or its state was replaced after opt.step(), before the step closed; the "
                f"checkpoint of step {pending.step} is discarded (opt.ckpt.end_step() closes it in time)"
            )

    def _record(self, pending: InFlight) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields of the checkpoint's record, and the tensors of its extra state."""
        early, tensors = self._early
        early["frozen"] = [n for n, p in {**self.inventory.trained, **self.inventory.frozen}.items() if not p.requires_grad]
        late = {e.name: e.get() for e in self.extras if not e.early}
        optimizers = [self._optimizer_record(i, tensors) for i in range(len(self.steppers))]
        fields = {
            "step": pending.step,
            "iteration": self.iteration + self.in_iteration if self.loops else pending.step,
            "updates": self.applied.promise(),
            "time": time.time(),
            "world_size": world_size(),
            "rank": rank(),
            "layers": pending.layout.records(pending.step),
            "ties": dict(self.inventory.ties),
            "optimizers": optimizers,
            "state": {"early": early, "late": encode_state(late, tensors, "late")},
        }
        fields["metrics"], self._notes = self._notes, {}
        return fields, tensors

    def _optimizer_record(self, index: int, tensors: dict[str, Any]) -> dict[str, Any]:
        """What of an optimizer is not in a file of tensors, encoded: its groups, plain state values, which gradients exist, and
        those that wait for a later step of it: it steps at every fourth iteration, and another optimizer leads."""
        stepper = self.steppers[index]
        members = iter(stepper.members)
        groups = [
            {
                "params": [next(members).name for _ in group["params"]],
                "settings": {k: v for k, v in group.items() if k not in ("params", "param_names")},
            }
            for group in stepper.opt.param_groups
        ]
        if stepper.bound != self._described.get(index, (None,))[0] or any(m.plain for m in stepper.members):
            states = {m.name: m.describe() for m in stepper.members if m.state}
            self._described[index] = (stepper.bound, encode_state(states, tensors, f"optimizers/{index}/state"))
        record = {
            "class": plain_class(stepper.opt).__name__,
            "groups": encode_state(groups, tensors, f"optimizers/{index}/groups"),
            "state": self._described[index][1],  # for hundreds of tensors this is worth making once
            "gradients": list(self._present[index]),
        }
        if waiting := {name: grad for name, grad in self._present[index].items() if grad is not None}:
            record["accumulated"] = encode_state(waiting, tensors, f"optimizers/{index}/gradients")
        return record

    def settled(self) -> None:
        """A load made all layers those of one step."""
        for stepper in self.steppers:
            stepper.halfway, stepper.accumulated = False, True  # its gradients may wait for a step

    def _abort(self, why: str) -> None:
        """An exception inside a step: its checkpoint is dropped, its fences are released."""
        self._current = None
        for pending in self.saver.under_way():  # Ctrl-C may come before the one that was begun is known here
            if pending is not self._open and not pending.closed.is_set():
                pending.give_up(why)

    def drop_open(self, why: str) -> None:
        """Tensors are about to be replaced: wait for copies, and drop a checkpoint whose step has not closed."""
        with self._lock:
            pending, self._open = self._open, None
        if pending is not None:
            pending.give_up(why)
        self.fence_all()

    # -- the ops' port ----------------------------------------------------------------------------------------------

    def fence(self, layer: int, tensors: Sequence[torch.Tensor]) -> None:
        """Wait until every copy of this layer is done."""
        self._wait(layer)

    def fence_all(self) -> None:
        """Look for changes, and wait until nothing is being copied."""
        self._look_for_changes(None)
        self._wait(-1)

    def _look_for_changes(self, stepper: Stepper | None) -> None:
        """Drop checkpoints under way of which a tensor is not as its step left it; after this it may change. None: all layers.

        All layers of ``stepper`` at once, before the first is updated: views of one buffer have one version counter.
        """
        for pending in self.saver.under_way():
            if pending is self._current or (stepper is not None and pending.layout is not self._layout):
                continue  # emitted in this very step, or it numbers its layers otherwise and was waited for with that layout
            numbers = pending.layout.number("update") if stepper is None else stepper.numbers()
            with pending.looking:  # or the committer would take what this step changes for a change behind our back
                for number in numbers:
                    try:
                        pending.layout.compare(pending, number)
                    except plan.Changed as error:
                        self._discard(pending, error)
                    pending.unwatch(number)

    def _watch_again(self) -> None:
        """A step was left in its middle: what it has not waited for is being copied still, and must not change unseen."""
        for pending in self.saver.under_way():
            with pending.looking:
                pending.note_versions()

    def _discard(self, pending: InFlight, error: plan.Changed) -> None:
        """A tensor of this checkpoint changed."""
        if pending.given_up is None and not isinstance(error, Cancelled) and pending.fail(error):
            self.saver.note_failure(pending.step, error)
        pending.give_up(str(error))

    def _wait(self, layer: int) -> None:
        """Wait in slices; a checkpoint whose copies make no progress is dropped by the committer (a hung disk), or from here
        if the committer hangs itself."""
        if self.engine is None or not self.engine.pending():
            return
        streams, waited = self._streams(), None
        while not self.engine.fence(layer, SLICE, streams):
            waited = waited or self.saver.patience()
            if waited.over():
                self.saver.drop_all("the disk hangs")

    def emit(self, layer: int, tensors: Sequence[torch.Tensor]) -> None:
        """Hand a layer to the engine, if a checkpoint is being taken."""
        if self._current is not None:
            self._hand_over(self._current, layer, tensors)

    def _hand_over(self, pending: InFlight, layer: int, tensors: Sequence[torch.Tensor], copied: bool = False) -> None:
        """Hand a layer of this checkpoint to the engine, and a copy of it to ``on_layer``.

        What was seen to change outside ``opt.step()`` is handed over at the end of the turn, ``copied``, since nothing fences
        such changes. Without turns there is no instant at which the change is known to have been made, or not yet.
        """
        found = pending.layout.layers[layer]
        if (
            found.kind == "update"
            and self.in_iteration
            and not copied
            and any(e.key in self._changed_outside for e in found.entries)
        ):
            pending.deferred.append((layer, tensors))
            return
        if len(found.entries) != len(tensors):
            raise FxckptError(f"layer {found.name!r} was planned with {len(found.entries)} tensors, {len(tensors)} came")
        if found.kind != "counts" and not copied:
            pending.versions[layer] = (tensors, [])
        sources = found.sources
        if sources is None or copied:
            # On a device the copy is made in order on the current stream.
            copies = [storable(t).clone(memory_format=torch.contiguous_format) for t in tensors]
            pending.keep += copies
            sources = self._sources(copies)
        pending.emit(layer, sources, self._streams() if sources.devices else None)
        if self.config.on_layer is not None and found.kind == "update":
            try:
                self.config.on_layer(found.name, pending.step, {e.key: e.tensor.detach().clone() for e in found.entries})
            except Exception as error:
                self._callback_error = self._callback_error or error

    # -- what the handle needs --------------------------------------------------------------------------------------

    def stall_seconds(self) -> float:
        """Time the training thread has waited for us so far."""
        return self.saver.wait_seconds + self.engine.statistics()["stall_seconds"]

    def note(self, metrics: Mapping[str, Any]) -> None:
        """Metrics for the record of the checkpoint that closes next."""
        noted = {name: _as_float(name, value) for name, value in metrics.items()}
        with self._lock:
            self._notes = {**self._notes, **noted}

    def save(self, name: str | None) -> None:
        """A full checkpoint of the state as it is now, waited for; raises what made it fail. Nothing if all is turned off."""
        if self.engine is None:
            log.warning("fxckpt is off (FXCKPT_DISABLE=1): nothing is saved")
            return
        if not self.active:
            raise SetupError("this run takes no checkpoints: it was shut down or disabled, or this is a forked process")
        with self._stepping:
            pending = self._begin_save(name)
        self.saver.wait_for(pending)
        if pending.error is not None:
            self.saver.forget(pending.error)
            raise pending.error
        self.schedule.started(self.attempts, self.stall_seconds())

    def _begin_save(self, name: str | None) -> InFlight:
        """Hand all layers over as they are now, and close."""
        if self.partially_loaded is not None:
            self._refuse_mixture()
        if any(stepper.halfway for stepper in self.steppers):
            raise SetupError(
                "opt.step() was left by an exception in its middle: some layers are updated and some are not, which "
                "is no step to save. fxckpt.load() goes back to the last one that is; opt.step() goes on from here."
            )
        self.close_step()
        if not self._store_checked:
            self._check_store()
        self._look_for_names()
        self.refresh()
        try:
            pending = self._current = self.saver.begin(self.attempts, self._current_layout(), wait=True, name=name)
            pending.turn = self.in_iteration
            with torch.no_grad():
                self._emit_rest(pending, None)
            self._raise_callback_error()
        except BaseException:
            self._abort("save() failed")
            raise
        self.close_step()
        return pending

    def end_step(self, timeout: float | None = None) -> None:
        """``close_step`` from any thread: between two steps. Raises TimeoutError if one does not end, after ``timeout`` seconds
        or, without one, after those for which training itself waits."""
        patience = 2 * self.saver.stuck_after if timeout is None else min(max(timeout, 0), threading.TIMEOUT_MAX)
        if not self._stepping.acquire(timeout=patience):
            raise TimeoutError(f"opt.step() has not ended after {patience:.3g} s")
        try:
            self.close_step()
        finally:
            self._stepping.release()

    def flush(self, timeout: float | None = None) -> None:
        """Close the step, and wait for the checkpoints in flight; from inside ``opt.step()`` (a signal's handler, a hook) for
        those of steps before it."""
        self.end_step(timeout)
        self.saver.flush(timeout, unclosed=not self._inside_a_step())

    def _inside_a_step(self) -> bool:
        """Is this thread in the middle of an ``opt.step()``, which can close only when it goes on?"""
        return self._current is not None and threading.current_thread() is self.saver.trainer

    def shutdown(self, timeout: float | None = None, *, unfinished: bool = False) -> None:
        """Finish what was started, then stop. Later steps train on without checkpoints.

        ``unfinished``: an exception ended the script, perhaps between ``opt.step()`` and ``scheduler.step()``, so the
        checkpoint of a step that has not closed is dropped; the one before it is complete.
        """
        if not self.active:
            return
        try:
            if unfinished:
                self.drop_open("the script ended with an exception before the step closed")
            self.end_step(timeout)
        finally:
            self.stopped = True
            try:
                if self.tracing is not None:
                    self.saver.flush(timeout, unclosed=not self._inside_a_step())
            finally:
                if self.tracing is not None:
                    self.tracing.__exit__()
                self.saver.stop(timeout, unclosed=not self._inside_a_step())

    def _announce(self) -> None:
        """Say what runs a step, once for each way it runs, and what the snapshots of buffers may take."""
        bound = [(s.bound, s.whole, s.rehearsal is not None and s.rehearsal.proven) for s in self.steppers]
        self._unsaid = False
        if bound == self._announced:
            return
        if not self._announced and (buffers := sum(t.nbytes for t in self.inventory.buffers.values())) >> 20:
            log.info("fxckpt: snapshots of the model's buffers take at most %d MiB more", buffers * self.config.max_async >> 20)
        self._announced = bound
        for i, line in enumerate(stepper.describe() for stepper in self.steppers):
            if line and (i, line) not in self._said:
                self._said.add((i, line))
                log.info("fxckpt: %s", line)
        moved = (
            sum(
                t.nbytes
                for stepper in self.steppers
                for tensors in stepper.layer_tensors()
                for t in tensors
                if self._is_remote(t) and not t.is_contiguous()
            )
            * self.config.max_async
        )
        if moved and (-1, str(moved)) not in self._said:
            self._said.add((-1, str(moved)))
            log.info(
                "fxckpt: tensors that are not in row-major order are copied on their device first, which takes at most "
                "%.1f MiB there",
                moved / 2**20,
            )


def _as_float(name: str, value: Any) -> float:
    """A metric's value. Raises SetupError for what is not one number."""
    try:
        if isinstance(value, str):
            raise TypeError("a string")
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise SetupError(f"note({name}=...) takes a number or a tensor with one element, not {value!r:.100}") from error


def the_run() -> Run:
    """The one live run. Raises SetupError if there is none, or several (listing them)."""
    runs = sorted((run for run in live_runs if not run.stopped), key=lambda run: run.number)
    if len(runs) == 1:
        return runs[0]
    if not runs:
        raise SetupError("there is no run: call fxckpt.compile_step(optimizer) first, or say which directory to load")
    listed = "\n".join(f"  {run.directory!r}: {', '.join(type(o).__name__ for o in run.optimizers)}" for run in runs)
    raise SetupError(f"{len(runs)} runs are live; pass optimizer= (or dir=) to say which:\n{listed}")
