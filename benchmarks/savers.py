"""The contestants of overhead.py, models.py and kills.py: ways to save a model and its optimizer after every step.

Each saver is durable by its own means: what it says is saved is on disk after ``flush``.
"""

from __future__ import annotations

import copy
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from saving import Nothing, copy_in, replace_durably, sync_tree
from torch import nn

REPORTED = (
    "bytes_written", "stall_seconds", "copy_seconds", "write_seconds", "checkpoints_committed", "records_committed"
)  # fmt: skip


class Fxckpt(Nothing):
    """``fxckpt`` with a checkpoint at every step."""

    def __init__(self, update: str = "native", writer: str = "thread", **options: Any):
        self.update, self.writer, self.fused, self.options = update, writer, update == "native", options
        self.durable = []

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
        optimizer.ckpt.on_commit(lambda done: self.durable.append((done.step, time.monotonic())))
        return torch.compile(model, backend=fxckpt.backend)

    @property
    def stalled(self) -> float:
        return self.optimizer.ckpt.statistics()["stall_seconds"]

    @property
    def saves(self) -> int:
        return self.optimizer.ckpt.statistics()["checkpoints_started"]

    def turns(self) -> Iterable:
        import fxckpt

        return fxckpt.steps(10**9)

    def at(self, every: int | str) -> None:
        """Nobody changes this while it trains, so there is no public way to: one process is to be measured at each."""
        from fxckpt.run.clock import Schedule

        stepping = self.optimizer.ckpt._run.stepping
        before, stepping.schedule = stepping.schedule, Schedule(every or 10**9)
        stepping.schedule.last_step, stepping.schedule.owed = before.last_step, before.owed

    def save(self, step: int) -> None:
        """The boundary does it."""

    def flush(self) -> None:
        self.optimizer.ckpt.flush()

    def close(self) -> None:
        self.optimizer.ckpt.shutdown()

    def restore(self) -> dict[str, str]:
        import fxckpt

        return {str(skipped): "skipped" for skipped in fxckpt.load(optimizer=self.optimizer).skipped}

    def check(self, step: int) -> dict:
        import fxckpt

        done = self.optimizer.ckpt.statistics()
        report = {key: done[key] for key in REPORTED}
        if self.writer == "mock":
            return report
        if done["checkpoints_committed"] != step:
            raise AssertionError(f"{step} steps, but {done['checkpoints_committed']} checkpoints committed")
        restored = copy.deepcopy(self.model)
        found = fxckpt.load(self.folder, model=restored)  # reads and verifies every chunk
        if found.step != step or found.skipped:
            raise AssertionError(f"expected a verified checkpoint of step {step}, found that of {found.step}: {found.skipped}")
        weights = dict(restored.named_parameters())
        for name, parameter in self.model.named_parameters():
            if not torch.equal(weights[name], parameter):
                raise AssertionError(f"{name} in {self.folder} is not what was trained")
        return report


class TorchSave(Nothing):
    """``torch.save`` and fsync."""

    def saved(self, step: int) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        replace_durably(self.folder / "checkpoint.pt", lambda new: torch.save(state, new))
        self.durable.append((step, time.monotonic()))

    def restore(self) -> dict[str, str]:
        state = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return {}


class Safetensors(Nothing):
    """``safetensors.torch.save_file`` and fsync."""

    def saved(self, step: int) -> None:
        from safetensors.torch import save_file

        replace_durably(self.folder / "checkpoint.safetensors", lambda new: save_file(self.tensors(), new))
        self.durable.append((step, time.monotonic()))

    def restore(self) -> dict[str, str]:
        from safetensors.torch import load_file

        self.make_moments()
        copy_in(load_file(self.folder / "checkpoint.safetensors"), self.tensors())
        return {}


class Asynchronous(Nothing):
    """Saves beside training, one checkpoint after the other; the last two are kept."""

    syncs = False  # the library syncs its files itself
    wait: Callable | None = None
    last = 0  # the step that was saved last

    def start(self, where: Path) -> Callable:
        """Begin to save to ``where``; the result waits until the files are written."""
        raise NotImplementedError

    def load(self, where: Path) -> dict[str, dict[str, torch.Tensor]]:
        """Read what was saved to ``where``, over the live tensors where the library does so; as :meth:`payload`."""
        raise NotImplementedError

    def payload(self) -> dict[str, dict[str, torch.Tensor]]:
        """What is saved."""
        return {"model": self.model.state_dict(), "optimizer": self.moments()}

    def saved(self, step: int) -> None:
        self.flush()
        self.where = self.folder / str(step)
        wait = self.wait = self.start(self.where)
        self.note = threading.Thread(target=self.complete, args=(step, wait), daemon=True)
        self.note.start()
        for old in self.folder.iterdir():
            if old.name.isdecimal() and int(old.name) < self.last:
                shutil.rmtree(old, ignore_errors=True)
        self.last = step

    def complete(self, step: int, wait: Callable) -> None:
        """Note when it is, by the library's own word."""
        wait()
        self.durable.append((step, time.monotonic()))

    def flush(self) -> None:
        if self.wait is not None:
            self.wait()
            if not self.syncs:
                sync_tree(self.where)
            self.wait = None

    def close(self) -> None:
        self.flush()

    def restore(self) -> dict[str, str]:
        self.make_moments()
        errors: dict[str, str] = {}
        for where in sorted(self.folder.iterdir(), key=lambda each: -int(each.name) if each.name.isdecimal() else 0):
            try:
                copy_in(self.load(where)["optimizer"], self.moments())
                return errors
            except Exception as error:
                errors[where.name] = f"{type(error).__name__}: {error}"[:200]
        raise AssertionError(f"nothing loads: {errors}")


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
            began = time.monotonic()
            with self.manager.lock():
                self.stalled += time.monotonic() - began
                step()

        optimizer.step = locked
        return super().prepare(model, optimizer, folder)

    def start(self, where: Path) -> Callable:
        return self.manager.save(str(where), self.payload()).result

    def load(self, where: Path) -> dict:
        return dict(self.manager.load(str(where), into=self.payload()))

    def check(self, step: int) -> dict:
        self.close()
        return {}

    def close(self) -> None:
        super().close()
        self.manager.close()


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
    Contestant("journal", "fxckpt, fused=True, journal=64", lambda: Fxckpt(journal=64)),
    Contestant("mock", 'fxckpt, writer="mock" (writes nothing)', lambda: Fxckpt(writer="mock")),
    Contestant("safetensors", "safetensors save_file + fsync", Safetensors, waits=True),
    Contestant("torch_save", "torch.save + fsync", TorchSave, waits=True),
    Contestant("dcp", "torch DCP async_save", DCP),
    Contestant("dcp_sync", "torch DCP save", DCPSynchronous, waits=True),
    Contestant("torchsnapshot", "TorchSnapshot async_take + fsync", TorchSnapshot, needs="torchsnapshot"),
    Contestant("torch_checkpointing", "torch_checkpointing async + fsync", TorchCheckpointing, needs="torch_checkpointing"),
)
