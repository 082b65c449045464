"""Run test files of transformers, Lightning or Accelerate twice, without fxckpt and with it attached, and print what differs.

    python tools/their_tests.py hf ../transformers/tests/trainer/test_trainer_callback.py [...]
    python tools/their_tests.py lightning ../pytorch-lightning/tests/tests_pytorch/loops/test_loops.py [...]
    python tools/their_tests.py accelerate ../accelerate/tests/test_optimizer.py [...]

The files come from a checkout of theirs, of the version that is installed. Attached means: every ``Trainer`` of transformers
gets ``fxckpt.hf.attach``, every fit of Lightning's a ``Checkpoint`` callback, every optimizer that Accelerate prepares goes
through ``compile_step``; each with a store of its own, at every step. A Trainer that is told to resume from a folder that it
saved goes on from our checkpoint of the same step. Exit status 1 if a test passes only without ours.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPORT, ATTACH, STORES = "FXCKPT_THEIRS_REPORT", "FXCKPT_THEIRS_ATTACH", "FXCKPT_THEIRS_STORES"
QUIET = ["--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors"]


# ---- in the process of pytest, which loads this file as a plugin ----


class Outcomes:
    """Keeps what became of each test, and the last line of what went wrong."""

    def __init__(self, path: str):
        self.path = path
        self.found: dict[str, tuple[str, str]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            crash = getattr(report.longrepr, "reprcrash", None)
            why = str(crash.message if crash else report.longrepr or "").strip().splitlines()
            if self.found.get(report.nodeid, ("passed", ""))[0] == "passed":
                self.found[report.nodeid] = (report.outcome, why[0] if why else "")
            Path(self.path).write_text(json.dumps(self.found))  # after each: a run that is ended keeps what it has


def store() -> str:
    """A new directory for checkpoints."""
    return tempfile.mkdtemp(dir=os.environ[STORES])


def attach_hf() -> None:
    """Every Trainer is attached when it is made. Where a test resumes from the folder of a step that a Trainer saved, which ours
    refuses, training goes on from our checkpoint of that step: the test then looks at what comes of ours."""
    from transformers import Trainer

    import fxckpt.hf

    init = Trainer.__init__
    trained: dict[str, str] = {}  # our store of the last training that began in an output_dir

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self.train_dataset is None:
            return
        ours = store()
        fxckpt.hf.attach(self, ours, every=1, keep=1000)
        attached = self.train

        def train(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
            folder, _, step = str(resume_from_checkpoint).rpartition("/checkpoint-")
            if folder in trained and step.isdigit():
                copy_until(int(step), trained[folder], ours)
                resume_from_checkpoint = None
            elif not resume_from_checkpoint:
                trained[self.args.output_dir] = ours
            return attached(resume_from_checkpoint, *args, **kwargs)

        self.train = train

    Trainer.__init__ = made


def copy_until(step: int, source: str, target: str) -> None:
    """What a run that was killed behind the checkpoint of ``step`` leaves."""
    from fxckpt.store.names import step_of

    shutil.rmtree(target)
    shutil.copytree(source, target, ignore=lambda _, names: [name for name in names if (step_of(name) or 0) > step])
    if not any(step_of(name) == step for name in os.listdir(target)):
        raise AssertionError(f"no checkpoint of step {step} in {sorted(os.listdir(source))}")


def attach_lightning() -> None:
    """Every fit has a Checkpoint, added when it begins, so that tests that look at a Trainer's callbacks see theirs."""
    from lightning.pytorch import Trainer

    import fxckpt.lightning

    fit = Trainer.fit

    def fitted(self: Any, *args: Any, **kwargs: Any) -> Any:
        ours = fxckpt.lightning.Checkpoint(store(), every=1)
        self.callbacks.append(ours)
        try:
            return fit(self, *args, **kwargs)
        finally:
            self.callbacks.remove(ours)

    Trainer.fit = fitted


def attach_accelerate() -> None:
    """Every optimizer that is prepared with a model is compiled for it."""
    import torch
    from accelerate import Accelerator

    import fxckpt

    prepare = Accelerator.prepare

    def prepared(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = prepare(self, *args, **kwargs)
        several = found if isinstance(found, tuple) else (found,)
        models = [each for each in several if isinstance(each, torch.nn.Module)]
        for each in several:
            if isinstance(each, torch.optim.Optimizer) and models:
                fxckpt.compile_step(each, store(), model=models[0], every=1)
        return found

    Accelerator.prepare = prepared


ATTACHED: dict[str, Callable[[], None]] = {
    "hf": attach_hf,
    "lightning": attach_lightning,
    "accelerate": attach_accelerate,
}


def pytest_configure(config: Any) -> None:
    """pytest's hook: attach, if asked to, before it imports their files."""
    config.pluginmanager.register(Outcomes(os.environ[REPORT]))
    if kind := os.environ.get(ATTACH):
        ATTACHED[kind]()


# ---- the command ----


def outcomes(kind: str | None, files: list[str], options: list[str], seconds: float) -> dict[str, tuple[str, str]]:
    """What becomes of each test. Tests that ``seconds`` ended are missing. Raises SystemExit if none could be collected."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        paths = [str(ROOT), str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
        given = {REPORT: str(report), ATTACH: kind or "", STORES: folder, "PYTHONPATH": os.pathsep.join(paths)}
        environ = {**os.environ, "HF_HUB_OFFLINE": "1", **given}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "their_tests", *QUIET, *options, *files]
        try:
            done = subprocess.run(command, env=environ, timeout=seconds, capture_output=True, text=True)
            printed = done.stdout
        except subprocess.TimeoutExpired:
            printed = f"ended after {seconds:.0f} seconds"
        if not report.exists():
            raise SystemExit(f"no test ran:\n{printed[-3000:]}")
        print(printed.strip().splitlines()[-1])
        return {name: (outcome, why) for name, (outcome, why) in json.loads(report.read_text()).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=list(ATTACHED))
    parser.add_argument("files", nargs="+", help="test files, or node ids")
    parser.add_argument("--seconds", type=float, default=1800.0, help="for each of the two runs")
    parser.add_argument("--pytest", nargs=1, action="extend", default=[], help="an option for pytest: --pytest=-x")
    args = parser.parse_args()
    plain = outcomes(None, args.files, args.pytest, args.seconds)
    ours = outcomes(args.kind, args.files, args.pytest, args.seconds)
    passed = [name for name, (outcome, _) in plain.items() if outcome == "passed"]
    differ = {name: ours.get(name, ("did not run", "")) for name in passed if ours.get(name, ("", ""))[0] != "passed"}
    for name, (outcome, why) in differ.items():
        print(f"{outcome}: {name}\n    {why}")
    print(f"{len(passed)} of {len(plain)} tests pass without fxckpt, {len(passed) - len(differ)} of these with it")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
