"""A soak: runs of one training, each with faults at random calls, killed at a random instant or ended, one after the other.

``FXCKPT_SOAK`` says how many with each writer (3; ``make soak``: 500), ``FXCKPT_SEED`` repeats a run's dice,
``FXCKPT_SOAK_WRITER`` leaves one writer. After each run every checkpoint verifies and is one step, whole; the newest is no
older than what was reported; no process is left that has anything of the store open. At the end no shared memory is.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from known_sums import good
from process_runs import ProcessRun
from waiting import until

SOAK = int(os.environ.get("FXCKPT_SOAK", "3"))
SEED = int(os.environ.get("FXCKPT_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)
WRITERS = os.environ.get("FXCKPT_SOAK_WRITER", "thread monitor").split()

SCRIPT = """
from script_prelude import *
from known_sums import Sums, Tally, tell, wrong
import instruments
import errno, os

dice = random.Random(int(os.environ["DICE"]))
ERRORS = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.EINTR, 0]
faults = dice.random() < 0.5

def disturb(calls):
    if faults and dice.random() < 0.3:
        instruments.fail(dice.randint(1, calls), dice.choice(ERRORS))

def fds():
    return len(os.listdir("/proc/self/fd"))

m = Sums()
model = eager(m)
tally = Tally()
opt = torch.optim.SGD(m.parameters(), lr=1.0, momentum=1.0)
disturb(30)
try:
    fxckpt.compile_step(opt, "d", model=m, every=dice.choice([1, 1, 2]), keep=dice.choice([1, 2, 3]), update="native",
                        chunk_mb=1, max_async=dice.choice([1, 2]), writer=os.environ["WRITER"], extra={"tally": tally})
except (OSError, fxckpt.StoreError) as error:
    instruments.fail_none()
    print("REFUSED", error)
    raise SystemExit(0)
instruments.fail_none()
steps = [each.step for each in fxckpt.checkpoints("d")]
back = dice.choice(steps[:-1]) if len(steps) > 1 and dice.random() < 0.15 else None
start = fxckpt.load(step=back).step
tell("loaded" if back is None else "back", start)
assert not wrong(start, m, opt, tally), wrong(start, m, opt, tally)
end = start + (dice.randint(1, 60) if dice.random() < 0.3 else 10**9)
most = 0
for step in range(start, end):
    if step - start > 2:
        disturb(200)
    model().backward()
    opt.step()
    opt.zero_grad()
    tally.steps += 1
    found = opt.ckpt.statistics()
    assert faults or found["checkpoints_failed"] == 0, found
    if (found["last_committed_step"] or start) != start:
        tell("committed", found["last_committed_step"])
    most = max(most, fds())
    assert most < 60, os.listdir("/proc/self/fd")
instruments.fail_none()
try:
    opt.ckpt.shutdown()
except (OSError, fxckpt.FxckptError) as error:
    print("SHUTDOWN", error)
"""


def floor_of(report: Path) -> tuple[int, int | None]:
    """The newest step that was reported in the branch that counts, and where a run went back to that reported none yet."""
    floor, back = 0, None
    for line in report.read_text().splitlines() if report.exists() else ():
        what, step = line.split()
        if what == "back":
            back = int(step)
        elif what == "committed":
            floor, back = int(step), None
    return floor, back


def let_run(process: ProcessRun, directory: Path, dice: random.Random) -> str:
    """Let a run go on for a while, then kill it if it has not ended; how it ended."""
    report = directory / "report"
    before = report.stat().st_size if report.exists() else 0
    if dice.random() < 0.95:
        more = before + dice.randrange(10, 500)
        until(lambda: not process.alive() or (report.exists() and report.stat().st_size > more), why=lambda: process.output)
    time.sleep(dice.uniform(0, 0.1))
    killed = process.alive()
    process.kill()
    assert process.returncode == -signal.SIGKILL if killed else process.returncode in (0, -signal.SIGKILL), process.output
    return "killed" if process.returncode else "refused at its opening" if "REFUSED" in process.output else "ended"


def users_of(directory: Path) -> list[int]:
    """Processes that have a file below it open, or memory of one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = [os.readlink(link) for link in (process / "fd").iterdir()]
        except OSError:
            continue  # it ended while we looked
        if any(link.startswith(f"{directory}/") for link in links):
            found.append(int(process.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_soak_of_kills_faults_and_restarts_never_loses_what_was_reported(writer, fork_server, tmp_path, counted):
    script, directory, dice = tmp_path / "train.py", tmp_path / "d", random.Random(SEED)
    script.write_text(SCRIPT)
    shared = set(os.listdir("/dev/shm"))
    print(f"seed {SEED}")
    for number in range(SOAK):
        process = fork_server.start(script, directory, DICE=str(dice.randrange(2**32)), WRITER=writer)
        counted(f"runs that were {let_run(process, directory, dice)} ({writer} writer)", 1)
        # a monitor may be finishing what it was given
        until(lambda: not users_of(directory / "d"), why=lambda: f"processes {users_of(directory / 'd')} are left")
        floor, back = floor_of(directory / "report")
        newest = good(directory, 0)
        assert newest >= floor or (back is not None and newest > back), (
            f"run {number} (seed {SEED}): step {floor} was reported, the newest is {newest}"
        )
        assert not Path(f"/proc/{process.pid}").exists(), "the trainer is left"
    counted("steps reported durable in the soak", len((directory / "report").read_text().splitlines()))
    left = {name for name in os.listdir("/dev/shm") if not name.startswith("fxckpt-test-")}  # folders of tests beside us
    assert left <= shared, "shared memory is left"
