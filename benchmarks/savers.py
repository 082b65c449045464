"""The contestants of overhead.py and kills.py: ways to save a model and its optimizer after every step.

Each saver is durable by its own means: what it says is saved is on disk after ``flush``.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

REPORTED = ("bytes_written", "stall_seconds", "copy_seconds", "write_seconds", "checkpoints_committed")


class Nothing:
    """No checkpoints: plain ``torch.compile`` and the plain optimizer, the base of every ratio."""

    fused = True

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Callable:
        """Remember what to save and where; returns the compiled forward."""
        self.model, self.optimizer, self.folder = model, optimizer, folder
        return torch.compile(model)

    def saved(self, step: int) -> None:
        """Called after each optimizer step."""

    def flush(self) -> None:
        """Return when everything that was started is durable."""

    def check(self, step: int) -> dict:
        """Verify the last checkpoint (of ``step``); returns what to report. Raises if it is not good."""
        return {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters by name and optimizer state by ``key/name``; ties once."""
        found = {name: p.detach() for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            found.update({f"{key}/{name}": value for key, value in self.optimizer.state[p].items()})
        return found


class Fxckpt(Nothing):
    """``fxckpt`` with a checkpoint at every step."""

    def __init__(self, update: str = "native", writer: str = "thread", **options: Any):
        self.update, self.writer, self.fused, self.options = update, writer, update == "native", options

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Callable:
        import fxckpt

        super().prepare(model, optimizer, folder)
        fxckpt.compile_step(
            optimizer,
            folder,
            model=model,
            every=1,
            writer=self.writer,
            update=None if self.fused else self.update,
            on_error="raise",
            **self.options,
        )
        return torch.compile(model, backend=fxckpt.backend)

    def flush(self) -> None:
        self.optimizer.ckpt.flush()

    def check(self, step: int) -> dict:
        from safetensors.torch import load_file

        import fxckpt

        done = self.optimizer.ckpt.statistics()
        report = {key: done[key] for key in REPORTED}
        if self.writer == "mock":
            return report
        if done["checkpoints_committed"] != step:
            raise AssertionError(f"{step} steps, but {done['checkpoints_committed']} checkpoints committed")
        newest = fxckpt.latest(self.folder)  # reads and verifies every chunk
        if newest is None or newest.step != step:
            raise AssertionError(f"expected a verified checkpoint of step {step}, found {newest}")
        weights = load_file(Path(newest.path) / "model.safetensors")
        for name, parameter in self.model.named_parameters():
            if not torch.equal(weights[name], parameter):
                raise AssertionError(f"{name} in {newest.path} is not what was trained")
        return report


def replace_durably(path: Path, write: Callable[[Path], None]) -> None:
    """Write a new file beside ``path``, sync it, rename it over ``path``, sync the directory."""
    new = path.with_suffix(".new")
    write(new)
    for name, flags in ((new, os.O_RDWR), (path.parent, os.O_RDONLY)):
        fd = os.open(name, flags)
        os.fsync(fd)
        os.close(fd)
        if name == new:
            os.rename(new, path)


class TorchSave(Nothing):
    """``torch.save`` and fsync."""

    def saved(self, step: int) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        replace_durably(self.folder / "checkpoint.pt", lambda new: torch.save(state, new))


class Safetensors(Nothing):
    """``safetensors.torch.save_file`` and fsync."""

    def saved(self, step: int) -> None:
        from safetensors.torch import save_file

        replace_durably(self.folder / "checkpoint.safetensors", lambda new: save_file(self.tensors(), new))


class Asynchronous(Nothing):
    """Saves beside training, one checkpoint after the other; the last two are kept."""

    syncs = False  # the library syncs its files itself
    wait: Callable | None = None

    def start(self, where: Path) -> Callable:
        """Begin to save to ``where``; the result waits until the files are written."""
        raise NotImplementedError

    def load(self, where: Path) -> dict[str, dict[str, torch.Tensor]]:
        """Read what was saved to ``where``, over the live tensors where the library does so; as :meth:`payload`."""
        raise NotImplementedError

    def payload(self) -> dict[str, dict[str, torch.Tensor]]:
        """What is saved."""
        return {"model": self.model.state_dict(), "optimizer": self.tensors()}

    def saved(self, step: int) -> None:
        self.flush()
        self.where = self.folder / str(step)
        self.wait = self.start(self.where)
        shutil.rmtree(self.folder / str(step - 2), ignore_errors=True)

    def flush(self) -> None:
        if self.wait is not None:
            self.wait()
            if not self.syncs:
                sync_tree(self.where)
            self.wait = None


def dcp_alone() -> Any:
    """``torch.distributed.checkpoint``, without its warning that there is no process group."""
    import torch.distributed.checkpoint as dcp

    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    return dcp


class DCP(Asynchronous):
    """``torch.distributed.checkpoint.async_save``, by a thread."""

    syncs = True

    def start(self, where: Path) -> Callable:
        return dcp_alone().async_save(self.payload(), checkpoint_id=where, no_dist=True).result

    def load(self, where: Path) -> dict:
        dcp, state = dcp_alone(), self.payload()
        try:
            dcp.load(state, checkpoint_id=where, no_dist=True)
        except dcp.api.CheckpointException as error:  # no Exception, but a BaseException
            raise RuntimeError(str(error).strip().splitlines()[-1]) from error
        return state


class DCPSynchronous(DCP):
    """``torch.distributed.checkpoint.save``: the step waits until it is written."""

    def start(self, where: Path) -> Callable:
        dcp_alone().save(self.payload(), checkpoint_id=where, no_dist=True)
        return lambda: None


class DCPProcess(DCP):
    """The same by a process, which needs a process group; here one of a single rank."""

    def start(self, where: Path) -> Callable:
        import torch.distributed as dist
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        if not dist.is_initialized():
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            dist.init_process_group("gloo", init_method=f"file://{self.folder.resolve()}/group", rank=0, world_size=1)
        kind = AsyncCheckpointerType.PROCESS
        return dcp.async_save(self.payload(), checkpoint_id=where, async_checkpointer_type=kind).result


class TorchSnapshot(Asynchronous):
    """``torchsnapshot.Snapshot.async_take``."""

    def start(self, where: Path) -> Callable:
        import torchsnapshot

        state = torchsnapshot.StateDict(**self.payload())
        return torchsnapshot.Snapshot.async_take(str(where), {"state": state}).wait

    def load(self, where: Path) -> dict:
        import torchsnapshot

        state = torchsnapshot.StateDict(**self.payload())
        torchsnapshot.Snapshot(str(where)).restore({"state": state})
        return dict(state)


class TorchCheckpointing(Asynchronous):
    """``torch_checkpointing`` with its asynchronous saver, as its guide says: the step holds the manager's lock.

    Without O_DIRECT, its default, for which ext4 refuses the ends of its files (EINVAL).
    """

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Callable:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        config = CheckpointManager.Config.with_async_save()
        config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
        self.manager, step = CheckpointManager(config), optimizer.step

        def locked() -> None:
            with self.manager.lock():
                step()

        optimizer.step = locked
        return super().prepare(model, optimizer, folder)

    def start(self, where: Path) -> Callable:
        return self.manager.save(str(where), self.payload()).result

    def load(self, where: Path) -> dict:
        return dict(self.manager.load(str(where), into=self.payload()))

    def check(self, step: int) -> dict:
        self.manager.close()
        return {}


def sync_tree(folder: Path) -> None:
    """Make every file and directory below ``folder`` durable, and its own name."""
    for where, _, files in os.walk(folder):
        for name in (where, *(os.path.join(where, file) for file in files)):
            fd = os.open(name, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
    fd = os.open(folder.parent, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


@dataclass(frozen=True)
class Contestant:
    """One row of the table."""

    key: str
    label: str
    make: Callable[[], Nothing]
    needs: str = ""  # a package of the bench extra; left out, and said so, where it does not import
    waits: bool = False  # each save waits for the disk, so that a short round measures it as well as a long one


CONTESTANTS = (
    Contestant("none", "no checkpoints (AdamW fused)", Nothing),
    Contestant("fxckpt", "fxckpt, fused=True (native update)", Fxckpt),
    Contestant("inductor", 'fxckpt, update="inductor"', lambda: Fxckpt(update="inductor")),
    Contestant("mock", 'fxckpt, writer="mock" (writes nothing)', lambda: Fxckpt(writer="mock")),
    Contestant("safetensors", "safetensors save_file + fsync", Safetensors, waits=True),
    Contestant("torch_save", "torch.save + fsync", TorchSave, waits=True),
    Contestant("dcp", "torch DCP async_save", DCP),
    Contestant("dcp_sync", "torch DCP save", DCPSynchronous, waits=True),
    Contestant("torchsnapshot", "TorchSnapshot async_take + fsync", TorchSnapshot, needs="torchsnapshot"),
    Contestant("torch_checkpointing", "torch_checkpointing async + fsync", TorchCheckpointing, needs="torch_checkpointing"),
)
