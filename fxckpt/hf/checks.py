"""What cannot be resumed exactly is refused, by its name and with what to do instead: at ``attach``, and when training begins."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import Trainer

from fxckpt.compat.trainer import is_attached, missing_parts
from fxckpt.compiled_optimizer import compile_step
from fxckpt.data import source_of
from fxckpt.data.accelerated import AcceleratedSource
from fxckpt.errors import SetupError

OURS = ("trainer", "lr_scheduler", "attributes")
"""Names among the extras that an attached Trainer's run has itself."""

_BACKWARD_STEPS = "makes its steps inside the backward, where no checkpoint can be of one step. Choose another optim="


def check(
    trainer: Any, compile: bool, attributes: Sequence[str], extra: Mapping[str, object] | None, options: Mapping[str, Any]
) -> None:
    """Raises SetupError for the first thing that ``attach`` refuses."""
    if not isinstance(trainer, Trainer):
        raise SetupError(f"fxckpt.hf.attach takes a transformers.Trainer; this is a {type(trainer).__name__}")
    if missing := missing_parts(trainer):
        raise SetupError(f"this version of transformers has no Trainer.{missing[0]}: fxckpt.hf needs transformers 5.24 or newer")
    if absent := [name for name in attributes if not hasattr(trainer, name)]:
        raise SetupError(f"attributes={tuple(attributes)!r}: this {type(trainer).__name__} has no {absent[0]!r}")
    _check_options(extra, options)
    for why in (*_of_trainer(trainer, compile), *_of_arguments(trainer)):
        raise SetupError(f"fxckpt.hf: {why}")


def _check_options(extra: Mapping[str, object] | None, options: Mapping[str, Any]) -> None:
    """The options are of compile_step, and not what the Trainer decides."""
    if extra is not None and not isinstance(extra, Mapping):
        raise SetupError(f"extra= takes a dict of objects by name; this is a {type(extra).__name__}")
    if taken := [name for name in OURS if name in (extra or {})]:
        raise SetupError(f"extra[{taken[0]!r}] is kept by fxckpt.hf itself: choose another name")
    known = inspect.signature(compile_step).parameters.keys() - {"opt", "dir", "extra"}
    for name in options:
        if name == "model":
            raise SetupError("fxckpt.hf.attach checkpoints the Trainer's model: leave model= out")
        if name not in known:
            raise SetupError(
                f"fxckpt.hf.attach has no option {name!r}; fxckpt.compile_step has these: {', '.join(sorted(known))}"
            )


def _of_trainer(trainer: Trainer, compile: bool) -> Iterator[str]:
    """Reasons against this Trainer."""
    if is_attached(trainer):
        yield "this Trainer is attached already"
    if compile and trainer.model_init is not None:
        yield "compile=True compiles a model that is there; with model_init=, call model.compile(backend=fxckpt.backend) in it"
    for name in ("DeepSpeed", "FSDP"):
        if getattr(trainer, f"is_{name.lower()}_enabled", False):
            yield f"{name} splits the optimizer's state over processes, and no checkpoint of one holds it. Train without it"
    if trainer.accelerator.dataloader_config.use_stateful_dataloader:
        yield (
            "the accelerator has use_stateful_dataloader=True, which draws random numbers before training. Leave it out: the "
            "loader's place is in the checkpoint anyway"
        )


def _of_arguments(trainer: Trainer) -> Iterator[str]:
    """Reasons against its TrainingArguments."""
    args = trainer.args
    if args.world_size > 1:
        yield (
            f"this is one of {args.world_size} processes, whose newest checkpoints may be of different steps. Train in one, or "
            "write the loop yourself, with DistributedDataParallel (docs/distributed.md)"
        )
    if args.n_gpu > 1:
        yield f"{args.n_gpu} devices in one process (DataParallel). Name one of them in CUDA_VISIBLE_DEVICES"
    if args.auto_find_batch_size:
        yield "auto_find_batch_size=True trains with another batch size after a failure. Say per_device_train_batch_size"
    if args.ignore_data_skip:
        yield "ignore_data_skip=True begins the epoch anew. Leave it out: no batch is read twice in any case"
    if not args.dataloader_in_order:
        yield "dataloader_in_order=False makes the order of batches chance. Leave it out"
    if args.dataloader_persistent_workers and args.dataloader_num_workers and trainer.eval_dataset is not None:
        yield (
            "dataloader_persistent_workers=True with an eval_dataset: the first evaluation of a process draws a random number "
            "that later ones do not, so a resumed run would have others than the uninterrupted one. Leave it out"
        )
    optim = str(getattr(args.optim, "value", args.optim))
    if optim in ("lomo", "adalomo") or optim.endswith("layerwise"):
        yield f"optim={optim!r} {_BACKWARD_STEPS}"


def check_loader(loader: Any) -> None:
    """Raises SetupError for a training loader that cannot be resumed in the middle of a pass with the bits it has without us."""
    if not isinstance(source_of(loader), AcceleratedSource):
        raise SetupError(
            f"fxckpt.hf: get_train_dataloader() returned a {type(loader).__name__} that Accelerate did not prepare: the Trainer "
            "draws from it before fxckpt can. Return self.accelerator.prepare(loader) there"
        )
