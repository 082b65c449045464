"""``fxckpt.hf.attach`` in one process: what is kept of a Trainer, what is refused, what is over, stopped or longer.

A training is interrupted here by an exception out of a callback, and goes on with a Trainer that is made anew.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from digests import digest
from torch import nn
from torch.nn import functional as F
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import ExportableState

import fxckpt
import fxckpt.hf

pytestmark = pytest.mark.usefixtures("one_thread")


class Rows(torch.utils.data.Dataset):
    rows = torch.randn(14, 8, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"x": self.rows[i], "labels": torch.tensor(i % 4), "input_ids": torch.ones(1 + i % 3)}


class Net(nn.Module):
    config = None

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 4))

    def get_input_embeddings(self):
        return self.layers[0]

    def forward(self, x, labels):
        logits = self.layers(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Interrupted(Exception):
    pass


class Interrupts(TrainerCallback):
    def __init__(self, at):
        self.at = at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise Interrupted


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in ("x", "labels")}


def made(folder, callbacks=(), kind=Trainer, model_init=None, **arguments):
    set_seed(0)
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "logging_steps": 2}
    given = {"per_device_train_batch_size": 2, "num_train_epochs": 2, "save_strategy": "no", "learning_rate": 0.02, **arguments}
    args = TrainingArguments(output_dir=str(folder / "out"), **quiet, **given)
    model = Net() if model_init is None else None
    return kind(model, args, collate, Rows(), Rows(), model_init=model_init, callbacks=list(callbacks))


def attached(folder, *args, options=None, **kwargs):
    trainer = made(folder, *args, **kwargs)
    return fxckpt.hf.attach(trainer, folder / "ckpt", every=1, update="native", **(options or {}))


def log(trainer):
    timed = ("runtime", "per_second")
    return [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in trainer.state.log_history]


def ending(trainer):
    """Bits and log of a Trainer that has trained to its end."""
    return trainer.state.global_step, log(trainer), digest(trainer.model)


def interrupted(folder, at, make, **kwargs):
    """A training that is interrupted before this step, and one that goes on with it; returns the second one."""
    first = make(folder, **kwargs)
    first.add_callback(Interrupts(at))
    with pytest.raises(Interrupted):
        first.train()
    second = make(folder, **kwargs)
    second.train()
    return second


def trained(folder, **kwargs):
    trainer = made(folder, **kwargs)
    trainer.train()
    return trainer


class Doubts(Trainer):
    """A GradScaler where Accelerate has none on a CPU, and infinite losses that it finds."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step in (2, 6):
            next(self.model.parameters()).grad += float("inf")
        return loss


class Counts(TrainerCallback, ExportableState):
    def __init__(self):
        self.steps = self.epochs = 0

    def on_train_begin(self, *args, **kwargs):
        self.steps = self.epochs = 0

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epochs += 1
        state.log_history.append({"epoch begins": self.epochs})

    def on_step_end(self, *args, **kwargs):
        self.steps += 1

    def state(self):
        return {"args": {}, "attributes": {"steps": self.steps, "epochs": self.epochs}}


CASES = {
    "scaler": {"kind": Doubts},
    "balanced batches": {"train_sampling_strategy": "batch_rebalance", "gradient_accumulation_steps": 2},
    "fused, no clipping": {"optim": "adamw_torch_fused", "weight_decay": 0.1, "max_grad_norm": 0},
    "schedule of its own": {"train_sampling_strategy": "sequential", "lr_scheduler_type": "cosine_with_restarts"},
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_interrupted_goes_on_with_the_same_bits_and_log(name, tmp_path):
    plain = trained(tmp_path, **CASES[name])
    at = 3 if "gradient_accumulation_steps" in CASES[name] else 8
    assert ending(interrupted(tmp_path, at, attached, **CASES[name])) == ending(plain)


def test_the_state_is_that_of_an_uninterrupted_training_fields_that_no_argument_sets_included(tmp_path):
    plain, second = trained(tmp_path), interrupted(tmp_path, 8, attached)
    plain.state.log_history, second.state.log_history = log(plain), log(second)
    assert second.state == plain.state


def test_at_the_head_of_an_epoch_it_goes_on_too(tmp_path):
    plain = trained(tmp_path, eval_strategy="epoch")
    counted = Counts()
    second = interrupted(tmp_path, 7, attached, callbacks=[counted], eval_strategy="epoch")
    second.state.log_history = [each for each in second.state.log_history if "epoch begins" not in each]
    assert ending(second) == ending(plain)
    assert (counted.steps, counted.epochs) == (14, 2)


def test_the_model_may_be_made_by_a_function_and_compiled_by_none(tmp_path):
    plain = trained(tmp_path, model_init=Net)
    assert ending(interrupted(tmp_path, 5, attached, model_init=Net)) == ending(plain)
    with pytest.raises(fxckpt.SetupError, match="model_init"):
        attached(tmp_path, model_init=Net, options={"compile": True})


def test_compile_compiles_the_model_with_our_backend(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "compile", lambda self, backend: compiled.append((self, backend)))
        compiled = []
        trainer = attached(tmp_path, options={"compile": True})
    assert compiled == [(trainer.model, fxckpt.backend)]


@pytest.mark.skipif("FXCKPT_INTEGRATIONS" not in os.environ, reason="ten seconds of Inductor")
def test_a_compiled_model_trains_and_its_layers_are_known(tmp_path):
    trainer = attached(tmp_path, max_steps=2, options={"compile": True})
    trainer.train()
    assert trainer.optimizer.ckpt.statistics()["layers"] > 1
    assert "layers_0" in str(trainer.optimizer.ckpt.graph)


def test_callbacks_and_extras_get_their_state_back(tmp_path):
    found = []
    for at in (5, 99):
        counted, box = Counts(), {"seen": 0}
        trainer = attached(tmp_path, [counted], options={"extra": {"box": box}})
        trainer.add_callback(Interrupts(at))
        found.append((counted, box))
        if at == 5:
            with pytest.raises(Interrupted):
                trainer.train()
            box["seen"] = 1  # behind the last boundary: lost
        else:
            trainer.train()
    assert found[1][0].steps == 14 and found[1][1] == {"seen": 0}
    assert [each["epoch begins"] for each in trainer.state.log_history if "epoch begins" in each] == [1, 2]
    with pytest.raises(fxckpt.SetupError, match="1 Counts; this Trainer has 0"):
        attached(tmp_path, options={"extra": {"box": {}}}).train()


class Keeps(Trainer):
    """A Trainer that trains on what it keeps."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.turn, self.kept = 0, []

    def training_step(self, model, inputs, *args):
        self.turn += 1
        self.kept.append(inputs["x"].mean())
        return super().training_step(model, {**inputs, "x": inputs["x"] + sum(self.kept[-3:]) + self.turn}, *args)


class Remembers(TrainerCallback):
    def __init__(self):
        self.steps = 0

    def on_step_end(self, *args, **kwargs):
        self.steps += 1


def test_attributes_of_a_trainer_are_kept_by_name(tmp_path):
    plain = trained(tmp_path, kind=Keeps)
    second = interrupted(tmp_path, 5, attached, kind=Keeps, options={"attributes": ("turn", "kept")})
    assert ending(second) == ending(plain) and second.turn == 14
    with pytest.raises(fxckpt.SetupError, match="has no 'trn'"):
        attached(tmp_path, options={"attributes": ("trn",)})


def test_what_changes_and_is_in_no_checkpoint_is_said_once(tmp_path, caplog):
    attached(tmp_path / "1", [Remembers()], kind=Keeps, max_steps=4).train()
    said = [each.getMessage() for each in caplog.records if "in no checkpoint" in each.getMessage()]
    assert len(said) == 2
    assert "turn, kept of this Keeps" in said[0] and "attributes=('turn', 'kept')" in said[0]
    assert "Remembers.steps" in said[1] and "vars(callback)" in said[1]
    caplog.clear()
    remembers = Remembers()
    extra = {"remembers": vars(remembers)}
    attached(
        tmp_path / "2", [remembers], kind=Keeps, max_steps=4, options={"attributes": ("turn", "kept"), "extra": extra}
    ).train()
    assert "in no checkpoint" not in caplog.text
    attached(tmp_path / "3", [Counts(), EarlyStoppingCallback(3)], **EVALUATES).train()
    assert "in no checkpoint" not in caplog.text


class Patient(Counts):
    """Its argument grows while it trains."""

    def __init__(self):
        super().__init__()
        self.patience = 1

    def on_step_end(self, *args, **kwargs):
        super().on_step_end()
        self.patience += 1

    def state(self):
        return {**super().state(), "args": {"patience": self.patience}}


def test_an_argument_of_a_callback_that_changes_is_said_for_it_is_no_part_of_what_is_put_back(tmp_path, caplog):
    attached(tmp_path, [Patient()], max_steps=4).train()
    said = [each.getMessage() for each in caplog.records if "in no checkpoint" in each.getMessage()]
    assert len(said) == 1 and "Patient.patience changes" in said[0] and "names it among its attributes" in said[0]


EVALUATES = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "loss"}


def test_a_training_that_is_over_stays_over_and_has_its_summary_once(tmp_path):
    whole = attached(tmp_path, eval_strategy="epoch", load_best_model_at_end=True, save_strategy="epoch")
    first = whole.train()
    again = attached(tmp_path, eval_strategy="epoch", load_best_model_at_end=True, save_strategy="epoch")
    second = again.train()
    assert ending(again) == ending(whole)
    assert second.training_loss == first.training_loss
    assert whole.optimizer.ckpt.statistics()["checkpoints_failed"] == 0


def test_the_summary_is_of_the_whole_training(tmp_path):
    second = interrupted(tmp_path, 5, attached)
    summary = second.state.log_history[-1]
    assert summary["train_steps_per_second"] == pytest.approx(14 / summary["train_runtime"], rel=0.01)


def test_a_longer_training_goes_on_where_the_shorter_one_ended(tmp_path):
    attached(tmp_path, max_steps=5).train()
    longer = attached(tmp_path, max_steps=9)
    assert longer.train().global_step == 9
    assert longer.optimizer.ckpt.statistics()["steps"] == 9
    assert attached(tmp_path, max_steps=9).train().global_step == 9


def test_a_training_that_a_callback_stopped_is_over_unless_it_is_to_go_on(tmp_path):
    stops = {"eval_strategy": "epoch", "metric_for_best_model": "loss", "learning_rate": 30.0, "num_train_epochs": 5}
    stops |= {"load_best_model_at_end": True, "save_strategy": "epoch"}
    stopped = attached(tmp_path, [EarlyStoppingCallback(1)], **stops)
    stopped.train()
    assert stopped.state.global_step < 35
    again = attached(tmp_path, [EarlyStoppingCallback(1)], **stops)
    again.train()
    assert ending(again) == ending(stopped)
    on = attached(tmp_path, [EarlyStoppingCallback(1)], options={"go_on": True}, **stops)
    on.train()
    assert on.state.global_step > stopped.state.global_step


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    plain = trained(tmp_path)
    first = attached(tmp_path)
    first.add_callback(Interrupts(5))
    with pytest.raises(Interrupted):
        first.train()
    newest = fxckpt.checkpoints(tmp_path / "ckpt")[-1].path / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-3] ^= 1
    newest.write_bytes(data)
    second = attached(tmp_path)
    second.train()
    assert ending(second) == ending(plain)


def test_numbers_of_numpy_and_torch_may_be_in_the_log(tmp_path):
    class Logs(Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step == 2:
                self.log({"a": np.float32(0.1), "b": loss[None], "train_loss": 1.0})
            return loss

    plain = trained(tmp_path, kind=Logs)
    assert str(log(interrupted(tmp_path, 5, attached, kind=Logs))[1:]) == str(
        [{k: v.item() if hasattr(v, "item") else v for k, v in e.items()} for e in log(plain)][1:]
    )


REFUSED = {
    "ignore_data_skip": ({"ignore_data_skip": True}, {}),
    "auto_find_batch_size": ({"auto_find_batch_size": True}, {}),
    "dataloader_in_order": ({"dataloader_in_order": False, "dataloader_num_workers": 1}, {}),
    "persistent_workers": ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, {}),
    "model=": ({}, {"model": None}),
    "no option 'eveery'": ({}, {"eveery": 1}),
    "'lr_scheduler'": ({}, {"extra": {"lr_scheduler": {}}}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exact_is_refused_by_its_name(name, tmp_path):
    arguments, options = REFUSED[name]
    with pytest.raises(fxckpt.SetupError, match=name):
        fxckpt.hf.attach(made(tmp_path, **arguments), tmp_path / "ckpt", **options)


def test_other_ways_to_resume_and_other_trainers_are_refused(tmp_path):
    trainer = attached(tmp_path)
    with pytest.raises(fxckpt.SetupError, match="attached already"):
        fxckpt.hf.attach(trainer, tmp_path)
    with pytest.raises(fxckpt.SetupError, match=r"resume_from_checkpoint=True.*from_pretrained"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(fxckpt.SetupError, match="hyperparameters"):
        trainer.train(trial=object())
    with pytest.raises(fxckpt.SetupError, match=r"takes a transformers.Trainer"):
        fxckpt.hf.attach(Net())


def test_a_version_of_transformers_without_what_is_needed_is_refused_by_the_part_that_it_lacks(tmp_path, monkeypatch):
    trainer = made(tmp_path)
    monkeypatch.delattr(Trainer, "_init_training_state")
    with pytest.raises(fxckpt.SetupError, match=r"no Trainer._init_training_state: .* transformers 5.24"):
        fxckpt.hf.attach(trainer, tmp_path / "ckpt")


def test_another_length_of_an_epoch_is_refused(tmp_path):
    attached(tmp_path, max_steps=9).train()
    for other in ({"per_device_train_batch_size": 4}, {"gradient_accumulation_steps": 2}):
        with pytest.raises(fxckpt.SetupError, match="that is another training"):
            attached(tmp_path, max_steps=12, **other).train()


def test_a_loader_with_a_state_of_its_own_is_refused(tmp_path):
    trainer = made(tmp_path)
    trainer.accelerator.dataloader_config.use_stateful_dataloader = True
    with pytest.raises(fxckpt.SetupError, match="use_stateful_dataloader"):
        fxckpt.hf.attach(trainer, tmp_path / "ckpt")


def test_a_loader_that_accelerate_did_not_prepare_is_refused(tmp_path):
    class Own(Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, 2, collate_fn=collate)

    with pytest.raises(fxckpt.SetupError, match=r"accelerator.prepare\(loader\)"):
        attached(tmp_path, kind=Own).train()


def test_turned_off_nothing_is_written_and_nothing_changes(tmp_path, monkeypatch):
    plain = trained(tmp_path)
    monkeypatch.setenv("FXCKPT_DISABLE", "1")
    off = attached(tmp_path)
    off.train()
    assert ending(off) == ending(plain) and not (tmp_path / "ckpt").exists()


def test_a_checkpoint_of_another_loop_is_refused(tmp_path):
    model = Net()
    opt = fxckpt.compile_step(torch.optim.SGD(model.parameters(), 0.1), tmp_path / "ckpt", model=model, every=1, update="native")
    for _ in fxckpt.steps(1):
        model(torch.ones(2, 8), torch.tensor([0, 1]))["loss"].backward()
        opt.step()
    opt.ckpt.shutdown()
    with pytest.raises(fxckpt.SetupError, match=r"without fxckpt.hf.attach.*fresh=True"):
        attached(tmp_path).train()
    assert attached(tmp_path, max_steps=2, options={"fresh": True}).train().global_step == 2


def test_who_does_not_ask_for_hf_imports_neither_transformers_nor_accelerate(fork_server, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, fxckpt\nfxckpt.compile_step, fxckpt.load, fxckpt.batches\n"
        "assert not {'transformers', 'accelerate'} & set(sys.modules)"
    )
    run = fork_server.start(script, tmp_path / "run")
    assert run.wait() == "" and run.returncode == 0, run.output
