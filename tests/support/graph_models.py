"""Small models and compilers that the tests of the graph side share."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fxckpt.graph.model.book import TraceBook, traces
from fxckpt.torch_backend import backend

D = 6


@pytest.fixture(autouse=True)
def book():
    """A book of the test's own, and a compiler that remembers nothing."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    before = dict(vars(traces))
    vars(traces).update(vars(TraceBook()))
    yield traces
    vars(traces).update(before)
    torch._dynamo.reset()


def front_end(gm, example_inputs):
    """Inductor up to its code generation: builds the joint graph, runs the joint passes, then runs it eagerly."""
    from torch._inductor.compile_fx import compile_fx

    def interpret(graph, inputs, **kwargs):
        run = graph.forward

        def boxed(args):
            given = list(args)
            args.clear()
            return run(*given)

        boxed._boxed_call = True
        return boxed

    return compile_fx(gm, example_inputs, inner_compile=interpret)


def compiled(model, inner=front_end, **kwargs):
    return torch.compile(model, backend=backend, options={"inner": inner}, **kwargs)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x):
        return F.dropout(self.down(torch.relu(self.up(x))), 0.1).sum()


class ConvNet(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Linear(width, D)

    def forward(self, x):
        return self.head(torch.relu(self.bn(self.conv(x[:, None]))).mean((2, 3))).sum()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.ln(x))))


class GPT(nn.Module):
    """Tied embeddings; blocks plain, checkpointed or compiled once as nested regions; a graph break on demand."""

    def __init__(self, call=lambda block, x: block(x), breaks=False):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(8, D), nn.Embedding(D, D)
        self.h = nn.ModuleList([Block(), Block()])
        self.ln_f, self.head = nn.LayerNorm(D), nn.Linear(D, 8, bias=False)
        self.head.weight = self.wte.weight
        self.call, self.breaks = call, breaks

    def forward(self, x):
        tokens = x.abs().long() % 8
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        if self.breaks:
            torch._dynamo.graph_break()
        for block in self.h:
            x = self.call(block, x)
        if self.breaks:
            torch._dynamo.graph_break()
        return self.head(self.ln_f(x)).sum()


class Shared(nn.Module):
    """One module called twice, around another."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        return self.a(torch.relu(self.b(torch.relu(self.a(x))))).sum()


class Branch(nn.Module):
    """Which of two layers runs depends on the data; both are in the graph."""

    def __init__(self):
        super().__init__()
        self.stem, self.yes, self.no, self.out = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x):
        x = self.stem(x)
        x = torch.cond(x.sum() > 0, self.yes, lambda x: self.no(x) * 2, (x,))
        return self.out(x).sum()


def checkpointed():
    return GPT(call=lambda block, x: checkpoint(block, x, use_reentrant=False))


def nested():
    @torch.compiler.nested_compile_region
    def call(block, x):
        return block(x)

    return GPT(call=call)


MODELS = {
    "mlp": MLP,
    "conv": ConvNet,
    "gpt": GPT,
    "shared": Shared,
    "cond": Branch,
    "checkpointed": checkpointed,
    "nested": nested,
}


def batch():
    return torch.randn(4, D, D)


class Program(nn.Module):
    """A random forward: weights shared, used early as a view, under ``no_grad``, detached, in dead code, in bodies."""

    OPS = (
        "mm",
        "linear",
        "addmm",
        "detach",
        "early",
        "bias",
        "ln",
        "residual",
        "gate",
        "checkpoint",
        "cat",
        "norm",
        "cast",
        "no_grad",
    )

    def __init__(self, steps, seed):
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(torch.randn(D, D) * 0.3) for _ in range(4)])
        self.b = nn.ParameterList([nn.Parameter(torch.randn(D)) for _ in range(4)])
        self.ln = nn.LayerNorm(D)
        choose = random.Random(seed)
        self.steps = [(op, choose.randrange(4), choose.randrange(4), choose.randrange(99)) for op in steps]

    def forward(self, x):
        values = [x]
        early = {i: self.w[i].t() * 2 for op, i, _, _ in self.steps if op == "early"}
        for op, i, j, at in self.steps:
            v = values[-1] if at % 3 else values[at % len(values)]
            values.append(self.step(op, v, self.w[i], self.w[j], self.b[i], self.b[j], early.get(i), values[0]))
        return values[-1].sum() + values[-2].sum()

    def step(self, op, v, w, u, b, c, early, x):
        if op == "mm":
            return v @ (w if early is None else early)
        if op == "linear":
            return F.linear(v, w, c)
        if op == "addmm":
            return torch.addmm(c, v, w)
        if op == "detach":
            return v @ w.detach()
        if op == "bias":
            return torch.tanh(v + b)
        if op == "ln":
            return self.ln(v)
        if op == "residual":
            return v + x
        if op == "gate":
            return v * b.sigmoid() + c
        if op == "checkpoint":
            return checkpoint(lambda v: torch.relu(v @ w) @ u + b, v, use_reentrant=False)
        if op == "cat":
            return torch.cat([v, v @ w], 1) @ torch.cat([u, w], 0)
        if op == "norm":
            return v @ (w / w.norm() * c)
        if op == "cast":
            with torch.autocast("cpu", torch.bfloat16):
                return F.linear(v, w, b).float()
        if op == "no_grad":
            with torch.no_grad():
                k = (w * u).sum()
            return v * k
        return v
