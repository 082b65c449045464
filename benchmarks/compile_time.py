"""How long compiling the update takes: GPTs of growing depth, AdamW with ``update="inductor"``.

Each model is stepped in a new process with an empty cache, and then in another one with the cache of the first. The time
is that of the first two steps, of which one compiles; a C++ file that Inductor's cache has after them and had not before
is one compile.

    python benchmarks/compile_time.py [--json benchmarks/results/compile_time.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
from contest import write

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def sources(cache: str) -> set[Path]:
    """The C++ files in Inductor's cache."""
    return set(Path(cache).rglob("*.main.cpp"))


def step(layers: int) -> dict:
    """Seconds and C++ compiles of the first two steps, and how many parameters they update."""
    before = sources(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    sys.path.insert(0, str(EXAMPLES))
    import torch
    from train_gpt import GPT

    import fxckpt

    parameters = list(GPT(layers, 64, 4, 32).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    with tempfile.TemporaryDirectory() as folder:
        optimizer = fxckpt.compile_step(torch.optim.AdamW(parameters), folder, every=10**9, update="inductor")
        began = time.perf_counter()
        optimizer.step()  # PyTorch's own step makes the state, and what updates it from now on is compiled
        optimizer.step()
        seconds = time.perf_counter() - began
        optimizer.ckpt.shutdown()
    return {
        "layers": layers,
        "parameters": len(parameters),
        "seconds": seconds,
        "compiles": len(sources(os.environ["TORCHINDUCTOR_CACHE_DIR"]) - before),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12, 48])
    parser.add_argument("--json", help="write the numbers to this file")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(step(args.one)))
        return
    numbers = {"machine": machine.describe(Path()), "results": []}
    print(machine.line(numbers["machine"]))
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as cache:
            for kind in ("empty cache", "second process"):
                done = subprocess.run(
                    [sys.executable, __file__, "--one", str(layers)],
                    check=True,
                    text=True,
                    capture_output=True,
                    env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
                )
                row = {"cache": kind, **json.loads(done.stdout)}
                numbers["results"].append(row)
                line = "{layers:3} layers, {parameters:4} parameters, {cache:15}{compiles:3} C++ compiles{seconds:7.2f} s"
                print(line.format_map(row), flush=True)
    write(numbers, args.json)


if __name__ == "__main__":
    main()
