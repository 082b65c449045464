"""Every optimizer of ``torch.optim`` with every option it has: what the differential test runs and the docs list.

``python tests/optimizer_cases.py`` prints the table of ``docs/optimizers.md``; ``make optimizers`` writes it there.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import fxckpt
from fxckpt.journal.repeatable import REPEATABLE

STEPS = 6
LR = 1e-2
TENSOR = "a 0-dim tensor"  # stands for a fresh tensor of the value LR, or of each beta

CASES: dict[str, list[dict[str, Any]]] = {
    "ASGD": [{}, {"t0": 2.0}, {"lambd": 1e-2, "alpha": 0.5, "weight_decay": 0.1}, {"maximize": True}, {"lr": TENSOR}],
    "Adadelta": [{}, {"rho": 0.8, "eps": 1e-5, "weight_decay": 0.1}, {"maximize": True}, {"lr": TENSOR}],
    "Adafactor": [
        {},
        {"beta2_decay": -0.5, "eps": (1e-6, 1e-2), "d": 2.0, "weight_decay": 0.1},
        {"maximize": True},
        {"lr": TENSOR},
    ],
    "Adagrad": [
        {},
        {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-6},
        {"maximize": True},
        {"lr": TENSOR},
    ],
    "Adam": [
        {},
        {"amsgrad": True},
        {"weight_decay": 0.1, "betas": (0.7, 0.9), "eps": 1e-5},
        {"maximize": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"lr": TENSOR},
        {"lr": TENSOR, "betas": TENSOR},
    ],
    "AdamW": [
        {},
        {"amsgrad": True},
        {"weight_decay": 0.0, "betas": (0.7, 0.9), "eps": 1e-5},
        {"maximize": True},
        {"lr": TENSOR},
        {"lr": TENSOR, "betas": TENSOR},
    ],
    "Adamax": [{}, {"weight_decay": 0.1, "betas": (0.7, 0.9), "eps": 1e-5}, {"maximize": True}, {"lr": TENSOR}],
    "LBFGS": [
        {},
        {
            "line_search_fn": "strong_wolfe",
            "history_size": 3,
            "max_iter": 4,
            "max_eval": 5,
            "tolerance_grad": 1e-6,
            "tolerance_change": 1e-8,
        },
        {"lr": TENSOR},
    ],
    "Muon": [
        {},
        {"nesterov": False, "momentum": 0.8, "weight_decay": 0.0},
        {"adjust_lr_fn": "match_rms_adamw"},
        {"ns_steps": 3, "ns_coefficients": (3.0, -4.0, 2.0), "eps": 1e-6},
        {"lr": TENSOR},
    ],
    "NAdam": [
        {},
        {"weight_decay": 0.1, "betas": (0.7, 0.9), "eps": 1e-5, "momentum_decay": 1e-2},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"maximize": True},
        {"lr": TENSOR},
    ],
    "RAdam": [
        {"betas": (0.7, 0.99)},
        {"weight_decay": 0.1, "eps": 1e-5},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"maximize": True},
        {"lr": TENSOR},
    ],
    "RMSprop": [
        {},
        {"momentum": 0.9},
        {"centered": True, "alpha": 0.9, "eps": 1e-5, "weight_decay": 0.1},
        {"maximize": True, "momentum": 0.5, "centered": True},
        {"lr": TENSOR},
    ],
    "Rprop": [{}, {"etas": (0.4, 1.3), "step_sizes": (1e-5, 1.0)}, {"maximize": True}, {"lr": TENSOR}],
    "SGD": [
        {"momentum": 0.9},
        {},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.9, "dampening": 0.3},
        {"maximize": True, "momentum": 0.9},
        {"lr": TENSOR, "momentum": 0.9},
    ],
    "SparseAdam": [{}, {"betas": (0.7, 0.9), "eps": 1e-5}, {"maximize": True}],
}
"""The first of each is the one that ``make test`` compiles."""

SHORT = ("Adam", "SGD")
"""The classes that ``make test`` tries most of: two moments, and none."""

NEVER_ON_CPU = {"capturable": "PyTorch takes it on accelerators only", "differentiable": "parameters must not be leaves"}
"""Options that no CPU training can use: PyTorch raises at the first step."""

BOUNDS = {
    "ASGD": 4,
    "Adadelta": 4,
    "Adagrad": 4,
    "Adam": 4,
    "AdamW": 4,
    "Adamax": 4,
    "NAdam": 4,
    "RAdam": 4,
    "RMSprop": 32,
    "Rprop": 32,
    "SGD": 4,
}
"""k of ``update="inductor"``: every parameter is within ``k * eps * (|p| + lr)`` of PyTorch's after six steps. Steps of two
classes are many times as large as lr: RMSprop divides by sqrt((1 - alpha) * grad**2) at first, which makes ten of it, and
momentum adds them up; those of Rprop grow by etas from lr on."""

NOT_RUN = "not run"

FORMS = ("single", "foreach", "fused")


def classes() -> dict[str, type]:
    """The optimizers that this version of torch has."""
    found = {
        name: value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def arguments(name: str) -> set[str]:
    """What the class's constructor takes, parameters and implementation left out."""
    return set(inspect.signature(classes()[name].__init__).parameters) - {"self", "params", "foreach", "fused"}


def forms(name: str) -> list[str]:
    """The implementations that a class offers."""
    taken = inspect.signature(classes()[name].__init__).parameters
    return ["single", *(form for form in FORMS[1:] if form in taken)]


def parameters(name: str, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """Matrices (one in another memory order), vectors; a scalar where the class allows one."""
    g = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(4, 3), (3, 5), (5, 5), (3, 5)] if name == "Muon" else [(3, 4), (5,), (2, 3, 2, 2), (7,), ()]
    if name in ("Rprop", "SparseAdam"):
        shapes = [s for s in shapes if s]
    if name == "LBFGS":
        shapes = [s for s in shapes if len(s) < 4]  # it takes views of gradients
    made = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]
    made = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in made]
    return [torch.nn.Parameter(t) for t in made]


def make(name: str, options: dict[str, Any], form: str | None, dtype: torch.dtype = torch.float32):
    """``(optimizer, its parameters)``: two groups with learning rates of their own. ``form`` None: no flag is given."""
    params, given = parameters(name, dtype), {"lr": LR, **options}
    if given["lr"] is TENSOR:
        given["lr"] = torch.tensor(LR)
    if given.get("betas") is TENSOR:
        given["betas"] = (torch.tensor(0.8), torch.tensor(0.9))
    if form is not None and len(forms(name)) > 1:
        given.update({"foreach": False} if form == "single" else {form: True})
    groups: Any = params
    if name != "LBFGS":
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": given["lr"] * 0.5}]
    return classes()[name](groups, **given), params


def train(opt: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> None:
    """Six steps with gradients made of the step's number; the second parameter has none in one of them."""
    for step in range(STEPS):
        for group in opt.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].mul_(0.9)
            else:
                group["lr"] *= 0.9
        if type(opt).__name__ == "LBFGS":
            opt.step(functools.partial(_closure, opt, params))
            continue
        for i, p in enumerate(params):
            p.grad = None if (step, i) == (3, 1) else _gradient(p, 1000 * step + i, type(opt).__name__)
        opt.step()


def _gradient(p: torch.Tensor, seed: int, name: str) -> torch.Tensor:
    grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(p.dtype)
    if name == "SparseAdam":
        grad[::2] = 0
        return grad.to_sparse(1)
    return grad.contiguous(memory_format=torch.channels_last) if p.dim() == 4 else grad


def _closure(opt: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> torch.Tensor:
    opt.zero_grad()
    loss = sum(((p - 1) ** 2).sum() + (p**4).sum() for p in params)
    loss.backward()
    return loss


@dataclass(frozen=True)
class Outcome:
    """How one case went. ``worst``: the largest k of any element; ``whole``: why the stock step ran, if it did."""

    identical: bool
    worst: float
    whole: str | None
    compiled: bool
    programs: int

    def __str__(self) -> str:
        return "whole step" if self.whole else "identical" if self.identical else f"k = {self.worst:.1f}"


def refusal(name: str, options: dict[str, Any], form: str) -> str | None:
    """What PyTorch itself raises for this combination, None if it runs."""
    try:
        train(*make(name, options, form))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def outcome(name: str, options: dict[str, Any], form: str | None, update: str, dtype: torch.dtype = torch.float32) -> Outcome:
    """Run a case through ``compile_step`` with every other step a checkpoint, and beside it the stock optimizer."""
    theirs, stock = make(name, options, form, dtype)
    train(theirs, stock)
    mine, ours = make(name, options, form, dtype)
    fxckpt.compile_step(mine, writer="mock", every=2, update=update)
    train(mine, ours)
    stepper = mine.ckpt._run.steppers[0]
    same = all(torch.equal(a, b) and _same_state(mine.state[a], theirs.state[b]) for a, b in zip(ours, stock))
    eps = torch.finfo(dtype).eps
    worst = max(float(((a - b).abs().double() / (eps * (b.abs().double() + LR))).max().detach()) for a, b in zip(ours, stock))
    found = Outcome(
        same,
        worst,
        stepper.whole,
        any(m.flat for m in stepper.bindings.members),
        sum(len(p) for p in stepper.programs.traced.values() if isinstance(p, list)),
    )
    assert mine.ckpt.statistics()["checkpoints_failed"] == 0
    assert mine.ckpt.statistics()["checkpoints_started"] == STEPS // 2
    mine.ckpt.shutdown()
    return found


def _same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    def same(x: Any, y: Any) -> bool:
        if isinstance(x, torch.Tensor):
            return torch.equal(x, y)
        return [*map(same, x, y)] == [True] * len(y) if isinstance(x, list) else x == y

    return list(a) == list(b) and all(same(a[k], b[k]) for k in b if k != "func_evals")


def label(options: dict[str, Any]) -> str:
    """The options as a user writes them."""
    return ", ".join(f"{k}={'tensor' if v is TENSOR else repr(v)}" for k, v in options.items()) or "defaults"


def reaches(options: dict[str, Any], name: str, form: str, full: bool) -> bool:
    """Is this one run? All are with ``full``. Else of the classes in ``SHORT`` every option single, and the first and the last
    case in every form; of others the first in every form, and the last single."""
    first, last = options == CASES[name][0], options == CASES[name][-1]
    return full or first or (form == "single" and (last or name in SHORT)) or (last and name in SHORT)


def rows(name: str, full: bool = True) -> Iterator[tuple[dict[str, Any], dict[str, Outcome | str], str]]:
    """Run a class natively: ``(options, {form: outcome, or what PyTorch says}, the line of the table)``."""
    for options in CASES[name]:
        cells: dict[str, Outcome | str] = {}
        for form in FORMS:
            if form not in forms(name):
                cells[form] = "–"
            elif not reaches(options, name, form, full):
                cells[form] = NOT_RUN
            elif (reason := refusal(name, options, form)) is not None:
                cells[form] = reason
            else:
                cells[form] = outcome(name, options, form, "native")
        shown = [str(c) if isinstance(c, Outcome) else c if c in ("–", NOT_RUN) else "PyTorch refuses" for c in cells.values()]
        run = all(reaches(options, name, form, full) for form in forms(name))
        last = f"{_compiled(name, cells)} | {_journalled(name, shown)}" if run else f"{NOT_RUN} | {NOT_RUN}"
        yield options, cells, f"| {name} | {label(options)} | {' | '.join(shown)} | {last} |"


def _compiled(name: str, cells: dict[str, Outcome | str]) -> str:
    """What ``update="inductor"`` does: it starts from the single-tensor step."""
    single = cells["single"]
    if isinstance(single, Outcome) and single.whole:
        return "whole step"
    assert isinstance(single, Outcome), f"{name}: PyTorch refuses its single-tensor step: {single}"
    return f"within {BOUNDS[name]}" if name in BOUNDS else "native"


def _journalled(name: str, shown: list[str]) -> str:
    """Which forms a journal stores as gradients: those whose step is split."""
    whole = [form for form, cell in zip(FORMS, shown) if cell == "whole step"]
    if name not in REPEATABLE or {*shown} <= {"whole step", "–"}:
        return "in full"
    return "yes" if not whole else f"yes; {', '.join(whole)} in full"


HEADER = """| optimizer | options | single | foreach | fused | `update="inductor"` | journal |
| --- | --- | --- | --- | --- | --- | --- |"""


def table(progress: Callable[[str], None] = lambda name: None) -> str:
    """The whole table; takes as long as the native half of the test."""
    lines = [HEADER]
    for name in classes():
        progress(name)
        lines += [line for _, _, line in rows(name)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
