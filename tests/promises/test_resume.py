"""Promise 1, bit-exact resume: a script that is killed with SIGKILL and run again ends with the bits of an uninterrupted run.

Compared are the loss of every step and, at the end, all parameters, buffers, optimizer state, schedulers, scalers, loaders
and random generators.
"""

from __future__ import annotations

import pytest
from process_runs import fresh_process, results
from resume_case import BODY, Case, kill_after_next_commit, same_bits

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
        x, y = torch.randn(8, 8), torch.randint(0, 4, (8,))
        kill_window()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        if step % 4 == 1:  # after a forward, which tells names and buffers
            report(step, loss)  # a step that may be committed is not made again
            opt.ckpt.save()  # every="auto" takes none in the first minute
        kill_window()
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
        kill_window()
        if step % 2 == 1:
            opt.step()
            kill_window()
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
            kill_window()
        torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1)
        opt.step()
        kill_window()
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
        kill_window()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        kill_window()
        s.step()
    """,
    ),
    "random numbers of numpy, Python and torch": Case(
        setup="own = np.random.default_rng(5); torch_own = torch.Generator().manual_seed(6)",
        compile_step=EVERYTHING.join(["optimizer, ", ', extra={"sched": s, "own": own, "t": torch_own}']),
        body="""
        x = torch.randn(8, 8) * random.random() + np.random.randn() + own.normal() + torch.randn(1, generator=torch_own)
        y = torch.randint(0, 4, (8,))
        kill_window()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        kill_window()
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
        kill_window()
        optimizer.step()
        kill_window()
        second.step()
        kill_window()
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
        kill_window()
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
        kill_window()
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
        kill_window()
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
        kill_window()
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
        kill_window()
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
        kill_window()
        {unscale}
        scaler.step(opt)
        kill_window()
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


@pytest.mark.parametrize("name", CASES)
def test_killed_and_run_again_ends_with_the_same_bits(name, fork_server, tmp_path):
    case, script = CASES[name], tmp_path / "train.py"
    script.write_text(case.script())
    whole = fork_server.start(script, tmp_path / "whole")
    killed = fork_server.start(script, tmp_path / "killed", KILL_WINDOW="0.005")
    kill_after_next_commit(killed, tmp_path / "killed" / case.store)
    same_bits(whole.succeed(), results(killed.output), fork_server.start(script, tmp_path / "killed"))


COMPILED = Case(
    model="nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))",
    compiled="torch.compile(m, backend=fxckpt.backend)",
    compile_step='optimizer, "d", model=m, every=1, extra={"sched": s, "data": loader}',
)


@pytest.mark.slow
def test_killed_and_run_again_by_python_with_everything_compiled_ends_with_the_same_bits(fork_server, inductor_cache, tmp_path):
    """Model and update by Inductor, and ``python train.py`` twice, as a user does it. One cold compile, then cached."""
    script = tmp_path / "train.py"
    script.write_text(COMPILED.script())
    whole = fork_server.start(script, tmp_path / "whole").succeed()
    (tmp_path / "killed").mkdir()
    killed = fresh_process(script, tmp_path / "killed", inductor_cache, KILL_WINDOW="0.01")
    kill_after_next_commit(killed, tmp_path / "killed" / "d")
    same_bits(whole, results(killed.output), fresh_process(script, tmp_path / "killed", inductor_cache))


def test_killed_again_and_again_ends_with_the_same_bits(fork_server, tmp_path):
    """Every run gets a step or a few further; generations and slots go on over all of them."""
    script, store = tmp_path / "train.py", tmp_path / "killed" / "d"
    script.write_text(CASES["without a compiled model"].script())
    whole = fork_server.start(script, tmp_path / "whole")
    found: dict[str, str] = {}
    for _ in range(4):
        process = fork_server.start(script, tmp_path / "killed", KILL_WINDOW="0.02")
        kill_after_next_commit(process, store, upto=0)
        found.update(results(process.output))
    same_bits(whole.succeed(), found, fork_server.start(script, tmp_path / "killed"))
