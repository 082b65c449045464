"""What checkpoints cost in the training of models that people know: ResNet-50, BERT-base, GPT-2 124M; and what a kill costs.

**Rounds.** Each way to save has a process that trains the model. It takes rounds without saving, with a checkpoint at every
step, and at every tenth, in alternating order; a ratio is of step times in the same round. The ratios of fxckpt are to a second
process, which trains without it and takes turns with it. Before a round one step with a checkpoint is taken that does not
count, so that what works beside training has as much to do at the beginning of a round as at its end. Those who wait for the
disk at each save can hide nothing, so their every tenth is computed from the same rounds: nine steps without, one with.
``every="auto"`` is a minute's training around one checkpoint.

**Kills.** A fresh process saves at every step and gets SIGKILL at a random instant after its first checkpoint; another fresh one
restores from a cold page cache, into a new model and optimizer. The steps lost are those between. For the other cadences they
are computed, from when steps were made and checkpoints complete in the rounds: the mean over all instants, and the most.

The results are written after each way to save; ``--only`` and ``--savers`` replace parts of what a file has already.

    python benchmarks/models.py [--only gpt2] [--savers fxckpt dcp] [--quick] [--json benchmarks/results/models.json]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import contest
import machine
from duel import Duel
from killed import kill
from trainers import LIMIT, WAYS, count
from workloads import WORKLOADS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PRELOADED = ["torch._inductor.compile_fx", "torch.distributed.checkpoint", "torch_checkpointing", "safetensors.torch"]
PRELOADED += ["fxckpt.compiled_optimizer", "fxckpt.loading.load", "fxckpt.loop", "lightning.pytorch", "transformers.trainer"]
PRELOADED += [f"transformers.models.{name}.modeling_{name}" for name in ("resnet", "bert", "gpt2")]


def measure(model: str, way: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One row of one model. What cannot be measured has ``failed``, and why."""
    row: dict[str, Any] = {"label": WAYS[way].label, "synced": WAYS[way].synced}
    if (why := contest.absent(WAYS[way].package)) is not None:
        return {**row, "failed": f"not installed: {why}"}
    row["version"] = version(WAYS[way].package)
    row["load"] = os.getloadavg()[0]
    try:
        with fresh(folder) as store:
            contest.progress(f"{model}, {row['label']}: rounds")
            row["every"] = Duel(model, way, store, args).run()
        chance, row["kills"] = random.Random(f"{args.seed} {model} {way}"), []
        for number in range(args.kills):
            contest.progress(f"{model}, {row['label']}: kill {number + 1} of {args.kills}")
            with fresh(folder) as store:
                row["kills"].append(kill(model, way, store, args, chance))
    except contest.Died as error:
        row["failed"] = str(error)
        print((folder / "log").read_text()[-3000:], file=sys.stderr)
    return row


class fresh:
    """A folder that is empty, and gone afterwards: the disk has no room for two contestants' checkpoints."""

    def __init__(self, parent: Path):
        self.folder = parent / "store"

    def __enter__(self) -> Path:
        self.folder.mkdir()
        return self.folder

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def version(package: str) -> str:
    """What is installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return getattr(importlib.import_module(package), "__version__", "")  # run from where it lies


def begin(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The file's results, if it has some of this machine, to be replaced in parts; else empty ones."""
    numbers: dict[str, Any] = {
        "machine": machine.describe(folder),
        "note": args.note,
        "quick": args.quick,
        "threads": args.threads,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "models": {},
    }
    if args.json and Path(args.json).exists():
        before = json.loads(Path(args.json).read_text())
        for key in ("machine", "note", "quick", "threads", "omp_wait_policy"):
            if before[key] != numbers[key]:
                raise SystemExit(f"{args.json} has results of another {key}: {before[key]}; give another file")
        numbers["models"] = before["models"]
    return numbers


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All that was asked for, written after each row."""
    numbers = begin(args, folder)
    for model in args.only:
        counter = contest.Contestant(model, count, model, args, kind="forkserver", limit=LIMIT)
        parameters, state = counter.answer()
        counter.join()
        about = {"label": WORKLOADS[model].label, "batch": WORKLOADS[model].batch_label, "parameters": parameters}
        rows = numbers["models"].get(model, {}).get("ways", {})
        numbers["models"][model] = {**about, "state_bytes": state, "ways": rows}
        for way in args.savers:
            began = time.monotonic()
            rows[way] = {**measure(model, way, folder, args), "took_seconds": round(time.monotonic() - began, 1)}
            contest.write(numbers, args.json)
            contest.progress("")
            print(f"{model:10}{brief(rows[way])}", flush=True)
    return numbers


def brief(row: dict[str, Any]) -> str:
    """One line of what was found; the tables are made by tables.py."""
    if "failed" in row:
        return f"{row['label']:36}{row['failed']}"
    ratios = "".join(f"  {every}: {found['ratio']:.2f}" for every, found in row["every"].items() if "ratio" in found)
    kills = "; ".join(f"lost {each['lost']}, restored in {each['seconds']:.2f} s" for each in row["kills"])
    rounds = len(row["every"]["none"]["rounds"])
    step = statistics.median(row["every"]["none"]["rounds"])
    return f"{row['label']:36}step {step:.2f} s{ratios}  ({rounds} rounds); {kills}; took {row['took_seconds']:.0f} s"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--only", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), help="these models")
    option("--savers", nargs="+", choices=list(WAYS), default=list(WAYS), help="these ways to save")
    option("--quick", action="store_true", help="models of two layers, few rounds, one kill: to see that it runs")
    option("--seconds", type=float, default=45.0, help="for the rounds of one row")
    option("--least", type=int, default=3, help="rounds that are taken however long they take")
    option("--rounds", type=int, default=6, help="rounds at most")
    option("--auto-seconds", type=float, default=62.0, help='of training with every="auto", which saves once a minute')
    option("--kills", type=int, default=3)
    option("--seed", type=int, default=0, help="draws the instants")
    option("--threads", type=int, default=2)
    option("--note", default="", help="what else the machine does, for the results")
    option("--dir", default=".", help="the disk to measure; needs 9 GB")
    option("--json", help="write the results to this file, after each row")
    args = parser.parse_args()
    if args.quick:
        args.seconds, args.least, args.rounds, args.kills, args.auto_seconds = 5.0, 2, 2, 1, 0.0
    return args


def main() -> None:
    args = arguments()
    # Forked from one that has imported all that is large: a process begins within a second, and no restore counts an import.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with contest.scratch(args.dir) as folder:
        (folder / "log").touch()
        numbers = run(args, folder)
    print(machine.line(numbers["machine"]))


if __name__ == "__main__":
    main()
