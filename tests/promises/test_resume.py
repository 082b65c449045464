"""Promise 1, bit-exact resume: a script that is killed with SIGKILL and run again ends with the bits of an uninterrupted run.

Compared are the loss of every step and, at the end, all parameters, buffers, optimizer state, schedulers, scalers, loaders
and random generators.
"""

from __future__ import annotations

import random
import signal
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import committed, until
from lives import Life, fresh_life, results

SCRIPT = """
from helpers import *

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
        moment()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        moment()
        opt.step()
        moment()
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


EVERYTHING = '"d", model=m, every=1, update="native"'

CASES = {
    "mlp with dropout": Case(compiled="eager(m)"),
    "conv net with BatchNorm": Case(
        compiled="eager(m)",
        model="conv()",
        loader="Loader.of(3, 8, 8)",
        optimizer="torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True)",
    ),
    "gpt with tied embeddings": Case(compiled="eager(m)", model="GPT()", loader="Loader.of_tokens()"),
    "frozen parameters": Case(
        compiled="eager(m)",
        model="frozen()",
        optimizer="torch.optim.Adam([p for p in m.parameters() if p.requires_grad], lr=1e-2)",
    ),
    "without a compiled model": Case(),
    "RAdam, which rectifies from its sixth step on, warmed up and restarted": Case(
        optimizer="torch.optim.RAdam(m.parameters(), lr=1e-2)",
        scheduler="torch.optim.lr_scheduler.SequentialLR(optimizer, [torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5), "
        "torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 7)], [5])",
    ),
    "Muon, with a learning rate that falls when the loss does not": Case(
        optimizer="torch.optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=1e-2)",
        scheduler='torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", 0.7, 1)',
        body=BODY.replace("opt.zero_grad()", "model.zero_grad()").replace("s.step()", "s.step(loss.item())"),
    ),
    "an optimizer of one's own, that counts in its group and in its state": Case(optimizer="Counting(m.parameters(), lr=1e-2)"),
    "without model": Case(
        compiled="eager(m)",
        model="conv()",
        loader="Loader.of(3, 8, 8)",
        compile_step='optimizer, "d", every=1, update="native", extra={"sched": s, "data": loader}',
    ),
    "without model, frozen parameters, SGD": Case(
        compiled="eager(m)",
        model="frozen()",
        optimizer="torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1, momentum=0.9)",
        compile_step='optimizer, "d", every=1, update="native", extra={"sched": s, "data": loader}',
    ),
    "compile_step(optimizer) alone": Case(
        compiled="eager(m)",
        optimizer="torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True)",
        scheduler="None",
        compile_step="optimizer",
        store="checkpoints",
        finish="optimizer",
        body="""
        if step % 4 == 2:
            opt.ckpt.save()  # every="auto" takes none in the first minute
        x, y = torch.randn(8, 8), torch.randint(0, 4, (8,))
        moment()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        moment()
    """,
    ),
    "the loop of fxckpt.steps": Case(compiled="eager(m)", steps="fxckpt.steps(STEPS)"),
    "the loop of fxckpt.steps, accumulating": Case(
        compiled="eager(m)",
        steps="fxckpt.steps(STEPS)",
        length=30,
        body="""
        x, y = next(loader)
        loss = F.cross_entropy(model(x), y) / 2
        loss.backward()
        moment()
        if step % 2 == 1:
            opt.step()
            moment()
            opt.zero_grad()
            s.step()
    """,
    ),
    "accumulation in the body": Case(
        body="""
        for half in range(2):
            x, y = next(loader)
            loss = F.cross_entropy(model(x), y) / 2
            loss.backward()
            moment()
        torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1)
        opt.step()
        moment()
        opt.zero_grad(set_to_none=False)
        s.step()
    """
    ),
    "zero_grad before, a Counter of milestones, groups with learning rates of their own": Case(
        optimizer='torch.optim.Adam([{"params": m[0].parameters(), "lr": 0.05}, {"params": m[3].parameters()}], lr=1e-3)',
        scheduler="torch.optim.lr_scheduler.MultiStepLR(optimizer, [4, 9, 9, 14])",
        body="""
        opt.zero_grad()
        x, y = next(loader)
        moment()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        moment()
        s.step()
    """,
    ),
    "random numbers of numpy, Python and torch": Case(
        setup="own = np.random.default_rng(5); torch_own = torch.Generator().manual_seed(6)",
        compile_step=EVERYTHING.join(["optimizer, ", ', extra={"sched": s, "own": own, "t": torch_own}']),
        body="""
        x = torch.randn(8, 8) * random.random() + np.random.randn() + own.normal() + torch.randn(1, generator=torch_own)
        y = torch.randint(0, 4, (8,))
        moment()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        moment()
        opt.zero_grad()
        s.step()
    """,
        finish="optimizer, s, own.bit_generator.state, torch_own.get_state()",
    ),
    "several optimizers": Case(
        optimizer="torch.optim.SGD(m[0].parameters(), lr=0.05, momentum=0.9)",
        setup="second = torch.optim.AdamW(m[3].parameters(), lr=1e-2, amsgrad=True); both = [optimizer, second]",
        compile_step='both, "d", model=m, every=1, update="native", extra={"sched": s, "data": loader}',
        body="""
        x, y = next(loader)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        moment()
        optimizer.step()
        moment()
        second.step()
        moment()
        optimizer.zero_grad(); second.zero_grad()
        s.step()
    """,
        finish="optimizer, second, s, loader",
        held="second",
    ),
    "worker processes of a DataLoader, which outlive the kill": Case(
        setup="data = [(loader.inputs[i % 50], loader.targets[i % 50]) for i in range(8 * STEPS)]",
        body="""
        if step == start:
            batches = iter(torch.utils.data.DataLoader(data, 8, sampler=range(8 * start, len(data)), num_workers=2,
                                                       generator=torch.Generator()))
        x, y = next(batches)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        moment()
        opt.step()
        opt.zero_grad()
        s.step()
    """,
        finish="optimizer, s",
    ),
    "LBFGS, whole": Case(
        model="nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))",
        optimizer="torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3, history_size=4)",
        scheduler="loader = Loader.of(8)",
        compile_step='optimizer, "d", model=m, every=1, extra={"data": loader}',
        body="""
        x, y = next(loader)

        def closure():
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        loss = opt.step(closure)
        moment()
    """,
        finish="optimizer, loader",
    ),
    "Adagrad, Adam's closure, state made at construction": Case(
        optimizer="torch.optim.Adagrad(m.parameters(), lr=0.05)",
        scheduler="torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)",
        body="""
        x, y = next(loader)

        def closure():
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        loss = opt.step(closure)
        moment()
        s.step()
    """,
    ),
    "a part is frozen, then trained": Case(
        setup="for p in m[0].parameters(): p.requires_grad_(False)",
        body="""
        if step >= 8:
            m[0].requires_grad_(True)
        x, y = next(loader)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        moment()
        opt.zero_grad()
        s.step()
    """,
    ),
    "a learning rate in a tensor": Case(
        optimizer="torch.optim.Adam(m.parameters(), lr=torch.tensor(1e-2), foreach=False)",
        scheduler="torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)",
    ),
    "an average of the weights": Case(
        setup="average = torch.optim.swa_utils.AveragedModel(m, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8))",
        compile_step=EVERYTHING.join(["optimizer, ", ', extra={"sched": s, "data": loader, "average": average}']),
        body="""
        x, y = next(loader)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        moment()
        average.update_parameters(m)
        s.step()
    """,
        finish="optimizer, s, loader, average",
    ),
}

SCALED = """
        x, y = next(loader)
        loss = F.cross_entropy(model(x), y)
        scaler.scale(loss * (float("inf") if step in (0, 5, 6, 13) else 1)).backward()
        moment()
        {unscale}
        scaler.step(opt)
        moment()
        scaler.update()
        opt.zero_grad()
        s.step()
"""
for name, form, unscale in (
    ("GradScaler that skips the step", "lr=1e-2", "pass"),
    ("GradScaler with fused Adam", "lr=1e-2, fused=True", "pass"),
    (
        "GradScaler with fused Adam and clipping",
        "lr=1e-2, fused=True",
        "scaler.unscale_(opt); nn.utils.clip_grad_norm_(m.parameters(), 0.1)",
    ),
):
    CASES[name] = Case(
        optimizer=f"torch.optim.Adam(m.parameters(), {form})",
        setup='scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, growth_interval=3)',
        compile_step=EVERYTHING.join(["optimizer, ", ', extra={"sched": s, "data": loader, "scaler": scaler}']),
        body=SCALED.format(unscale=unscale),
        finish="optimizer, s, loader, scaler",
    )


def kill_after_next_commit(life: Life, store: Path, upto: float = 0.12) -> None:
    """SIGKILL within so many seconds after its first commit: long before a script with moments of 5 ms is at its end."""
    before = set(committed(store))
    until(lambda: set(committed(store)) - before or not life.alive(), why=lambda: life.output)
    time.sleep(random.SystemRandom().uniform(0, upto))
    life.kill()
    assert life.returncode == -signal.SIGKILL, f"it ended before the kill:\n{life.output}"


def same_bits(whole: dict[str, str], first: dict[str, str], again: Life) -> None:
    """The last life took up after the first commit, and everything it and those before did is what the whole run did."""
    second = again.succeed()
    assert "LOSS 0" not in second, "nothing was restored"
    assert {**first, **second}.keys() == whole.keys(), "steps were skipped"
    for line in (first, second):
        wrong = {step: (whole[step], found) for step, found in line.items() if whole[step] != found}
        assert not wrong, f"uninterrupted and resumed: {wrong}\n{again.output}"


@pytest.mark.parametrize("name", CASES)
def test_killed_and_run_again_ends_with_the_same_bits(name, nursery, tmp_path):
    case, script = CASES[name], tmp_path / "train.py"
    script.write_text(case.script())
    whole = nursery.start(script, tmp_path / "whole")
    killed = nursery.start(script, tmp_path / "killed", MOMENT="0.005")
    kill_after_next_commit(killed, tmp_path / "killed" / case.store)
    same_bits(whole.succeed(), results(killed.output), nursery.start(script, tmp_path / "killed"))


COMPILED = Case(
    model="nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))",
    compiled="torch.compile(m, backend=fxckpt.backend)",
    compile_step='optimizer, "d", model=m, every=1, extra={"sched": s, "data": loader}',
)


@pytest.mark.slow
def test_killed_and_run_again_by_python_with_everything_compiled_ends_with_the_same_bits(nursery, inductor_cache, tmp_path):
    """Model and update by Inductor, and ``python train.py`` twice, as a user does it. One cold compile, then cached."""
    script = tmp_path / "train.py"
    script.write_text(COMPILED.script())
    whole = nursery.start(script, tmp_path / "whole").succeed()
    (tmp_path / "killed").mkdir()
    killed = fresh_life(script, tmp_path / "killed", inductor_cache, MOMENT="0.01")
    kill_after_next_commit(killed, tmp_path / "killed" / "d")
    same_bits(whole, results(killed.output), fresh_life(script, tmp_path / "killed", inductor_cache))


def test_killed_again_and_again_ends_with_the_same_bits(nursery, tmp_path):
    """Every life gets a step or a few further; generations and slots go on over all of them."""
    script, store = tmp_path / "train.py", tmp_path / "killed" / "d"
    script.write_text(CASES["without a compiled model"].script())
    whole = nursery.start(script, tmp_path / "whole")
    found: dict[str, str] = {}
    for _ in range(4):
        life = nursery.start(script, tmp_path / "killed", MOMENT="0.02")
        kill_after_next_commit(life, store, upto=0)
        found.update(results(life.output))
    same_bits(whole.succeed(), found, nursery.start(script, tmp_path / "killed"))
