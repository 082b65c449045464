"""A whole training through ``compile_step`` that a test records or watches."""

from __future__ import annotations

from pathlib import Path

from small_training import Training

import fxckpt
from fxckpt.engine import io
from fxckpt.store.reader import latest


def real_run(root: Path, acks: Path, writer: str) -> None:
    """``compile_step`` and ``load(step=…)``: training, a named save, a rollback past the same steps, a second run."""

    def commits(training: Training, steps: int) -> None:
        for _ in range(steps):
            training.train()
            training.opt.ckpt.flush()
            io.mkdir(acks / f"{latest(root).generation}")

    options = {"keep": 2, "writer": writer} | ({"chunk_mb": 1, "staging_mb": 4} if writer == "monitor" else {})
    training = Training(root, **options)
    commits(training, 4)
    training.opt.ckpt.save("best")
    io.mkdir(acks / f"{latest(root).generation}-best")
    assert fxckpt.load(root, optimizer=training.opt, step=3).step == 3
    commits(training, 2)
    training.opt.ckpt.shutdown()
    training = Training(root, **options)
    assert fxckpt.load(root, optimizer=training.opt).step == 5
    commits(training, 2)
    training.opt.ckpt.shutdown()
