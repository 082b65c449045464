"""What checkpoints cost on a GPU: GPT models of 124M, 350M and 1.3B parameters, AdamW fused, bf16 autocast.

For each model, after a warm-up: plain steps, and fxckpt at every step; later also every tenth, and "continuous", with each
writer; then torch.save and DCP async_save (pinned) every tenth. Plain steps are measured again at the end, and a ratio is taken
against the mean of both. Reported for each: step time (median and p99, from CUDA events at the end of each step, so that
nothing waits for the device), the host's stall, device memory beyond the plain run's, and what was committed. Beside them:
a plain pinned copy against fxckpt's device-to-host rate, a plain writer against fxckpt's disk rate, and a training that is
killed and resumed, to the same bits. Models are not compiled: that would take most of ten minutes.

What is worth most comes first, and the file of results is whole after each case: whatever ends the script, or goes wrong in one
case, what was measured before stays.

    python benchmarks/gpu.py [--minutes 8] [--dir DISK] [--json benchmarks/results/gpu.json]
    python benchmarks/gpu.py --rehearse            a tiny model on the CPU, to see that the script works; with
                                                   FXCKPT_CUDA_DRIVER, the tests' fake driver, as if it lay on a device
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products, for the resumed training

import machine
import torch
from torch import nn
from torch.nn import functional as F

import fxckpt

MODELS = {  # layers, width, heads, batch, length
    "tiny": (2, 64, 2, 2, 32),
    "124M": (12, 768, 12, 8, 1024),
    "350M": (24, 1024, 16, 8, 1024),
    "1.3B": (24, 2048, 16, 4, 1024),
}
VOCABULARY = 50304
WORTH = {"tiny": 1.0, "124M": 1.0, "350M": 1.0, "1.3B": 2.0}  # of the time, for one case
JOURNAL = 4
"""Steps from one full checkpoint to the next in the case of a journal: of 1.3B parameters a record has 5 GB, and the disk 40."""

COUNTED = ("checkpoints_committed", "records_committed", "checkpoints_skipped", "checkpoints_failed", "bytes_written")
TARGET = 1.02
"""The ratio that checkpoints at every step are to stay under."""


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.proj(mixed.reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """GPT-2's shape; the output layer shares its weight with the token embedding."""

    def __init__(self, layers: int, width: int, heads: int, length: int, vocabulary: int = VOCABULARY):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            hidden = block(hidden)
        return F.cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), y.flatten())


# ---- the device ----


class Marks:
    """The device's time at the end of each step, without waiting for it."""

    def __init__(self, device: torch.device):
        self.cuda, self.found = device.type == "cuda", []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.found.append(event)
        else:
            self.found.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between marks; waits for the last one."""
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(self.found, self.found[1:])]
        return [b - a for a, b in zip(self.found, self.found[1:])]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def pinned_copy_rate(device: torch.device, nbytes: int = 256 << 20) -> float:
    """Bytes per second of one big copy into pinned memory, the best of five."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    best = 0.0
    for _ in range(5):
        synchronize(device)
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        synchronize(device)
        best = max(best, nbytes / (time.perf_counter() - began))
    return best


def describe_device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": "CPU (a rehearsal: no figure means anything)"}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "memory_gib": round(found.total_memory / 2**30),
        "cuda": torch.version.cuda,
        "driver": _driver_version(),
    }


def _driver_version() -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    return "unknown"


# ---- one training ----


class Training:
    """A model, its optimizer and a batch."""

    def __init__(self, name: str, device: torch.device):
        layers, width, heads, batch, length = MODELS[name]
        torch.manual_seed(0)
        self.device = device
        self.model = GPT(layers, width, heads, length, 257 if name == "tiny" else VOCABULARY).to(device)
        self.opt = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.x = torch.randint(0, 256, (batch, length), device=device)
        self.y = self.x.roll(-1, 1)

    def step(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(self.x, self.y)
        loss.backward()
        self.opt.step()
        self.opt.zero_grad()

    def plain(self) -> None:
        """End its run, and give the optimizer its own class back: what follows is PyTorch alone."""
        if hasattr(self.opt, "ckpt"):
            self.opt.ckpt.shutdown()
            self.opt.__class__ = torch.optim.AdamW
            del self.opt.__dict__["_fxckpt_run"]

    def state_bytes(self) -> int:
        tensors = [*self.model.parameters(), *(t for s in self.opt.state.values() for t in s.values())]
        return sum(t.nbytes for t in tensors)


def measure(
    training: Training, seconds: float, saved: Callable[[int], None] = lambda step: None, least: int = 12
) -> dict[str, Any]:
    """Steps for about so many seconds; times in seconds."""
    device = training.device
    for step in range(1, 3):  # slots are made, allocations settle
        training.step()
        saved(step)
    synchronize(device)
    marks, began = Marks(device), time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    marks.mark()
    step = 2
    while step < least + 2 or time.perf_counter() - began < seconds:
        step += 1
        training.step()
        saved(step)
        marks.mark()
        if time.perf_counter() - began > 2 * seconds and step > 5:
            break  # far slower than hoped: what there is must do
    times = marks.seconds()
    whole = time.perf_counter() - began
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {
        "steps": len(times),
        "median": statistics.median(times),
        "mean": whole / len(times),
        "p99": sorted(times)[min(len(times) - 1, int(len(times) * 0.99))],
        "device_peak_bytes": memory,
    }


def with_fxckpt(
    training: Training, folder: Path, seconds: float, every: int | str, writer: str, journal: int = 1
) -> dict[str, Any]:
    big = training.state_bytes() > 8 << 30  # two slots of 16 GB are enough for a disk of 64
    fxckpt.compile_step(
        training.opt,
        folder,
        model=training.model,
        every=every,
        writer=writer,
        journal=journal,
        threads=4,
        fresh=True,
        keep=1 if big else 2,
        max_async=1 if big else 2,
        on_error="raise",
    )
    before = training.opt.ckpt.statistics()
    found = measure(training, seconds)
    stats = training.opt.ckpt.statistics()
    found["stall_per_step"] = (stats["stall_seconds"] - before["stall_seconds"]) / (found["steps"] + 2)
    training.opt.ckpt.flush()
    done = training.opt.ckpt.statistics()
    found |= {key: done[key] for key in COUNTED}
    found["staging_limit_bytes"] = training.opt.ckpt._run.engine.memory_bytes
    training.plain()
    return found


def with_torch_save(training: Training, folder: Path, seconds: float, every: int) -> dict[str, Any]:
    def saved(step: int) -> None:
        if step % every == 0:
            torch.save({"model": training.model.state_dict(), "optimizer": training.opt.state_dict()}, folder / "checkpoint.pt")
            with open(folder / "checkpoint.pt", "rb+") as file:
                os.fsync(file)

    return measure(training, seconds, saved)


def with_dcp(training: Training, folder: Path, seconds: float, every: int) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    options = StagingOptions(
        use_pinned_memory=training.device.type == "cuda",
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=training.device.type == "cuda",
    )
    stager, last = DefaultStager(options), []

    def saved(step: int) -> None:
        if step % every:
            return
        if last:
            done(last.pop())
        state = {"model": training.model.state_dict(), "optimizer": training.opt.state_dict()}
        last.append(dcp.async_save(state, checkpoint_id=folder / str(step // every % 2), no_dist=True, async_stager=stager))

    def done(response: Any) -> None:
        getattr(response, "upload_completion", response).result()

    found = measure(training, seconds, saved)
    if last:
        done(last.pop())
    return found


def rates(training: Training, folder: Path) -> dict[str, float]:
    """fxckpt's own rates with the device at rest: a mock checkpoint's copies, then a real one to the disk; bytes/s."""
    out = {"pinned_copy": pinned_copy_rate(training.device), "plain_writer": machine.Disk(folder, 1 << 30, threads=4).measure()}
    for writer in ("mock", "thread"):
        store = folder / f"rates-{writer}"
        fxckpt.compile_step(
            training.opt, store, model=training.model, every=10**9, writer=writer, threads=8, fresh=True, keep=1, max_async=1
        )
        training.step()
        training.opt.ckpt.save()  # files are made, buffers touched
        synchronize(training.device)
        path = folder / "rates.json"
        with training.opt.ckpt.trace(path):
            began = time.perf_counter()
            training.opt.ckpt.save()
            whole = time.perf_counter() - began
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") == "fxckpt"]
        copies = [e for e in events if e["name"].startswith("copy") and (e["tid"] >= 200 or training.device.type == "cpu")]
        first, last = min(e["ts"] for e in copies), max(e["ts"] + e["dur"] for e in copies)
        moved = sum(e["args"].get("bytes", 0) for e in copies)
        out |= {f"{writer}_copy": moved / (last - first) * 1e6, f"{writer}_whole": training.state_bytes() / whole}
        training.plain()
        shutil.rmtree(store, ignore_errors=True)
    return out


def picture(training: Training, folder: Path, path: Path) -> None:
    """A trace of three steps at every-step checkpointing, with torch's profiler beside it."""
    from torch.profiler import profile

    fxckpt.compile_step(training.opt, folder / "picture", model=training.model, every=1, threads=4, fresh=True, keep=1)
    for _ in range(3):
        training.step()
    with training.opt.ckpt.trace(path, beside=folder / "torch.json"):
        with profile() as profiler:
            for _ in range(3):
                training.step()
            synchronize(training.device)
        profiler.export_chrome_trace(str(folder / "torch.json"))
        training.opt.ckpt.flush()
    training.plain()
    shutil.rmtree(folder / "picture", ignore_errors=True)


# ---- kill and resume ----

LIFE_STEPS = 30
RESUMED = {"kill_and_resume": 1, "kill_and_resume_journal": 8}
"""By which journal's steps a life goes on."""


def life(folder: str, device: torch.device, journal: int) -> None:
    """One life of a small training with dropout: goes on from what is there, prints each step and the digest."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Dropout(0.1), nn.BatchNorm1d(512), nn.Linear(512, 16)).to(device)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.97)
    fxckpt.compile_step(opt, folder, model=model, every=1, journal=journal, extra={"scheduler": scheduler})
    for step in range(fxckpt.load().step, LIFE_STEPS):
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(64, 256, generator=g).to(device), torch.randint(0, 16, (64,), generator=g).to(device)
        F.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()
        scheduler.step()
        print("STEP", step, flush=True)
        time.sleep(0.02)
    sha = hashlib.sha256()
    for tensor in [*model.state_dict().values(), *(t for s in opt.state.values() for t in s.values())]:
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    print("DIGEST", sha.hexdigest(), flush=True)


def kill_and_resume(folder: Path, device: torch.device, rehearse: bool, journal: int = 1) -> dict[str, Any]:
    """A whole life against one that is killed twice: are the last bits the same?"""

    def run(store: str, kill_at: int | None) -> str:
        command = [sys.executable, __file__, "--life", str(folder / f"{store}-{journal}"), "--device", device.type]
        command += ["--journal", str(journal)]
        command += ["--rehearse"] if rehearse else []
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        digest = ""
        for line in process.stdout:
            if kill_at is not None and line.startswith("STEP") and int(line.split()[1]) >= kill_at:
                process.send_signal(signal.SIGKILL)
                break
            digest = line.split()[1] if line.startswith("DIGEST") else digest
        process.wait()
        return digest

    whole = run("whole", None)
    run("killed", LIFE_STEPS // 3)
    run("killed", 2 * LIFE_STEPS // 3)
    return {"whole": whole, "resumed": (resumed := run("killed", None)), "same": bool(whole) and whole == resumed}


# ---- all of it ----

Case = Callable[[Training, Path, float], dict[str, Any]]


def plain(training: Training, folder: Path, seconds: float) -> dict[str, Any]:
    return measure(training, seconds)


def fxckpt_case(every: int | str, writer: str, journal: int = 1) -> Case:
    return lambda training, folder, seconds: with_fxckpt(training, folder, seconds, every, writer, journal)


def cases() -> dict[str, Case]:
    """What is worth most."""
    return {"none": plain, "fxckpt every=1 thread": fxckpt_case(1, "thread"), "none again": plain}


def more_cases() -> dict[str, Case]:
    """The other writers, intervals and contestants."""
    found: dict[str, Case] = {"none": plain}
    for writer, every in (("thread", 10), ("monitor", 1), ("thread", "continuous"), ("monitor", 10), ("monitor", "continuous")):
        found[f"fxckpt every={every} {writer}"] = fxckpt_case(every, writer)
    found[f"fxckpt every=1 journal={JOURNAL}"] = fxckpt_case(1, "thread", JOURNAL)
    found["torch.save every=10"] = lambda t, f, s: with_torch_save(t, f, s, 10)
    found["DCP async pinned every=10"] = lambda t, f, s: with_dcp(t, f, s, 10)
    found["none again"] = plain
    return found


class Report:
    """The numbers so far, in a file that is whole after each part; a part that raises is a result too."""

    def __init__(self, path: Path | None, numbers: dict[str, Any]):
        self.path, self.numbers = path, numbers
        self.write()

    def write(self) -> None:
        if self.path is not None:
            beside = self.path.with_name(self.path.name + ".part")
            beside.write_text(json.dumps(self.numbers, indent=1) + "\n")
            beside.replace(self.path)

    def part(self, into: dict[str, Any], name: str, function: Callable[[], Any]) -> None:
        """Run one, and keep what it gives in ``into[name]``."""
        try:
            into[name] = function()
        except Exception as error:
            logging.exception("%s", name)
            into[name] = {"failed": f"{type(error).__name__}: {error}"}
        self.write()


def run_cases(name: str, device: torch.device, folder: Path, todo: dict[str, Case], key: str, report: Report, end: float) -> None:
    """Cases of a model, each with an equal part of the time until ``end``."""
    training, found = Training(name, device), {}
    for _ in range(3):
        training.step()
    model = report.numbers["models"].setdefault(name, {})
    model |= {"parameters": sum(p.numel() for p in training.model.parameters()), "state_bytes": training.state_bytes()}
    model[key] = found
    for index, (case, function) in enumerate(todo.items()):
        left = (end - time.monotonic()) / (len(todo) - index)
        if left < 1 and name != "tiny":
            found[case] = {"skipped": "no time was left"}
            continue
        store = folder / "store"
        store.mkdir(exist_ok=True)
        report.part(found, case, partial(function, training, store, min(left * 0.5, 12.0)))
        with contextlib.suppress(Exception):
            training.plain()
        shutil.rmtree(store, ignore_errors=True)
        compare(found)
        say(f"{name:5} {case:32} " + line_of(found[case]))
    report.write()


def compare(found: dict[str, dict[str, Any]]) -> None:
    """Ratios of step times to plain ones, and device memory beyond them."""
    plain = [found[key] for key in ("none", "none again") if "median" in found.get(key, {})]
    if not plain:
        return
    base = statistics.mean(p["median"] for p in plain)
    for case in found.values():
        if "median" in case:
            case["ratio"] = case["median"] / base
            case["ratio_of_means"] = case["mean"] / statistics.mean(p["mean"] for p in plain)
            case["device_stall"] = case["median"] - base
            case["device_bytes_added"] = case["device_peak_bytes"] - plain[0]["device_peak_bytes"]


def line_of(case: dict[str, Any]) -> str:
    if "median" not in case:
        return str(case)
    return (
        f"{case['median'] * 1e3:8.1f} ms median {case['p99'] * 1e3:8.1f} p99 {case['mean'] * 1e3:8.1f} mean "
        f"{case.get('stall_per_step', 0) * 1e3:7.1f} stall, {case.get('checkpoints_committed', '-')} committed"
    )


def say(text: str) -> None:
    print(text, flush=True)


def stand_in() -> Any:
    """A rehearsal's tensors lie on a device that the tests' fake driver plays. Returns the driver."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/support"))
    from standin import FakeDriver, StandIn

    from fxckpt.compat import cuda

    device = StandIn(FakeDriver(os.environ["FXCKPT_CUDA_DRIVER"]))
    cuda.Devices = lambda: device
    return device.fake


def rates_and_picture(args: argparse.Namespace, device: torch.device, folder: Path, report: Report) -> None:
    training = Training(args.models[0], device)
    report.part(report.numbers, "rates", lambda: rates(training, folder))
    say(f"rates, bytes/s: {report.numbers['rates']}")
    if args.trace:
        report.part(report.numbers, "trace", lambda: picture(training, folder, Path(args.trace)))


def everything(args: argparse.Namespace, device: torch.device, folder: Path, report: Report) -> None:
    """In order of worth, each part with its share of the time that is left."""
    end, numbers = time.monotonic() + args.minutes * 60, report.numbers
    first, *others = args.models

    def model(name: str, todo: dict[str, Case], key: str) -> tuple[float, Callable[[float], None]]:
        return len(todo) * WORTH[name], lambda until: run_cases(name, device, folder, todo, key, report, until)

    def resumed(until: float) -> None:
        for name, journal in RESUMED.items():
            report.part(numbers, name, partial(kill_and_resume, folder, device, args.rehearse, journal))
            say(f"{name}: {numbers[name]}")

    parts = [
        model(first, cases(), "cases"),
        (2.0, resumed),
        (2.0, lambda until: rates_and_picture(args, device, folder, report)),
        *(model(name, cases(), "cases") for name in others),
        *(model(name, more_cases(), "more") for name in args.models),
    ]
    for index, (worth, run) in enumerate(parts):
        now = time.monotonic()
        share = worth / sum(w for w, _ in parts[index:])
        report.part(numbers.setdefault("parts", {}), str(index + 1), partial(run, now + max(end - now, 0) * share))
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--minutes", type=float, default=8.0, help="for everything")
    option("--models", nargs="+", choices=list(MODELS), default=["124M", "350M", "1.3B"])
    option("--dir", default=".", help="the disk to measure; needs about 40 GB")
    option("--json", help="write the numbers to this file")
    option("--trace", help="write a picture of three steps of the first model to this file")
    option("--device", default="cuda")
    option("--rehearse", action="store_true")
    option("--life", help=argparse.SUPPRESS)
    option("--journal", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    fake = None
    if args.rehearse:
        args.device, args.models, args.minutes = "cpu", ["tiny"], 0.3
        fake = stand_in() if os.environ.get("FXCKPT_CUDA_DRIVER") else None
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device)
    if args.life:
        life(args.life, device, args.journal)
        return
    folder = Path(tempfile.mkdtemp(prefix=".bench-gpu-", dir=args.dir))
    numbers = {"machine": machine.describe(folder), "device": describe_device(device), "target": TARGET, "models": {}}
    try:
        report = Report(Path(args.json) if args.json else None, numbers)
        say(f"{numbers['device']}")
        everything(args, device, folder, report)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if fake is not None and (found := fake.violations()):
        raise SystemExit(f"the fake driver would not have had this: {found}")
    if not all(numbers[name].get("same") for name in RESUMED):
        raise SystemExit("the resumed training has other bits, or did not come to its end")


if __name__ == "__main__":
    main()
