"""Rounds of one way to save, with and without its checkpoints, and what they say."""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import contest
from trainers import LIMIT, WAYS, live
from turns import Order


class Duel:
    """One way to save, with and without its checkpoints, in turns."""

    def __init__(self, model: str, way: str, folder: Path, args: Namespace):
        self.way, self.args = WAYS[way], args
        begin = partial(contest.Contestant, kind="forkserver", limit=LIMIT)
        self.mine = begin(f"{model}, {self.way.label}", live, model, way, folder, args)
        self.base = self.mine
        if way == "fxckpt":
            self.base = begin(f"{model}, no checkpoints", live, model, "none", folder, args)
        self.found: dict[int | str, list[dict]] = {0: [], 1: [], 10: []}

    def order(self, every: int | str) -> Order:
        """A round of this cadence."""
        if every == 0:
            return Order(0, 3)
        if self.way.waits:
            return Order(1, 2)
        return Order(every, 10 if every == 10 else 3, first=True)

    def run(self) -> dict[str, Any]:
        """All rounds, for as long as there is time for another."""
        try:
            self.plain_memory = self.base.ask(Order(0, 3))["peak_memory"]  # nothing has been saved: what training needs
            self.mine.ask(Order(1, 2 if self.base is self.mine else 5))  # every buffer and slot is used once
            cadences: list[int | str] = [0, 1] if self.way.waits else [0, 1, 10]
            began, number = time.monotonic(), 0
            while number < self.args.least or (time.monotonic() - began < self.args.seconds and number < self.args.rounds):
                for every in contest.in_turn(number, cadences):
                    self.found[every].append((self.mine if every else self.base).ask(self.order(every)))
                number += 1
            if self.base is not self.mine:
                self.auto()
            self.end()
            return self.report()
        finally:  # whatever came between, a Ctrl-C included
            self.mine.kill()
            self.base.kill()

    def auto(self) -> None:
        """A minute with ``every="auto"``, between two rounds without checkpoints."""
        before = self.base.ask(Order(0, 3))
        self.found["auto"] = [self.mine.ask(Order("auto", 1, self.args.auto_seconds, first=True))]
        after = self.base.ask(Order(0, 3))
        self.around = (before["seconds"] + after["seconds"]) / 2

    def end(self) -> None:
        """The processes end by themselves."""
        for each in {self.mine, self.base}:
            each.pipe.send(None)
            each.join()

    def report(self) -> dict[str, Any]:
        """What the rounds say, by cadence."""
        plain = [found["seconds"] for found in self.found[0]]
        rows = {"none": {"rounds": plain, "peak_memory": self.plain_memory}}
        for every in (1, 10, "auto"):
            if rounds := self.found.get(every):
                seconds = [found["seconds"] for found in rounds]
                rows[str(every)] = {
                    **contest.ratios(seconds, [self.around] if every == "auto" else plain),
                    "rounds": seconds,
                    **summary(rounds, every, self.way.waits),
                }
        if self.way.waits:
            seconds = [(9 * without + step) / 10 for without, step in zip(plain, rows["1"]["rounds"])]
            each = {name: rows["1"][name] for name in ("stall_seconds", "bytes", "peak_memory", "held")}
            rows["10"] = {**contest.ratios(seconds, plain), "rounds": seconds, "computed": True, **each}
            rows["10"]["lost"] = tenth_lost(statistics.median(plain), statistics.median(seconds))
        return rows


def summary(rounds: list[dict], every: int | str, waits: bool) -> dict[str, Any]:
    """Medians over rounds: what one checkpoint stalls and writes, what a kill would cost; the most memory and disk."""
    each = [lost(found, 0 if waits else every) for found in rounds]
    saves = [max(1, found["saves"]) for found in rounds]
    return {
        "stall_seconds": statistics.median(found["stalled"] / n for found, n in zip(rounds, saves)),
        "bytes": statistics.median(found["bytes"] / n for found, n in zip(rounds, saves)),
        "peak_memory": max(found["peak_memory"] for found in rounds),
        "held": max(found["held"] for found in rounds),
        "saves": sum(found["saves"] for found in rounds),
        "lost": {"mean": statistics.mean(mean for mean, _ in each), "most": max(most for _, most in each)},
    }


def lost(found: dict, behind: int | str) -> tuple[float, int]:
    """Steps made that no complete checkpoint has: the mean over all instants of a round, and the most.

    At its beginning the newest one is so many steps ``behind``, as in a training that goes on for long: none if each save was
    waited for, else those from one to the next; of a word, those of the whole round.
    """
    made, before = found["made"], found["made"][0][0] - 1
    newest = before - (behind if isinstance(behind, int) else len(made))
    if before == 0:
        newest = 0
    events = sorted([(when, "made", step) for step, when in made] + [(when, "durable", step) for step, when in found["durable"]])
    end = found["began"] + found["seconds"] * found["steps"]
    now, reached, total, most = found["began"], before, 0.0, 0
    for when, what, step in [*events, (end, "made", 0)]:
        if now < (until := min(max(when, found["began"]), end)):
            total += (until - now) * (reached - newest)
            most, now = max(most, reached - newest), until
        if what == "made":
            reached = max(reached, step)
        else:
            newest = max(newest, step)
    return total / (end - found["began"]), most


def tenth_lost(plain: float, tenth: float) -> dict[str, float]:
    """Of one who waits for the disk: nothing right after a save, one step more after each step, ten while it saves."""
    saving = 10 * tenth - 10 * plain
    return {"mean": (sum(range(10)) * plain + 10 * saving) / (10 * tenth), "most": 10}
