"""Ctrl-C before any line of ours, and handlers of signals at any instant: nothing is left taken, and training goes on."""

from __future__ import annotations

import dis
import gc
import linecache
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from digests import differences, snapshot, stored
from waiting import until

import fxckpt
from fxckpt.store import slots

pytestmark = pytest.mark.usefixtures("one_thread")

OURS = str(Path(fxckpt.__file__).parent)
SAMPLE = int(os.environ.get("FXCKPT_INTERRUPTS", "40"))
"""How many lines of our source are tried for each loop, when they run first; 0: every one, each time it runs."""

STARTING = tuple(f"{OURS}/{room}" for room in ("compiled_optimizer", "engine", "monitor", "run/run", "saving/saver", "store"))
"""Where a run takes what another one can only have later."""

FIRST_IN_A_FINALLY = {"self.between_steps.release()", "set_grad_mode(enabled)"}
"""Calls of C with no instruction before them at which a signal could be seen: only a tracer can come there."""


@cache
def sees_no_signal(file: str, line: int) -> bool:
    """A ``try:`` with no call before it in its block: a signal is seen behind a call, and CPython 3.11 has no handler for that
    instruction, which does nothing."""
    here, before = (linecache.getline(file, number).partition("  #")[0].rstrip() for number in (line, line - 1))
    indent = len(here) - len(here.lstrip())
    return here.strip() == "try:" and not (before.endswith(")") and len(before) - len(before.lstrip()) == indent)


def is_end_of_block(code: CodeType, offset: int, line: int) -> bool:
    """Does a ``with`` call ``__exit__`` here, at its end? No signal can come before that: its line has come once already."""
    if not linecache.getline(code.co_filename, line).lstrip().startswith("with "):
        return False
    starts = [*dis.findlinestarts(code), (len(code.co_code), None)]
    first = next(i for i, (_, number) in enumerate(starts) if number == line)
    return offset >= starts[first + 1][0]


def ctrl_c() -> None:
    raise KeyboardInterrupt


class Interrupt:
    """Calls a handler before the n-th line of ``rooms``, as a signal would; ``seen`` counts them."""

    def __init__(self, n: int, handler: Callable[[], None] = ctrl_c, rooms: tuple[str, ...] = (OURS,)):
        self.n, self.seen, self.where, self.handler, self.rooms = n, 0, "", handler, rooms
        self.first: dict[tuple[str, int], int] = {}  # by file and line, when it ran first

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        return self.line if frame.f_code.co_filename.startswith(self.rooms) else None

    def line(self, frame: Any, event: str, _: Any) -> Any:
        file, number = frame.f_code.co_filename, frame.f_lineno
        if event != "line" or is_end_of_block(frame.f_code, frame.f_lasti, number):
            return self.line
        if linecache.getline(file, number).strip() in FIRST_IN_A_FINALLY or sees_no_signal(file, number):
            return self.line
        self.seen += 1
        self.first.setdefault((file, number), self.seen)
        if self.seen == self.n:
            self.where = f"{os.path.relpath(file, OURS)}:{number}"
            self.handler()
        return self.line

    def around(self, body: Callable[[], None]) -> bool:
        """Run it; was it left by Ctrl-C?"""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            body()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


class Run:
    """A small training in one of the loops."""

    def __init__(self, directory: Path, loop: str):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 8))
        self.opt = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.directory, self.loop = directory, loop
        fxckpt.compile_step(
            self.opt, directory, model=self.model, every=1, update="native", chunk_mb=1, read_back="off", fresh=True,
            writer="monitor" if loop == "monitor" else "thread",
        )  # fmt: skip
        self.inside = self.opt.ckpt._run
        self.inside.saver.loop.stuck_after = 2.0
        self.train(3)
        self.opt.ckpt.flush()

    def step(self) -> None:
        self.opt.zero_grad()
        self.model(torch.ones(4, 8)).square().sum().backward()
        self.opt.step()

    def train(self, steps: int) -> None:
        if self.loop == "steps":
            for _ in fxckpt.steps(self.inside.clock.iteration + steps, optimizer=self.opt):
                self.step()
            return
        for _ in range(steps):
            self.step()

    def interrupted(self) -> None:
        self.train(2)
        if self.loop == "save":
            self.opt.ckpt.save()
        else:
            self.opt.ckpt.flush()

    def check(self) -> None:
        """Training goes on, its checkpoints too, with the right bits, and nothing is taken."""
        assert torch.is_grad_enabled()
        before = self.opt.ckpt.statistics()["checkpoints_committed"]
        self.train(3)
        self.opt.ckpt.flush(30)
        assert self.opt.ckpt.statistics()["checkpoints_committed"] >= before + 3
        newest = max(fxckpt.checkpoints(self.directory), key=lambda each: each.step)
        assert newest.step == self.opt.ckpt.statistics()["steps"]
        assert differences(stored(newest.path), snapshot(self.model, self.opt)) == []
        saver, closing = self.inside.saver, self.inside.closing
        until(lambda: all(slot is saver.supply.ready for slot in self.slots_in_use()))
        assert not saver.flights.under_way() and self.inside.emitter.current is None
        for lock in (closing.between_steps, closing._lock, saver.supply.lock, saver.flights.lock, *self.locks_of_store()):
            assert free_for_others(lock)

    def slots_in_use(self) -> list[object]:
        store = self.inside.store
        return [*(store._link.slots.values() if self.loop == "monitor" else store._pool._busy)]

    def locks_of_store(self) -> tuple[Any, ...]:
        store = self.inside.store
        return (store._link._lock, store._starting) if self.loop == "monitor" else (store._pool.moves, store._pool.mutex)


def free_for_others(lock: Any) -> bool:
    """Can another thread have it?"""
    found = []

    def take() -> None:
        if lock.acquire(timeout=10):
            found.append(True)
            lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return bool(found)


def lines_of(run: Run) -> list[int]:
    """Those that are tried."""
    whole = Interrupt(0)
    assert not whole.around(run.interrupted)
    count = SAMPLE // 3 if run.loop == "monitor" else SAMPLE
    return random.Random(0).sample([*whole.first.values()], count) if SAMPLE else [*range(1, whole.seen + 1)]


@pytest.mark.parametrize("loop", ["plain", "steps", "save", "monitor"])
def test_ctrl_c_before_any_line_of_ours_leaves_nothing_taken(loop, tmp_path):
    run = Run(tmp_path, loop)
    for n in lines_of(run):
        interrupt = Interrupt(n)
        interrupt.around(run.interrupted)
        try:
            run.check()
        except Exception as error:
            raise AssertionError(f"interrupted before line {n}, {interrupt.where}") from error
    run.opt.ckpt.shutdown()


LONG = pytest.mark.skipif(SAMPLE > 0, reason="starts hundreds of processes: set FXCKPT_INTERRUPTS=0")


@pytest.mark.parametrize("writer", ["thread", pytest.param("monitor", marks=LONG)])
def test_ctrl_c_before_any_line_while_a_run_starts_leaves_its_directory_free(writer, tmp_path):
    def start(directory: Path) -> None:
        model = torch.nn.Linear(4, 4)
        opt = torch.optim.AdamW(model.parameters())
        fxckpt.compile_step(opt, directory, model=model, every=1, update="native", writer=writer)
        kept.append(opt)  # Python ignores what is raised where the last reference goes
        opt.ckpt.shutdown()

    kept: list[object] = []
    start(tmp_path / "0")
    gc.freeze()  # a collection need not look at all that torch has imported: 0.3 s each
    whole = Interrupt(0, rooms=STARTING)
    whole.around(partial(start, tmp_path / "1"))
    lines = [*whole.first.values()]
    for n in random.Random(0).sample(lines, 3 * SAMPLE) if SAMPLE else lines:
        directory, interrupt = tmp_path / f"at-{n}", Interrupt(n, rooms=STARTING)
        interrupt.around(partial(start, directory))
        kept.clear()
        gc.collect()
        try:
            start(directory)
        except Exception as error:
            raise AssertionError(f"interrupted before line {n}, {interrupt.where}") from error


@pytest.mark.parametrize("asks", ["save", "flush"])
def test_a_handler_before_any_line_of_ours_gets_what_it_asks_for_or_is_refused_at_once(asks, tmp_path):
    """Where it waited for its own thread, the patience of a hung disk would end that with another error."""
    run, refused = Run(tmp_path, "plain"), []

    def handler() -> None:
        try:
            getattr(run.opt.ckpt, asks)()
        except fxckpt.SetupError as error:
            assert "finish_on_signal" in str(error) or "in its middle" in str(error)
            refused.append(error)

    lines = [1, *lines_of(run)]  # the first is before any step, where the few that are drawn may all lie within one
    for n in lines:
        interrupt = Interrupt(n, handler)
        try:
            assert not interrupt.around(run.interrupted)
            run.check()
        except Exception as error:
            raise AssertionError(f"asked before line {n}, {interrupt.where}") from error
    assert 0 < len(refused) < len(lines)
    run.opt.ckpt.shutdown()


def test_a_handler_while_a_step_opens_its_files_is_refused_at_once(tmp_path, monkeypatch):
    run, refused, acquire = Run(tmp_path, "plain"), [], slots.Store.acquire

    def handler(*_: object) -> None:
        for ask in (run.opt.ckpt.save, run.opt.ckpt.flush, run.opt.ckpt.shutdown):
            with pytest.raises(fxckpt.SetupError, match="finish_on_signal") as raised:
                ask()
            refused.append(raised.value)

    def acquiring(*args: Any) -> Any:
        if threading.current_thread() is threading.main_thread() and not refused:
            os.kill(os.getpid(), signal.SIGUSR1)
        return acquire(*args)

    until(lambda: run.inside.saver.supply.ready is not None)
    run.inside.saver.supply.ready = None  # so that the step has to ask
    run.inside.store.reclaim([])
    monkeypatch.setattr(slots.Store, "acquire", acquiring)
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        run.train(1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(refused) == 3
    run.check()


def test_a_handler_in_a_wait_of_its_own_thread_can_save(tmp_path, monkeypatch):
    run, asked = Run(tmp_path, "plain"), []
    changed = run.inside.saver.flights.changed
    wait = changed.wait

    def waiting(timeout: float) -> bool:
        if threading.current_thread() is threading.main_thread() and not asked:
            asked.append(True)
            run.opt.ckpt.save("preempted")
        return wait(timeout)

    monkeypatch.setattr(changed, "wait", waiting)
    run.train(1)
    run.opt.ckpt.flush()
    assert asked and (tmp_path / "named" / "preempted").is_dir()
    run.check()
