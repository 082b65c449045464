"""Lives of a job whose ranks hold parts of parameters, forked from this process, which has imported everything.

    python sharded_run.py < LIVES

A life is a line of JSON, a dict: ``layout`` (one of LAYOUTS), ``world``, ``cwd``, ``dir``, ``steps`` (train up to this one),
``optimizer``, ``update``, ``every``, ``journal``, ``load`` (False: a life without us), ``kill`` (which ranks, once rank 0 has
begun which step, and how many seconds later: ``[ranks, step, seconds]``), ``signal`` (SIGTERM comes to all, one after the other:
``[step, seconds between two]``), ``clamp`` (every so many steps a weight is clamped behind one), ``boundaries`` (loop with
``fxckpt.steps``). Prints, for each life, what each rank found and left: a list of dicts, null of a rank that was killed. The file
``dir``.log has a line for what each life loads and for each of its steps: the step's number, a digest of all parameters and state
behind it, and the last step that rank 0 knew to be committed.
"""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fork_server import warm_up
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from whole_tensors import whole

import fxckpt
from fxckpt.loading.load import Restored

Live = Callable[[dict[str, Any], int, Any], dict[str, Any]]
"""One rank of a life: what was asked for, its number, where rank 0 says which step has begun. Returns what it found and left."""

LAYOUTS = ("single", "ddp", "fsdp", "hsdp", "tp", "fsdp_tp", "halves", "ignored")
"""``halves``: two ranks each shard by themselves, on meshes that know of no others. ``ignored``: each has a head of its own."""


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(13, 22), nn.Linear(22, 13)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Sizes that hardly a number of ranks divides (tensor parallelism computes with no others); of the last layer some ranks
    have nothing."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(13, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1.0
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def laid_out(layout: str, world: int, **options: Any) -> tuple[nn.Module, nn.Module, int]:
    """The model and what holds it, over the ranks; and whose batches this rank takes."""
    torch.manual_seed(0)
    net, rank = Net(), dist.get_rank() if world > 1 else 0
    if layout == "single":
        return net, net, 0
    if layout == "ddp":
        return net, DistributedDataParallel(net, **options), rank
    if layout == "halves":
        mine, _ = dist.new_subgroups(world // 2)
        return net, fully_shard(net, mesh=DeviceMesh.from_group(mine, "cpu")), rank
    if layout == "ignored":
        mesh = init_device_mesh("cpu", (world,))
        return net, fully_shard(net, mesh=mesh, ignored_params=set(net.head.parameters())), rank
    two = layout in ("hsdp", "fsdp_tp")
    mesh = init_device_mesh("cpu", (world // 2, 2) if two else (world,), mesh_dim_names=("a", "b") if two else ("a",))
    if layout in ("tp", "fsdp_tp"):
        for block in net.blocks:
            parallelize_module(block, mesh["b" if two else "a"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if layout != "tp":
        shards = mesh["a"] if layout == "fsdp_tp" else mesh
        for block in net.blocks:
            fully_shard(block, mesh=shards, **options)
        fully_shard(net, mesh=shards, **options)
    whose = {"tp": 0, "fsdp_tp": mesh.get_coordinate()[0]}.get(layout, rank)
    return net, net, whose


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "foreach": lambda params: torch.optim.Adam(params, lr=1e-2, foreach=True, amsgrad=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, nesterov=True),
}


def digest(net: nn.Module, opt: torch.optim.Optimizer) -> str:
    """Of all parameters and all state, gathered. All ranks call it."""
    sha = hashlib.sha256()
    for name, param in net.named_parameters():
        state = opt.state.get(param, {})
        for key, tensor in (("", param), *sorted(state.items())):
            sha.update(f"{name}/{key}".encode() + whole(tensor))
    return sha.hexdigest()[:12]


def note(life: dict[str, Any], rank: int, line: str) -> None:
    """Into the log, at once: the next instant may be the last."""
    if rank == 0 and life["dir"]:
        with open(f"{life['dir']}.log", "a") as log:
            log.write(line + "\n")


def live(life: dict[str, Any], rank: int, begun: Any) -> dict[str, Any]:
    """One rank of a life."""
    torch.set_num_threads(1)
    net, model, whose = laid_out(life["layout"], life["world"], **life.get("options", {}))
    opt = OPTIMIZERS[life.get("optimizer", "adamw")](net.parameters())
    restored, watched = Restored(), life.get("load", True)
    if watched:
        every, journal, update = life.get("every", 1), life.get("journal", 1), life.get("update")
        fxckpt.compile_step(opt, life["dir"], model=model, every=every, keep=8, journal=journal, update=update)
        if "signal" in life:
            opt.ckpt.finish_on_signal()
        restored = fxckpt.load()
    loaded, losses, clamp = digest(net, opt), [], life.get("clamp")
    note(life, rank, f"{restored.step} {loaded} {restored.step}")
    for step in fxckpt.steps(life["steps"]) if watched and life.get("boundaries") else range(restored.step, life["steps"]):
        if rank == 0:
            begun.value = step + 1
        torch.manual_seed(1000 * step + whose)
        loss = model(torch.randn(4, 13)).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        if clamp and step % clamp == 0:
            with torch.no_grad():
                net.blocks[1].up.weight.clamp_(-0.1, 0.1)
        losses.append(loss.item().hex())
        note(life, rank, f"{step + 1} {digest(net, opt)} {opt.ckpt.statistics()['last_committed_step'] or 0 if watched else 0}")
    found: dict[str, Any] = {"start": restored.step, "loaded": loaded, "losses": losses, "seen": net.seen.item()}
    found["from"] = "" if restored.path is None else restored.path.name
    if watched:
        opt.ckpt.flush()
        note(life, rank, f"{life['steps']} {digest(net, opt)} {opt.ckpt.statistics()['last_committed_step']}")
        found["records"] = opt.ckpt.statistics()["records_committed"]
        found["graph"] = opt.ckpt.graph.table() if life["steps"] > restored.step else ""
        opt.ckpt.shutdown()
    return {**found, "left": digest(net, opt)}


def main_of_rank(live: Live, life: dict[str, Any], rank: int, file: str, begun: Any, out: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(life["cwd"])
    if life["world"] > 1:
        store = dist.FileStore(file, life["world"])
        dist.init_process_group("gloo", store=store, rank=rank, world_size=life["world"])
    try:
        answer: Any = live(life, rank, begun)
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    out.send(answer)
    os._exit(0)


def one_life(life: dict[str, Any], live: Live) -> list[dict[str, Any] | None]:
    """Fork its ranks, kill those that are to be killed, and with them all others, as a launcher does."""
    fork = multiprocessing.get_context("fork")
    begun = fork.Value("i", 0)
    pipes = [fork.Pipe(duplex=False) for _ in range(life["world"])]
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "store")
        ranks = [
            fork.Process(target=main_of_rank, args=(live, life, rank, file, begun, pipes[rank][1]))
            for rank in range(life["world"])
        ]
        for each in ranks:
            each.start()
        if (kill := life.get("kill")) is not None:
            chosen, at, wait = kill
            wait_for(begun, at, ranks)
            time.sleep(wait)
            for rank in [*chosen, *range(life["world"])]:
                ranks[rank].kill()
        if (asked := life.get("signal")) is not None:
            wait_for(begun, asked[0], ranks)
            for each in random.sample(ranks, len(ranks)):
                each.terminate()
                time.sleep(asked[1])
        for (_, ours), each in zip(pipes, ranks):
            ours.close()
            each.join()
        return [answer(pipe) for pipe, _ in pipes]


def wait_for(begun: Any, step: int, ranks: list[Any]) -> None:
    """Until rank 0 has begun this step, or one has ended."""
    while begun.value < step and all(each.is_alive() for each in ranks):
        time.sleep(0.001)


def answer(pipe: Any) -> dict[str, Any] | None:
    """What a rank has sent; None if it was killed before."""
    try:
        found: dict[str, Any] = pipe.recv()
    except EOFError:
        return None
    return found


def serve(live: Live) -> None:
    """Lives as they are asked for; each rank of one is ``live``."""
    warm_up()
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(one_life(json.loads(line), live)), flush=True)


if __name__ == "__main__":
    serve(live)
