"""One call of ``trainer.train()``: where its boundaries are, and what comes between them.

An update's boundary is the instant before the batches of the next one are drawn, when ``get_batch_samples`` is called: its log,
its evaluation, its scheduler's step and what Trainer saves lie behind it then. The last update of an epoch ends before
``on_epoch_begin`` of the next one, and the last of all before Trainer adds its summary to the log.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.trainer_utils import has_length

from fxckpt.compat.trainer import loading_no_weights
from fxckpt.compiled_optimizer import compile_step
from fxckpt.config import disabled
from fxckpt.errors import FxckptError, SetupError, StoreError
from fxckpt.handle import Handle
from fxckpt.hf.checks import check_loader
from fxckpt.hf.others import Attributes, Watch
from fxckpt.hf.progress import Progress, place_of
from fxckpt.hf.resuming import folder, newest, turns_per_epoch
from fxckpt.loading.load import load
from fxckpt.loop import batches, steps

log: logging.Logger = logging.getLogger("fxckpt")

_WITHOUT_END = 1 << 62
"""Turns: Trainer knows when to stop."""

_SUMMARY = {"train_runtime", "train_loss", "total_flos"}
"""What only the last entry of a log has, all together."""


@dataclass(frozen=True)
class Options:
    """What ``attach`` was given. ``compiled``: for compile_step."""

    directory: str
    go_on: bool
    attributes: tuple[str, ...]
    extra: Mapping[str, object]
    compiled: Mapping[str, Any]


class Attachment:
    """Stands in for two methods of a Trainer, and has its callbacks called first and last while it trains."""

    def __init__(self, trainer: Trainer, options: Options):
        self._trainer, self._options = trainer, options
        self._train, self._get_batch_samples = trainer.train, trainer.get_batch_samples
        self._training: Training | None = None

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, *args: Any, **kwargs: Any) -> Any:
        """``Trainer.train``, from the newest checkpoint on."""
        if resume_from_checkpoint not in (None, False):
            raise SetupError(
                f"trainer.train(resume_from_checkpoint={resume_from_checkpoint!r}): this Trainer resumes from the checkpoints in "
                f"{self._options.directory!r} by itself. Leave it out. To begin with what a Trainer saved, load the model from "
                "that folder with from_pretrained()"
            )
        if trial is not None:
            raise SetupError(
                "fxckpt.hf: a search of hyperparameters trains many models. Attach to the Trainer of each one by itself"
            )
        with contextlib.ExitStack() as stack:
            place, expected = None, None
            if not (disabled() or self._options.compiled.get("fresh")) and (found := newest(self._options.directory)) is not None:
                expected, saved = found
                at, made = place_of(saved)
                place = stack.enter_context(folder(self._trainer, at, made, self._options.go_on))
                stack.enter_context(loading_no_weights(self._trainer))
            self._training = training = Training(self._trainer, self._options, None if expected is None else str(expected))
            stack.enter_context(self._called_first_and_last(training))
            stack.enter_context(self._ended(training))
            return self._train(place, None, *args, **kwargs)

    @contextlib.contextmanager
    def _called_first_and_last(self, training: Training) -> Iterator[None]:
        """What others do when training begins is done before the load; what they do at an epoch's head, behind the boundary."""
        handler = self._trainer.callback_handler
        handler.callbacks = [First(training), *handler.callbacks, Last(training)]
        try:
            yield
        finally:
            handler.callbacks = [each for each in handler.callbacks if not isinstance(each, (First, Last))]

    @contextlib.contextmanager
    def _ended(self, training: Training) -> Iterator[None]:
        """The run ends with the call, whichever way it ends: the next call is another run."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(FxckptError):
                training.end()
            raise
        else:
            training.end()
        finally:
            self._training = None

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """``Trainer.get_batch_samples``, from our pass over the same loader; the boundary of the update before comes first."""
        training = self._training
        if training is None or training.turns is None:
            return self._get_batch_samples(epoch_iterator, *args, **kwargs)
        training.progress.settle()
        training.boundary()
        found = self._get_batch_samples(training.rest_of_pass(), *args, **kwargs)
        if found[0]:
            training.drawn()
        return found


class Training:
    """A run, and where Trainer's loop is in it. ``expected``: the checkpoint that Trainer's place comes from."""

    def __init__(self, trainer: Trainer, options: Options, expected: str | None):
        self._trainer, self._options, self._expected = trainer, options, expected
        self.progress: Progress = Progress(trainer)
        self.turns: Iterator[int] | None = None  # once the run has begun
        self._ckpt: Handle | None = None
        self._loader: Any = None
        self._pass: Any = None  # what gives the batches of this epoch
        self._watch: Watch | None = None
        self._undrawn = False  # a turn has begun, and none of its batches was drawn
        self._epoch_began = False
        self._eval_on_start: bool | None = None  # what the arguments said, if it was turned off
        self._total_loss = 0.0  # before the summary adds what was not logged

    # -- its events, in their order --------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Model, optimizer and scheduler are there: the run begins, from a checkpoint if there is one."""
        trainer, options = self._trainer, self._options
        self._loader = trainer.callback_handler.train_dataloader
        check_loader(self._loader)
        extra = {**options.extra, "trainer": self.progress, "lr_scheduler": trainer.lr_scheduler}
        if options.attributes:
            extra["attributes"] = Attributes(trainer, options.attributes)
        self._watch = Watch(trainer, options.attributes, [*options.extra.values()])
        model, given = cast(Any, trainer.model), cast(Any, trainer.optimizer)
        optimizer: Any = compile_step(given, options.directory, model=model, extra=extra, **options.compiled)
        self._ckpt = optimizer.ckpt
        mine = turns_per_epoch(trainer, self._loader), trainer.args.gradient_accumulation_steps
        if not options.compiled.get("fresh"):
            self._load(optimizer, *mine)
        self.progress.place.turns_per_epoch, self.progress.place.accumulation = mine
        self.logged()
        self.turns = steps(_WITHOUT_END, optimizer=optimizer)

    def _load(self, optimizer: Any, per_epoch: int, accumulation: int) -> None:
        """Load, and see that the Trainer is at the place of what was loaded."""
        restored = load(optimizer=optimizer)
        if (None if restored.path is None else str(restored.path)) != self._expected:
            raise StoreError(f"{self._options.directory}: its newest checkpoint was {self._expected}, and is {restored.path} "
                             "now. Does something else write there? Start again")  # fmt: skip
        if restored.path is None:
            return
        place = self.progress.place
        other_length = per_epoch != place.turns_per_epoch and (place.epoch or has_length(self._loader))
        if other_length or accumulation != place.accumulation:
            raise SetupError(
                f"the checkpoint is of epochs of {place.turns_per_epoch} updates with {place.accumulation} batches each, and now "
                f"they have {per_epoch} with {accumulation}: that is another training. Keep the data, the batch size and "
                "gradient_accumulation_steps as they were (and max_steps, for data without a length)"
            )
        self._eval_on_start, self._trainer.args.eval_on_start = self._trainer.args.eval_on_start, False

    def epoch_begins(self) -> None:
        """The last update of the epoch before is over. In the epoch that a load goes on in, that was in another process."""
        place = self.progress.place
        if self._epoch_began:
            self._leave_pass()
            place.epoch, place.turns = place.epoch + 1, 0
        self._epoch_began = True
        if place.at_start:
            self.progress.settle()
            self.boundary()

    def boundary(self) -> None:
        """Everything is at rest: what was trained since the last boundary is a turn."""
        if self.turns is not None and not self._undrawn:
            next(self.turns)
            if self._watch is not None:
                self._watch.look()
            self._undrawn = True

    def rest_of_pass(self) -> Iterator[Any]:
        """The batches of this epoch that were not drawn."""
        if self._pass is None:
            optimizer: Any = self._trainer.optimizer
            self._pass = iter(batches(self._loader, optimizer=optimizer))
            if hasattr(self._loader, "set_epoch"):  # behind a load, which puts it where it was; nothing was drawn yet
                self._loader.set_epoch(self.progress.place.epoch)
        return cast(Iterator[Any], self._pass)

    def drawn(self) -> None:
        """Batches of an update were drawn."""
        self._undrawn = False
        self.progress.place.turns += 1

    def logged(self) -> None:
        """The loss was added up, for the log."""
        self._total_loss = self._trainer._total_loss_scalar

    def summary(self, logs: dict[str, float]) -> None:
        """Training is over, and its summary is in the log: what comes of it is made again by a process that begins here. Nothing
        that follows, the best model for one, may change what is being copied."""
        trainer, place = self._trainer, self.progress.place
        if not self._epoch_began:  # it was over before
            place.stopped = place.stopped and not self._options.go_on
        else:
            place.stopped = trainer.control.should_training_stop and trainer.state.global_step < trainer.state.max_steps
        if place.turns >= place.turns_per_epoch:
            self._leave_pass()
            place.epoch, place.turns = place.epoch + 1, 0
        self.progress.at_end = len(trainer.state.log_history) - 1, self._total_loss
        self.boundary()
        if self._ckpt is not None:
            self._ckpt.flush()
        self._count_earlier_seconds(logs)

    def _count_earlier_seconds(self, logs: dict[str, float]) -> None:
        """The summary is of all steps; so is its time."""
        if not self.progress.seconds:
            return
        alone = logs["train_runtime"]
        whole = alone + self.progress.seconds
        entry = self._trainer.state.log_history[-1]
        for name in logs:
            if name == "train_runtime" or (name.startswith("train_") and name.endswith("_per_second")):
                entry[name] = logs[name] = whole if name == "train_runtime" else logs[name] * alone / whole

    def end(self) -> None:
        """No more checkpoints."""
        if self._eval_on_start is not None:
            self._trainer.args.eval_on_start = self._eval_on_start
        self._leave_pass()
        if self._ckpt is not None:
            self._ckpt.shutdown()

    def _leave_pass(self) -> None:
        if self._pass is not None:
            self._pass.close()
        self._pass = None


class First(TrainerCallback):
    """Is called before all other callbacks."""

    def __init__(self, training: Training):
        self._training = training

    def on_epoch_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._training.epoch_begins()

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._training.logged()

    def on_log(self, args: Any, state: Any, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if logs.keys() >= _SUMMARY:
            self._training.summary(logs)
        else:
            self._training.logged()


class Last(TrainerCallback):
    """Is called after all other callbacks."""

    def __init__(self, training: Training):
        self._training = training

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._training.begin()
