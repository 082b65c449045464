"""``attach``: Hugging Face's ``Trainer`` checkpoints layer by layer, and its training resumes with the same bits.

    trainer = fxckpt.hf.attach(Trainer(...), "checkpoints/", every=1)
    trainer.train()

``checks`` says what is refused, ``training`` is one call of ``train()``, ``progress`` is what a record holds of a Trainer, and
``resuming`` brings the Trainer's loop to the place of a record.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from transformers import Trainer

from fxckpt.compat.trainer import stand_in
from fxckpt.config import default_directory
from fxckpt.hf.checks import check
from fxckpt.hf.training import Attachment, Options
from fxckpt.store.directory import local_path
from fxckpt.torch_backend import backend

__all__ = ["attach"]

T = TypeVar("T", bound=Trainer)


def attach(
    trainer: T,
    dir: str | os.PathLike[str] | None = None,
    *,
    compile: bool = False,
    go_on: bool = False,
    attributes: Sequence[str] = (),
    extra: Mapping[str, object] | None = None,
    **options: Any,
) -> T:
    """Checkpoint a Trainer's training, and let the same script go on after it was killed.

    From now on ``trainer.train()`` loads the newest checkpoint of ``dir`` that verifies, if there is one, and goes on in the
    middle of its epoch: with the bits, the number of steps and the ``log_history`` of a training that was never interrupted.
    Nothing else of the script changes, and an uninterrupted training has the bits that it has without this call. While it
    trains, ``trainer.optimizer.ckpt`` is the run's :class:`~fxckpt.Handle`.

    Args:
        trainer: of one process. Model, optimizer and scheduler may be given to it or made by it.
        dir: the store's directory; default ``$FXCKPT_DIR``, else ``checkpoints/``. Another one than ``output_dir``, where the
            Trainer may save beside it.
        compile: compile the model in place with ``fxckpt.backend``.
        go_on: train on where a callback had stopped the training before its last step. Without it such a training is over.
        attributes: names of attributes of a Trainer of your own that change while it trains.
        extra: what else has state, by name, as ``fxckpt.compile_step`` takes it; ``vars(callback)`` of a callback that keeps
            something and is no ``ExportableState``.
        options: of ``fxckpt.compile_step``: ``every``, ``keep``, ``writer``, ``on_error`` and the others.

    Returns:
        The same trainer.

    Raises:
        SetupError: something that cannot be resumed exactly, by its name, and what to do instead. ``train()`` raises it for what
        only shows then, and all that ``compile_step`` and ``load`` raise.
    """
    check(trainer, compile, attributes, extra, options)
    if compile:
        assert trainer.model is not None
        trainer.model.compile(backend=backend)
    directory = os.path.abspath(local_path(dir if dir is not None else default_directory()))
    attachment = Attachment(trainer, Options(directory, go_on, tuple(attributes), dict(extra or {}), options))
    stand_in(trainer, attachment)
    return trainer
