"""Two lives of one training in this process: whether the second ends with the bits of a training that was never interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from digests import digest

import fxckpt

Loop = Callable[[Any, torch.optim.Optimizer, int], torch.Tensor]
"""One turn of ``loop(model, opt, step)``: a loss to go back from."""


def batch(step: int, *shape: int) -> torch.Tensor:
    """The data of a step."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step))


def life(store: Path | None, make: Callable, loop: Loop, steps: int, **options: Any) -> Any:
    """Train until ``steps``, from wherever the store says; returns the model. Without a store: plain PyTorch. ``make`` may return
    the model and what compile_step gets as ``model=``."""
    torch.manual_seed(0)
    made = make()
    model, given = made if isinstance(made, tuple) else (made, made)
    modules = [given] if isinstance(given, torch.nn.Module) else [*(given.values() if isinstance(given, dict) else given)]
    opt = torch.optim.AdamW([p for each in modules for p in each.parameters() if p.requires_grad], lr=0.01)
    start = 0
    if store is not None:
        fxckpt.compile_step(opt, store, **{"model": given, "every": 1, "update": "native", **options})
        start = fxckpt.load(optimizer=opt).step
    for step in range(start, steps):
        loop(model, opt, step).backward()
        opt.step()
        opt.zero_grad()
    if store is not None:
        opt.ckpt.shutdown()
    return model


def resumed(store: Path, make: Callable, loop: Loop, steps: int = 8, killed: int = 4, **options: Any) -> tuple[Any, Any]:
    """The models of an uninterrupted training and of one that was ended after ``killed`` steps and begun anew. Their tensors
    have the same bits."""
    plain = life(None, make, loop, steps)
    life(store, make, loop, killed, **options)
    second = life(store, make, loop, steps, **options)
    assert digest(tensors(second)) == digest(tensors(plain))
    return plain, second


def tensors(model: Any) -> dict[str, torch.Tensor]:
    """All parameters and buffers, in whatever holds the modules."""
    modules = model.values() if isinstance(model, dict) else model if isinstance(model, (list, tuple)) else [model]
    found: dict[str, torch.Tensor] = {}
    for at, module in enumerate(modules):
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            found[f"{at}.{name}"] = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    return found
