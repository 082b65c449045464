"""The monitor writer: what was handed over is committed when the trainer is gone, and nothing is left behind.

``FXCKPT_KILLS`` says how often the trainer is killed (3; ``make kills``: 100), ``FXCKPT_STATE_MB`` with how much state in
the test that has the most (24). The script and its numbers are those of ``test_kill_loop.py``: any byte of a checkpoint tells
which step it is of.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from known_sums import good, run_and_be_killed, told
from process_runs import ProcessRun
from repository import python_path
from small_models import mlp
from small_training import Training, all_good
from waiting import committed, until

import fxckpt
from fxckpt.engine import Engine
from fxckpt.engine.ring import Ring, post_into
from fxckpt.monitor import client, launch, link, wire
from fxckpt.store.lock import wait_for_monitor
from fxckpt.store.slots import Store

pytestmark = pytest.mark.usefixtures("one_thread")

KILLS = int(os.environ.get("FXCKPT_KILLS", "3"))
STATE_MB = int(os.environ.get("FXCKPT_STATE_MB", "24"))

SCRIPT = """
import os, threading
from script_prelude import *
from known_sums import Sums, Tally, tell, wrong

os.setsid()
m = Sums()
larger = int(os.environ.get("LARGER", "1"))
m.weights = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(len(w) * larger, dtype=w.dtype)) for w in m.weights)
tally = Tally()
opt = torch.optim.SGD(m.parameters(), lr=1.0, momentum=1.0)
fxckpt.compile_step(opt, "d", model=m, every=1, update="native", chunk_mb=1, writer="monitor",
                    staging_mb=int(os.environ["STAGING"]), extra={"tally": tally})
monitor = opt.ckpt._run.store.pid
start = fxckpt.load().step
with open("monitors", "a") as file:
    file.write(f"{monitor}\\n")
tell("loaded", start)
assert not wrong(start, m, opt, tally), wrong(start, m, opt, tally)
if "WORKER" in os.environ and os.fork() == 0:
    import time
    open("worker", "w").write(str(os.getpid()))
    time.sleep(300)
    os._exit(0)

def watch():  # a thread of its own, so that a step is reported as soon as it is handed over
    last = 0
    while True:
        found = opt.ckpt.statistics()
        if found["checkpoints_failed"]:
            os._exit(3)
        if (found["last_handed_over_step"] or 0) > last:
            last = found["last_handed_over_step"]
            tell("handed", last)
        threading.Event().wait(0.001)

threading.Thread(target=watch, daemon=True).start()
for step in range(start, 10**9):
    m().backward()
    opt.step()
    opt.zero_grad()
    tally.steps += 1
"""


def state_of(pid: int) -> str:
    """The letter of a process's state; Z is one that nobody has reaped yet; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def gone(pid: int) -> bool:
    return state_of(pid) in ("", "Z")


def monitors(directory: Path) -> list[int]:
    """Of all runs so far that came to start one."""
    noted = directory / "monitors"
    return [int(line) for line in noted.read_text().split()] if noted.exists() else []


def holders() -> list[str]:
    """Every process that has memory of a ring mapped or open."""
    return [p.name for p in Path("/proc").glob("[0-9]*") if any("fxckpt-ring" in each for each in (*links(p), maps(p)))]


def links(process: Path) -> list[str]:
    """What a process has open."""
    out = []
    for fd in (process / "fd").glob("*"):
        try:
            out.append(os.readlink(fd))
        except OSError:
            continue
    return out


def maps(process: Path) -> str:
    try:
        return (process / "maps").read_text()
    except OSError:
        return ""


def start(fork_server, tmp_path, staging: int = 8, **variables: str) -> ProcessRun:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    return fork_server.start(script, tmp_path / "d", STAGING=str(staging), **variables)


def handing_over(process: ProcessRun, directory: Path, steps: int = 3) -> None:
    until(lambda: told(directory)[0] >= steps or not process.alive(), why=lambda: process.output)
    assert process.alive(), process.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("larger", "staging"),
    [(1, 2), (1, 8), (-(-STATE_MB // 3), STATE_MB + 8)],
    ids=["small ring", "ring of more than the state", f"{STATE_MB} MB of state and a ring to match"],
)
def test_every_step_reported_as_handed_over_is_committed_after_a_kill_at_any_instant(fork_server, tmp_path, larger, staging):
    directory = tmp_path / "d"
    seed = random.SystemRandom().randrange(2**32)
    chance, newest, finished, kills = random.Random(seed), 0, 0, 0
    while kills < KILLS or newest < KILLS:  # runs that are killed before their first step alone would show little
        kills += 1
        assert kills <= 20 * KILLS, f"seed {seed}: hardly a step was made"
        process = start(fork_server, tmp_path, staging, LARGER=str(larger))
        if larger == 1:
            run_and_be_killed(process, directory, chance)
        else:  # starting takes longer than a step: a kill that comes before the first one was handed over shows little
            handing_over(process, directory, newest + chance.randrange(1, 4))
            time.sleep(chance.uniform(0, 0.5))
            process.kill()
        handed, _ = told(directory)
        finished += handed > newest_by_name(directory)
        for pid in monitors(directory)[-1:]:
            until(lambda pid=pid: gone(pid), why=lambda pid=pid: f"seed {seed}: the monitor {pid} outlives its work")
        newest = good(directory, max(handed, newest))
    print(f"{kills} kills, seed {seed}: up to step {newest}; {finished} times the monitor had to finish what was handed over")
    assert not set(map(str, monitors(directory))) & set(holders())


def newest_by_name(directory: Path) -> int:
    return max((int(name.split("-")[1]) for name in committed(directory / "d")), default=0)


def test_ctrl_c_to_the_group_ends_the_trainer_and_not_what_it_handed_over(fork_server, tmp_path):
    process, directory = start(fork_server, tmp_path), tmp_path / "d"
    handing_over(process, directory)
    (monitor,) = monitors(directory)
    assert os.getsid(monitor) == monitor != os.getsid(process.pid) == process.pid
    os.killpg(process.pid, signal.SIGINT)
    process.wait()
    assert "KeyboardInterrupt" in process.output
    until(lambda: gone(monitor), why=lambda: "the monitor outlives its work")
    good(directory, told(directory)[0])


def test_signals_that_end_whole_sessions_do_not_end_the_monitor(fork_server, tmp_path):
    process, directory = start(fork_server, tmp_path), tmp_path / "d"
    handing_over(process, directory)
    (monitor,) = monitors(directory)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        os.kill(monitor, number)
    handing_over(process, directory, told(directory)[0] + 3)
    process.kill()
    until(lambda: gone(monitor))
    good(directory, told(directory)[0])


def test_a_forked_worker_that_outlives_the_trainer_keeps_neither_the_monitor_nor_its_memory(fork_server, tmp_path):
    process, directory = start(fork_server, tmp_path, WORKER="1"), tmp_path / "d"
    handing_over(process, directory)
    (monitor,) = monitors(directory)
    until((directory / "worker").exists)
    until(lambda: (directory / "worker").read_text() != "")
    worker = int((directory / "worker").read_text())
    try:
        process.kill()
        until(lambda: gone(monitor), why=lambda: "the monitor waits for a worker")
        good(directory, told(directory)[0])
        assert not gone(worker) and str(worker) not in holders()
        held = [link for link in links(Path(f"/proc/{worker}")) if "eventfd" in link or "pidfd" in link or "socket" in link]
        assert held == []
    finally:
        os.kill(worker, signal.SIGKILL)


def test_the_next_run_waits_for_the_monitor_of_the_one_before(fork_server, tmp_path):
    process, directory = start(fork_server, tmp_path), tmp_path / "d"
    handing_over(process, directory)
    process.kill()
    store = Store(directory / "d")
    wait_for_monitor(store.open)
    store.close()
    assert gone(monitors(directory)[0]) or good(directory, told(directory)[0])
    good(directory, told(directory)[0])


def test_the_monitor_has_no_torch_and_is_small(fork_server, tmp_path):
    process, directory = start(fork_server, tmp_path), tmp_path / "d"
    handing_over(process, directory)
    (monitor,) = monitors(directory)
    maps = Path(f"/proc/{monitor}/maps").read_text()
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{monitor}/status").read_text().splitlines() if ":\t" in line)
    assert "_engine.abi3" in maps and "torch" not in maps
    assert int(status["RssAnon"].split()[0]) < 60 << 10
    assert process.alive()


# ---- in this process ----


def training(directory, **options):
    m = mlp()
    opt = torch.optim.AdamW(m.parameters(), lr=1e-2)
    fxckpt.compile_step(
        opt,
        directory,
        **{"model": m, "every": 1, "update": "native", "writer": "monitor", "chunk_mb": 1, "staging_mb": 4, **options},
    )

    def step() -> None:
        m(torch.zeros(2, 8)).sum().backward()
        opt.step()
        opt.zero_grad()

    return opt, step


def descriptors() -> list[str]:
    return sorted(link for link in links(Path("/proc/self")) if "/proc/" not in link)


def test_shutdown_leaves_no_process_no_descriptor_and_no_memory(tmp_path):
    opt, step = training(tmp_path / "warm")  # what is opened once and for all
    step(), opt.ckpt.shutdown()
    before = descriptors()
    opt, step = training(tmp_path / "d")
    assert str(os.getpid()) in holders()
    pid = opt.ckpt._run.store.pid
    for _ in range(3):
        step()
    opt.ckpt.shutdown()
    assert state_of(pid) == ""
    assert opt.ckpt.statistics()["last_committed_step"] == 3
    assert descriptors() == before and str(os.getpid()) not in holders()


def test_a_killed_monitor_is_noticed_said_and_replaced(tmp_path, caplog):
    opt, step = training(tmp_path / "d")
    step()
    opt.ckpt.flush()
    first = opt.ckpt._run.store.pid
    with caplog.at_level(logging.WARNING, "fxckpt"):
        os.kill(first, signal.SIGKILL)
        until(lambda: "SIGKILL" in caplog.text)  # nothing was asked of it
        for _ in range(4):
            step()
    assert opt.ckpt._run.store.pid != first and "another monitor was started" in caplog.text
    assert state_of(first) == ""
    with contextlib.suppress(fxckpt.SaveFailed):  # of a step whose slot the dead one had made ready
        opt.ckpt.flush()
    opt.ckpt.flush()
    opt.ckpt.shutdown()
    found = [each.step for each in fxckpt.checkpoints(tmp_path / "d")]
    assert found == [5, 4] or found == [4, 5]


def test_a_monitor_that_stops_for_a_while_costs_checkpoints_in_bounded_time_and_is_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr(link, "PATIENCE", 1.0)
    monkeypatch.setattr(client, "EXIT_PATIENCE", 5.0)
    training = Training(tmp_path / "d", writer="monitor", staging_mb=8).train(2)
    training.opt.ckpt.flush()
    training.opt.ckpt._run.saver.loop.stuck_after = 0.5
    os.kill(training.opt.ckpt._run.store.pid, signal.SIGSTOP)
    training.train(6)
    with pytest.raises(fxckpt.SaveFailed):
        training.opt.ckpt.flush()
    with pytest.raises(fxckpt.SaveFailed, match="stopped, or the disk hangs"):
        training.opt.ckpt.save("x")
    os.kill(training.opt.ckpt._run.store.pid, signal.SIGCONT)
    until(lambda: training.train(1).found["last_committed_step"] > 8)
    with contextlib.suppress(fxckpt.SaveFailed):  # of steps before it was back
        training.opt.ckpt.flush()
    training.end()
    assert all_good(tmp_path / "d", training)[-2:] == [2, 1]


def test_a_message_that_a_stopped_monitor_does_not_read_ends_in_bounded_time(tmp_path, monkeypatch):
    monkeypatch.setattr(link, "PATIENCE", 1.0)
    monkeypatch.setattr(client, "EXIT_PATIENCE", 1.0)
    training = Training(tmp_path / "d", writer="monitor", staging_mb=8).train(1)
    training.opt.ckpt.flush()
    connected = training.opt.ckpt._run.store._link
    os.kill(connected.process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(fxckpt.SaveFailed, match="stopped, or the disk hangs"):
            connected.send({"op": "nothing"}, [bytes(16 << 20)])
    finally:
        os.kill(connected.process.pid, signal.SIGCONT)
    connected.process.wait(30)  # the end of the stream is the end of its work


def test_a_monitor_killed_with_a_checkpoint_in_flight_costs_that_one_and_raises_if_asked(tmp_path):
    opt, step = training(tmp_path / "d", on_error="raise")
    step()
    opt.ckpt.flush()
    pid = opt.ckpt._run.store.pid
    until(lambda: opt.ckpt._run.saver.supply.ready is not None)  # the next step need not ask for a slot
    os.kill(pid, signal.SIGSTOP)
    step()
    opt.ckpt.end_step()
    until(lambda: opt.ckpt.statistics()["last_handed_over_step"] == 2)
    os.kill(pid, signal.SIGKILL)
    until(lambda: opt.ckpt.statistics()["checkpoints_failed"] == 1)
    with pytest.raises(fxckpt.SaveFailed, match="SIGKILL"):
        step()
    step()
    opt.ckpt.flush()
    assert opt.ckpt.statistics()["last_committed_step"] == 3
    opt.ckpt.shutdown()


def test_what_the_monitor_cannot_write_fails_that_checkpoint_and_not_the_next(tmp_path):
    opt, step = training(tmp_path / "d", max_async=1)
    step()
    opt.ckpt.flush()
    until(lambda: opt.ckpt._run.saver.supply.ready is not None)
    shutil.rmtree(opt.ckpt._run.saver.supply.ready.path)
    step()
    with pytest.raises(fxckpt.SaveFailed, match="No such file"):
        opt.ckpt.flush()
    step()
    opt.ckpt.flush()
    found = opt.ckpt.statistics()
    assert (found["checkpoints_failed"], found["last_committed_step"]) == (1, 3)
    opt.ckpt.shutdown()


def test_errors_of_the_store_come_through_as_they_are(tmp_path):
    other = Store(tmp_path / "d")
    other.open()
    with pytest.raises(fxckpt.StoreLocked, match=str(os.getpid())):
        training(tmp_path / "d")
    other.close()
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "thesis.txt").write_text("precious")
    (tmp_path / "e" / "store.json").write_text("precious, too")
    with pytest.raises(fxckpt.NotAStore, match=r"store\.json"):
        training(tmp_path / "e")
    opt, step = training(tmp_path / "d")
    step(), opt.ckpt.shutdown()
    opt, step = training(tmp_path / "d")
    with pytest.raises(fxckpt.StoreNotLoaded, match="load"):
        step()
    opt.ckpt.shutdown()


def test_a_ring_too_small_or_too_large_is_an_error_at_the_start(tmp_path):
    with pytest.raises(fxckpt.SetupError, match="staging_mb"):
        training(tmp_path / "d", staging_mb=1)
    with pytest.raises(fxckpt.SetupError, match="MiB of shared memory"):
        training(tmp_path / "d", staging_mb=1 << 24)
    assert not (tmp_path / "d").exists()


def test_frozen_parameters_are_not_written_again(tmp_path):
    m = torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.Linear(1024, 4))
    m[0].requires_grad_(False)
    opt = torch.optim.SGD(m[1].parameters(), lr=0.1)
    fxckpt.compile_step(
        opt, tmp_path / "d", model=m, every=1, keep=1, max_async=1, update="native", writer="monitor", chunk_mb=1, staging_mb=4
    )
    written = []
    for _ in range(8):
        m(torch.zeros(2, 512)).sum().backward()
        opt.step()
        opt.ckpt.flush()
        written.append(opt.ckpt.statistics()["bytes_written"])
    opt.ckpt.shutdown()
    assert written[-1] - written[-2] < written[0] / 1.5
    for each in fxckpt.checkpoints(tmp_path / "d"):
        fxckpt.load(each.path.parent, model=m, step=each.step)


def test_the_ring_is_no_part_of_dev_shm(tmp_path):
    before = os.statvfs("/dev/shm")
    ring, ring_bytes = Ring.make(64, 1 << 20), 64 << 20
    taken = (before.f_bfree - os.statvfs("/dev/shm").f_bfree) * before.f_frsize
    assert taken < ring_bytes // 2  # other processes have files there, too
    del ring


@pytest.mark.slow
def test_a_ring_larger_than_a_64_mib_dev_shm_works(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("""
import os
from script_prelude import *
assert os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize == 64 << 20
m = nn.Linear(1024, 8192)
opt = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
fxckpt.compile_step(opt, "d", model=m, every=1, update="native", chunk_mb=1, writer="monitor", staging_mb=96)
for _ in range(3):
    m(torch.zeros(1, 1024)).sum().backward()
    opt.step()
opt.ckpt.shutdown()
print("committed", opt.ckpt.statistics()["last_committed_step"])
""")
    env = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    inside = f"mount -t tmpfs -o size=64m tmpfs /dev/shm || exit 77; exec {sys.executable} {script}"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", inside], cwd=tmp_path, env=env, capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no private mounts here: {done.stderr.strip()[:200]}")
    assert "committed 3" in done.stdout, done.stdout + done.stderr


def test_the_checkpoints_are_those_of_the_thread_writer(tmp_path):
    trained = Training(tmp_path / "d", writer="monitor", chunk_mb=1, staging_mb=4, max_async=2).train(6).end()
    assert all_good(tmp_path / "d", trained) == [6, 5, 4, 3, 2, 1]


def test_a_named_save_and_a_rollback_go_through_the_monitor(tmp_path):
    opt, step = training(tmp_path / "d", keep=3)
    step(), step()
    opt.ckpt.save("best")
    step()
    opt.ckpt.flush()
    assert fxckpt.load(step=2).step == 2
    step()
    opt.ckpt.shutdown()
    assert (tmp_path / "d" / "named" / "best" / "commit.json").exists()
    assert any("-g" in name for name in committed(tmp_path / "d"))


@pytest.mark.parametrize(
    "error",
    [
        fxckpt.SaveFailed("pwrite", "/a/b", 4096, 28),
        fxckpt.SetupError("no"),
        OSError(5, "Input/output error", "/a"),
        fxckpt.StoreLocked("taken"),
        fxckpt.Cancelled("given up"),
    ],
)
def test_an_error_crosses_the_wire_as_itself(error):
    found = wire.unpack_error(wire.pack_error(error))
    assert type(found) is type(error) and str(found) == str(error)
    assert getattr(found, "errno", None) == getattr(error, "errno", None)


def test_a_frame_that_ends_early_is_no_frame():
    for cut in (0, 5, 12, 20, 1000):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            wire.send(ours, {"op": "x"}, [b"y" * 1000])
            whole = theirs.recv(4096)
            theirs.sendall(whole[:cut])
            theirs.close()
            assert wire.receive(ours) is None
    ours, theirs = socket.socketpair()
    with ours, theirs:
        wire.send(ours, {"op": "x"}, [b"y" * 1000, b""])
        message, blob = wire.receive(theirs)
        assert message == {"op": "x"} and bytes(blob) == b"y" * 1000


def test_waiting_for_a_monitor_ends_when_it_does_and_not_for_anybody_else():
    answers = ["finishing", "monitor", "finishing", None]

    def take() -> None:
        refused = fxckpt.StoreLocked("taken")
        refused.monitor = answers.pop(0)
        if refused.monitor is not None:
            raise refused

    wait_for_monitor(take)
    answers[:] = [""]
    with pytest.raises(fxckpt.StoreLocked):
        wait_for_monitor(take)


def test_process_number_one_is_warned(monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert any("number 1" in text for text in launch.limits())


def test_the_engine_of_a_trainer_needs_a_ring_of_its_own_size():
    ring = Ring.make(4, 1 << 20)
    engine = Engine(threads=1, chunk_bytes=1 << 20, staging_bytes=8 << 20, mock=True)
    with pytest.raises(fxckpt.SaveFailed, match="staging"):
        post_into(engine, ring, os.pidfd_open(os.getpid()))
    engine.close()
