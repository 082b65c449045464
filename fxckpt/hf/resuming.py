"""Brings a Trainer's loop to the place of a record: which checkpoint is gone on from, and the folder that says so to Trainer."""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState
from transformers.trainer_utils import has_length

from fxckpt.errors import Corrupt, NoCheckpoint, SetupError
from fxckpt.hf.progress import Place
from fxckpt.loading.load import saved_amid_an_iteration
from fxckpt.loading.schema import check_encoded, decode
from fxckpt.store import names
from fxckpt.store.reader import Candidate, Reader, candidates

_STATE = "trainer_state.json"


@contextmanager
def folder(trainer: Trainer, place: Place, steps: int, go_on: bool) -> Iterator[str]:
    """A folder that ``train(resume_from_checkpoint=...)`` takes its place from, gone at the end.

    Trainer computes the epoch and the batches to skip from ``global_step`` and the length of an epoch. That is wrong where an
    epoch or the training was stopped; so it reads there the number from which the right place comes, and gets the true one
    later.
    """
    counted = _as_trainer_counts(trainer, place, steps, go_on)
    state = TrainerState(global_step=counted, train_batch_size=trainer.args.train_batch_size)
    for name in ("logging_steps", "eval_steps", "save_steps"):
        if (given := getattr(trainer.args, name)) is not None:  # without one the state has a number of its own
            setattr(state, name, given)  # else it says that they have changed
    made = tempfile.mkdtemp(prefix="fxckpt-hf-")
    try:
        state.save_to_json(os.path.join(made, _STATE))
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _as_trainer_counts(trainer: Trainer, place: Place, steps: int, go_on: bool) -> int:
    """The ``global_step`` from which Trainer's arithmetic comes to this place, or, if it is over, behind the last epoch."""
    args, per_epoch = trainer.args, place.turns_per_epoch
    last = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    if steps >= last or (place.stopped and not go_on):
        known = trainer.train_dataset is None or has_length(trainer.train_dataset)
        return per_epoch * (math.ceil(last / per_epoch) if known else sys.maxsize)
    return place.epoch * per_epoch + place.turns


def newest(directory: str) -> tuple[Path, Mapping[str, Any]] | None:
    """The newest checkpoint that verifies, and its Trainer's progress; None if there is none. It is read once more than others
    are: Trainer has to know its place before there is an optimizer to load into.

    Raises:
        SetupError: it is of a training that was no Trainer's.
    """
    for found in sorted(_good(directory), key=lambda each: saved_amid_an_iteration(each.record)):
        path = str(Path(found.path) / names.COMMIT)
        try:
            reader = Reader(found.path)
            check_encoded(reader.record, path)
            reader.verify()
            saved = decode(reader.record, reader.state_tensors(), path)
        except (Corrupt, NoCheckpoint):
            continue
        extras = {**saved.early["extra"], **saved.late}
        progress = extras.get("trainer")
        if not isinstance(progress, dict) or not isinstance(progress.get("plain"), str):
            raise SetupError(f"{found.path} is a checkpoint of a loop without fxckpt.hf.attach: name another directory, or start "
                             "over with fresh=True")  # fmt: skip
        return Path(found.path), progress
    return None


def _good(directory: str) -> list[Candidate]:
    """Those whose records can be read."""
    return [each for each in candidates(directory) if isinstance(each, Candidate)] if os.path.isdir(directory) else []


def turns_per_epoch(trainer: Trainer, loader: Any) -> int:
    """Updates in an epoch, as Trainer counts them."""
    if not has_length(loader):
        return int(trainer.state.max_steps)
    return max(math.ceil(len(loader) / trainer.args.gradient_accumulation_steps), 1)
