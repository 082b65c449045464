"""What the documents' blocks take for granted: the small models, loaders and stores that their snippets and commands name.

``SETTINGS`` is Python that runs before a block of Python or a side of a diff, chosen by the words that the block contains;
``stores`` makes the directories that commands are shown with.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import fxckpt

# ---- Python ----

SMALL = """
import torch, fxckpt
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    def forward(self, x, y):
        return nn.functional.mse_loss(self.net(x), y)

torch.manual_seed(0)
model = Small()
opt = torch.optim.AdamW(model.parameters())
scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)
loader = stream = DataLoader(TensorDataset(torch.randn(6, 4), torch.randn(6, 1)), 2, shuffle=True)
loss, validate = torch.zeros(()), lambda model: None

def train(steps):
    for _ in range(steps):
        x, y = torch.randn(2, 4), torch.randn(2, 1)
        model(x, y).backward(); opt.step(); opt.zero_grad()
"""

STARTED = SMALL + 'fxckpt.compile_step(opt, "checkpoints/", model=model, every=1)\n'
TRAINED = STARTED + "train(3)\n"
STORED = STARTED + 'train(100)\nopt.ckpt.save("before-decay")\nopt.ckpt.shutdown()\n'

WANDB = """
import sys, types
logged = []
sys.modules["wandb"] = types.SimpleNamespace(init=lambda project: types.SimpleNamespace(log=logged.append))
"""
"""The package is large and wants an account: what stands in for it takes the two calls."""

TRAINER = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=8, n_positions=4, bos_token_id=0, eos_token_id=0))
arguments = TrainingArguments("out", num_train_epochs=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
                              save_strategy="no", disable_tqdm=True)
train = test = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 6
"""

ACCELERATE = SMALL + "from accelerate import Accelerator\naccelerator = Accelerator(cpu=True)\n"

FABRIC = SMALL + 'import lightning\nfabric = lightning.Fabric(accelerator="cpu", devices=1)\n'

LIGHTNING = (
    SMALL
    + """
import functools, lightning
class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = model
    def training_step(self, batch, i):
        return self.model(*batch)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
module = Module()
Trainer = functools.partial(lightning.Trainer, accelerator="cpu", logger=False, enable_progress_bar=False,
                            enable_model_summary=False, enable_checkpointing=False)
"""
)

SETTINGS = {
    "trace_autograd_ops = True": "",  # it trains by itself
    "fxckpt.hf.attach": TRAINER,
    "trainer = Trainer(max_epochs": LIGHTNING,
    "accelerator.prepare(": ACCELERATE,
    "fabric.setup(": FABRIC,
    "compile_step(": SMALL,
    "fxckpt.load()": STARTED,
    "load_file(": STORED,
    "StoreReader(": STORED,
    "import wandb": TRAINED + WANDB,
    "opt": TRAINED,
}
"""By words of the block, the first that fits. ``TRAINED``: what to do with an optimizer that has steps behind it."""

SHORTER = {
    r"(?<=epochs\()90(?=\))|(?<=range\()(?:90|10)(?=\))|(?<=epochs\()10(?=\))|(?<=max_epochs=)90": "2",
    r"(?<=steps\()100_000(?=\))": "2",
    r"^( +)\.\.\.$": r"\1loss = model(x, y); loss.backward(); opt.step(); opt.zero_grad()",
    r"(?<=writer=\"monitor\", staging_mb=)2048": "16",
    r"(?<=watch checkpoints)$": " --once",
    r"--seconds 3": "--seconds 0.2 --size 8MiB",
}
"""What a block is shortened by, or what stands for the dots in it."""

# ---- commands ----


class Sample(nn.Module):
    """The model of the samples in ``docs/cli.md``."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(2000, 128)
        self.h = nn.ModuleList(nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True) for _ in range(2))
        self.head = nn.Linear(128, 2000, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.tokens(words)
        for block in self.h:
            x = block(x)
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), words[:, 1:].flatten())


class SampleRun:
    """A training of it, as the samples' one was."""

    def __init__(self, directory: str, steps: int, *, load: bool = False, **options: object) -> None:
        torch.manual_seed(0)
        self.model = Sample()
        opt = torch.optim.AdamW(self.model.parameters(), lr=3e-3, foreach=True)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 40)
        chance = torch.Generator().manual_seed(1)
        extra = {"data": chance, "s": scheduler}
        self.opt = fxckpt.compile_step(opt, directory, model=self.model, update="native", extra=extra, **options)
        if load:
            fxckpt.load(optimizer=self.opt)
        words = torch.randint(2000, (4, 16), generator=chance)
        for step in fxckpt.steps(steps, optimizer=self.opt):
            loss = self.model(words)
            loss.backward()
            self.opt.step()
            self.opt.zero_grad()
            scheduler.step()
            if step == 8:
                self.opt.ckpt.save("before-decay")
            self.opt.ckpt.note(loss=loss.item())
        self.opt.ckpt.flush()


def sample_store(folder: Path) -> None:
    """``checkpoints``, ``damaged`` with a flipped bit in its newest checkpoint, and the same as the tutorial's ``ckpt``."""
    made = folder.parent / "sample"
    if not made.exists():  # the page's first block of commands
        SampleRun(str(made), 13, every=1, keep=2, keep_every=5, keep_best="loss").opt.ckpt.shutdown()
    for copy in ("checkpoints", "damaged", "ckpt"):
        shutil.copytree(made, folder / copy)
    with open(folder / "damaged" / "step-000000013" / "optimizer.safetensors", "r+b") as file:
        file.seek(9000)
        byte = file.read(1)
        file.seek(9000)
        file.write(bytes([byte[0] ^ 1]))


def pretrained(folder: Path) -> None:
    """A file of ``torch.save``."""
    torch.manual_seed(0)
    model = Sample()
    opt = torch.optim.AdamW(model.parameters())
    model(torch.randint(2000, (2, 8))).backward()
    opt.step()
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict(), "epoch": 3}, folder / "pretrained.pt")


def watched(folder: Path) -> SampleRun:
    """``checkpoints`` of a run that began with an import and is still alive."""
    pretrained(folder)
    fxckpt.import_checkpoint(folder / "pretrained.pt", folder / "checkpoints")
    return SampleRun(str(folder / "checkpoints"), 20, load=True, every=4)


STORES: dict[str, Callable[[Path], object]] = {
    "fxckpt import": pretrained,
    "fxckpt watch": watched,
    "fxckpt plot": watched,
    "fxckpt": sample_store,
}
"""By words of a block of commands, the first that fits."""
