"""Try optimizers from PyPI, and write what they do into docs/optimizers.md.

Install the packages first, and what they import: ``pip install --no-deps pytorch-optimizer lion-pytorch torchao
bitsandbytes adabelief-pytorch schedulefree prodigyopt came-pytorch``. Those that are missing are left out. Each optimizer
runs six steps plain and six through ``compile_step``; then fresh objects go on from the checkpoint of the fourth.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BEGIN, END = "<!-- third party: begin -->", "<!-- third party: end -->"
LR = 1e-2

TRIED: list[tuple[str, str, list[str], dict[str, Any]]] = [
    ("pytorch-optimizer", "pytorch_optimizer", ["Lion", "Lamb", "LARS", "AdaBelief", "Adan", "CAME", "Prodigy", "StableAdamW",
                                                "AdEMAMix", "MARS", "SOAP", "Shampoo", "Tiger", "ScheduleFreeAdamW"], {}),
    ("lion-pytorch", "lion_pytorch", ["Lion"], {}),
    ("adabelief-pytorch", "adabelief_pytorch", ["AdaBelief"], {"print_change_log": False}),
    ("schedulefree", "schedulefree", ["AdamWScheduleFree", "SGDScheduleFree"], {}),
    ("prodigyopt", "prodigyopt", ["Prodigy"], {}),
    ("came-pytorch", "came_pytorch", ["CAME"], {}),
    ("torchao", "torchao.optim", ["AdamW8bit", "AdamW4bit", "AdamWFp8"], {}),
    ("bitsandbytes", "bitsandbytes.optim", ["AdamW", "AdamW8bit", "Lion8bit", "SGD8bit"], {}),
]


def parameters() -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in ((64, 64), (64,), (32, 64))]


def make(cls: type, options: dict[str, Any]) -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
    params = parameters()
    extra = {"momentum": 0.9} if "SGD8" in cls.__name__ else {}
    opt = cls(params, lr=LR, **options, **extra)
    if hasattr(opt, "train"):
        opt.train()
    return opt, params


def steps(opt: torch.optim.Optimizer, params: list[torch.nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(step)
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + i))
        opt.step()


def attempt(cls: type, options: dict[str, Any], directory: str) -> tuple[str, str, str]:
    """``(how it runs, its bits after six steps, its bits after a resume at four)``."""
    import fxckpt

    theirs, stock = make(cls, options)
    steps(theirs, stock, 0, 6)
    mine, ours = make(cls, options)
    fxckpt.compile_step(mine, directory, every=1, keep=9)
    steps(mine, ours, 0, 6)
    same = all(torch.equal(a, b) for a, b in zip(ours, stock))
    how = "whole step" if mine.ckpt._run.steppers[0].whole else "split"
    mine.ckpt.shutdown()
    again, resumed = make(cls, options)
    fxckpt.compile_step(again, directory, every=1, keep=9)
    fxckpt.load(optimizer=again, step=4)  # others are live that could not be checkpointed
    steps(again, resumed, 4, 6)
    back = all(torch.equal(a, b) for a, b in zip(resumed, stock))
    again.ckpt.shutdown()
    return how, "identical" if same else "differ", "identical" if back else "differ"


def rows(say: Callable[[str], None]) -> Iterator[str]:
    """The lines of the table; what raises is shown with its first line."""
    for package, module, names, options in TRIED:
        try:
            version, found = importlib.metadata.version(package), importlib.import_module(module)
        except ImportError as error:
            say(f"{package}: {error}")
            continue
        for name in names:
            try:
                with tempfile.TemporaryDirectory() as directory:
                    result = " | ".join(attempt(getattr(found, name), options, directory))
            except Exception as error:
                result = f"{type(error).__name__}: {str(error).splitlines()[0][:150]} | – | –".replace("\n", " ")
            say(f"{package} {name}: {result}")
            yield f"| {package} {version} | {name} | {result} |"


def main() -> None:
    """Replace what lies between the two marks."""
    logging.getLogger("fxckpt").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    path = ROOT / "docs" / "optimizers.md"
    head, _, rest = path.read_text().partition(BEGIN)
    _, found, tail = rest.partition(END)
    if not found:
        sys.exit(f"{path} has lost its marks {BEGIN} and {END}")
    lines = ["| package | optimizer | runs | bits | bits after a resume |", "| --- | --- | --- | --- | --- |"]
    lines += rows(lambda line: print(line, file=sys.stderr, flush=True))
    path.write_text(f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{tail}")


if __name__ == "__main__":
    main()
