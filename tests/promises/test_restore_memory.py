"""Restoring peaks at no more than what is restored plus 64 MiB: no second copy of the model, whatever is restored into. And
a run that saves peaks at no more above one that does not write than what it printed when it started.

The kernel's own high-water mark of a process of its own, read from outside.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from waiting import until

MIB = 1 << 20
MODEL = 64 * MIB  # the model; AdamW's state is twice that

SCRIPT = """
from script_prelude import *
import os, time

m = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(16)])
opt = torch.optim.AdamW(m.parameters(), fused=True)

def step():
    m(torch.randn(2, 1024)).square().mean().backward()
    opt.step()
    opt.zero_grad()

def ask():
    open("ready", "w").close()
    while not os.path.exists("go"):
        time.sleep(0.005)
    os.unlink("go")

def run():
    fxckpt.compile_step(opt, "d", model=m, every=1, keep=1, max_async=1, update="native", read_back="off")

what = os.environ["WHAT"]
if what == "save":
    run()
    step()
    opt.ckpt.shutdown()
elif what in ("thread", "monitor", "mock"):
    fxckpt.compile_step(opt, "d", model=m, every=1, writer=what, update="native")
    for _ in range(20):
        step()
    opt.ckpt.flush()
    assert opt.ckpt.statistics()["checkpoints_failed"] == 0
    ask()
else:
    if what != "weights":
        run()
    if what == "rollback":
        fxckpt.load()
        step()
        opt.ckpt.flush()
    for p in m.parameters():
        p.grad = None
    ask()
    restored = fxckpt.load("d", model=m) if what == "weights" else fxckpt.load()
    assert restored.step > 0
    ask()
"""


def kilobytes(pid: int, field: str) -> int:
    """A line of the process's status, in bytes."""
    return int(re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[1]) * 1024


@pytest.mark.parametrize(("what", "new"), [("weights", 0), ("fresh", 2 * MODEL), ("rollback", 0)])
def test_restoring_peaks_at_the_state_plus_64_mib(what, new, fork_server, tmp_path):
    """``new``: bytes of optimizer state that did not exist before."""
    script, directory = tmp_path / "train.py", tmp_path / "run"
    script.write_text(SCRIPT)
    saved = fork_server.start(script, directory, WHAT="save")
    saved.wait()
    assert saved.returncode == 0, saved.output
    process = fork_server.start(script, directory, WHAT=what)

    def answered() -> bool:
        assert process.alive(), process.output
        return (directory / "ready").exists()

    until(answered)
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the high-water mark begins anew
    before = kilobytes(process.pid, "VmRSS")
    (directory / "ready").unlink()
    (directory / "go").touch()
    until(answered)
    peak, after = kilobytes(process.pid, "VmHWM"), kilobytes(process.pid, "VmRSS")
    (directory / "go").touch()
    assert process.wait() is not None and process.returncode == 0, process.output
    assert peak >= before and after >= before + new * 0.9, "nothing was measured"
    assert peak - before <= new + 64 * MIB, f"{(peak - before) / MIB:.0f} MiB more at the peak, {new / MIB:.0f} of state"
    print(f"{what}: {(peak - before - new) / MIB:.1f} MiB beyond the state")


@pytest.mark.parametrize("writes", ["thread", "monitor"])
def test_a_run_peaks_at_no_more_above_the_mock_than_what_it_printed_at_start(fork_server, tmp_path, writes):
    """With the monitor: the training process, the memory that it shares with the monitor included."""
    script, peaks = tmp_path / "train.py", {}
    script.write_text("import logging\nlogging.basicConfig(level=logging.INFO)\n" + SCRIPT)
    for writer in ("mock", writes):
        # Without a heap that keeps what was freed, the same training peaks at the same height each time.
        process = fork_server.start(script, tmp_path / writer, WHAT=writer, MALLOC_MMAP_THRESHOLD_="65536")
        ready = tmp_path / writer / "ready"
        until(
            lambda process=process, ready=ready: ready.exists() or not process.alive(), why=lambda process=process: process.output
        )
        assert process.alive(), process.output
        peaks[writer] = kilobytes(process.pid, "VmHWM")
        (tmp_path / writer / "go").touch()
        assert process.wait() is not None and process.returncode == 0, process.output
    printed = int(re.search(r"memory at most (\d+) MiB", process.output)[1]) * MIB
    more = peaks[writes] - peaks["mock"]
    assert more <= printed, f"{more / MIB:.0f} MiB above the mock, {printed / MIB:.0f} MiB printed"
    print(f"{more / MIB:.1f} MiB above the mock, {printed / MIB:.0f} MiB printed")
