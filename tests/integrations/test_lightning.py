"""Lightning's Trainer with ``fxckpt.lightning.Checkpoint``: uninterrupted it has the bits it has without, and so after kills.

Each case is many features of Trainer at once. ``FXCKPT_INTEGRATIONS`` says how many kills each gets (``make integrations``: 30).
"""

from __future__ import annotations

import csv
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from loop_runs import Loop
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fxckpt
import fxckpt.lightning
from fxckpt.lightning.checks import check_trainer
from fxckpt.lightning.logs import continue_logs, keep_rows, positions

KILLS = int(os.environ.get("FXCKPT_INTEGRATIONS", "2"))

SCRIPT = """
import logging
import warnings
from pathlib import Path
import lightning as L
import torch
from lightning.pytorch import callbacks as cb
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from script_prelude import finish
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanSquaredError
import fxckpt.lightning  # fxckpt

CASE = {case}
warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Noisy(Dataset):
    rows = torch.randn(22, 8, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return 22

    def __getitem__(self, i):
        return self.rows[i] + 0.1 * torch.randn(8), self.rows[i].sum()


class Data(L.LightningDataModule):
    def train_dataloader(self):
        kind = DataLoader
        if CASE["stateful"]:
            from torchdata.stateful_dataloader import StatefulDataLoader as kind
        loader = kind(Noisy(), 2, shuffle=True, num_workers=CASE["workers"])
        both = {{"a": loader, "b": DataLoader(Noisy(), 5, shuffle=True)}}
        return CombinedLoader(both, "max_size_cycle") if CASE["manual"] else loader

    def val_dataloader(self):
        return DataLoader(Noisy(), 4)


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 1))
        self.automatic_optimization = not CASE["manual"]
        self.error = MeanSquaredError()

    def forward(self, x):
        return self.layers(x).squeeze(-1)

    def training_step(self, batch, i):
        x, y = batch if not CASE["manual"] else (torch.cat(each) for each in zip(batch["a"], batch["b"]))
        loss = nn.functional.mse_loss(self(x), y)
        self.error(self(x).detach().float(), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("error", self.error, on_step=False, on_epoch=True)
        if CASE["manual"]:
            first, second = self.optimizers()
            for opt in (first, second):
                opt.zero_grad()
            self.manual_backward(loss)
            first.step()
            if i % 2:
                second.step()
            self.lr_schedulers().step()
            return None
        return loss

    def validation_step(self, batch, i):
        self.log("val", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        if CASE["manual"]:
            first = torch.optim.AdamW(self.layers[0].parameters(), lr=0.01, foreach=True)
            second = torch.optim.SGD([*self.layers[1].parameters(), *self.layers[4].parameters()], lr=0.01, momentum=0.9)
            return [first, second], [torch.optim.lr_scheduler.CosineAnnealingLR(first, 30)]
        opt = torch.optim.AdamW(self.parameters(), lr=0.02, foreach=True)
        if CASE["scheduler"] == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0)
            return {{"optimizer": opt, "lr_scheduler": {{"scheduler": plateau, "monitor": "val"}}}}
        every = CASE["scheduler"]
        return [opt], [{{"scheduler": torch.optim.lr_scheduler.StepLR(opt, 2, 0.8), "interval": every}}]


def callbacks():
    yield cb.ModelCheckpoint("saved", save_top_k=2, monitor="val", save_last=True, enable_version_counter=False)
    if "early" in CASE["callbacks"]:
        yield cb.EarlyStopping("val", patience=1, min_delta=0.2)
    if "swa" in CASE["callbacks"]:
        yield cb.StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=2)
    if "ema" in CASE["callbacks"]:
        yield cb.EMAWeightAveraging(decay=0.9)
    if "rates" in CASE["callbacks"]:
        yield cb.LearningRateMonitor()


L.seed_everything(0, verbose=False)
quiet = dict(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1)
chosen = list(callbacks())
chosen.insert(0, fxckpt.lightning.Checkpoint("ckpt", every=1, update="native"))  # fxckpt
if CASE["fp16"]:  # Trainer(precision="16-mixed") on a CPU makes bf16 of it; the plugin itself does not
    from lightning.pytorch.plugins import MixedPrecision
    quiet["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20))]
logger = CSVLogger("out", name="log", version=0, flush_logs_every_n_steps={flush})
trainer = L.Trainer(**quiet, **CASE["trainer"], callbacks=chosen, logger=logger)
net = Net()
trainer.fit(net, datamodule=Data())
values = {{name: float(value).hex() for name, value in sorted(trainer.callback_metrics.items())}}
print("END", trainer.global_step, trainer.current_epoch, values)
if CASE["fp16"]:
    scaler = trainer.precision_plugin.scaler
    assert scaler.get_scale() < scaler._init_scale, "no step was skipped"
    print("END", scaler.state_dict())
for row in Path("out/log/version_0/metrics.csv").read_text().splitlines():
    print("END", row)
print("END", [(Path(each.best_model_path).name, each.best_k_models.__len__()) for each in trainer.checkpoint_callbacks])
finish(net, *trainer.optimizers, [each.scheduler.state_dict() for each in trainer.lr_scheduler_configs])
"""

USUAL = {"workers": 0, "fp16": False, "stateful": False, "manual": False, "scheduler": "step", "callbacks": ()}
CASES = {
    "accumulation, workers, fp16": {
        **USUAL, "workers": 2, "fp16": True, "callbacks": ("rates",),
        "trainer": {"max_steps": 13, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "val_check_interval": 0.5},
    },
    "plateau, bf16, early, averaged": {
        **USUAL, "scheduler": "plateau", "callbacks": ("early", "ema"), "trainer": {"max_epochs": 4, "precision": "bf16-mixed"},
    },
    "two optimizers by hand, two loaders": {
        **USUAL, "manual": True, "trainer": {"max_epochs": 2, "num_sanity_val_steps": 0, "limit_train_batches": 9},
    },
    "stateful, averaged at the end": {
        **USUAL, "stateful": True, "workers": 2, "scheduler": "epoch", "callbacks": ("swa", "rates"),
        "trainer": {"max_epochs": 3},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_trainer_ends_with_the_same_bits_steps_and_log(name, lightning_server, tmp_path, counted):
    flush = 1 if "workers" in name else 100
    loop = Loop(lightning_server, SCRIPT.format(case=CASES[name], flush=flush), tmp_path)
    plain, whole = loop.plain(), loop.whole()
    assert whole == plain, "fxckpt changed an uninterrupted training"
    assert whole.dropped == 0
    for seed, resumed in loop.killed_anew(KILLS // 2, 2, plain.backwards):
        assert resumed.lines == plain.lines, f"seed {seed}"
        counted("kills of a Lightning Trainer", 2)


class Small(lightning.LightningModule):
    """The least that trains."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch, i):
        return self.layer(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TakesTheIterator(Small):
    def training_step(self, dataloader_iter):
        return self.layer(next(dataloader_iter)[0][0]).sum()


class Thaws(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        pass

    def finetune_function(self, pl_module, epoch, optimizer):
        pass


class Stream(IterableDataset):
    def __iter__(self):
        return iter([torch.ones(4)] * 4)


QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
         "enable_model_summary": False, "max_epochs": 1}  # fmt: skip


def fit(directory, module=None, loader=None, *callbacks, ckpt_path=None, **options):
    """One training, with ours among the callbacks; returns ours."""
    ours = fxckpt.lightning.Checkpoint(directory, every=1, update="native")
    trainer = lightning.Trainer(**QUIET, **options, callbacks=[ours, *callbacks])
    loader = DataLoader(TensorDataset(torch.ones(8, 4)), 2) if loader is None else loader
    trainer.fit(module or Small(), loader, ckpt_path=ckpt_path)
    return ours, trainer


def test_a_training_that_is_over_stays_over_and_more_epochs_go_on(tmp_path, monkeypatch):
    ours, trainer = fit(tmp_path / "ckpt")
    assert trainer.global_step == ours.ckpt.statistics()["last_committed_step"] == 4
    again, trainer = fit(tmp_path / "ckpt")
    assert trainer.global_step == 4 and again.ckpt.statistics()["checkpoints_started"] == 0
    monkeypatch.setitem(QUIET, "max_epochs", 2)
    more, trainer = fit(tmp_path / "ckpt")
    assert trainer.global_step == 8 and more.ckpt.statistics()["checkpoints_started"] == 4


class Fails(Small):
    def on_train_batch_end(self, *_):
        if self.trainer.global_step == 2:
            raise ArithmeticError


def test_the_workers_of_a_training_that_fails_end_with_it(tmp_path):
    before = set(multiprocessing.active_children())
    loader = DataLoader(TensorDataset(torch.ones(8, 4)), 2, num_workers=1)
    with pytest.raises(ArithmeticError):
        fit(tmp_path / "ckpt", Fails(), loader)
    assert set(multiprocessing.active_children()) <= before


REFUSED = {
    "reload": (lambda: {"reload_dataloaders_every_n_epochs": 1}, "set_epoch"),
    "iterator": (lambda: {"module": TakesTheIterator()}, "take a batch"),
    "thaws": (lambda: {"callbacks": [Thaws()]}, "Thaws adds parameter groups"),
    "length": (lambda: {"loader": DataLoader(Stream(), 2)}, "__len__"),
    "two": (lambda: {"callbacks": [fxckpt.lightning.Checkpoint("other")]}, "two of them"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_resumed_is_refused_with_the_way_out(name, tmp_path):
    options, why = REFUSED[name]
    given = options()
    module, loader, callbacks = given.pop("module", None), given.pop("loader", None), given.pop("callbacks", [])
    with pytest.raises(fxckpt.SetupError, match=why):
        fit(tmp_path / "ckpt", module, loader, *callbacks, **given)


def test_several_devices_are_refused_with_the_way_out():
    trainer = lightning.Trainer(**QUIET, strategy=DDPStrategy())
    trainer.strategy.connect(Small())
    with pytest.raises(fxckpt.SetupError, match=r"DDPStrategy .*one device.*docs.distributed"):
        check_trainer(trainer, None)


def test_a_checkpoint_of_lightnings_own_is_refused_beside_ours(tmp_path):
    _, trainer = fit(tmp_path / "ckpt")
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    with pytest.raises(fxckpt.SetupError, match="ckpt_path"):
        fit(tmp_path / "other", ckpt_path=tmp_path / "own.ckpt")


def test_a_kill_while_a_log_gets_a_new_column_loses_no_row(tmp_path, monkeypatch):
    logger = CSVLogger(tmp_path, version=0)
    keep_rows([logger])
    logger.log_metrics({"a": 1.0}, 0)
    logger.save()
    rows = positions([logger])

    def die(writer):
        raise KeyboardInterrupt

    monkeypatch.setattr(csv.DictWriter, "writeheader", die)
    logger.log_metrics({"b": 1.0}, 1)
    with pytest.raises(KeyboardInterrupt):
        logger.save()
    again = CSVLogger(tmp_path, version=0)
    continue_logs([again], rows)
    assert Path(again.log_dir, "metrics.csv").read_text().splitlines() == ["a,step", "1.0,0"]


def test_a_row_that_a_callback_has_logged_and_nobody_has_written_is_in_the_checkpoint(tmp_path):
    logger = CSVLogger(tmp_path, version=0)
    assert positions([logger]) == [0] and logger._experiment is None, "making its writer would delete the file"
    logger.log_metrics({"a": 1.0}, 0)
    assert positions([logger]) == [1]
    logger.log_metrics({"a": 2.0}, 1)
    logger.save()
    logger.log_metrics({"a": 3.0}, 2)
    continue_logs([logger], [1])
    assert positions([logger]) == [1], "what was logged behind it is gone, written or not"


def test_the_model_is_not_an_option_and_there_is_no_run_before_fit():
    with pytest.raises(fxckpt.SetupError, match="model="):
        fxckpt.lightning.Checkpoint("ckpt", model=nn.Linear(1, 1))
    with pytest.raises(fxckpt.SetupError, match="no run yet"):
        _ = fxckpt.lightning.Checkpoint("ckpt").ckpt


def test_lightning_is_not_imported_before_it_is_asked_for():
    code = "import sys, fxckpt.compiled_optimizer, fxckpt.loop; assert not {'lightning', 'pytorch_lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
