"""``compile_step``: the optimizer the user made, with its step run through a StepGraph.

The instance stays the same object; only its class is swapped for a subclass made for it (as FSDP2's ``fully_shard`` does
with modules), so ``isinstance(opt, torch.optim.AdamW)`` holds and whoever keeps a reference sees the new step.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fxckpt.compat import cuda
from fxckpt.compat.dynamo import untraced
from fxckpt.compat.instance_subclass import instance_subclass
from fxckpt.compat.modules import named_parameters
from fxckpt.compat.optimizers import hooked, rebind_scheduler_wrapper
from fxckpt.compat.ranks import rank, world_size
from fxckpt.config import Config, default_directory, disabled
from fxckpt.errors import SetupError, StoreLocked
from fxckpt.handle import Handle
from fxckpt.run.run import Run, live_runs
from fxckpt.saving.engines import CheckpointEngine
from fxckpt.saving.inventory import storable
from fxckpt.saving.stores import CheckpointStore, NullStore
from fxckpt.store.lock import wait_for_monitor
from fxckpt.store.slots import Store

if TYPE_CHECKING:
    from fxckpt.engine import Engine

log = logging.getLogger("fxckpt")

BESIDE, RECORD = 24 << 20, 16 << 10
"""Bytes beside the engine's buffers: the store's code and its threads (9 MiB measured with 16 parameters), and for each
parameter what stands of it and its state in the records in flight."""


def compile_step(
    opt: Any,
    dir: str | None = None,
    *,
    model: torch.nn.Module | None = None,
    every: int | str = "auto",
    keep: int = 2,
    keep_every: int | None = None,
    keep_minutes: float | None = None,
    keep_best: str | tuple[str, str] | None = None,
    writer: str = "thread",
    extra: Mapping[str, Any] | None = None,
    layer: str | Callable[[str], str] = "module",
    on_layer: Callable | None = None,
    update: str | None = None,
    threads: int = 2,
    chunk_mb: int = 4,
    staging_mb: int | None = None,
    max_async: int = 2,
    preset: str | None = None,
    on_error: str = "warn",
    fresh: bool = False,
) -> Any:
    """Checkpoint training layer by layer inside ``opt.step()``.

    Args:
        opt: an optimizer, or a list of them that make one run (the last one leads; see ``fxckpt.run``).
        dir: the store; default ``$FXCKPT_DIR``, else ``checkpoints/``.
        model: the module being trained, compiled or wrapped or not. Names every tensor, and adds what the optimizer
            does not hold: frozen parameters and buffers. Without it both come from the compiled graphs.
        every: ``N`` (each N-th optimizer step, waiting when the disk is behind), ``"auto"`` (at most once a minute,
            within a stall budget of 1 %) or ``"continuous"`` (the same budget, no minimum interval).
        keep: good checkpoints to keep. With 1, rot on the disk cannot be survived.
        keep_every, keep_minutes: keep for good, beyond ``keep``, the first checkpoint at or behind each multiple of so
            many steps, or of so many minutes of the clock (UTC).
        keep_best: keep the best checkpoint by a metric given with ``opt.ckpt.note``: ``"loss"`` (the lowest), or
            ``("accuracy", "max")``.
        writer: ``"thread"`` writes from this process; ``"monitor"`` from a separate one, which finishes what it was given
            even if this one is killed (docs/monitor.md); ``"mock"`` does all but the write.
        extra: objects with ``state_dict``/``load_state_dict``, and random generators, by name.
        layer: ``"module"``, ``"block"``, or a function from a parameter's name to its layer's.
        on_layer: called as ``on_layer(layer_name, step, tensors)`` for each layer of each checkpoint, with copies (by
            key: ``"h.0.weight"``, ``"exp_avg/h.0.weight"``) that it may keep.
        update: ``None`` keeps the kernels that flags ask for and compiles the rest; ``"native"`` or ``"inductor"``
            (what Inductor cannot take stays native, said once).
        threads, chunk_mb, staging_mb, max_async: writer threads, MiB per chunk, MiB for what a fence copies itself
            (default 32), checkpoints in flight. ``preset``: ``"throughput"``, ``"latency"`` or ``"memory"`` sets all four.
        on_error: ``"warn"`` logs a failed checkpoint and trains on; ``"raise"`` raises it at the next step.
        fresh: start over in a directory that holds checkpoints, without loading one.

    Returns:
        ``opt`` itself (or the list); ``opt.ckpt`` is the run's handle.

    Raises:
        SetupError: wrong arguments. StoreLocked: another trainer writes there. NotAStore: the directory holds something
        else. EngineMissing: the C engine is not built. Nothing falls back silently. At the first checkpoint, NoSpace: the
        disk has no room for ``keep + max_async`` of them.
    """
    config = Config.make(
        preset,
        every=every,
        keep=keep,
        keep_every=keep_every,
        keep_minutes=keep_minutes,
        keep_best=keep_best,
        writer=writer,
        layer=layer,
        on_layer=on_layer,
        update=update,
        threads=threads,
        chunk_mb=chunk_mb,
        staging_mb=staging_mb,
        max_async=max_async,
        on_error=on_error,
        fresh=fresh,
    )
    optimizers = list(opt) if isinstance(opt, (list, tuple)) else [opt]
    _check(optimizers, model)
    directory = os.path.abspath(os.fsdecode(dir if dir is not None else default_directory()))  # wherever the script goes later
    devices = cuda.Devices()
    ordinals = devices.all_of(p for each in optimizers for group in each.param_groups for p in group["params"])
    engine, store = (None, NullStore()) if disabled() else _start(directory, config, devices, ordinals)
    run = Run(optimizers, directory, model, extra, config, engine, store, devices)
    handle = Handle(run)
    for each in optimizers:
        each.__class__ = stepped_class(type(each))
        each._fxckpt_handle = handle
        rebind_scheduler_wrapper(each)
    _say(run)
    return opt


def _check(optimizers: Sequence[Any], model: Any) -> None:
    """Raises SetupError for what is no optimizer, is taken already, or cannot be checkpointed here."""
    if not optimizers:
        raise SetupError("compile_step needs an optimizer, or a list of them; the list is empty")
    for each in optimizers:
        if not isinstance(each, torch.optim.Optimizer):
            raise SetupError(
                f"compile_step takes torch.optim.Optimizer objects; this is a {type(each).__name__}. "
                "If it wraps an optimizer, pass the inner one."
            )
        if (inner := _wrapped(each)) is not None:
            raise SetupError(
                f"this {type(each).__name__} (of {type(each).__module__}) only wraps the "
                f"{type(inner).__name__} that steps. Call compile_step on the inner optimizer, before it is "
                "wrapped or with wrapper.optimizer, and train with the wrapper as before."
            )
        if "_fxckpt_handle" in each.__dict__ and not each.ckpt._run.status.stopped:
            raise SetupError(f"this {type(each).__name__} already belongs to {each.ckpt!r}; call opt.ckpt.shutdown() first")
    if model is not None and not isinstance(model, torch.nn.Module):
        raise SetupError(f"model= takes a torch.nn.Module; this is a {type(model).__name__}")
    seen: set[int] = set()
    names = {} if model is None else {id(p): name for name, p in named_parameters(model)}
    places = (
        (i, j, k, p)
        for i, opt in enumerate(optimizers)
        for j, group in enumerate(opt.param_groups)
        for k, p in enumerate(group["params"])
    )
    for i, j, k, param in places:
        name = names.get(id(param), f"parameter {k} of group {j} of optimizer {i}")
        if id(param) in seen:
            raise SetupError(f"{name} is in two optimizers of the run; its checkpoint could not say which step it is from")
        seen.add(id(param))
        if not disabled():
            storable(param, name)
    for run in live_runs:
        if not disabled() and not run.status.stopped and (shared := [names[i] for i in run.trained() if i in names]):
            log.warning(
                "fxckpt: %r of this model belongs to an optimizer of another run, in %r. Neither run's checkpoints are "
                "of one step of both: pass the optimizers of one model in one list to one compile_step, or shut the "
                "other run down with opt.ckpt.shutdown()",
                shared[0],
                run.directory,
            )


def _wrapped(opt: torch.optim.Optimizer) -> torch.optim.Optimizer | None:
    """The optimizer that ``opt`` hands its steps to, as Accelerate's, Lightning's and Fabric's wrappers do; else None."""
    for attribute in ("optimizer", "_optimizer", "optim"):
        inner = getattr(opt, attribute, None)
        if isinstance(inner, torch.optim.Optimizer) and inner is not opt:
            return inner
    return None


def _start(directory: str, config: Config, devices: cuda.Devices, ordinals: set[int]) -> tuple[CheckpointEngine, CheckpointStore]:
    """The engine and the store, or the error that says why not. With a monitor, the engine writes nothing itself."""
    from fxckpt.engine import Engine

    chunk, staging = config.chunk_mb << 20, config.staging_bytes
    if ordinals:
        staging = max(cuda.STAGING if config.staging_mb is None else staging, cuda.LEAST_CHUNKS * chunk)
    engine = Engine(threads=config.threads, chunk_bytes=chunk, staging_bytes=staging, mock=config.writer != "thread")
    store = _store(directory, config, engine)
    try:
        wait_for_monitor(store.open)  # before the devices: with a monitor it is its memory that they pin
        for ordinal in sorted(ordinals):
            engine.open_device(ordinal, devices.driver)
    except BaseException as error:
        engine.close()
        store.close()
        if isinstance(error, StoreLocked) and world_size() > 1:
            raise SetupError(
                f"{error}\nThis is rank {rank()} of {world_size()}: give every rank a directory "
                "of its own (for example f'checkpoints/rank{rank}')."
            ) from error
        raise
    return engine, store


def _store(directory: str, config: Config, engine: Engine) -> CheckpointStore:
    """What writes to the directory, if anything does."""
    if config.writer == "mock":
        return NullStore()
    options: dict[str, Any] = {
        "keep": config.keep,
        "max_async": config.max_async,
        "fresh": config.fresh,
        "keep_every": config.keep_every,
        "keep_minutes": config.keep_minutes,
        "keep_best": config.keep_best,
    }
    if config.writer == "monitor":
        from fxckpt.monitor.client import MonitorStore

        return MonitorStore(directory, engine, threads=config.threads, **options)
    return Store(directory, **options)


def _say(run: Run) -> None:
    """What was started, in one line, with the memory it may take."""
    if run.engine is None:
        log.warning("fxckpt is off (FXCKPT_DISABLE=1): no checkpoints")
        return
    config = run.config
    beside = BESIDE + RECORD * len(run.trained())
    log.info(
        "fxckpt: checkpoints in %r, every=%r, keep=%d, writer=%r; memory at most %d MiB (%d threads x %d MiB + %d MiB "
        "staging + %d MiB for records and code), plus a snapshot of the model's buffers and of tensors in extra=",
        run.directory,
        config.every,
        config.keep,
        config.writer,
        run.engine.memory_bytes + beside >> 20,
        config.threads,
        config.chunk_mb,
        run.engine.staging_bytes >> 20,
        beside >> 20,
    )
    if config.keep == 1:
        log.warning("fxckpt: keep=1 cannot survive rot on disk: there is no older checkpoint to fall back to")
    if config.writer == "mock":
        log.warning('fxckpt: writer="mock" writes nothing; there will be no checkpoints')


@functools.cache
def stepped_class(base: type) -> type:
    """The subclass of ``base`` whose step is ours. Pickles and copies are of ``base``: a run belongs to one process and one
    optimizer."""

    def step(self, closure=None):
        return self._fxckpt_handle._run.stepping.step(self, closure)

    functools.update_wrapper(step, base.step, assigned=("__doc__",), updated=())
    return instance_subclass(
        base,
        {
            "step": untraced(hooked(step)),
            "load_state_dict": _load_state_dict,
            "add_param_group": _add_param_group,
            "ckpt": property(lambda self: self._fxckpt_handle),
        },
    )


def _load_state_dict(self, state_dict):
    """Load, once no copy reads the tensors that it replaces."""
    run = self._fxckpt_handle._run
    run.closing.drop("load_state_dict() replaced its tensors")
    self._fxckpt_base.load_state_dict(self, state_dict)


def _add_param_group(self, param_group):
    """Add a group; the checkpoint of a step that has not closed would have the old layers and the new groups."""
    if "_fxckpt_handle" in self.__dict__:
        self._fxckpt_handle._run.closing.drop("add_param_group() changed the optimizer before the step closed")
    self._fxckpt_base.add_param_group(self, param_group)


def _shutdown_all() -> None:
    """At exit: finish what was started. ``sys.last_value`` is set when an exception ended the script."""
    unfinished = getattr(sys, "last_value", None) is not None
    for run in list(live_runs):
        try:
            run.shutdown(unfinished=unfinished)
        except Exception as error:
            log.error("fxckpt: at exit: %s", error)


atexit.register(_shutdown_all)
