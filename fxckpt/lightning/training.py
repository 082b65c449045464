"""One ``trainer.fit``: where its boundaries are, and how it goes on from a checkpoint.

A boundary is the instant at which Lightning's loop over batches is about to fetch one: the batch before is behind, with its
validation, schedulers, callbacks and logs, and at an epoch's first batch so is the end of the epoch before. The last boundary is
behind ``on_train_end``.

A resumed process comes to its first fetch as a new one does, with the number of the epoch set. There all is loaded once more, so
what hooks, a sanity check and iterators did on the way leaves no trace, and this fetch is the one that the checkpoint was taken
at. Lightning's own way of restarting, which skips and repeats some of this, is not used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from fxckpt.compat.lightning import release, scaler_of, stand_in
from fxckpt.compiled_optimizer import compile_step
from fxckpt.errors import SetupError
from fxckpt.handle import Handle
from fxckpt.lightning.checks import check_loaders, check_trainer
from fxckpt.lightning.feed import Feed
from fxckpt.lightning.logs import continue_logs, keep_rows
from fxckpt.lightning.progress import Progress
from fxckpt.loading.load import load
from fxckpt.loop import batches, steps

_ENDLESS = 1 << 62
_OURS = "lightning"


class Training:
    """Made when ``fit`` starts, after Lightning has its optimizers, and before it begins any loop."""

    def __init__(self, trainer: Any, module: Any, callback: Any, directory: str | os.PathLike[str], options: Mapping[str, Any]):
        check_trainer(trainer, callback)
        self._trainer, self._fit_loop = trainer, trainer.fit_loop
        self._progress = Progress(trainer, module, callback)
        self._feeds: list[Feed] = []
        self._turns: Iterator[int] | None = None
        optimizers = list(trainer.optimizers)
        self._optimizer = optimizers[-1]
        arguments: dict[str, Any] = {**options, "model": module, "extra": self._extras(options.get("extra"))}
        compile_step(optimizers, directory, **arguments)
        self.handle: Handle = self._optimizer.ckpt
        self._resumes = not options.get("fresh") and load(optimizer=self._optimizer).path is not None
        keep_rows(trainer.loggers)
        if self._resumes:
            self._progress.head()
            continue_logs(trainer.loggers, self._progress.loaded["logs"])
        stand_in(self._fit_loop, loaders_made=self._loaders_made, advance=self._advance, run_ended=self._run_ended)

    def _extras(self, given: Any) -> Any:
        """What is kept beside the model and its optimizers."""
        if given is not None and not isinstance(given, Mapping):
            return given  # refused where it is refused always
        found = {_OURS: self._progress, **(given or {})}
        if found[_OURS] is not self._progress:
            raise SetupError(f"extra[{_OURS!r}] is the name under which the Trainer's state is kept: choose another one")
        if (scaler := scaler_of(self._trainer)) is not None:
            found.setdefault("scaler", scaler)
        return found

    def _loaders_made(self) -> None:
        """The training loaders are there, and no iterator of theirs: ours stand in for them."""
        combined = self._fit_loop._combined_loader
        check_loaders(combined)
        self._feeds = [Feed(each, self._begin_pass, self._resumes) for each in combined.flattened]
        combined.flattened = self._feeds
        if self._resumes:
            self._progress.put_metrics()  # the sanity check has reset them

    def _begin_pass(self, loader: Any) -> Iterator[Any]:
        return iter(batches(loader, optimizer=self._optimizer))

    def _advance(self, data_fetcher: Any) -> None:
        """A batch is about to be fetched."""
        if self._turns is not None:
            next(self._turns)
            return
        if self._resumes:
            self._progress.here = data_fetcher
            load(optimizer=self._optimizer)
            self._progress.here = None
            continue_logs(self._trainer.loggers, self._progress.loaded["logs"])  # callbacks have logged at the head once more
        self._progress.amid = True
        self._turns = steps(_ENDLESS, optimizer=self._optimizer)
        next(self._turns)
        if self._resumes:
            for feed in self._feeds:
                feed.go_on()

    def _run_ended(self) -> None:
        """All batches are behind, and all that Lightning does then: nothing is left to do for a run that goes on from here."""
        for feed in self._feeds:
            feed.close()
        self._progress.amid = False
        if self._turns is not None:
            next(self._turns)
        self.end()

    def end(self) -> None:
        """Finish what is in flight, and leave the Trainer as it was."""
        release(self._fit_loop)
        for feed in self._feeds:
            feed.close()  # where a fit has failed, its workers would wait for a pass that nobody goes on with
        turns, self._turns = self._turns, None
        if turns is not None:
            turns.close()  # type: ignore[attr-defined]
        self.handle.shutdown()
