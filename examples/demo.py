"""Kill a training run with SIGKILL, start it again, and compare it with one that was never interrupted.

`make demo` runs it. Three runs of train_gpt.py: plain PyTorch without checkpoints; a checkpoint at every
step, killed at a random moment after its first commit; and the same command again. The demo succeeds (exit
status 0) only if both end with the same bits.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SCRIPT = Path(__file__).with_name("train_gpt.py")
STEP = re.compile(r"step (\d+)/\d+  loss ([\d.]+)  ([\d.]+) ms(?:  committed (\d+|None))?")
TOTALS = re.compile(r"checkpoints committed (\d+)  bytes (\d+)  stalled ([\d.]+) s")
DIGEST = re.compile(r"(parameters|optimizer) +sha256 (\w+)")
PLAIN, KILLED, RESUMED = "1  plain PyTorch   ", "2  with checkpoints", "3  same command    "
WARM_UP = 5  # steps at the start of a run that its step time leaves out: they compile


@dataclass
class Outcome:
    """What one run of the training script printed."""

    first: int | None = None  # number of the first step it took; steps are counted from 1
    last: int = 0
    committed: int | None = None
    milliseconds: list[float] = field(default_factory=list)
    checkpoints: int = 0
    written: int = 0
    seconds: float = 0.0  # from the end of the first step to the end of the run
    digests: dict[str, str] = field(default_factory=dict)
    status: int = 0

    @property
    def step_time(self) -> float:
        """Median milliseconds of a step, compilation left out."""
        return statistics.median(self.milliseconds[WARM_UP:] or self.milliseconds or [float("nan")])

    def read(self, line: str) -> bool:
        """Take in one line; True when it reports a step."""
        if match := STEP.match(line):
            self.last = int(match[1])
            self.first = self.first or self.last
            self.milliseconds.append(float(match[3]))
            self.committed = int(match[4]) if match[4] and match[4] != "None" else None
        elif totals := TOTALS.match(line):
            self.checkpoints, self.written = int(totals[1]), int(totals[2])
        elif digest := DIGEST.match(line):
            self.digests[digest[1]] = digest[2]
        return match is not None


def progress(label: str, line: str) -> None:
    """Rewrite the progress line; without a terminal nothing is shown until the run ends."""
    if sys.stdout.isatty():
        print(f"\r\033[K{label}  {line}", end="", flush=True)


def run(
    label: str,
    arguments: list[str],
    environment: dict[str, str],
    stop_at: Callable[[Outcome], float | None] = lambda outcome: None,
) -> Outcome:
    """Run the training script to its end, or until ``stop_at`` names a delay (s) after which it is killed."""
    outcome, began = Outcome(), None
    process = subprocess.Popen(
        [sys.executable, "-u", str(SCRIPT), *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    other = []
    progress(label, "starting: import, load, compile")
    try:
        for line in process.stdout:
            if outcome.read(line):
                began = began or time.monotonic()
                progress(label, line.rstrip())
                delay = stop_at(outcome) if process.returncode is None else None
                if delay is not None:
                    time.sleep(delay)
                    process.send_signal(signal.SIGKILL)
                    process.wait()
            else:
                other.append(line)
        outcome.status = process.wait()
        outcome.seconds = time.monotonic() - (began or time.monotonic())
    finally:
        end(process)
    if outcome.status not in (0, -signal.SIGKILL):
        raise SystemExit(f"\n{''.join(other[-40:])}{label.strip()}: the training script failed with status {outcome.status}")
    return outcome


def end(process: subprocess.Popen) -> None:
    """Leave nothing behind: the run's own process group holds the compiler's helpers too."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all of them have gone by themselves
    finally:
        process.wait()
        process.stdout.close()


def random_moment(steps: int, rng: random.Random) -> Callable[[Outcome], float | None]:
    """A moment in a run: a step in its middle, at least one commit made, and a fraction of one step later."""
    step = rng.randint(max(2, steps // 5), max(2, steps * 4 // 5))

    def stop_at(outcome: Outcome) -> float | None:
        if outcome.last < step or outcome.committed is None:
            return None
        return rng.random() * outcome.milliseconds[-1] / 1e3

    return stop_at


def done(label: str, text: str) -> None:
    print(f"{chr(13) + chr(27) + '[K' if sys.stdout.isatty() else ''}{label}  {text}", flush=True)


def report(plain: Outcome, killed: Outcome, resumed: Outcome) -> bool:
    """Print both runs side by side; True when every digest is equal."""
    print(f"\n{'':26}{'never interrupted':<22}killed and resumed")
    equal = bool(plain.digests) and plain.digests == resumed.digests
    for name, label in (("parameters", "parameters, SHA-256"), ("optimizer", "optimizer state, SHA-256")):
        ours, theirs = plain.digests.get(name, "-"), resumed.digests.get(name, "-")
        same = "equal" if ours == theirs else "DIFFERENT"
        print(f"{label:<26}{ours[:16] + '…':<22}{theirs[:16] + '…'}  {same}")
    lost = killed.last - (resumed.first - 1)
    print(f"{'steps done, lost':<26}{f'{plain.last}, 0':<22}{resumed.last}, {max(0, lost)}")
    slower = resumed.step_time / plain.step_time - 1
    print(f"{'time of a step (median)':<26}{f'{plain.step_time:.1f} ms':<22}{resumed.step_time:.1f} ms ({slower:+.1%})")
    print(f"{'checkpoints':<26}{'none':<22}one every step; {resumed.checkpoints} committed since the restart")
    print(
        f"{'written since the restart':<26}{'-':<22}{resumed.written / 1e9:.2f} GB, "
        f"{resumed.written / 1e9 / resumed.seconds:.2f} GB/s over the whole run, all of it on disk"
    )
    print(
        "\nThe runs came one after the other, so other work on the machine shows in their step times;\n"
        "benchmarks/overhead.py lets them take turns."
    )
    return equal


def demonstrate(folder: Path, args: argparse.Namespace) -> bool:
    """The three runs, in ``folder``."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    common = ["--steps", str(args.steps)]
    checkpointed = [*common, "--dir", str(folder / "checkpoints")]
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)

    plain = run(PLAIN, [*common, "--no-checkpoint"], environment)
    done(PLAIN, f"{plain.last} steps, {plain.step_time:.1f} ms each")
    killed = run(KILLED, checkpointed, environment, random_moment(args.steps, random.Random(seed)))
    if killed.status == 0:
        raise SystemExit("the run ended before it could be killed: no checkpoint was committed in time")
    done(KILLED, f"SIGKILL after step {killed.last}, when step {killed.committed} was committed")
    resumed = run(RESUMED, checkpointed, environment)
    done(RESUMED, f"went on from step {resumed.first - 1}, {resumed.last} steps done")
    return report(plain, killed, resumed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, help="of the moment of the kill; default: a new one each time")
    args = parser.parse_args()
    print("fxckpt demo: a small GPT on CPU, a durable checkpoint at every step, and a SIGKILL\n")
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix=".demo-", dir="."))  # here, not in /tmp, which may be memory
    try:
        equal = demonstrate(folder, args)
    except KeyboardInterrupt:
        print("\ninterrupted")
        return 130
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{'The bits are the same.' if equal else 'THE RUNS DIFFER.'} ({time.monotonic() - began:.0f} s)")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
