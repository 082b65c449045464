"""One rank of torchtitan's own Trainer, of 0.3, on a CPU: a small Llama with FSDP2 over all ranks.

    python -m torch.distributed.run --nproc-per-node 2 titan_itself.py FOLDER [OPTION=VALUE ...]

``steps``, ``interval``; ``kill``: in its first life rank 1 kills itself before this step; ``ours=0``: without us; ``tp``: the
degree of tensor parallelism; ``compiled=1``: blocks are compiled with our backend. Its layers draw random numbers. Prints
``LEFT`` and a digest of all parameters and all that the optimizers keep. torchtitan trains on accelerators only, so it is told
that this CPU is one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._utils
import torch.distributed as dist


class Cpu(types.ModuleType):
    """``torch.cpu`` with what torchtitan asks the module of an accelerator for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def get_device_name(self, *_: Any) -> str:
        return "CPU"

    def get_device_properties(self, *_: Any) -> Any:
        return types.SimpleNamespace(total_memory=1 << 34)

    def memory_stats(self, *_: Any) -> dict[str, int]:
        return {}

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, *_: Any) -> None: ...

    def reset_peak_memory_stats(self) -> None: ...

    def empty_cache(self) -> None: ...


CPU = Cpu("cpu")
torch._utils._get_available_device_type = lambda: "cpu"
torch._utils._get_device_module = lambda _: CPU
if not hasattr(dist, "set_timeout"):  # newer than torch 2.13
    dist.set_timeout = lambda timeout, group=None: None

from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torch.utils.data import IterableDataset  # noqa: E402
from torchtitan.components.dataloader import ParallelAwareDataloader  # noqa: E402
from torchtitan.components.optimizer import OptimizersContainer  # noqa: E402
from torchtitan.components.optimizer.optimizer import ParamGroupConfig  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.models.llama3 import config_registry  # noqa: E402
from torchtitan.tools.logging import init_logger  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402
from whole_tensors import whole  # noqa: E402

import fxckpt.titan  # noqa: E402


class Numbers(IterableDataset):
    """Endless text of tokens, of each rank its own."""

    def __init__(self, rank: int, length: int):
        self.rank, self.length, self.place = rank, length, 0

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.place += 1
            draw = torch.Generator().manual_seed(1000 * self.place + self.rank)
            tokens = torch.randint(0, 2048, (self.length + 1,), generator=draw)
            yield {"input": tokens[:-1]}, tokens[1:]

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


class Loader(ParallelAwareDataloader):
    """torchtitan's own, over these."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        pass

    def __init__(self, config: Config, *, dp_world_size: int, dp_rank: int, seq_len: int, local_batch_size: int, **others: Any):
        every = others["snapshot_every_n_steps"]
        data = Numbers(dp_rank, seq_len)
        super().__init__(data, dp_rank, dp_world_size, batch_size=local_batch_size, snapshot_every_n_steps=every)


class NoTokenizer(BaseTokenizer):
    """The text is of tokens already."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: Any):
        super().__init__()

    def encode(self, *_: Any, **__: Any) -> list[int]:
        return []

    def decode(self, *_: Any, **__: Any) -> str:
        return ""

    def get_vocab_size(self) -> int:
        return 2048


def summing(parallelize: Callable[..., Any]) -> Callable[..., Any]:
    """gloo reduces with sums only."""

    def with_sums(model: Any, **given: Any) -> Any:
        model = parallelize(model, **given)
        for each in model.modules():
            if isinstance(each, FSDPModule):
                each.set_force_sum_reduction_for_comms(True)
        return model

    return with_sums


def group(pattern: str, name: str, **options: Any) -> ParamGroupConfig:
    return ParamGroupConfig(pattern=pattern, optimizer_name=name, optimizer_kwargs={"lr": 8e-4, **options})


def make_config(folder: str, asked: dict[str, int]) -> Trainer.Config:
    """torchtitan's debug model, smaller; two optimizers, two micro-batches a step, and our manager."""
    config = config_registry.llama3_debugmodel()
    model = config.model_spec.model
    model.layers = model.layers[:2]
    for layer in model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()  # the other one is for accelerators
    config.model_spec = dataclasses.replace(config.model_spec, parallelize_fn=summing(config.model_spec.parallelize_fn))
    config.optimizer = OptimizersContainer.Config(param_groups=[group("norm", "Adam"), group(".*", "AdamW", weight_decay=0.1)])
    config.dataloader, config.tokenizer = Loader.Config(), NoTokenizer.Config()
    config.training.local_batch_size, config.training.seq_len = 2, 32
    config.training.global_batch_size = 2 * 2 * dist_size() // asked["tp"]
    config.training.steps = asked["steps"]
    config.training.disable_cuda_graphs, config.training.mixed_precision_param = True, "float32"
    config.parallelism.spmd_backend, config.parallelism.tensor_parallel_degree = "partial_dtensor", asked["tp"]
    config.compile.enable, config.compile.backend, config.compile.components = bool(asked["compiled"]), "fxckpt", ["model"]
    config.validator.enable, config.debug.seed, config.dump_folder = False, 0, folder
    config.checkpoint = fxckpt.titan.CheckpointManager.Config(
        enable=bool(asked["ours"]), interval=asked["interval"], folder="store", update="native"
    )
    return config


def dist_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def left(trainer: Trainer) -> str:
    """All ranks call it."""
    found = hashlib.sha256()
    for param in trainer.model_parts[0].parameters():
        states = [each.state[param] for each in trainer.optimizers if param in each.state]
        for tensor in (param, *(t for state in states for _, t in sorted(state.items()))):
            found.update(whole(tensor))
    return found.hexdigest()[:16]


def main() -> None:
    folder, *given = sys.argv[1:]
    asked = {"steps": 5, "interval": 2, "ours": 1, "kill": 0, "tp": 1, "compiled": 0}
    asked |= {name: int(value) for name, value in (each.split("=") for each in given)}
    init_logger()
    trainer = make_config(folder, asked).build()
    for block in trainer.model_parts[0].layers.values():
        block.register_forward_hook(lambda module, args, out: out * (1 + 0.1 * torch.rand_like(out)))
    if asked["kill"] and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and dist.get_rank() == 1:
        theirs = trainer.train_step

        def killed(batches: Any) -> None:
            if trainer.step == asked["kill"]:
                os.kill(os.getpid(), signal.SIGKILL)
            theirs(batches)

        trainer.train_step = killed
    trainer.train()
    print("LEFT", trainer.step, trainer.ntokens_seen, left(trainer), flush=True)
    trainer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
