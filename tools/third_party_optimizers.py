"""Try optimizers from PyPI, and write what they do into docs/optimizers.md.

Install the packages first, and what they import: ``pip install --no-deps pytorch-optimizer lion-pytorch torchao
bitsandbytes adabelief-pytorch schedulefree prodigyopt came-pytorch sophia-opt timm``. Those that are missing are left out.
Each class runs some steps plain and as many through ``compile_step``; then fresh objects go on from the checkpoint of the
fourth. Names of packages as arguments: only their part of the table is made anew. ``--keep FILE`` keeps results there, so
that an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import logging
import random
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BEGIN, END = "<!-- third party: begin -->", "<!-- third party: end -->"
LR = 1e-2
STEPS = 12
AT = 4  # the step that is loaded

TRIED = {
    "pytorch-optimizer": "pytorch_optimizer",
    "timm": "timm.optim",
    "lion-pytorch": "lion_pytorch",
    "adabelief-pytorch": "adabelief_pytorch",
    "schedulefree": "schedulefree",
    "prodigyopt": "prodigyopt",
    "came-pytorch": "came_pytorch",
    "sophia-opt": "sophia_opt",
    "torchao": "torchao.optim",
    "bitsandbytes": "bitsandbytes.optim",
}
OPTIONS: dict[str, dict[str, Any]] = {"SGD8bit": {"momentum": 0.9}, "SGD": {"momentum": 0.9}}
"""Beside ``lr``, for classes that cannot do without."""


def classes(module: str) -> dict[str, type]:
    """The optimizers that a package offers, less those that it has from PyTorch."""
    if module == "timm.optim":
        return _timm()
    found = vars(importlib.import_module(module)).items()
    return {name: value for name, value in sorted(found) if _is_optimizer(value)}


def _is_optimizer(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and not value.__module__.startswith("torch.")


def _timm() -> dict[str, type]:
    """Its optimizers' modules, each alone: the package itself needs torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None:
        raise ImportError("timm is not installed")
    folder = Path(spec.origin).parent
    for name, path in (("timm", folder), ("timm.optim", folder / "optim")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(path)]
    found: dict[str, type] = {}
    for path in sorted((folder / "optim").glob("*.py")):
        if path.stem == "optim_factory" or path.stem.startswith("_"):
            continue
        values = vars(importlib.import_module(f"timm.optim.{path.stem}"))
        found |= {k: v for k, v in values.items() if _is_optimizer(v) and v.__module__ == f"timm.optim.{path.stem}"}
    return found


def make(cls: type) -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
    """An optimizer with its defaults, and what it trains."""
    g = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in ((64, 64), (64,), (32, 64))]
    opt = cls(params, lr=LR, **OPTIONS.get(cls.__name__, {}))
    if hasattr(opt, "train"):
        opt.train()
    return opt, params


def steps(opt: torch.optim.Optimizer, params: list[torch.nn.Parameter], first: int, last: int) -> None:
    """Train with gradients that are made of the step's number."""
    for step in range(first, last):
        torch.manual_seed(step)
        random.seed(step)
        numpy.random.seed(step)
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + i))
        opt.step()


def attempt(cls: type, directory: str) -> str:
    """How it runs; with a word on bits that differ from the class's own, there or after a resume."""
    import fxckpt

    try:
        theirs, stock = make(cls)
    except Exception:  # each says it in its own way
        return "not tried: wants other arguments than parameters and a learning rate, or a device"
    try:
        steps(theirs, stock, 0, STEPS)
    except Exception as error:
        return f"does not run here, with fxckpt or without: {_short(error)}"
    mine, ours = make(cls)
    fxckpt.compile_step(mine, directory, every=1, keep=STEPS)
    steps(mine, ours, 0, STEPS)
    stepper = mine.ckpt._run.steppers[0]
    how = f"whole step: {stepper.whole}" if stepper.whole else "split per layer" if stepper.describe() else "never proven"
    how += "" if all(map(torch.equal, ours, stock)) else "; OTHER BITS"
    mine.ckpt.shutdown()
    again, resumed = make(cls)
    fxckpt.compile_step(again, directory, every=1, keep=STEPS)
    fxckpt.load(optimizer=again, step=AT)  # others are live that could not be checkpointed
    try:
        steps(again, resumed, AT, STEPS)
    except Exception as error:
        return f"{how}; after a resume its step raises {_short(error)}"
    again.ckpt.shutdown()
    return how if all(map(torch.equal, resumed, stock)) else f"{how}; other bits after a resume"


def _short(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:150]}"


class Results:
    """What was found so far, kept in a file if there is one."""

    def __init__(self, path: Path | None):
        self.path = path
        self.known: dict[str, str] = json.loads(path.read_text()) if path is not None and path.exists() else {}

    def of(self, package: str, name: str, cls: type) -> str:
        """How a class runs."""
        key = f"{package} {name}"
        if key not in self.known:
            try:
                with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
                    found = attempt(cls, directory)
            except Exception as error:
                found = f"refused: {_short(error)}"
            self.known[key] = found.replace("|", "/").replace(f"{name}.step() ", "step() ")
            print(f"{key}: {found}", file=sys.stderr, flush=True)
            if self.path is not None:
                self.path.write_text(json.dumps(self.known))
        return self.known[key]


def rows(package: str, results: Results) -> Iterator[str]:
    """The lines of one package, one for each way to run."""
    version, ways = importlib.metadata.version(package), {}
    for name, cls in classes(TRIED[package]).items():
        ways.setdefault(results.of(package, name, cls), []).append(name)
    for way, names in sorted(ways.items(), key=lambda item: (item[0] != "split per layer", item[0])):
        yield f"| {package} {version} | {way} | {', '.join(names)} |"


def main() -> None:
    """Replace what lies between the two marks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE")
    parser.add_argument("--keep", type=Path, metavar="FILE")
    given = parser.parse_args()
    if unknown := set(given.packages) - set(TRIED):
        parser.error(f"unknown packages {sorted(unknown)}; there are {', '.join(TRIED)}")
    results = Results(given.keep)
    logging.getLogger("fxckpt").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path = ROOT / "docs" / "optimizers.md"
    head, _, rest = path.read_text().partition(BEGIN)
    table, found, tail = rest.partition(END)
    if not found:
        sys.exit(f"{path} has lost its marks {BEGIN} and {END}")
    lines = ["| package | runs | optimizers |", "| --- | --- | --- |"]
    for package in TRIED:
        if given.packages and package not in given.packages:
            lines += [line for line in table.splitlines() if line.startswith(f"| {package} ")]
            continue
        try:
            lines += rows(package, results)
        except ImportError as error:
            print(f"{package}: {error}", file=sys.stderr)
    path.write_text(f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{tail}")


if __name__ == "__main__":
    main()
