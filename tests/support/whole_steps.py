"""Makes whole steps, forward to ``zero_grad``, by one compiled function, and the same by plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import fxckpt

Loop = Callable[[nn.Module, Any, torch.Tensor, torch.Tensor], torch.Tensor]
"""One step of a model and its optimizer on a batch; returns the loss, detached."""


class Mlp(nn.Module):
    """Two layers with a LayerNorm between them, which Inductor would read late."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(torch.tanh(self.up(x))))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of a step, the same in every run."""
    made = torch.Generator().manual_seed(step)
    return torch.randn(16, 8, generator=made), torch.randint(0, 4, (16,), generator=made)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)


def plain(model: nn.Module, opt: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    opt.step()
    opt.zero_grad()
    return loss.detach()


def clipped(model: nn.Module, opt: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    opt.step()
    opt.zero_grad()
    return loss.detach()


def kept_as_zeros(model: nn.Module, opt: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    opt.step()
    opt.zero_grad(set_to_none=False)
    return loss.detach()


def zeroed_first(model: nn.Module, opt: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    opt.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    opt.step()
    return loss.detach()


def accumulated(model: nn.Module, opt: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(())
    for part in range(2):
        loss = F.cross_entropy(model(x[part::2]), y[part::2]) / 2
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    opt.step()
    opt.zero_grad()
    return total


class Whole:
    """A model and its optimizer, and the function that steps them: ``compiled`` says with which options of the backend, None that
    it is not compiled. ``graphs`` are Dynamo's, all that were compiled."""

    def __init__(
        self,
        loop: Loop = clipped,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
        directory: Any = None,
        compiled: dict[str, Any] | None = None,
        build: Callable[[], nn.Module] = Mlp,
        fullgraph: bool = True,
        backend: Callable[..., Any] = fxckpt.backend,
        **options: Any,
    ):
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.model, self.graphs, self.losses = build(), [], []
        self.opt: Any = optimizer(self.model)
        if compiled is not None:
            writer = {"writer": "mock"} if directory is None else {"keep": 20}
            given = {"model": self.model, "every": 1, **writer, **options}
            self.opt = fxckpt.compile_step(self.opt, directory, **given)
        model, opt = self.model, self.opt

        def train_step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return loop(model, opt, x, y)

        @functools.wraps(backend)
        def noting(gm: torch.fx.GraphModule, inputs: Any) -> Any:
            self.graphs.append(gm)
            return backend(gm, inputs, options=compiled)

        self.step = train_step if compiled is None else torch.compile(train_step, backend=noting, fullgraph=fullgraph)

    def train(self, *steps: int) -> Whole:
        for step in steps:
            self.losses.append(self.step(*batch(step)).item())
        return self

    def bits(self) -> list[torch.Tensor]:
        """Copies of the parameters and of all state."""
        state = [v for p in self.model.parameters() for v in self.opt.state[p].values() if isinstance(v, torch.Tensor)]
        return [t.detach().clone() for t in [*self.model.parameters(), *state]]

    def updated_in_graph(self) -> list[str]:
        """The layers that the last step updated in the graph."""
        standing = self.opt.ckpt.graph.standing
        return [] if standing is None else [name for name, why in standing.items() if not why]


def whole_steps(graph: torch.fx.GraphModule) -> int:
    """How many steps stand in one of Dynamo's graphs."""
    return len(graph.graph.find_nodes(op="call_function", target=torch.ops.fxckpt.optimizer_step.default))
