"""What a record holds of a Trainer beside model, optimizer and scheduler: its state, log and counts, and where its loop is."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from fxckpt.compat.trainer import RUNNING_LOSS, counts, set_counts
from fxckpt.errors import SetupError

_KEPT = ("epoch", "global_step", "num_input_tokens_seen", "total_flos", "best_metric", "best_global_step",
         "best_model_checkpoint", "stateful_callbacks")  # fmt: skip
"""Fields of TrainerState that training changes; the others follow from the arguments. ``log_history`` is kept line by line."""


@dataclass
class Place:
    """Where a Trainer's loop is: ``turns`` of so many ``turns_per_epoch`` updates are behind in this ``epoch``, each of
    ``accumulation`` batches. ``stopped``: a callback ended the training before its last step."""

    epoch: int = 0
    turns: int = 0
    turns_per_epoch: int = 1
    accumulation: int = 1
    stopped: bool = False

    @property
    def at_start(self) -> bool:
        """Of an epoch."""
        return self.turns == 0


class Progress:
    """An entry of ``extra=``: a Trainer's progress, taken at a boundary and put back by a load.

    Attributes:
        place: where the loop is.
        seconds: what earlier processes have trained.
        at_end: how the log and the counts were before the Trainer closed them, once it has; else None.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._lines: list[str] = []  # of the log, each entry as JSON
        self.place: Place = Place()
        self.seconds: float = 0.0
        self.at_end: tuple[int, float] | None = None
        self._began = time.monotonic()
        self._loaded: Mapping[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """All as it is now. What is plain is one text, which a record takes quicker than its parts."""
        trainer = self._trainer
        history, found = trainer.state.log_history, counts(trainer)
        if self.at_end is not None:
            entries, found["_total_loss_scalar"] = self.at_end
            history = history[:entries]
        plain = {
            "place": asdict(self.place),
            "state": {name: getattr(trainer.state, name) for name in _KEPT},
            "counts": found,
            "callbacks": [[type(each).__name__, each.state()["attributes"]] for each in self._exportable()],
            "seconds": self.seconds + time.monotonic() - self._began,
        }
        loss = getattr(trainer, RUNNING_LOSS).detach().cpu().clone()
        return {"plain": json.dumps(plain, default=_number), "log": self._log(history), "loss": loss}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Put it back. Steps and epochs of the whole training, and what is said how often, come from the arguments of now."""
        trainer, plain = self._trainer, json.loads(saved["plain"])
        state: Any = trainer.state
        for name in _KEPT:
            setattr(state, name, plain["state"][name])
        state.log_history = [json.loads(line) for line in saved["log"].splitlines()]
        state.compute_steps(trainer.args, state.max_steps)
        self._load_callbacks(plain["callbacks"])
        set_counts(trainer, plain["counts"])
        setattr(trainer, RUNNING_LOSS, saved["loss"].to(trainer.args.device))
        self._lines, self.place, self.seconds = saved["log"].splitlines(), Place(**plain["place"]), plain["seconds"]
        self._began = time.monotonic()
        self._loaded = saved

    def settle(self) -> None:
        """Put back once more what was loaded: the head of an epoch that goes on in its middle was called again since, and logged
        and counted what it had before."""
        if self._loaded is not None:
            place = self.place
            self.load_state_dict(self._loaded)
            self.place, self._loaded = place, None

    def _load_callbacks(self, saved: list[tuple[str, dict[str, Any]]]) -> None:
        """Each gets the state of the one of its class that had its place among those."""
        for name in {name for name, _ in saved}:
            mine = [each for each in self._exportable() if type(each).__name__ == name]
            theirs = [attributes for each, attributes in saved if each == name]
            if len(mine) != len(theirs):
                raise SetupError(f"the checkpoint has the state of {len(theirs)} {name}; this Trainer has {len(mine)}. Add "
                                 "the same callbacks as before")  # fmt: skip
            for callback, attributes in zip(mine, theirs):
                for attribute, value in attributes.items():
                    setattr(callback, attribute, value)

    def _exportable(self) -> list[Any]:
        """Callbacks that say what their state is."""
        return [each for each in self._trainer.callback_handler.callbacks if isinstance(each, ExportableState)]

    def _log(self, history: list[dict[str, float]]) -> str:
        """The log, of which only what is new is made into text: it is in every record."""
        if len(self._lines) > len(history):
            self._lines = []
        self._lines += [json.dumps(entry, default=_number) for entry in history[len(self._lines) :]]
        return "\n".join(self._lines)


def place_of(saved: Mapping[str, Any]) -> tuple[Place, int]:
    """Of a record's progress: the place, and how many steps were made."""
    plain = json.loads(saved["plain"])
    return Place(**plain["place"]), plain["state"]["global_step"]


def _number(value: Any) -> Any:
    """numpy's and torch's numbers, which Trainers and their metrics mix with Python's."""
    if callable(item := getattr(value, "item", None)) and not (isinstance(value, torch.Tensor) and value.numel() != 1):
        return item()
    raise TypeError(f"a {type(value).__name__} in the log, the state or a callback of a Trainer is no number")
