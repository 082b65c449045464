"""The package's only module-level state: what the compiler has seen, the runs that are live, updates that were compiled.

A run is held weakly: it lives as long as its optimizers do.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxckpt.graph.joint import TraceBook
    from fxckpt.run import Run


class Registry:
    """Live runs, the traces that ``fxckpt.backend`` recorded by parameter identity, and updates that any run may use."""

    def __init__(self) -> None:
        self._runs: weakref.WeakSet[Run] = weakref.WeakSet()
        self._traces: TraceBook | None = None
        self.programs: dict[Any, list[Any]] = {}  # signature -> traced updates of torch.optim's classes, for all runs

    @property
    def traces(self) -> TraceBook:
        """The book of joint traces; made at first use, so that importing the package stays cheap."""
        if self._traces is None:
            from fxckpt.graph.joint import TraceBook

            self._traces = TraceBook()
        return self._traces

    @property
    def runs(self) -> weakref.WeakSet[Run]:
        """The runs that ``compile_step`` registered and that are still alive."""
        return self._runs


registry = Registry()
