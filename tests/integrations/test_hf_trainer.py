"""Hugging Face's Trainer with ``fxckpt.hf.attach``: uninterrupted it has the bits that it has without, and so it has after kills.

Each case is many features of Trainer at once. ``FXCKPT_INTEGRATIONS`` says how many kills each gets (``make integrations``: 30).
"""

from __future__ import annotations

import os

import pytest
from loop_runs import Loop

KILLS = int(os.environ.get("FXCKPT_INTEGRATIONS", "2"))

SCRIPT = """
import json
import torch
from script_prelude import finish
from torch import nn
from torch.nn import functional as F
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
import fxckpt.hf  # fxckpt

CASE = {case}


class Rows(torch.utils.data.Dataset):
    def __init__(self, size, changed=True):
        self.rows, self.changed = torch.randn(size, 8, generator=torch.Generator().manual_seed(size)), changed

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        x = self.rows[i] + 0.1 * torch.randn(8) if self.changed else self.rows[i]
        return {{"input_ids": torch.ones(3 + i % 5), "x": x, "labels": torch.tensor(i % 4)}}


class Stream(torch.utils.data.IterableDataset):
    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __iter__(self):
        return ({{"x": torch.randn(8, generator=self.generator), "labels": torch.tensor(i % 4)}} for i in range(20))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = None
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))

    def forward(self, x, labels=None):
        logits = self.layers(x)
        return {{"logits": logits}} if labels is None else {{"loss": F.cross_entropy(logits, labels), "logits": logits}}


class EndsAnEpoch(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step == 3


def gpt2_with_adapters():
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=8, bos_token_id=0, eos_token_id=0)
    lora = LoraConfig(r=2, lora_dropout=0.1, target_modules=["c_attn"], task_type="CAUSAL_LM")
    return get_peft_model(GPT2LMHeadModel(config), lora)


class Words(torch.utils.data.Dataset):
    def __len__(self):
        return 18

    def __getitem__(self, i):
        words = torch.randint(0, 32, (8,), generator=torch.Generator().manual_seed(i))
        return {{"input_ids": words, "labels": words}}


def collate(rows):
    return {{name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "input_ids" or len(rows[0]) == 2}}


lora, stream = CASE.pop("lora", False), CASE.pop("stream", False)
callbacks = [EarlyStoppingCallback(1)] if CASE.pop("early", False) else [EndsAnEpoch()] if CASE.pop("ends", False) else []
set_seed(0)
model = gpt2_with_adapters() if lora else Net()
quiet = dict(report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, output_dir="out", logging_steps=2)
usual = dict(per_device_train_batch_size=2, learning_rate=0.02, save_strategy="no")
arguments = TrainingArguments(**{{**usual, **quiet, **CASE}})
train, test = (Words(), Words()) if lora else (Stream() if stream else Rows(22), Rows(6, changed=False))
test = None if arguments.dataloader_persistent_workers else test
trainer = Trainer(model, arguments, None if lora else collate, train, test, callbacks=callbacks)
fxckpt.hf.attach(trainer, "ckpt", every=1, update="native")  # fxckpt
done = trainer.train()
timed = ("runtime", "per_second")
log = [{{name: value for name, value in entry.items() if not name.endswith(timed)}} for entry in trainer.state.log_history]
print("END", done.global_step, done.training_loss, json.dumps(log))
finish(model)
"""

PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss", "lr_scheduler_kwargs": {"patience": 0}}
BEST = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2}
CASES = {
    "accumulation, augmented": {
        "num_train_epochs": 2.5, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "warmup_steps": 2,
        "label_smoothing_factor": 0.1, "max_grad_norm": 0.5, "include_num_input_tokens_seen": "all",
    },
    "workers, saves, best": {
        "max_steps": 17, "dataloader_num_workers": 2, "eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True,
        "optim": "sgd", "train_sampling_strategy": "group_by_length", **BEST,
    },
    "plateau, bf16, early": {
        "num_train_epochs": 4, "bf16": True, "optim": "adafactor", "eval_strategy": "epoch", "early": True, **PLATEAU,
        "load_best_model_at_end": True, "save_strategy": "epoch", "learning_rate": 0.5,
    },
    "adapters": {"num_train_epochs": 2, "lora": True, "lr_scheduler_type": "cosine", "optim": "adamw_torch"},
    "an epoch that is stopped": {
        "num_train_epochs": 3, "ends": True, "dataloader_num_workers": 2, "dataloader_persistent_workers": True,
    },
    "a stream": {"max_steps": 14, "stream": True, "gradient_accumulation_steps": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_trainer_ends_with_the_same_bits_steps_and_log(name, trainers_server, tmp_path, counted):
    loop = Loop(trainers_server, SCRIPT.format(case=CASES[name]), tmp_path)
    plain, whole = loop.plain(), loop.whole()
    assert whole == plain, "fxckpt changed an uninterrupted training"
    assert whole.dropped == 0
    for seed, resumed in loop.killed_anew(KILLS // 2, 2, plain.backwards):
        assert resumed.lines == plain.lines, f"seed {seed}"
        counted("kills of a Trainer", 2)
