"""A training that ends by itself has its last step on the disk, whatever kind of process it ran in."""

from __future__ import annotations

from pathlib import Path

import pytest
from process_runs import fresh_process

import fxckpt

TRAINING = """
import multiprocessing, os, sys
import torch
import fxckpt

def train(directory, ending=lambda: None):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    opt = fxckpt.compile_step(torch.optim.AdamW(model.parameters()), directory, model=model, every=1, update="native", keep=9)
    for step in range(4):
        model(torch.ones(2, 4)).square().sum().backward()
        opt.step()
        opt.zero_grad()
        if step == 3:
            ending()

def fails():
    raise ValueError("for this test")

def ranked(rank, directory, ending):
    train(directory, ending)
"""

FORKED = f"""{TRAINING}
parent = torch.optim.SGD(torch.nn.Linear(1, 1).parameters())
fxckpt.compile_step(parent, "parent")  # a child must not end the runs of its parent
children = {{}}
for name, ending in {{"returns": lambda: None, "leaves": sys.exit, "fails": fails}}.items():
    children[name] = multiprocessing.get_context("fork").Process(target=train, args=(name, ending))
    children[name].start()
started = torch.multiprocessing.start_processes(ranked, ("fails-of-torch", fails), start_method="fork", join=False)
children["fails-of-torch"] = started.processes[0]
for name, child in children.items():
    child.join()
    print(name, child.exitcode)
parent.ckpt.save()
"""


def steps(directory: Path) -> list[int]:
    return [each.step for each in fxckpt.checkpoints(directory)]


def test_a_forked_child_that_ends_by_itself_commits_its_last_step_and_one_that_fails_the_step_before(fork_server, tmp_path):
    script, here = tmp_path / "train.py", tmp_path / "d"
    script.write_text(FORKED)
    output = fork_server.start(script, here).wait()
    for name, code, found in (("returns", 0, 4), ("leaves", 0, 4), ("fails", 1, 3), ("fails-of-torch", 1, 3)):
        assert f"{name} {code}\n" in output
        assert steps(here / name) == [1, 2, 3, 4][:found], output
    assert len(steps(here / "parent")) == 1


@pytest.mark.slow
def test_a_child_of_a_fork_server_commits_its_last_step(inductor_cache, tmp_path):
    script = tmp_path / "train.py"
    begins = "process = multiprocessing.get_context('forkserver').Process(target=train, args=('d',))"
    script.write_text(f"{TRAINING}\nif __name__ == '__main__':\n    {begins}\n    process.start()\n    process.join()\n")
    output = fresh_process(script, tmp_path, inductor_cache).wait()
    assert steps(tmp_path / "d") == [1, 2, 3, 4], output
