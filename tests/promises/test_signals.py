"""``opt.ckpt.finish_on_signal``: a preempted run ends on a checkpoint of a whole step, then does what it would have done."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest
from known_sums import good, told
from process_runs import ProcessRun
from small_training import Training
from waiting import until

import fxckpt

SCRIPT = """
import os, signal, sys, time
from script_prelude import *
from known_sums import Sums, Tally, tell, wrong

def mine(number, frame):
    tell("asked", opt.ckpt.statistics()["last_committed_step"] or 0)
    sys.exit(7)

if os.environ["HANDLER"] == "mine":
    signal.signal(signal.SIGTERM, mine)
m, tally = Sums(), Tally()
opt = torch.optim.SGD(m.parameters(), lr=1.0, momentum=1.0)
fxckpt.compile_step(opt, "d", model=m, every=int(os.environ["EVERY"]), update="native", chunk_mb=1, writer=os.environ["WRITER"],
                    extra={"tally": tally})
opt.ckpt.finish_on_signal()
fxckpt.load()
for step in range(10**9):
    m().backward()
    opt.step()
    opt.zero_grad()
    time.sleep(0.01)  # here the tally is behind: a signal mostly comes now
    tally.steps += 1
    tell("made", 0)
"""


def start(fork_server, tmp_path: Path, **variables: str) -> ProcessRun:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    process = fork_server.start(script, tmp_path / "d", **variables)
    until(lambda: len(told(tmp_path / "d")[1]) > 3 or not process.alive(), why=lambda: process.output)
    return process


@pytest.mark.parametrize(("writer", "every"), [("thread", 10**9), ("monitor", 10**9), ("thread", 1)])
def test_a_signal_is_answered_with_a_checkpoint_of_a_whole_step_and_then_the_users_handler(fork_server, tmp_path, writer, every):
    process = start(fork_server, tmp_path, WRITER=writer, EVERY=str(every), HANDLER="mine")
    process.kill(signal.SIGTERM)
    assert process.returncode == 7, process.output
    at_least, lines = told(tmp_path / "d")
    assert at_least > 0 and lines[-1] == f"asked {at_least}"
    assert good(tmp_path / "d", at_least) == at_least


def test_without_a_handler_of_the_users_the_signal_ends_the_process(fork_server, tmp_path):
    process = start(fork_server, tmp_path, WRITER="thread", EVERY="1000000", HANDLER="none")
    process.kill(signal.SIGTERM)
    assert process.returncode == -signal.SIGTERM, process.output
    assert good(tmp_path / "d", 1) >= 1


def test_a_handler_is_installed_in_the_main_thread_or_not_at_all(tmp_path):
    trained, raised = Training(tmp_path / "d"), []

    def elsewhere() -> None:
        try:
            trained.opt.ckpt.finish_on_signal(signal.SIGUSR1)
        except fxckpt.SetupError as error:
            raised.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(raised) == 1 and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
