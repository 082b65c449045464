"""A loader that Fabric set up: it tells samplers the number of each pass, and moves batches to its device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fxckpt.compat.fabric import StandIn, loader_in, passes_of, put_loader, set_passes
from fxckpt.data.source import Source


class FabricSource(Source):
    """What ``setup_dataloaders`` returned. It is iterated over itself, with the loader inside replaced as long as a pass runs.
    Nothing is read ahead, so its place is that of the loader inside."""

    def __init__(self, loader: Any, inner: Source):
        super().__init__(loader)
        self._inner, self._base = inner, loader_in(loader)
        self._number = 0

    def _begin(self, saved: dict[str, Any] | None, going_on: bool) -> Iterator[Any]:
        if going_on:
            assert saved is not None
            set_passes(self.loader, saved["number"])
        self._number = passes_of(self.loader)
        if self.exhausted:
            list(self._inner.begin())
            set_passes(self.loader, self._number + 1)
            return iter(())
        put_loader(self.loader, StandIn(self._base, self._inner.begin))
        return iter(self.loader)

    def finish(self) -> None:
        super().finish()
        put_loader(self.loader, self._base)
        self._inner.finish()

    def _state(self) -> dict[str, Any]:
        return {"inner": self._inner.state_dict(), "number": self._number if self._running else passes_of(self.loader)}

    def _loaded(self, state: dict[str, Any]) -> None:
        self._inner.load_state_dict(state["inner"])
        if not state["running"]:
            set_passes(self.loader, state["number"])

    def _misfits(self, state: Mapping[str, Any]) -> list[str]:
        return super()._misfits(state) or self._inner._misfits(state["inner"])

    def _fingerprint(self) -> dict[str, Any]:
        return {"kind": type(self.loader).__name__}
