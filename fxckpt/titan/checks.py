"""What of a torchtitan training no checkpoint could bring back, or only torchtitan's own manager writes: refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fxckpt.errors import SetupError

_HOW = "fxckpt.titan.CheckpointManager"
_OWN = "torchtitan.components.checkpointer.CheckpointManager"

DATALOADER, LR_SCHEDULER = "dataloader", "lr_scheduler"
"""torchtitan's names of what is kept beside the Trainer's ``states``: ``exclude_from_loading`` may name them, too."""


def check(config: Any, model_parts: Sequence[Any], dataloader: Any, states: Mapping[str, Any]) -> None:
    """Raises SetupError, with the way out, for options and parts that are not supported."""
    if why := next(_reasons(config, model_parts, dataloader, states), None):
        raise SetupError(f"{_HOW}: {why}")


def _reasons(config: Any, model_parts: Sequence[Any], dataloader: Any, states: Mapping[str, Any]) -> Iterator[str]:
    """Why not."""
    dims = (getattr(each, "parallel_dims", None) for each in states.values())
    if len(model_parts) != 1 or any(getattr(each, "pp_enabled", False) for each in dims):
        yield (
            f"with pipeline parallelism each rank trains other parameters ({len(model_parts)} model parts on this one), which "
            "no checkpoint of one store holds. Set parallelism.pipeline_parallel_degree to 1 (FSDP2 and tensor parallelism are "
            f"supported), or keep {_OWN}"
        )
    if dataloader is None:
        yield "there is no dataloader, and it is before a batch is fetched that a checkpoint is taken"
    if taken := [name for name in (DATALOADER, LR_SCHEDULER, "model", "optimizer") if name in states]:
        yield f"states[{taken[0]!r}] has the name of what is kept beside it: choose another one"
    known = {DATALOADER, LR_SCHEDULER, *states}
    if other := [name for name in config.exclude_from_loading if name not in known]:
        yield (
            f"checkpoint.exclude_from_loading names {other[0]!r}: only {', '.join(sorted(known))} can be left as they are. "
            "To go on with weights alone, load them with fxckpt.dcp.StoreReader, or fxckpt.load(directory, model=model)"
        )
    if config.create_seed_checkpoint:
        yield (
            f"checkpoint.create_seed_checkpoint: a seed is written by {_OWN}, and its path given as "
            "checkpoint.initial_load_path begins a training here"
        )
    if config.last_save_model_only or config.last_save_in_hf:
        yield (
            "the last checkpoint holds all that the others hold. Leave checkpoint.last_save_model_only and last_save_in_hf "
            "False; `fxckpt export --format safetensors` writes the weights alone, also when training is over"
        )
    if config.initial_load_path and not config.initial_load_model_only:
        yield (
            "checkpoint.initial_load_path begins with weights only (initial_load_model_only=True). `fxckpt import` makes a "
            "whole checkpoint of torch.distributed.checkpoint, with its optimizer, the first one of checkpoint.folder"
        )
