"""A process that reads from a loader is killed at random, again and again, and what it saw is what one that lived saw."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from fork_server import ForkServer
from process_runs import ProcessRun
from waiting import until

SCRIPT = """
import os, pickle, sys
from pathlib import Path
from torch.utils.data import DataLoader
from loader_runs import Crops, generators, put, record, seed, source_of

kept, seen = Path("kept"), Path("seen")
seed(1)
source = source_of(DataLoader(Crops(40), 4, shuffle=True, num_workers=int(os.environ["WORKERS"]),
                              persistent_workers=os.environ["PERSISTENT"] == "1"))
epoch, lines = 0, []
if kept.exists():
    state, epoch, lines, now = pickle.loads(kept.read_bytes())
    seed(99)
    source.load_state_dict(state)
    put(now)
while epoch < 3:
    for batch in source.begin():
        lines.append(repr(record(epoch, batch)))
        whole = pickle.dumps((source.state_dict(), epoch, lines, generators()))
        Path("next").write_bytes(whole)
        os.replace("next", kept)
        print("BATCH", flush=True)
    source.finish()
    epoch += 1
seen.write_text("\\n".join(lines))
"""


def run(fork_server: ForkServer, folder: Path, workers: int, persistent: bool) -> ProcessRun:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    return fork_server.start(script, folder, WORKERS=str(workers), PERSISTENT=str(int(persistent)))


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "persistent"), [(2, True)])
def test_a_reader_killed_at_random_sees_each_sample_once_an_epoch_with_the_same_bits(fork_server, tmp_path, workers, persistent):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = run(fork_server, tmp_path / "whole", workers, persistent)
    rng = random.Random(workers)
    for _ in range(2):
        killed = run(fork_server, tmp_path / "killed", workers, persistent)
        wanted = rng.randrange(2, 11)
        until(lambda: killed.output.count("BATCH") >= wanted or not killed.alive())  # noqa: B023
        time.sleep(rng.random() * 0.01)
        killed.kill(signal.SIGKILL)
    last = run(fork_server, tmp_path / "killed", workers, persistent)
    for process in (whole, last):
        assert process.wait() is not None and process.returncode == 0, process.output
    seen = (tmp_path / "killed" / "seen").read_text()
    assert seen == (tmp_path / "whole" / "seen").read_text()
    rows = [eval(line) for line in seen.splitlines()]
    for epoch in range(3):
        assert sorted(int(row[0]) for at, batch, _ in rows if at == epoch for row in batch) == list(range(40))
