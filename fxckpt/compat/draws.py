"""How far the global random generators have come: how much was drawn between two instants, without drawing anything."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch

_WORDS = 624  # of a Mersenne twister's state; a position is known up to this many
_TORCH_STATE = 5056  # bytes of torch's CPU generator, as ``CPUGeneratorImplState`` lays them out: the seed, then what is left

Position = tuple[int, int]
"""A stream, and a place in it."""


def positions() -> dict[str, Position]:
    """Of torch's, numpy's and Python's global generators, and of every CUDA device that is in use."""
    found = {"numpy": (0, int(np.random.get_state(legacy=False)["state"]["pos"])), "python": (0, random.getstate()[1][_WORDS])}
    state = torch.get_rng_state().numpy()
    if state.nbytes == _TORCH_STATE:
        found["torch"] = (int(state[:8].view(np.uint64)[0]), -int(state[8:12].view(np.int32)[0]))
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            seed, offset = torch.cuda.get_rng_state(device).numpy()[-16:].view(np.int64)
            found[f"cuda:{device}"] = (int(seed), int(offset))
    return found


def drawn(before: Mapping[str, Position], after: Mapping[str, Position]) -> dict[str, int]:
    """By generator how many words were drawn in between, modulo its period; those that were seeded anew are left out."""
    both = {name: (before[name], after[name]) for name in before.keys() & after.keys()}
    return {
        name: (b[1] - a[1]) % (1 << 62 if name.startswith("cuda") else _WORDS) for name, (a, b) in both.items() if a[0] == b[0]
    }
