"""States by their bits: digests, snapshots, what a checkpoint's files hold, and where two of them differ."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import nn


def _feed(sha: Any, value: Any) -> None:
    """Hash a value by its exact bits and types."""
    if isinstance(value, torch.Tensor):
        value = torch.view_as_real(value.detach()) if value.is_complex() else value.detach()
        sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
        sha.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        sha.update(value.tobytes())
    elif isinstance(value, dict):
        for key in value:
            sha.update(repr(key).encode())
            _feed(sha, value[key])
    elif isinstance(value, (list, tuple)):
        for each in value:
            _feed(sha, each)
    else:
        sha.update(repr(value).encode())


def digest(*objects: Any) -> str:
    """SHA-256 over the state dicts of modules, optimizers, schedulers and loaders, and over plain values and tensors."""
    sha = hashlib.sha256()
    for each in objects:
        _feed(sha, each.state_dict() if hasattr(each, "state_dict") else each)
    return sha.hexdigest()[:16]


def snapshot(model: nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Copies of what the two files of a checkpoint must hold, by their keys there; ties once, by their first name."""
    out, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            out[name] = tensor.detach().clone()
            seen.add(id(tensor))
    for i, opt in enumerate(optimizers):
        for name, param in model.named_parameters():
            for key, value in opt.state.get(param, {}).items():
                if isinstance(value, torch.Tensor):
                    out[f"{key}/{name}" if i == 0 else f"optimizer{i}:{key}/{name}"] = value.detach().clone()
    return out


def stored(path: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint's two files hold, as the safetensors package reads them; copies, not mappings of the files."""
    return {**load((path / "model.safetensors").read_bytes()), **load((path / "optimizer.safetensors").read_bytes())}


def differences(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Names whose tensors are not the same bits, or are on one side only; NaN equals NaN."""
    return [key for key in {**left, **right} if key not in left or key not in right or digest(left[key]) != digest(right[key])]
