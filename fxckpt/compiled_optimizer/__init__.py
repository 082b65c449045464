"""``compile_step``: what a user calls to have an optimizer checkpoint its training.

``checks`` looks at the arguments, ``start`` opens the engine and the store, ``ends`` finishes at exit, ``types`` says to type
checkers what comes back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch

from fxckpt.checkpointed import attach, attach_wrapper, call_step
from fxckpt.compat import cuda
from fxckpt.compat.modules import Models
from fxckpt.compat.optimizers import rebind_scheduler_wrapper
from fxckpt.compat.wrappers import is_wrapper
from fxckpt.compiled_optimizer.checks import check, check_parts
from fxckpt.compiled_optimizer.ends import finish_at_exit
from fxckpt.compiled_optimizer.start import give_up, say, start
from fxckpt.compiled_optimizer.together import replicate
from fxckpt.compiled_optimizer.types import typed
from fxckpt.config import Config, default_directory, disabled
from fxckpt.run.run import Run
from fxckpt.saving.inventory import trained_by
from fxckpt.saving.stores import NullStore
from fxckpt.store.directory import local_path


@typed
def compile_step(
    opt: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    dir: str | os.PathLike[str] | None = None,
    *,
    model: Models | None = None,
    every: int | Literal["auto", "continuous"] = "auto",
    keep: int = 2,
    keep_every: int | None = None,
    keep_minutes: float | None = None,
    keep_best: str | tuple[str, str] | None = None,
    writer: Literal["thread", "monitor", "mock"] = "thread",
    extra: Mapping[str, object] | None = None,
    layer: Literal["module", "block"] | Callable[[str], str] = "module",
    on_layer: Callable[[str, int, dict[str, torch.Tensor]], object] | None = None,
    update: Literal["native", "inductor"] | None = None,
    updates: Literal["after_backward", "in_backward"] = "after_backward",
    threads: int = 2,
    chunk_mb: int = 4,
    staging_mb: int | None = None,
    max_async: int = 2,
    preset: Literal["throughput", "latency", "memory"] | None = None,
    on_error: Literal["warn", "raise"] = "warn",
    read_back: Literal["off", "sampled", "all"] = "sampled",
    fresh: bool = False,
    journal: int | Literal["auto"] = 1,
    restore_seconds: float = 30.0,
    on_divergence: Literal["warn", "raise", "off"] = "warn",
    replicas: Literal[0, 1] = 0,
) -> object:
    """Checkpoint training layer by layer inside ``opt.step()``.

    Args:
        opt: an optimizer, or a list of them that make one run: the last one leads, and a checkpoint is taken at its step. What
            Accelerate's ``prepare`` or Fabric's ``setup`` returned may be given; its ``GradScaler`` is then among the extras.
        dir: the store's directory; default ``$FXCKPT_DIR``, else ``checkpoints/``. Ranks that name one directory write it
            together, once there is a process group (docs/distributed.md).
        model: what is trained, compiled or wrapped or not: a module, or a list or dict of them, which must own all that the
            optimizers train. Names every tensor, and adds what the optimizer does not hold: frozen parameters, buffers,
            modes. Without it names and buffers come from graphs compiled with ``backend=fxckpt.backend``.
        every: ``N`` (each N-th optimizer step, waiting when the disk is behind), ``"auto"`` (at most once a minute,
            within a stall budget of 1 %) or ``"continuous"`` (the same budget, no minimum interval).
        keep: good checkpoints to keep. With 1, rot on the disk cannot be survived. Of several ranks with a store each, every one
            keeps ``max_async + 1`` at least, and the newest step that all of them have.
        keep_every, keep_minutes: keep for good, beyond ``keep``, the first checkpoint at or behind each multiple of so
            many steps, or of so many minutes of the clock (UTC).
        keep_best: keep the best checkpoint by a metric given with ``opt.ckpt.note``: ``"loss"`` (the lowest), or
            ``("accuracy", "max")``.
        writer: ``"thread"`` writes from this process; ``"monitor"`` from a separate one, which finishes what it was given
            even if this one is killed (docs/monitor.md); ``"mock"`` does all but the write.
        extra: by name, objects with ``state_dict``/``load_state_dict``, random generators of torch, numpy or Python, and plain
            values that can change in place: a dict, list, dataclass instance, ``SimpleNamespace``, array or tensor.
        layer: ``"module"``, ``"block"``, or a function from a parameter's name to its layer's.
        on_layer: called as ``on_layer(layer_name, step, tensors)`` for each layer of each checkpoint, with copies (by
            key: ``"h.0.weight"``, ``"exp_avg/h.0.weight"``) that it may keep.
        update: ``None`` keeps the kernels that flags ask for and compiles the rest; ``"native"`` or ``"inductor"``
            (what Inductor cannot take stays native, said once).
        updates: ``"in_backward"`` updates a layer as soon as its gradient is final and gives back the gradient's memory, where
            that can be shown to change no bit (docs/graph.md); what cannot is left to ``opt.step()``, and said.
        threads, chunk_mb, staging_mb, max_async: writer threads, MiB per chunk, MiB for what a fence copies itself
            (default 32), checkpoints in flight. ``preset``: ``"throughput"``, ``"latency"`` or ``"memory"`` sets all four.
        on_error: ``"warn"`` logs a failed checkpoint and trains on; ``"raise"`` raises it at the next step.
        read_back: read committed checkpoints again when the disk is idle: ``"sampled"`` (now and then, 2 % of the time at most),
            ``"all"`` (each one, before the next is committed) or ``"off"``. One that does not verify is a failed checkpoint.
        fresh: start over in a directory that holds checkpoints, without loading one.
        journal: with ``every=1``, steps from one full checkpoint to the next; each step between is stored as its gradients, from
            which ``load`` makes it again (docs/journal.md). What is not known to come out the same is stored in full, said once.
            ``"auto"`` chooses the number from what the first steps measure, and says it.
        restore_seconds: with ``journal="auto"``, what a ``load`` may take longer at most than that of a full checkpoint.
        on_divergence: where several ranks write one store, what to do when two of them have other bits in place of one tensor:
            ``"warn"`` logs and records it, ``"raise"`` raises it at rank 0's next step, ``"off"`` does not look.
        replicas: where ranks have a store each, on disks of their own: 1 sends each checkpoint that all of them have to a rank on
            another host, too, which keeps the newest ``keep`` beside its store. ``load`` takes them in place of what was lost
            with a disk (docs/distributed.md).

    Returns:
        ``opt`` itself (or the list), its class swapped for a subclass; ``opt.ckpt`` is the run's :class:`~fxckpt.Handle`.

    Raises:
        SetupError: wrong arguments. StoreLocked: another trainer writes there. NotAStore: the directory holds something
        else. EngineMissing: the C engine is not built. Nothing falls back silently. At the first checkpoint, NoSpace: the
        disk has no room for ``keep + max_async`` of them.
    """
    config = Config(
        every=every, preset=preset, threads=threads, chunk_mb=chunk_mb, staging_mb=staging_mb, max_async=max_async,
        keep=keep, keep_every=keep_every, keep_minutes=keep_minutes, keep_best=keep_best, fresh=fresh,
        writer=writer, layer=layer, on_layer=on_layer, update=update, updates=updates, on_error=on_error, read_back=read_back,
        journal=journal, restore_seconds=restore_seconds, on_divergence=on_divergence,
        replicas=replicas,
    )  # fmt: skip
    given = list(opt) if isinstance(opt, (list, tuple)) else [opt]
    optimizers, module, extras = check(given, model, extra)
    directory = os.path.abspath(local_path(dir if dir is not None else default_directory()))  # wherever the script goes later
    devices = cuda.Devices()
    ordinals = devices.all_of(trained_by(optimizers))
    engine, store = (None, NullStore()) if disabled() else start(directory, config, devices, ordinals)
    replication = None
    try:
        if not isinstance(store, NullStore):
            check_parts(module, optimizers, store.part[1])
            if config.replicas:
                replication = replicate(directory, config.keep, store.part)
        run = Run(optimizers, directory, module, extras, config, engine, store, devices, call_step, replication)
    except BaseException:
        give_up(engine, store, replication)
        raise
    for each in optimizers:
        attach(each, run)
        rebind_scheduler_wrapper(each)
    for wrapper in filter(is_wrapper, given):
        attach_wrapper(wrapper)
    finish_at_exit()
    say(run)
    return opt
