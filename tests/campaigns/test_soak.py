"""A soak: runs of one training, each with faults at random calls, killed at a random instant or ended, one after the other.

``FXCKPT_SOAK`` says how many with each writer (3; ``make soak``: 500), ``FXCKPT_SEED`` repeats a run's dice,
``FXCKPT_SOAK_WRITER`` leaves one writer, ``FXCKPT_SOAK_JOURNAL`` the lengths of a journal that runs choose among. After each run
every checkpoint verifies and is one step, whole, and so is every last step of a journal; the newest is no older than what was
reported; no process is left that has anything of the store open. At the end no shared memory is.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from known_sums import check, check_made_again, good, made_again
from process_runs import ProcessRun
from vandal import Vandal, users_of
from waiting import until

from fxckpt.errors import Corrupt
from fxckpt.store.journaled import Journaled, journaled
from fxckpt.store.reader import Reader, candidates, directory_of, records

SOAK = int(os.environ.get("FXCKPT_SOAK", "3"))
SEED = int(os.environ.get("FXCKPT_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)
WRITERS = os.environ.get("FXCKPT_SOAK_WRITER", "thread monitor").split()
JOURNAL = os.environ.get("FXCKPT_SOAK_JOURNAL", "1 2 3 8 64 auto")

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
    journal = dice.choice(os.environ["JOURNAL"].split())
    journal = int(journal) if journal.isdecimal() else journal
    fxckpt.compile_step(opt, "d", model=m, every=dice.choice([1, 1, 2]) if journal == 1 else 1, keep=dice.choice([1, 2, 3]),
                        update="native", chunk_mb=1, max_async=dice.choice([1, 2]), writer=os.environ["WRITER"],
                        extra={"tally": tally}, journal=journal)
except (OSError, fxckpt.StoreError) as error:
    instruments.fail_none()
    print("REFUSED", error)
    raise SystemExit(0)
instruments.fail_none()
steps = fxckpt.durable_steps("d")
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


VANDALIZED = """
from script_prelude import *
from known_sums import Sums, Tally, tell, wrong
import faulthandler, shutil, signal

faulthandler.enable()  # says where it was, if something aborts
signal.signal(signal.SIGINT, signal.default_int_handler)
dice = random.Random(int(os.environ["DICE"]))
m = Sums(frozen=300_000)
model = eager(m)
tally = Tally()
opt = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1.0, momentum=1.0)
try:
    fxckpt.compile_step(opt, "d", model=m, every=1, keep=dice.choice([2, 3]), update="native", chunk_mb=1,
                        max_async=dice.choice([1, 2]), writer=os.environ["WRITER"], extra={"tally": tally},
                        read_back=dice.choice(["off", "sampled", "all"]), journal=int(os.environ["JOURNAL"]))
    if dice.random() < 0.5:
        opt.ckpt.finish_on_signal()
    start = fxckpt.load().step
except (OSError, fxckpt.FxckptError) as error:
    print("REFUSED", type(error).__name__, error)
    raise SystemExit(0)
tell("loaded", start)
assert not wrong(start, m, opt, tally), wrong(start, m, opt, tally)
end = start + (dice.randint(1, 60) if dice.random() < 0.2 else 10**9)
for step in range(start, end):
    model().backward()
    opt.step()
    opt.zero_grad()
    tally.steps += 1
    found = opt.ckpt.statistics()
    if (found["last_committed_step"] or start) != start:
        tell("committed", found["last_committed_step"])
    if dice.random() < 0.01:
        shutil.rmtree("upload", ignore_errors=True)
        try:
            shutil.copytree("d", "upload", symlinks=True, ignore=lambda path, found: [each for each in found if each != "lock"
                            and not os.path.isdir(os.path.join(path, each))])
        except (OSError, shutil.Error):
            pass
try:
    opt.ckpt.shutdown()
except (OSError, fxckpt.FxckptError) as error:
    print("SHUTDOWN", error)
"""

ENDS = ("KeyboardInterrupt", "fxckpt.errors.")
"""What ends a run that was interrupted, or whose store is gone."""


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
    process.kill()  # unless it has ended, perhaps just now
    assert process.returncode in (0, -signal.SIGKILL), f"{process.returncode}: {process.output}"
    return "killed" if process.returncode else "refused at its opening" if "REFUSED" in process.output else "ended"


def wait_for_all_of(process: ProcessRun, root: Path) -> None:
    """Wait for the other processes of a run that has ended. A monitor whose trainer was killed before it was there has nothing
    of the store open yet, but what it tells its errors."""

    def left() -> list[int]:
        return users_of(root) + users_of(process.log)

    until(lambda: not left(), why=lambda: f"processes {left()} are left")


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_soak_of_kills_faults_and_restarts_never_loses_what_was_reported(writer, fork_server, tmp_path, counted):
    script, directory, dice = tmp_path / "train.py", tmp_path / "d", random.Random(SEED)
    script.write_text(SCRIPT)
    shared = set(os.listdir("/dev/shm"))
    print(f"seed {SEED}")
    for number in range(SOAK):
        process = fork_server.start(script, directory, DICE=str(dice.randrange(2**32)), WRITER=writer, JOURNAL=JOURNAL)
        counted(f"runs that were {let_run(process, directory, dice)} ({writer} writer)", 1)
        # a monitor may be finishing what it was given
        wait_for_all_of(process, directory / "d")
        floor, back = floor_of(directory / "report")
        newest = good(directory, 0)
        assert newest >= floor or (back is not None and newest > back), (
            f"run {number} (seed {SEED}): step {floor} was reported, the newest is {newest}"
        )
        assert not Path(f"/proc/{process.pid}").exists(), "the trainer is left"
        counted(f"steps of a journal made again by the soak ({writer} writer)", made_again(directory))
    counted("steps reported durable in the soak", len((directory / "report").read_text().splitlines()))
    left = {name for name in os.listdir("/dev/shm") if not name.startswith("fxckpt-test-")}  # folders of tests beside us
    assert left <= shared, "shared memory is left"


def let_run_beside(vandal: Vandal, process: ProcessRun, directory: Path, dice: random.Random) -> str:
    """The same, with a vandal at work."""
    report = directory / "report"
    before = report.stat().st_size if report.exists() else 0
    if dice.random() < 0.8:
        until(lambda: not process.alive() or (report.exists() and report.stat().st_size > before), why=lambda: process.output)
    for _ in range(dice.randint(3, 40)):
        time.sleep(dice.uniform(0, 0.05))
        if not process.alive():
            break
        vandal.act(process.pid)
    killed = process.alive() and dice.random() < 0.8
    if not killed:
        process.kill(signal.SIGTERM)
    process.kill()
    vandal.rest()
    trace = process.output.rpartition("Traceback (most recent call last):\n")[2].splitlines()
    raised = next((line for line in trace if not line.startswith(" ")), "")
    expected = process.returncode in (0, -signal.SIGKILL, -signal.SIGTERM)
    assert expected or raised.startswith(ENDS), f"{process.returncode}: {process.output}"
    return (
        "killed"
        if process.returncode == -signal.SIGKILL
        else "refused at its opening"
        if "REFUSED" in process.output
        else "ended"
    )


def survivors(root: Path, vandal: Vandal) -> list[int]:
    """The steps that load, checkpoints' and the last one of each journal; what does not must be the vandal's work, and its error
    says which it is."""
    found, whole = [], []
    for each in candidates(root):
        name = Path(directory_of(each)).name
        try:
            if isinstance(each, Corrupt):
                raise each
            check(each)
            found.append(each.record.step)
            whole.append(each)
        except Corrupt as error:
            assert vandal.ruined(name), f"nobody touched it: {error}"
            assert name in str(error)
    return found + [step for row in journaled(whole, records(root)) if (step := last_step(row, vandal)) is not None]


def last_step(row: Journaled, vandal: Vandal) -> int | None:
    """The last step of a journal that can be made again; before a record that cannot be read, which must be the vandal's work."""
    good = 0
    try:
        for each in row.records:
            Reader(each.path).verify()
            good += 1
    except Corrupt as error:
        assert vandal.ruined(row.records[good].path.name), f"nobody touched it: {error}"
    if (left := row.cut(good)) is None:
        return None
    check_made_again(left)
    return left.record.step


@pytest.mark.slow
@pytest.mark.parametrize("journal", [1, 5] if "FXCKPT_SOAK" in os.environ else [1])
@pytest.mark.parametrize("writer", WRITERS)
def test_beside_a_vandal_only_what_he_touched_is_lost_and_it_is_named(writer, journal, fork_server, tmp_path, counted):
    script, directory, dice = tmp_path / "train.py", tmp_path / "d", random.Random(SEED)
    script.write_text(VANDALIZED)
    directory.mkdir()
    root, report = directory / "d", directory / "report"
    print(f"seed {SEED}")
    vandal = Vandal(root, tmp_path / "outside", dice)
    newest = 0
    for number in range(SOAK):
        vandal.new_life()
        before = len(report.read_text().splitlines()) if report.exists() else 0
        chosen = {"DICE": str(dice.randrange(2**32)), "WRITER": writer, "JOURNAL": str(journal)}
        process = fork_server.start(script, directory, **chosen)
        how = let_run_beside(vandal, process, directory, dice)
        counted(f"runs that were {how} beside a vandal ({writer} writer, journal={journal})", 1)
        wait_for_all_of(process, root)
        vandal.check_outside()
        told = report.read_text().splitlines()[before:] if report.exists() else []
        floor, alive = max([int(line.split()[1]) for line in told], default=newest), survivors(root, vandal)
        where = f"run {number} (seed {SEED}): step {floor} was reported, {alive} load\n{process.output}" + "\n".join(
            vandal.journal[-50:]
        )
        newest = max(alive, default=0)
        # A step of a journal is lost with any record before it, or its checkpoint.
        assert newest >= floor or vandal.ruined_since(floor if journal == 1 else newest + 1), where
        if not alive and report.exists():  # nothing is left to go on with
            shutil.rmtree(root)
            report.unlink()
            counted("stores of which nothing was left", 1)
    for what, many in vandal.acts.items():
        counted(f"acts of a vandal: {what}", many)
