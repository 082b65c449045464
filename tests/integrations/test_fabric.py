"""Lightning Fabric: ``compile_step`` on what ``setup`` returned, loops over its loaders that are killed at random.

``FXCKPT_INTEGRATIONS`` says how many kills each loop gets (``make integrations``: 30).
"""

from __future__ import annotations

import os

import pytest
import torch
from digests import digest
from loop_runs import Loop
from torch import nn

import fxckpt

KILLS = int(os.environ.get("FXCKPT_INTEGRATIONS", "2"))

SCRIPT = """
import torch
from lightning.fabric import Fabric
from script_prelude import finish
from torch import nn
from torch.utils.data import DataLoader, Dataset
import fxckpt  # fxckpt

class Noisy(Dataset):
    rows = torch.randn(22, 8, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return 22

    def __getitem__(self, i):
        return self.rows[i] + 0.1 * torch.randn(8), self.rows[i].sum()

fabric = Fabric(accelerator="cpu", precision="{precision}")
fabric.seed_everything(0, verbose=False)
model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 1))
opt = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True)
scheduler = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, 20)
model, opt = fabric.setup(model, opt)
loader = fabric.setup_dataloaders(DataLoader(Noisy(), 2, shuffle=True, num_workers={workers}))
test = fabric.setup_dataloaders(DataLoader(Noisy(), 4))
fxckpt.compile_step(opt, "ckpt", model=model, every=1, extra={{"scheduler": scheduler}}, update="native")  # fxckpt
fxckpt.load()  # fxckpt
for epoch in fxckpt.epochs(3):  # fxckpt, was: for epoch in range(3):
    for x, y in fxckpt.batches(loader):  # fxckpt, was: for x, y in loader:
        fabric.backward((model(x).squeeze(-1) - y).square().mean())
        fabric.clip_gradients(model, opt, max_norm=1.0)
        opt.step()
        scheduler.step()
        opt.zero_grad()
    model.eval()
    with torch.no_grad():
        print("END", epoch, sum((model(x).squeeze(-1) - y).square().sum() for x, y in test).item().hex())
    model.train()
finish(model, opt.optimizer, scheduler.state_dict(), [loader._num_iter_calls])
"""

LOOPS = {"bf16, workers": ("bf16-mixed", 2), "plain": ("32-true", 0)}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_of_fabric_ends_with_the_same_bits(name, lightning_server, tmp_path, counted):
    precision, workers = LOOPS[name]
    loop = Loop(lightning_server, SCRIPT.format(precision=precision, workers=workers), tmp_path)
    plain, whole = loop.plain(), loop.whole()
    assert whole == plain, "fxckpt changed an uninterrupted training"
    assert whole.dropped == 0
    for seed, resumed in loop.killed_anew(KILLS // 2, 2, plain.backwards):
        assert resumed.lines == plain.lines[-len(resumed.lines) :], f"seed {seed}"
        counted("kills of a loop of Fabric", 2)


def on_cpu():
    from lightning.fabric import Fabric  # here, since each worker of pytest imports this file: it takes more than a second

    return Fabric(accelerator="cpu")


def set_up():
    torch.manual_seed(0)
    fabric, model = on_cpu(), nn.Linear(4, 4)
    return fabric, *fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.1))


def test_what_setup_returned_comes_back_and_has_ckpt(tmp_path):
    fabric, model, opt = set_up()
    assert fxckpt.compile_step(opt, tmp_path / "ckpt", model=model, every=1, update="native") is opt
    assert isinstance(opt, torch.optim.AdamW) and isinstance(opt, fxckpt.Checkpointed)
    assert fxckpt.load(optimizer=opt).step == 0
    for _ in fxckpt.steps(2, optimizer=opt):
        fabric.backward(model(torch.ones(2, 4)).sum())
        opt.step()
    opt.ckpt.shutdown()
    assert opt.ckpt is opt.optimizer.ckpt and opt.ckpt.statistics()["checkpoints_committed"] == 2
    _, other, again = set_up()
    fxckpt.compile_step(again, tmp_path / "ckpt", model=other)
    assert fxckpt.load(optimizer=again).step == 2 and digest(other.module) == digest(model.module)


def test_an_optimizer_that_was_compiled_before_setup_steps_through_its_run(tmp_path):
    model = nn.Linear(4, 4)
    opt = fxckpt.compile_step(torch.optim.AdamW(model.parameters()), tmp_path / "ckpt", model=model, every=1, update="native")
    fabric = on_cpu()
    model, wrapped = fabric.setup(model, opt)
    fabric.backward(model(torch.ones(2, 4)).sum())
    wrapped.step()
    assert opt.ckpt.statistics()["steps"] == 1


def test_a_strategy_that_shards_is_refused_by_name():
    class FSDPStrategy:
        """Stands in for Fabric's, which wants several processes."""

    _, model, opt = set_up()
    opt._strategy = FSDPStrategy()
    with pytest.raises(fxckpt.SetupError, match=r"FSDPStrategy.*fabric.save"):
        fxckpt.compile_step(opt, writer="mock", model=model)
