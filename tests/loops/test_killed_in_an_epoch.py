"""Many kills in three epochs of a shuffled loader whose workers crop at random: each sample is seen once an epoch.

A sample counts where the run that came to the end has it in its history; batches that a killed run made and no checkpoint
held were made again, with the same crops. ``FXCKPT_LOOPS`` says how often it is run again to be killed so, twenty times each
(``make loops``: 20).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from loop_runs import Ending, Loop
from waiting import until

ROUNDS = int(os.environ.get("FXCKPT_LOOPS", "1"))
KILLS = 20 if ROUNDS > 1 else 4
SAMPLES, EPOCHS = 96, 3

SCRIPT = """
import json
import random
import numpy as np
import torch
from script_prelude import finish
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
import fxckpt  # fxckpt

class Crops(Dataset):
    images = torch.randn({samples}, 1, 8, 8, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return {samples}

    def __getitem__(self, i):
        top, left = torch.randint(0, 4, (2,)).tolist()
        crop = self.images[i, :, top : top + 5, left : left + 5] * float(np.random.uniform(0.9, 1.1))
        return i, crop.flip(-1) if random.random() < 0.5 else crop, i % 4

torch.manual_seed(0)
loader = DataLoader(Crops(), batch_size=4, shuffle=True, {options})
model = nn.Sequential(nn.Flatten(), nn.Linear(25, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 4))
opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, foreach=True)
seen = [[] for _ in range({epochs})]
fxckpt.compile_step(opt, "ckpt", model=model, every=1, extra={{"seen": seen}})  # fxckpt
fxckpt.load()  # fxckpt
for epoch in fxckpt.epochs({epochs}):  # fxckpt, was: for epoch in range({epochs}):
    for samples, crops, labels in fxckpt.batches(loader):  # fxckpt, was: for samples, crops, labels in loader:
        loss = F.cross_entropy(model(crops), labels)
        loss.backward()
        opt.step()
        opt.zero_grad()
        seen[epoch] += samples.tolist()
print("END", json.dumps(seen))
finish(model, opt, seen)
"""


def history(ending: Ending) -> list[list[int]]:
    """The samples that were trained on, epoch by epoch, in their order."""
    return json.loads(ending.lines[0].removeprefix("END "))


LOADERS = [(0, False), (2, True), (3, False)] + ([(2, False), (3, True)] if ROUNDS > 1 else [])


@pytest.mark.parametrize("workers, persistent", LOADERS)
def test_each_sample_is_seen_once_an_epoch_however_often_it_is_killed(workers, persistent, fork_server, tmp_path, counted):
    options = f"num_workers={workers}, persistent_workers={persistent}"
    loop = Loop(fork_server, SCRIPT.format(samples=SAMPLES, epochs=EPOCHS, options=options), tmp_path)
    plain, whole = loop.plain(), loop.whole()
    assert whole == plain, "fxckpt changed the bits of an uninterrupted run"
    assert whole.committed == plain.backwards and whole.dropped == 0
    for seed, resumed in loop.killed_anew(ROUNDS, KILLS, plain.backwards):
        assert [sorted(epoch) for epoch in history(resumed)] == [list(range(SAMPLES))] * EPOCHS, f"seed {seed}"
        assert resumed.lines == plain.lines, f"seed {seed}: resumed, it ended otherwise"
        counted("kills in an epoch", KILLS)


def processes_in(folder: Path) -> list[str]:
    """Those whose working directory it is: a run's, and its workers'."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found += [process.name] if (process / "cwd").readlink() == folder else []
        except OSError:  # it ended meanwhile
            continue
    return found


def test_the_workers_of_a_killed_run_end_though_nobody_takes_their_batches(fork_server, tmp_path):
    """With the states that they carry, the batches that are made ahead are more than the pipe takes."""
    loop = Loop(fork_server, SCRIPT.format(samples=SAMPLES, epochs=EPOCHS, options="num_workers=2, prefetch_factor=6"), tmp_path)
    folder = loop.kill(tmp_path / "killed", "3 0.2")
    until(lambda: not processes_in(folder), why=lambda: f"still there: {processes_in(folder)}")
