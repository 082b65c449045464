"""Private parts of transformers' ``Trainer``: counts that it keeps beside its state, and the loading that ours stands in for.

``TrainerState`` holds what a log says, and not the loss that waits for the next log, nor the step of the last one. The place in
the training is a local of its loop: it comes from a ``trainer_state.json`` only, in the folder that ``train()`` is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

COUNTS = (
    "_total_loss_scalar",
    "_globalstep_last_logged",
    "_initial_global_step",
    "_initial_num_input_tokens_seen",
    "current_flos",
)
"""Numbers that a Trainer sets when training begins, and counts on."""

RUNNING_LOSS = "_tr_loss"
"""The tensor of the loss that was not logged yet."""

_ATTACHMENT = "_fxckpt_attachment"

_PARTS = ("get_batch_samples", "_load_from_checkpoint", "_init_training_state", "callback_handler", "accelerator")


def missing_parts(trainer: Any) -> list[str]:
    """What ``fxckpt.hf`` needs of a Trainer and this version has not. Those whose loop has ``_init_training_state`` keep the
    running loss in an attribute."""
    return [name for name in _PARTS if not hasattr(trainer, name)]


def is_attached(trainer: Any) -> bool:
    """Do methods of an attachment stand in for its own?"""
    return _ATTACHMENT in vars(trainer)


def stand_in(trainer: Any, attachment: Any) -> None:
    """Let the methods of ``attachment`` be called in place of the Trainer's; only this one's, whatever its class."""
    vars(trainer)[_ATTACHMENT] = attachment
    for name in ("train", "get_batch_samples"):
        vars(trainer)[name] = getattr(attachment, name)


def counts(trainer: Any) -> dict[str, Any]:
    """The numbers."""
    return {name: getattr(trainer, name) for name in COUNTS}


def set_counts(trainer: Any, saved: dict[str, Any]) -> None:
    """Put them back."""
    for name in COUNTS:
        setattr(trainer, name, saved[name])


@contextmanager
def loading_no_weights(trainer: Any) -> Iterator[None]:
    """Inside, ``train(resume_from_checkpoint=folder)`` takes its place from the folder, and no weights."""
    vars(trainer)["_load_from_checkpoint"] = lambda *_, **__: None
    try:
        yield
    finally:
        vars(trainer).pop("_load_from_checkpoint", None)
