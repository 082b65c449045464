"""Who wants to be told what became of each checkpoint: ``opt.ckpt.on_commit`` and ``on_failure``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

log: logging.Logger = logging.getLogger("fxckpt")


@dataclass(frozen=True)
class Committed:
    """A checkpoint that is durable, or a record of the journal, as ``on_commit`` is told of it.

    Attributes:
        step: ``opt.step()`` attempts before it.
        iteration: turns of ``fxckpt.steps`` before it, else ``step``.
        path: its directory, absolute; None under ``writer="mock"``, which writes nothing.
        generation: its id in the store; None under ``writer="mock"``.
        nbytes: of its tensors' files.
        seconds: from the step that it is of until it was durable.
        stall_seconds: what the thread that trains has waited for checkpoints so far, in this process.
        time: when its step closed, in seconds since 1970.
        metrics: as noted with ``opt.ckpt.note``.
        journal: of a record of the journal the steps that ``load`` makes again to come to it; 0 of a full checkpoint.
    """

    step: int
    iteration: int
    path: Path | None
    generation: int | None
    nbytes: int
    seconds: float
    stall_seconds: float
    time: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    journal: int = 0


@dataclass(frozen=True)
class Failed:
    """A checkpoint that failed, as ``on_failure`` is told of it: its step, and the error that ``flush`` would raise."""

    step: int
    error: BaseException


class Listeners:
    """The callbacks of a run. Whoever tells them holds this weakly: they may hold the run."""

    def __init__(self) -> None:
        self._callbacks: dict[type, list[Callable[[Any], object]]] = {Committed: [], Failed: []}
        self._logged: set[int] = set()

    def add(self, kind: type, callback: Callable[[Any], object]) -> None:
        """Call it with each event of this kind from now on, in the order of adding."""
        self._callbacks[kind].append(callback)

    def tell(self, event: Committed | Failed) -> None:
        """Call all that want to know. Never raises: a logger that cannot be reached costs no checkpoint."""
        for callback in tuple(self._callbacks[type(event)]):
            try:
                callback(event)
            except BaseException as error:  # of SystemExit, too, the thread that commits would end
                if id(callback) not in self._logged:
                    self._logged.add(id(callback))
                    what = f"a callback for checkpoints, {callback!r}, raised {type(error).__name__}"
                    log.error("fxckpt: %s; it is called again, and what it raises then is not logged", what, exc_info=True)
