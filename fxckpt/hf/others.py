"""Attributes that a Trainer's subclass or a callback keeps: those that are to be in a record, and those that should be.

A subclass may hold generated answers over several steps, or sums for its next log. Nothing of Trainer's tells; so what changed
from one boundary to the next is looked at in the first turns, and said.
"""

from __future__ import annotations

import dis
import functools
import logging
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from fxckpt.run import plain_values
from fxckpt.run.plain_loop import mark

log: logging.Logger = logging.getLogger("fxckpt")

_LOOKS = 4  # boundaries at which it looks


class Attributes:
    """An entry of ``extra=``: these attributes of a Trainer, whatever they hold."""

    def __init__(self, trainer: Trainer, names: Sequence[str]):
        self._trainer, self._names = trainer, tuple(names)

    def state_dict(self) -> dict[str, Any]:
        """By name."""
        return {name: plain_values.take_out(getattr(self._trainer, name), name) for name in self._names}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """What can be changed in place is; somebody else may hold it."""
        for name, value in saved.items():
            live = getattr(self._trainer, name)
            if plain_values.is_plain(live) and not plain_values.is_frozen(live):
                plain_values.put_back(live, value, name)
            else:
                setattr(self._trainer, name, value)


class Watch:
    """Says once what changes from turn to turn and is in no record. ``kept``: names of attributes; ``extras``: what is kept."""

    def __init__(self, trainer: Trainer, kept: Sequence[str], extras: Sequence[object]):
        self._trainer, self._kept = trainer, frozenset(kept)
        self._extras = {id(each) for each in extras}
        self._left, self._before = _LOOKS, dict[tuple[str, str], object]()

    def look(self) -> None:
        """A turn has ended."""
        if self._left == 0:
            return
        self._left -= 1
        now = dict(self._marks())
        changed = [key for key, value in now.items() if key in self._before and self._before[key] != value]
        self._before = now
        if changed:
            self._left = 0
            self._say(changed)

    def _marks(self) -> Iterator[tuple[tuple[str, str], object]]:
        trainer = self._trainer
        known = _attributes_of_trainers() | self._kept
        for name, value in self._plain(trainer):
            if name not in known and not name.startswith("_fxckpt"):
                yield ("", name), mark(value)
        for callback in trainer.callback_handler.callbacks:
            ours_or_theirs = type(callback).__module__.partition(".")[0] in ("transformers", "fxckpt")
            if ours_or_theirs or id(vars(callback)) in self._extras:
                continue
            # Of its arguments, which are the script's, none is put back.
            kept = callback.state()["attributes"] if isinstance(callback, ExportableState) else {}
            for name, value in self._plain(callback):
                if name not in kept:
                    yield (type(callback).__name__, name), mark(value)

    def _plain(self, holder: object) -> Iterator[tuple[str, Any]]:
        """Attributes whose values are all that they are."""
        for name, value in list(vars(holder).items()):
            number = isinstance(value, (bool, int, float, str, tuple, torch.Tensor))
            if (number or plain_values.is_plain(value)) and id(value) not in self._extras:
                yield name, value

    def _say(self, changed: Sequence[tuple[str, str]]) -> None:
        kind = type(self._trainer).__name__
        if mine := [name for callback, name in changed if not callback]:
            log.warning(
                "fxckpt: %s of this %s changes while it trains and is in no checkpoint: a resumed training has it as it was "
                "made. Keep it with attach(trainer, ..., attributes=%r)",
                ", ".join(mine),
                kind,
                tuple(mine),
            )
        if theirs := [each for each in changed if each[0]]:
            log.warning(
                "fxckpt: %s changes while it trains and is in no checkpoint. Let the callback be an ExportableState that "
                "names it among its attributes, or keep it with attach(trainer, ..., extra={'%s': vars(callback)})",
                ", ".join(".".join(each) for each in theirs),
                theirs[0][0].lower(),
            )


@functools.cache
def _attributes_of_trainers() -> frozenset[str]:
    """The attributes that transformers' own Trainer sets: what of them matters is kept already."""
    functions = [each for each in vars(Trainer).values() if isinstance(each, types.FunctionType)]
    return frozenset(each.argval for f in functions for each in dis.get_instructions(f) if each.opname == "STORE_ATTR")
