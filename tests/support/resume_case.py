"""A training script by its parts, killed and run again: whether it ends with the bits of an uninterrupted run."""

from __future__ import annotations

import random
import signal
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

from process_runs import ProcessRun
from waiting import committed, until

SCRIPT = """
from script_prelude import *

class Counting(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {{"lr": lr, "betas": (0.9, 0.999)}})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(seen=0, clock=torch.zeros(()), m=torch.zeros_like(p))
                state["seen"] += 1
                state["clock"] += 1
                state["m"].lerp_(p.grad, 1 - group["betas"][0])
                scale = 1 - group["betas"][0] ** (state["seen"] if group["step"] > 9 else state["clock"])
                p.sub_(state["m"].sign() / scale, alpha=group["lr"])

torch.manual_seed(0); random.seed(0); np.random.seed(0)
torch.use_deterministic_algorithms(True)
{setup}
opt = fxckpt.compile_step({compile_step})
start = fxckpt.load().step
for step in {steps}:
{body}
    report(step, loss)
{held}.ckpt.flush()
finish(m, {finish})
"""


BODY = """
        x, y = next(loader)
        kill_window()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        kill_window()
        opt.step()
        kill_window()
        opt.zero_grad()
        s.step()
    """


@dataclass(frozen=True)
class Case:
    """A script, by the parts in which it differs from the others. Names are those that a user's script would have."""

    model: str = "mlp()"
    loader: str = "Loader.of(8)"
    compiled: str = "m"
    optimizer: str = "torch.optim.AdamW(m.parameters(), lr=1e-2)"
    scheduler: str = "torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=STEPS + 1)"
    setup: str = ""
    compile_step: str = 'optimizer, "d", model=m, every=1, update="native", extra={"sched": s, "data": loader}'
    steps: str = "range(start, STEPS)"
    body: str = BODY
    finish: str = "optimizer, s, loader"
    held: str = "opt"
    store: str = "d"
    length: int = 24

    def script(self) -> str:
        setup = [
            f"STEPS = {self.length}",
            f"m = {self.model}",
            f"model = {self.compiled}",
            f"optimizer = {self.optimizer}",
            f"s = {self.scheduler}",
            f"loader = {self.loader}",
            textwrap.dedent(self.setup),
        ]
        body = textwrap.indent(textwrap.dedent(self.body).strip("\n"), "    ")
        return SCRIPT.format(
            setup="\n".join(setup),
            compile_step=self.compile_step,
            steps=self.steps,
            body=body,
            finish=self.finish,
            held=self.held,
        )


def kill_after_next_commit(process: ProcessRun, store: Path, upto: float = 0.12) -> None:
    """SIGKILL within so many seconds after its first commit: long before a script with kill windows of 5 ms is at its end."""
    before = set(committed(store))
    until(lambda: set(committed(store)) - before or not process.alive(), why=lambda: process.output)
    time.sleep(random.SystemRandom().uniform(0, upto))
    process.kill()
    assert process.returncode == -signal.SIGKILL, f"it ended before the kill:\n{process.output}"


def same_bits(whole: dict[str, str], first: dict[str, str], again: ProcessRun) -> None:
    """The last run took up after the first commit, and everything it and those before did is what the whole run did."""
    second = again.succeed()
    assert "LOSS 0" not in second, "nothing was restored"
    assert {**first, **second}.keys() == whole.keys(), "steps were skipped"
    for line in (first, second):
        wrong = {step: (whole[step], found) for step, found in line.items() if whole[step] != found}
        assert not wrong, f"uninterrupted and resumed: {wrong}\n{again.output}"
