"""Loaders that Accelerate prepared: they read a batch ahead, so a checkpoint lies one batch before the loader's own place."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader

from fxckpt.compat.loaders import copied, iterate_with
from fxckpt.data.generators import Reader, global_generators, kept_globals, packed, write_all
from fxckpt.data.loader import LoaderSource
from fxckpt.data.source import Source
from fxckpt.errors import SetupError


class Ahead:
    """What Accelerate's loader reads from: the inner source's batches, with a mark of the instant before each is made."""

    def __init__(self, inner: LoaderSource):
        self.inner: LoaderSource = inner
        self.marks: deque[dict[str, Any]] = deque(maxlen=2)
        self._again: tuple[int, dict[str, Any]] | None = None
        self._reader = Reader(global_generators())

    def go_on(self, count: int, states: dict[str, Any]) -> None:
        """The next pass begins with ``count`` batches that were made already, in these states of the global generators."""
        self._again = count, states

    def global_states(self, mark: dict[str, Any] | None) -> dict[str, Any]:
        """The packed states of the global generators at a mark, or now."""
        found = self._reader.read() if mark is None else mark["global"]
        return {name: packed(state) for name, state in found.items()}

    def begin(self) -> Iterator[Any]:
        """The inner source's pass."""
        again, self._again = self._again, None
        items = self.inner.begin()
        self.marks.clear()
        self._reader = Reader(global_generators())
        return self._marked(items, again)

    def _marked(self, items: Iterator[Any], again: tuple[int, dict[str, Any]] | None) -> Iterator[Any]:
        if again is not None:
            count, states = again
            with kept_globals():
                write_all(global_generators(), states)
                made = [self._next(items) for _ in range(count)]
            while made:
                yield made.pop(0)
        while True:
            try:
                yield self._next(items)
            except StopIteration:
                return

    def _next(self, items: Iterator[Any]) -> Any:
        self.marks.append({"global": self._reader.read(), **self.inner.mark()})
        return next(items)


class AcceleratedSource(Source):
    """A loader that ``Accelerator.prepare`` returned, or ``skip_first_batches``. It is iterated over itself, with the
    ``DataLoader`` inside replaced as long as a pass runs."""

    def __init__(self, loader: Any, inner: LoaderSource):
        super().__init__(loader)
        if hasattr(loader.base_dataloader, "state_dict"):
            raise SetupError(
                "Accelerate made this loader with use_stateful_dataloader=True, which draws from generators before training. "
                "Leave that out: fxckpt.batches() keeps the loader's place itself"
            )
        if type(loader).__name__ == "DataLoaderDispatcher" and loader.state.num_processes > 1:
            raise SetupError(
                "this loader reads in one process and dispatches to the others, which cannot be resumed exactly: prepare it with "
                "DataLoaderConfiguration(dispatch_batches=False)"
            )
        self._inner, self._ahead = inner, Ahead(inner)
        self._base, self._skip = loader.base_dataloader, getattr(loader, "skip_batches", 0)
        self._offset = self._skip  # batches that the loader drops at its start

    # ---- one pass ----

    def _begin(self, saved: dict[str, Any] | None, going_on: bool) -> Iterator[Any]:
        self._put_back()
        if not going_on:
            self._offset = self._skip
        else:
            assert saved is not None
            self._offset = saved["offset"]
            self.loader.iteration = saved["iteration"]
            if self.exhausted or saved["inner"]["exhausted"]:
                list(self._inner.begin())
                return self._last_of_pass()
            self.loader.skip_batches = 0
            self._ahead.go_on(saved["lag"], saved["global"])
        stand_in = copied(self._base, DataLoader)
        iterate_with(stand_in, self._ahead.begin)
        self.loader.base_dataloader = stand_in
        return iter(self.loader)

    def _last_of_pass(self) -> Iterator[Any]:
        """What the loader does behind its last batch."""
        self.loader.iteration += 1
        return iter(())

    def finish(self) -> None:
        super().finish()
        self._put_back()
        self._inner.finish()

    def _put_back(self) -> None:
        self.loader.base_dataloader = self._base
        if self._skip:
            self.loader.skip_batches = self._skip

    # ---- state ----

    def _state(self) -> dict[str, Any]:
        inner = self._inner.state_dict()
        found = {"inner": inner, "iteration": getattr(self.loader, "iteration", 0), "offset": self._offset, "lag": 0}
        if self._running and not self._inner.exhausted and self._ahead.marks:
            place = self.position + self._offset
            found["lag"] = inner["position"] - place
            mark = next((each for each in self._ahead.marks if each["position"] == place), None)
            found["global"] = self._ahead.global_states(mark)
            if mark is not None:
                self._inner.set_back(inner, mark)
        return found

    def _loaded(self, state: dict[str, Any]) -> None:
        self._inner.load_state_dict(state["inner"])
        if not state["running"]:
            self.loader.iteration = state["iteration"]

    def _misfits(self, state: Mapping[str, Any]) -> list[str]:
        return super()._misfits(state) or self._inner._misfits(state["inner"])

    def _fingerprint(self) -> dict[str, Any]:
        return {"kind": type(self.loader).__name__, "skip_batches": self._skip}
