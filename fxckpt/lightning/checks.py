"""What of a Trainer cannot be resumed exactly, and is refused before it trains."""

from __future__ import annotations

from typing import Any

from fxckpt.compat.lightning import missing_parts, reads_its_iterator, restored_elsewhere, validates_by_the_clock
from fxckpt.errors import SetupError

_HOW = "fxckpt.lightning.Checkpoint"


def check_trainer(trainer: Any, callback: Any) -> None:
    """Raises SetupError, with the way out, for a Trainer whose training no checkpoint could bring back."""
    if missing := missing_parts(trainer):
        raise SetupError(
            f"this version of Lightning has no {', '.join(missing)}, which {_HOW} needs; it is known to work with 2.6"
        )
    if why := next(iter(_reasons(trainer, callback)), None):
        raise SetupError(f"{_HOW}: {why}")


def _reasons(trainer: Any, callback: Any) -> list[str]:
    """Why not."""
    found = []
    if any(each is not callback and type(each) is type(callback) for each in trainer.callbacks):
        found.append("there are two of them among the Trainer's callbacks: leave one out")
    if restored_elsewhere(trainer):
        found.append(
            "the Trainer has loaded a checkpoint of its own (ckpt_path=). Leave that out: training goes on from the newest "
            "checkpoint in the directory by itself. To begin from weights, load them into the module before fit()"
        )
    if trainer.world_size > 1 or type(trainer.strategy).__name__ != "SingleDeviceStrategy":
        found.append(
            f"{type(trainer.strategy).__name__} over {trainer.world_size} devices is not supported yet. Train on one device "
            "(devices=1), or write the loop with DistributedDataParallel (docs/distributed.md)"
        )
    if trainer.reload_dataloaders_every_n_epochs:
        found.append(
            "with reload_dataloaders_every_n_epochs= it cannot be told which loader a checkpoint is of. Make the data set give "
            "another epoch's samples from its set_epoch(), or from a sampler"
        )
    if validates_by_the_clock(trainer):
        found.append("a val_check_interval= in hours validates elsewhere in each run. Count it in batches")
    if reads_its_iterator(trainer):
        found.append("a training_step that takes dataloader_iter fetches when it likes. Let it take a batch")
    if changing := [type(each).__name__ for each in trainer.callbacks if _changes_groups(each)]:
        found.append(
            f"{changing[0]} adds parameter groups in the middle of training. Give all of them to the optimizer in "
            "configure_optimizers, and set requires_grad in on_train_epoch_start"
        )
    return found


def _changes_groups(callback: Any) -> bool:
    """Is it one that thaws layers?"""
    return any(kind.__name__ == "BaseFinetuning" for kind in type(callback).__mro__)


def check_loaders(combined: Any) -> None:
    """Raises SetupError for training loaders that Lightning reads ahead of."""
    for loader in combined.flattened:
        try:
            len(loader)
        except (TypeError, NotImplementedError) as error:
            raise SetupError(
                f"{_HOW}: this {type(loader).__name__} has no length, so Lightning fetches a batch before it is needed, which no "
                "checkpoint could be exact about. Give the data set a __len__"
            ) from error
