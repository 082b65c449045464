"""The loop that commits, in the trainer and in the monitor: in order, each to an end, none longer than a disk that works."""

from __future__ import annotations

import errno
import threading
import time
from dataclasses import dataclass

import pytest
from waiting import until

from fxckpt.engine import Patience
from fxckpt.errors import Cancelled, SaveFailed
from fxckpt.store.commit_loop import CommitLoop, StallDetector, give_back


@dataclass(eq=False)
class Flight:
    """A checkpoint that a test commits; ``error`` is raised at its commit."""

    path: str
    error: Exception | None = None
    given_up: str = ""

    def give_up(self, why: str) -> None:
        self.given_up = why


class Work:
    """Notes how each checkpoint ended."""

    def __init__(self, commit=lambda flight: None):
        self.ends: list[tuple[str, Exception | None]] = []
        self.rests: list[bool] = []  # after each: whether there was something to do
        self._commit = commit

    def commit(self, flight: Flight) -> None:
        if flight.error is not None:
            raise flight.error
        self._commit(flight)

    def end(self, flight: Flight, error: Exception | None) -> None:
        self.ends.append((flight.path, error))

    def rest(self, busy) -> None:
        self.rests.append(busy())
        raise RuntimeError("it ends nothing")


def test_checkpoints_end_one_by_one_in_the_order_in_which_they_came_and_an_error_ends_only_its_own():
    loop, failure = CommitLoop(lambda: 0), SaveFailed("fsync", "b")
    work = Work(lambda flight: flight.path != "d" or until(lambda: not loop._queue.empty()))  # the end was asked for
    for flight in (Flight("a"), Flight("b", failure), Flight("c", Cancelled("no")), Flight("d")):
        loop.put(flight)
    loop.start(work)
    assert loop.end(30) and not loop.alive()
    assert [path for path, _ in work.ends] == ["a", "b", "c", "d"]
    assert [type(error) for _, error in work.ends] == [type(None), SaveFailed, Cancelled, type(None)]
    assert work.ends[1][1] is failure
    assert work.rests == [True] * 4, "the last one saw that the loop is to end"


def test_a_disk_that_writes_nothing_ends_the_checkpoint_and_one_that_is_slow_does_not():
    written = iter([*range(30), *[30] * 10_000])
    loop = CommitLoop(lambda: next(written), stuck_after=0.2)
    flight = Flight("slot-0.partial")
    began = time.monotonic()

    def ready() -> bool:
        time.sleep(0.02)
        return False

    with pytest.raises(SaveFailed, match=r"slot-0\.partial.*nothing was written for 0\.2 s"):
        loop.wait(flight, ready)
    assert flight.given_up == "the disk hangs" and time.monotonic() - began > 0.6


def test_a_process_that_was_stopped_has_not_waited_for_the_disk(monkeypatch):
    """SIGSTOP, Ctrl-Z, a machine that pauses: hours pass between two looks."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    waited = StallDetector(300, lambda: "the same")
    for _ in range(20):
        now[0] += 3600
        assert not waited.over()
    for _ in range(2990):
        now[0] += 0.1
        assert not waited.over() or now[0] > 20 * 3600 + 297
    now[0] += 0.9
    assert waited.over()


def test_a_wait_in_slices_does_not_count_a_pause(monkeypatch):
    now, answers = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def attempt(seconds):
        answers.append(seconds)
        now[0] += 3600 if len(answers) == 3 else max(seconds, 0.001)
        return len(answers) == 60

    assert Patience(10).until(attempt) and max(answers) <= 0.1
    answers.clear()
    assert not Patience(5).until(attempt) and 50 <= len(answers) < 60


def test_a_thread_that_is_stuck_is_left_behind_in_time():
    held = threading.Event()
    loop = CommitLoop(lambda: 0)
    loop.put(Flight("a"))
    loop.start(Work(lambda flight: held.wait(60)))
    assert not loop.end(0.05) and loop.alive()
    held.set()
    assert loop.end(30)


@pytest.mark.parametrize(
    ("error", "settled", "bad"),
    [
        (Cancelled("dropped"), True, False),
        (SaveFailed("pwrite", "a", None, errno.ENOSPC), True, False),
        (SaveFailed("fdatasync", "a", None, errno.ENOSPC), True, True),
        (SaveFailed("pwrite", "a", None, errno.EIO), True, True),
        (Cancelled("dropped"), False, True),
    ],
    ids=["dropped", "disk full", "failed sync", "damage", "a write that may still land"],
)
def test_a_slot_is_used_again_only_if_nothing_can_be_wrong_with_it(error, settled, bad):
    calls = []

    class Copy:
        def cancel(self):
            calls.append("cancel")

        def settled(self, timeout):
            calls.append("settled")
            return settled

    class Owner:
        def abandon(self, slot, *, bad, why):
            calls.append((slot, bad, why))

    give_back(Owner(), "slot", Copy(), error)
    why = "" if isinstance(error, Cancelled) else str(error)
    assert calls == ["cancel", "settled", ("slot", bad, why)]
