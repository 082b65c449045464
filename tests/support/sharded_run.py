"""A rank of a job whose ranks hold parts of parameters; ``rank_lives.py`` forks it.

A life is what it is there, with ``layout`` (one of LAYOUTS), ``width`` (of the model), ``dir``, ``steps`` (train up to this
one), ``optimizer``, ``update``, ``every``, ``journal``, ``load`` (False: a life without us), ``clamp`` (every so many steps a
weight is clamped behind one), ``boundaries`` (loop with ``fxckpt.steps``) and ``log``: the file ``dir``.log has a line for what
each life loads and for each of its steps: the step's number, a digest of all parameters and state behind it ("whole": the same
in every layout; "parts": of what each rank has of them, which costs less), and the last step that rank 0 knew to be committed.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from whole_tensors import local, whole

import fxckpt
from fxckpt.loading import gathered
from fxckpt.loading.load import Restored
from fxckpt.store import reader as readers

LAYOUTS = ("single", "ddp", "fsdp", "hsdp", "tp", "fsdp_tp", "halves", "ignored")
"""``halves``: two ranks each shard by themselves, on meshes that know of no others. ``ignored``: each has a head of its own."""


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, width + 9), nn.Linear(width + 9, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Sizes that hardly a number of ranks divides (tensor parallelism computes with no others); of the last layer some ranks
    have nothing, and of one parameter there is nothing."""

    def __init__(self, width: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, 1)
        self.nothing = nn.Parameter(torch.zeros(0, width), requires_grad=False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1.0
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def laid_out(layout: str, world: int, width: int, **options: Any) -> tuple[nn.Module, nn.Module, int]:
    """The model and what holds it, over the ranks; and whose batches this rank takes."""
    torch.manual_seed(0)
    net, rank = Net(width), dist.get_rank() if world > 1 else 0
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


def digest_of_parts(net: nn.Module, opt: torch.optim.Optimizer) -> str:
    """Of what each rank has of them. All ranks call it."""
    sha = hashlib.sha256()
    for name, param in net.named_parameters():
        for key, tensor in (("", param), *sorted(opt.state.get(param, {}).items())):
            sha.update(f"{name}/{key}".encode() + local(tensor))
    mine = torch.frombuffer(bytearray(sha.digest()), dtype=torch.uint8)
    all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_them, mine)
    return hashlib.sha256(torch.cat(all_of_them).numpy().tobytes()).hexdigest()[:12]


def counted() -> list[int]:
    """How many bytes of records and of other files are read from now on, one by one."""
    read: list[int] = []
    of_record, of_file = readers.record_bytes, readers.read_verified

    def record_bytes(file: str) -> bytes:
        read.append(len(raw := of_record(file)))
        return raw

    def read_verified(*file: Any, nbytes: int, chunk_bytes: int, only: Any = None, **more: Any) -> Any:
        read.append(nbytes if only is None else chunk_bytes * sum(map(len, only)))
        return of_file(*file, nbytes=nbytes, chunk_bytes=chunk_bytes, only=only, **more)

    readers.record_bytes = gathered.record_bytes = record_bytes
    readers.read_verified = read_verified
    return read


def nbytes_of_parts(net: nn.Module, opt: torch.optim.Optimizer) -> int:
    """What this rank has of parameters and state."""
    return sum(len(local(each)) for p in net.parameters() for each in (p, *opt.state.get(p, {}).values()))


DIGESTS = {"whole": digest, "parts": digest_of_parts}


def note(life: dict[str, Any], rank: int, net: nn.Module, opt: torch.optim.Optimizer, step: int, acknowledged: int) -> None:
    """Into the log, at once: the next instant may be the last."""
    if not life["dir"] or "log" not in life:
        return
    found = DIGESTS[life["log"]](net, opt)
    if rank == 0:
        with open(f"{life['dir']}.log", "a") as log:
            log.write(f"{step} {found} {acknowledged}\n")


def live(life: dict[str, Any], rank: int, begun: Any) -> dict[str, Any]:
    """One rank of a life."""
    torch.set_num_threads(1)
    width = life.get("width", 13)
    net, model, whose = laid_out(life["layout"], life["world"], width, **life.get("options", {}))
    opt = OPTIMIZERS[life.get("optimizer", "adamw")](net.parameters())
    restored, watched = Restored(), life.get("load", True)
    if watched:
        every, journal, update = life.get("every", 1), life.get("journal", 1), life.get("update")
        fxckpt.compile_step(opt, life["dir"], model=model, every=every, keep=8, journal=journal, update=update)
        if "signal" in life:
            opt.ckpt.finish_on_signal()
        read = counted()
        restored = fxckpt.load()
        read_to_load = sum(read)
    loaded, losses, clamp = digest(net, opt), [], life.get("clamp")
    note(life, rank, net, opt, restored.step, restored.step)
    for step in fxckpt.steps(life["steps"]) if watched and life.get("boundaries") else range(restored.step, life["steps"]):
        if rank == 0:
            begun.value = step + 1
        torch.manual_seed(1000 * step + whose)
        loss = model(torch.randn(4, width)).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        if clamp and step % clamp == 0:
            with torch.no_grad():
                net.blocks[1].up.weight.clamp_(-0.1, 0.1)
        losses.append(loss.item().hex())
        note(life, rank, net, opt, step + 1, opt.ckpt.statistics()["last_committed_step"] or 0 if watched else 0)
    found: dict[str, Any] = {"start": restored.step, "loaded": loaded, "losses": losses, "seen": net.seen.item()}
    found["from"] = "" if restored.path is None else restored.path.name
    if watched:
        opt.ckpt.flush()
        note(life, rank, net, opt, life["steps"], opt.ckpt.statistics()["last_committed_step"])
        found["read"], found["needed"] = read_to_load, nbytes_of_parts(net, opt)
        found["records"] = opt.ckpt.statistics()["records_committed"]
        found["graph"] = opt.ckpt.graph.table() if life["steps"] > restored.step else ""
        opt.ckpt.shutdown()
    return {**found, "left": digest(net, opt)}
