"""What a training script of the tests begins with: ``from script_prelude import *``; ``process_runs.py`` runs it."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import numpy as np
import torch
from digests import digest
from small_models import GPT, Loader, conv, eager, frozen, mlp
from torch import nn
from torch.nn import functional as F

import fxckpt

__all__ = ["GPT", "F", "Loader", "conv", "digest", "eager", "finish", "frozen", "fxckpt", "kill_window", "mlp", "nn", "np",
           "random", "report", "torch"]  # fmt: skip


def kill_window() -> None:
    """An instant at which a kill may come: a killed run lingers here, so that kills fall between all lines of its loop."""
    time.sleep(float(os.environ.get("KILL_WINDOW", "0")))


def report(step: int, loss: torch.Tensor) -> None:
    """Print a step's loss to the last bit, at once."""
    print(f"LOSS {step} {loss.item().hex()}", flush=True)
    kill_window()


def finish(*objects: Any) -> None:
    """Print the digest of everything that a run ends with, the random generators included."""
    state = random.getstate(), np.random.get_state()[1:], torch.get_rng_state()
    print("DIGEST", digest(*objects, *state), flush=True)
