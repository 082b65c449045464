"""Starts what a run writes with, the engine and the store, and says in one line what was started."""

from __future__ import annotations

import logging
from typing import Any

from fxckpt.compat import cuda
from fxckpt.compat.ranks import rank, world_size
from fxckpt.compiled_optimizer.together import open_together
from fxckpt.config import Config
from fxckpt.engine import Engine
from fxckpt.engine.reading import READING_THREADS
from fxckpt.errors import SetupError, StoreLocked
from fxckpt.ranks import least_kept
from fxckpt.ranks.replication import Replication
from fxckpt.run.run import Run
from fxckpt.saving.inventory import trained_by
from fxckpt.saving.stores import CheckpointStore, NullStore
from fxckpt.store.lock import wait_for_monitor
from fxckpt.store.slots import Store

log: logging.Logger = logging.getLogger("fxckpt")

_ADVICE = (
    "call torch.distributed.init_process_group() before compile_step, and ranks that name one directory write it together (with "
    "writer='thread'); or give every rank a directory of its own (for example f'checkpoints/rank{rank}')."
)

BESIDE, RECORD = 24 << 20, 16 << 10
"""Bytes beside the engine's buffers: the store's code and its threads (9 MiB measured with 16 parameters), and for each
parameter what stands of it and its state in the records in flight."""


def start(directory: str, config: Config, devices: cuda.Devices, ordinals: set[int]) -> tuple[Engine, CheckpointStore]:
    """The engine and the store, or the error that says why not. With a monitor, the engine writes nothing itself."""
    chunk, staging = config.chunk_mb << 20, config.staging_bytes
    if ordinals:
        staging = max(cuda.STAGING if config.staging_mb is None else staging, cuda.LEAST_CHUNKS * chunk)
    engine = Engine(threads=config.threads, chunk_bytes=chunk, staging_bytes=staging, mock=config.writer != "thread")
    store: CheckpointStore = NullStore()
    try:
        store = _open(directory, config, engine)  # before the devices: with a monitor it is its memory that they pin
        for ordinal in sorted(ordinals):
            engine.open_device(ordinal, devices.driver)
    except BaseException as error:
        give_up(engine, store)
        if isinstance(error, StoreLocked) and world_size() > 1:
            raise SetupError(f"{error}\nThis is rank {rank()} of {world_size()}: {_ADVICE}") from error
        raise
    return engine, store


def give_up(engine: Engine | None, store: CheckpointStore, replication: Replication | None = None) -> None:
    """No run comes to be that would end them."""
    if replication is not None:
        replication.close()
    if engine is not None:
        engine.close()
    store.close()


def _open(directory: str, config: Config, engine: Engine) -> CheckpointStore:
    """What writes to the directory, if anything does, opened."""
    if config.writer == "mock":
        return NullStore()
    names = ("keep", "keep_every", "keep_minutes", "keep_best", "max_async", "fresh", "read_back")
    options: dict[str, Any] = {"journal": config.first_journal, **{name: getattr(config, name) for name in names}}
    if config.writer == "thread":
        shared = open_together(directory, options, config.on_divergence, config.every, config.journal)
        if shared is not None:
            return shared
    if world_size() > 1:
        options["keep"] = least_kept(config.keep, config.max_async)
    store: CheckpointStore
    if config.writer == "monitor":
        from fxckpt.monitor.client import MonitorStore

        store = MonitorStore(directory, engine, threads=config.threads, **options)
    else:
        store = Store(directory, **options)
    try:
        wait_for_monitor(store.open)
    except BaseException:
        store.close()
        raise
    return store


def say(run: Run) -> None:
    """What was started, in one line, with the memory it may take."""
    if run.engine is None:
        log.warning("fxckpt is off (FXCKPT_DISABLE=1): no checkpoints")
        return
    config = run.config
    beside = BESIDE + RECORD * len(trained_by(run.optimizers))
    if config.writer == "thread" and config.read_back != "off":  # a monitor reads back in its own process
        beside += READING_THREADS * config.chunk_mb << 20
    every = f"every={config.every!r}" + ("" if config.journal == 1 else f", journal={config.journal!r}")
    log.info(
        f"fxckpt: checkpoints in {run.directory!r}, {every}, keep={config.keep}, writer={config.writer!r}; "
        f"memory at most {run.engine.memory_bytes + beside >> 20} MiB ({config.threads} threads x {config.chunk_mb} MiB + "
        f"{run.engine.staging_bytes >> 20} MiB staging + {beside >> 20} MiB for records, code and reading back), plus a snapshot "
        "of the model's buffers and of tensors in extra="
    )
    if config.keep == 1 and world_size() == 1:
        log.warning("fxckpt: keep=1 cannot survive rot on disk: there is no older checkpoint to fall back to")
    if config.writer == "mock":
        log.warning('fxckpt: writer="mock" writes nothing; there will be no checkpoints')
