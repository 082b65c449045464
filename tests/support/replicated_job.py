"""A job of ranks with replicas on each other's disks, which are directories; each rank says that its host is another one."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from waiting import until

SCRIPT = """
from script_prelude import *
from datetime import timedelta
import torch.distributed as dist

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD"])
store = dist.TCPStore("127.0.0.1", int(os.environ["PORT"]), None, False, timeout=timedelta(seconds=60))
dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
opt = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5)
own = {"rank": None}
fxckpt.compile_step(opt, "d", model=model, extra={"own": own}, every=1, keep=2, update="native",
                    replicas=1, writer=os.environ.get("WRITER", "thread"))
start = fxckpt.load()
torch.manual_seed(rank) if start.step == 0 else None
print("START", start.step, own["rank"], flush=True)
own["rank"] = rank
for step in fxckpt.steps(int(os.environ["STEPS"])):
    kill_window()
    model(torch.randn(2, 16)).square().mean().backward()  # each rank has data of its own
    for param in model.parameters():  # DDP sums in another order in its first step, and sums of three are then other ones
        dist.all_reduce(param.grad)
        param.grad /= world
    opt.step()
    opt.zero_grad()
    print("REPLICATED", opt.ckpt.statistics()["last_replicated_step"] or 0, flush=True)
opt.ckpt.flush()
print("END", digest(model), flush=True)
opt.ckpt.shutdown()
"""


class Life:
    """One life of the job: a process for each directory, and the store by which they talk, which is the launcher's."""

    def __init__(self, fork_server, script, disks, window="0.02", steps=30, **variables):
        self.server = dist.TCPStore("127.0.0.1", 0, None, True, timeout=timedelta(seconds=60), wait_for_workers=False)
        where = {"WORLD": str(len(disks)), "PORT": str(self.server.port), "KILL_WINDOW": window, "STEPS": str(steps), **variables}
        self.ranks = [
            fork_server.start(script, disk, RANK=str(rank), FXCKPT_HOST=f"127.0.0.{rank + 1}", **where)
            for rank, disk in enumerate(disks)
        ]

    def found(self, what):
        """What each rank has printed behind this word, the last time."""
        lines = [re.findall(rf"^{what} (.+)\n", rank.output, re.MULTILINE) for rank in self.ranks]
        return [each[-1] for each in lines if each]

    @property
    def output(self):
        return "\n".join(f"rank {at}:\n{rank.output}" for at, rank in enumerate(self.ranks))

    def kill_when_replicated(self, step):
        """Once every rank's disk has a neighbour's this far; returns up to which step all of them are sure to have it."""
        until(lambda: self.replicated() >= step, why=lambda: self.output)
        found = self.replicated()
        for rank in self.ranks:
            rank.kill()
        return found

    def replicated(self):
        """The newest step of which every rank has said that its replica is durable; 0 of none."""
        found = [int(each) for each in self.found("REPLICATED")]
        return min(found) if len(found) == len(self.ranks) else 0

    def end(self):
        for rank in self.ranks:
            rank.wait()
        (digest,) = set(self.found("END"))
        return digest


def started(life):
    """At which step each rank started, and whose checkpoint it got."""
    return [tuple(map(int, each.split())) for each in life.found("START")]


def replicas(root: Path, rank: int) -> list[Path]:
    """Directories of a rank's replicas beside a store, by their names alone, oldest step first."""
    return sorted(each for each in (root / "replicas" / f"rank-{rank:05d}").glob("step-*"))
