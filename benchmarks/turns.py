"""The steps of a training in rounds, as another process orders them, and what is measured in each round."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import machine
from saving import Nothing


@dataclass(frozen=True)
class Order:
    """A round. A checkpoint at each ``every``-th step (0: none; a word is the saver's business), for ``steps`` steps and at least
    ``seconds``. ``first``: one step with a checkpoint goes before, untimed, so that a saver which works beside training has as
    much to do at the beginning as at the end. ``tell``: send the number of each step when it is made, and of each checkpoint."""

    every: int | str
    steps: int
    seconds: float = 0.0
    first: bool = False
    tell: bool = False


class Turns:
    """Gives the number of each step to take; between two rounds it answers what the last one took, and waits for the next."""

    def __init__(self, saver: Nothing, folder: Any, pipe: Connection):
        self.saver, self.folder, self.pipe = saver, folder, pipe
        self.saves = False  # the step under way
        self.made: list[tuple[int, float]] = []
        self.telling, self.told = False, 0

    def due(self, step: int) -> bool:
        """Is this step, which was made a moment ago, to be saved?"""
        self.made.append((step, time.monotonic()))
        if self.telling:
            self.tell(step)
        return self.saves

    def take(self) -> Iterator[int]:
        """Steps, until there is no order any more. What is between two counts: whoever asks for the next has saved the last."""
        step = 0
        while (order := self.pipe.recv()) is not None:
            begin, self.made, self.telling = len(self.saver.durable), [], order.tell
            before = self.saver.stalled, self.saver.saves, machine.bytes_written()
            machine.reset_peak_memory()
            if order.first:
                step += 1
                self.next(1, step)
                yield step
            began, ended, origin = time.monotonic(), [], step
            while len(ended) < order.steps or time.monotonic() - began < order.seconds:
                step += 1
                self.next(order.every, step - origin)
                yield step
                ended.append(time.monotonic())
            stalled, saves = self.saver.stalled - before[0], self.saver.saves - before[1]
            self.saver.flush()
            self.pipe.send(
                {
                    "began": began,
                    "seconds": (ended[-1] - began) / len(ended),
                    "steps": len(ended),
                    "made": self.made[-len(ended) :],
                    "durable": self.saver.durable[begin:],
                    "stalled": stalled,
                    "saves": saves,
                    "peak_memory": machine.peak_memory(),
                    "bytes": machine.bytes_written() - before[2],
                    "held": machine.size(self.folder),
                }
            )

    def next(self, every: int | str, number: int) -> None:
        """Before the step that has this number in its round: whether it will be saved, unless the saver decides that."""
        if isinstance(every, int):
            self.saves = every > 0 and number % every == 0
            self.saver.at(int(self.saves))
        elif number == 1:
            self.saves = False
            self.saver.at(every)

    def tell(self, step: int) -> None:
        """What happened since the last step."""
        for done, _ in self.saver.durable[self.told :]:
            self.pipe.send(("durable", done))
            self.told += 1
        self.pipe.send(("made", step))
