"""What is left when the trainer is killed while a checkpoint is under way.

Every trial is a trainer in a process of its own. It takes a checkpoint of step 1 and waits until that is complete; then
one of step 2, asynchronously. At a random instant after that call returned and before the library says that the checkpoint is
complete the process gets SIGKILL. What it left running may go on until it ends by itself. Then a fresh process loads, and
compares every element: step 2, the older step 1, or nothing. Trials whose checkpoint was complete before the kill are not
counted but drawn again. Nothing is lost but processes: what they wrote is in the page cache, so this is no test of syncs.

The window is measured before, by a life that is not killed. ``handed over`` counts the trials in which fxckpt had reported
step 2 in ``last_handed_over_step`` before the kill; with a monitor all of these must load, or the exit status is 1.

    python benchmarks/kills.py [--trials 10] [--megabytes 600] [--only KEY ...] [--json benchmarks/results/kills.json]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import savers
from contest import absent, progress, scratch, write

PATIENCE = 300.0  # seconds that a life may take to come to its second checkpoint, and a load
SETTLE = 60.0  # seconds that what a killed trainer left running may take to end
PR_SET_CHILD_SUBREAPER = 36
PIECE = 16 << 20  # bytes of a parameter


class OneCall(savers.Fxckpt):
    """A checkpoint at every step; the step is closed by the same call, as the others' calls take all they need."""

    def saved(self, step: int) -> None:
        self.optimizer.ckpt.end_step()


@dataclass(frozen=True)
class Contestant:
    """``make`` is given the state's size in MiB."""

    label: str
    make: Callable[[int], savers.Nothing]
    needs: str = ""


CONTESTANTS = {
    "fxckpt-monitor": Contestant(
        'fxckpt, writer="monitor", staging ≥ state', lambda mib: OneCall(writer="monitor", staging_mb=mib + 16)
    ),
    "fxckpt": Contestant("fxckpt, its thread", lambda _: OneCall()),
    "dcp": Contestant("torch DCP async_save, thread", lambda _: savers.DCP()),
    "dcp-process": Contestant("torch DCP async_save, process", lambda _: savers.DCPProcess()),
    "torch_checkpointing": Contestant("torch_checkpointing async", lambda _: savers.TorchCheckpointing(), "torch_checkpointing"),
    "torchsnapshot": Contestant("TorchSnapshot async_take", lambda _: savers.TorchSnapshot(), "torchsnapshot"),
}


# ---- in the processes of a trial ----


def tell(folder: Path, what: str) -> None:
    """Append a line with the time, in one write, so that it holds even if the next instruction is the last."""
    fd = os.open(folder / "told", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(fd, f"{what} {time.monotonic()}\n".encode())
    os.close(fd)


def told(folder: Path) -> dict[str, float]:
    """What was told, and when."""
    try:
        lines = (folder / "told").read_text().splitlines()
    except FileNotFoundError:
        return {}
    return {what: float(when) for what, when in map(str.split, lines)}


def prepared(key: str, folder: Path, megabytes: int) -> tuple[savers.Nothing, Any, Any]:
    """A saver, a model and its optimizer (SGD with momentum: half of the state each), both with gradients of -1.

    After k steps all momenta are -k, all parameters k(k+1)/2.
    """
    import torch

    count, model = max(1, megabytes * 1000**2 // 2 // PIECE), torch.nn.Module()
    model.weights = torch.nn.ParameterList(torch.zeros(megabytes * 1000**2 // 8 // count) for _ in range(count))
    saver = CONTESTANTS[key].make(megabytes * 1000**2 // machine.MIB)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=1.0, fused=saver.fused)
    (folder / "saved").mkdir(exist_ok=True)
    saver.prepare(model, optimizer, folder / "saved")
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, -1.0)
    return saver, model, optimizer


def live(key: str, folder: Path, megabytes: int) -> None:
    """A trainer's life, up to the kill."""
    saver, _, optimizer = prepared(key, folder, megabytes)
    if hasattr(saver, "options"):
        import fxckpt

        fxckpt.load()
        threading.Thread(target=watch, args=(optimizer, folder), daemon=True).start()
    for step in (1, 2):
        optimizer.step()
        saver.saved(step)
        tell(folder, f"returned-{step}")
        (getattr(saver, "wait", None) or saver.flush)()  # the library's own word, before this benchmark syncs anything
        tell(folder, f"complete-{step}")
        if step == 1:
            saver.flush()
    signal.pause()


def watch(optimizer: Any, folder: Path) -> None:
    """Tell when step 2 is reported as handed over."""
    while (optimizer.ckpt.statistics()["last_handed_over_step"] or 0) < 2:
        time.sleep(0.001)
    tell(folder, "handed-2")


def load(key: str, folder: Path, megabytes: int) -> None:
    """Print as JSON the newest step that loads with every element right (null: none), and what did not load."""
    saver, model, optimizer = prepared(key, folder, megabytes)
    errors: dict[str, str] = {}
    if isinstance(saver, savers.Fxckpt):
        import fxckpt

        step = fxckpt.load().step
        if step and not right({"model": model.state_dict(), "optimizer": saver.tensors()}, step):
            errors[str(step)], step = "loads, and is not that step", 0
        print(json.dumps({"step": step or None, "errors": errors}))
        return
    optimizer.step()  # makes the momenta
    step = None
    for number in (2, 1):
        for tensors in saver.payload().values():
            for tensor in tensors.values():
                tensor.fill_(float("nan"))
        try:
            found = saver.load(saver.folder / str(number))
        except Exception as error:
            errors[str(number)] = f"{type(error).__name__}: {error}".replace(str(saver.folder), "")[:200]
            continue
        if right(found, number):
            step = number
            break
        errors[str(number)] = "loads, and is not that step"
    print(json.dumps({"step": step, "errors": errors}))


def right(found: dict, step: int) -> bool:
    """Whether every element is as after ``step``."""
    values = {"model": step * (step + 1) / 2, "optimizer": -step}
    tensors = {name: tensor for name, tensor in found["optimizer"].items() if name.startswith("momentum_buffer/")}
    both = [
        *((each, values["optimizer"]) for each in tensors.values()),
        *((each, values["model"]) for each in found["model"].values()),
    ]
    return len(tensors) == len(found["model"]) > 0 and all(bool((each == value).all()) for each, value in both)


# ---- the one who kills ----


def begun(role: str, key: str, folder: Path, megabytes: int, **options: Any) -> subprocess.Popen:
    """A process of a trial; what it says goes to a file."""
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, __file__, "--role", role, "--only", key, "--dir", str(folder), "--megabytes", str(megabytes)],
            stderr=log,
            stdin=subprocess.DEVNULL,
            **{"stdout": log, **options},
        )


def wait_for(process: subprocess.Popen, folder: Path, what: str) -> dict[str, float]:
    """Until a life has told something; raises SystemExit if it ends or takes too long."""
    began = time.monotonic()
    while what not in (found := told(folder)):
        if process.poll() is not None or time.monotonic() - began > PATIENCE:
            process.kill()
            raise SystemExit(f"a trainer did not come to {what}:\n{(folder / 'log').read_text()[-3000:]}")
        time.sleep(0.001 if "complete-1" in found else 0.05)
    return found


def settled() -> tuple[float, int]:
    """Wait for what a killed trainer left running; (seconds that took, processes that had to be killed)."""
    began = time.monotonic()
    while time.monotonic() - began < SETTLE:
        if not reap():
            return time.monotonic() - began, 0
        time.sleep(0.01)
    left = machine.below()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    while reap():
        time.sleep(0.01)
    return time.monotonic() - began, len(left)


def reap() -> bool:
    """Take the end of every child that ended; whether there are others. Orphans are ours: see ``main``."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return False
    return True


@dataclass
class Tally:
    """What came of the trials of one contestant. ``window_seconds``: from the call's return to the complete checkpoint."""

    label: str
    window_seconds: float
    step: int = 0
    older: int = 0
    nothing: int = 0
    handed_over: int | None = None
    handed_over_lost: int | None = None
    too_late: int = 0
    left_behind: int = 0
    settle_seconds: float = 0.0
    kills_seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def trials(self) -> int:
        return self.step + self.older + self.nothing


class Killer:
    """All trials of one contestant, in folders below ``folder``."""

    def __init__(self, key: str, folder: Path, megabytes: int, chance: random.Random):
        self.key, self.folder, self.megabytes, self.chance = key, folder, megabytes, chance
        self.tally = Tally(CONTESTANTS[key].label, 0.0)

    def calibrate(self) -> None:
        """A life that is not killed before its checkpoint is complete: how long that takes, and that it loads."""
        with Trial(self) as trial:
            times = wait_for(trial.process, trial.folder, "complete-2")
            trial.end()
            found = trial.loaded()
            if found["step"] != 2:
                raise SystemExit(f"{self.tally.label}: a complete checkpoint does not load: {found}")
        self.window(times["complete-2"] - times["returned-2"])

    def window(self, seconds: float) -> None:
        """Between the call's return and the complete checkpoint."""
        self.tally.window_seconds = seconds
        if self.key == "fxckpt-monitor":
            self.tally.handed_over = self.tally.handed_over_lost = 0

    def trial(self) -> None:
        """One kill, counted unless it came too late."""
        delay = self.chance.uniform(0, self.tally.window_seconds)
        with Trial(self) as trial:
            returned = wait_for(trial.process, trial.folder, "returned-2")["returned-2"]
            time.sleep(max(0.0, returned + delay - time.monotonic()))
            seconds, left = trial.end()
            known = told(trial.folder)
            if "complete-2" in known:
                self.tally.too_late += 1
                return
            self.count(trial.loaded(), "handed-2" in known)
        self.tally.kills_seconds.append(round(delay, 3))
        self.tally.settle_seconds = max(self.tally.settle_seconds, seconds)
        self.tally.left_behind += left

    def count(self, found: dict, handed: bool) -> None:
        tally, step = self.tally, found["step"]
        tally.step += step == 2
        tally.older += step == 1
        tally.nothing += step is None
        tally.errors += [error for error in found["errors"].values() if error not in tally.errors]
        if tally.handed_over is not None:
            tally.handed_over += handed
            tally.handed_over_lost += handed and step != 2


class Trial:
    """One trainer in a folder of its own; both are gone at the end."""

    def __init__(self, killer: Killer):
        self.killer, self.folder = killer, Path(tempfile.mkdtemp(prefix="trial-", dir=killer.folder))
        self.process = begun("live", killer.key, self.folder, killer.megabytes)

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder)

    def end(self) -> tuple[float, int]:
        """Kill it, and wait for what it left."""
        self.process.kill()
        self.process.wait()
        return settled()

    def loaded(self) -> dict:
        """What a fresh process finds."""
        process = begun("load", self.killer.key, self.folder, self.killer.megabytes, stdout=subprocess.PIPE, text=True)
        output, _ = process.communicate(timeout=PATIENCE)
        settled()
        if process.returncode:
            raise SystemExit(f"the load failed:\n{(self.folder / 'log').read_text()[-3000:]}")
        return json.loads(output.splitlines()[-1])


def measure(args: argparse.Namespace, folder: Path, before: dict) -> dict:
    """All trials, contestants in turn, so that what else the machine does meets all alike. The windows are those of
    ``before``, earlier results with as much state, if it has them."""
    killers = []
    for key in args.only:
        if (why := absent(CONTESTANTS[key].needs)) is not None:
            print(f"left out: {CONTESTANTS[key].label}: {why}")
            continue
        killers.append(Killer(key, folder, args.megabytes, random.Random(f"{args.seed} {key}")))
        if key in before:
            killers[-1].window(before[key]["window_seconds"])
        else:
            progress(f"measuring {CONTESTANTS[key].label}")
            killers[-1].calibrate()
    for number in range(args.trials):
        for killer in killers:
            progress(f"trial {number + 1} of {args.trials}: {killer.tally.label}")
            while killer.tally.trials <= number and killer.tally.too_late <= 3 * args.trials:
                killer.trial()
    progress("")
    shm = os.statvfs("/dev/shm")
    return {
        "machine": machine.describe(folder),
        "dev_shm_mib": shm.f_blocks * shm.f_frsize >> 20,
        "state_bytes": args.megabytes * 1000**2,
        "seed": args.seed,
        "results": {killer.key: vars(killer.tally) for killer in killers},
    }


def merged(older: dict, newer: dict) -> dict:
    """Two runs with different seeds as one, so that a long one can be made in pieces."""
    alike = ("machine", "dev_shm_mib")
    if any(older[key] != newer[key] for key in alike):
        raise SystemExit(f"--json names figures of another machine: {[older[key] for key in alike]}")
    seeds = dict.fromkeys([*str(older["seed"]).split(), str(newer["seed"])])
    out = {**newer, "seed": " ".join(seeds), "results": {**older["results"], **newer["results"]}}
    for key in older["results"].keys() & newer["results"].keys():
        mine, other = older["results"][key], newer["results"][key]
        add = {
            name: mine[name] + other[name]
            for name in (
                "step",
                "older",
                "nothing",
                "too_late",
                "left_behind",
                "kills_seconds",
                "handed_over",
                "handed_over_lost",
            )
            if mine[name] is not None
        }
        most = {name: max(mine[name], other[name]) for name in ("window_seconds", "settle_seconds")}
        out["results"][key] = {**other, **add, **most, "errors": list(dict.fromkeys(mine["errors"] + other["errors"]))}
    return out


def report(numbers: dict) -> None:
    print(machine.line(numbers["machine"]) + f", /dev/shm {numbers['dev_shm_mib']} MiB")
    print(
        f"state {numbers['state_bytes'] / 1e6:.0f} MB; SIGKILL between the return of the call for step 2 and its completion; "
        f"seed {numbers['seed']}\n"
    )
    print(f"{'':44}{'window':>9}{'trials':>8}{'step 2':>8}{'older':>7}{'nothing':>9}{'handed over':>13}")
    for row in numbers["results"].values():
        handed = "" if row["handed_over"] is None else f"{row['handed_over'] - row['handed_over_lost']} of {row['handed_over']}"
        trials = row["step"] + row["older"] + row["nothing"]
        print(
            f"{row['label']:44}{row['window_seconds']:7.2f} s{trials:8}{row['step']:8}{row['older']:7}{row['nothing']:9}"
            f"{handed:>13}"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--trials", type=int, default=10)
    option("--megabytes", type=int, default=600, help="of parameters and momenta")
    option("--seed", type=int, default=random.SystemRandom().randrange(2**32), help="draws the instants")
    option("--only", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS), help="these contestants")
    option("--dir", default=".", help="the disk; needs about four times the state")
    option("--json", help="write the figures to this file")
    option("--add", action="store_true", help="to those that the file has already")
    option("--role", choices=["live", "load"], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if args.role:
        {"live": live, "load": load}[args.role](args.only[0], Path(args.dir), args.megabytes)
        return 0
    # Whatever a killed trainer leaves running becomes our child, so that we can wait for its end.
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    target = Path(args.json) if args.json else None
    before = json.loads(target.read_text()) if args.add and target is not None and target.exists() else None
    if before is not None and before["state_bytes"] != args.megabytes * 1000**2:
        raise SystemExit(f"{target} has figures for {before['state_bytes']} bytes of state: --add needs as many")
    with scratch(args.dir) as folder:
        numbers = measure(args, folder, before["results"] if before else {})
    if before is not None:
        numbers = merged(before, numbers)
    report(numbers)
    write(numbers, target)
    return 1 if any(row["handed_over_lost"] for row in numbers["results"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
