"""Ways to train a model that people know: a loop with one of the savers, Hugging Face's Trainer, Lightning's Trainer.

Each trains as long as its turns give steps, and saves where they say so. With ``resume`` it goes on from the newest checkpoint
that loads, and a first turn is not taken: what is measured is how long it takes to get there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from saving import Nothing, sync_tree
from torch import nn
from turns import Turns
from workloads import Batch

LEARNING_RATE = 1e-5


@dataclass
class Restored:
    """What came of a restore: seconds until training could go on, the step that it goes on from, what did not load and why."""

    seconds: float
    step: int
    errors: dict[str, str]


def step_of(optimizer: torch.optim.Optimizer) -> int:
    """Which step a state is of, by the optimizer's own counts, which must agree."""
    steps = {int(state["step"]) for state in optimizer.state.values()}
    if len(steps) != 1:
        raise AssertionError(f"the parameters are of steps {sorted(steps)}")
    return steps.pop()


class Loop:
    """The loop that everyone writes, with one of the savers."""

    def __init__(self, saver: Nothing, model: nn.Module, batch: Batch, folder: Path):
        self.saver, self.model, self.batch, self.folder = saver, model, batch, folder
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def train(self, turns: Turns) -> None:
        """Not compiled: all alike, and a compiler would take most of the time that a model may be measured."""
        self.saver.prepare(self.model, self.optimizer, self.folder)
        steps = turns.take()
        for _ in self.saver.turns():
            if (step := next(steps, None)) is None:
                break
            self.model(**self.batch).loss.backward()
            self.optimizer.step()
            if turns.due(step):
                self.saver.save(step)
            self.optimizer.zero_grad()
        self.saver.close()

    def restore(self) -> Restored:
        """Into a new model and optimizer."""
        began = time.monotonic()
        self.saver.prepare(self.model, self.optimizer, self.folder)
        errors = self.saver.restore()
        return Restored(time.monotonic() - began, step_of(self.optimizer), errors)


class Framework(Nothing):
    """What a Trainer's own saving has in common with a saver; it trains by itself, and asks for a turn before each step."""

    pattern: str
    began = 0.0

    def __init__(self, model: nn.Module, batch: Batch, folder: Path):
        super().__init__()
        self.model, self.batch, self.folder = model, batch, folder
        self.saver = self

    def run(self, begin: Callable[[], int | None], due: Callable[[int], bool], resume: Path | None) -> torch.optim.Optimizer:
        """Train until ``begin``, asked before each step, gives None; returns the optimizer."""
        raise NotImplementedError

    def train(self, turns: Turns) -> None:
        steps = turns.take()
        self.run(lambda: next(steps, None), turns.due, None)

    def start_seconds(self, resume: Path | None) -> tuple[float, torch.optim.Optimizer]:
        """From the call until the first step would begin."""
        reached = 0.0

        def begin() -> None:
            nonlocal reached
            reached = reached or time.monotonic()

        began = time.monotonic()
        optimizer = self.run(begin, lambda step: False, resume)
        return reached - began, optimizer

    def restore(self) -> Restored:
        """The newest that loads. What the start takes without a checkpoint is taken off; the first start is for imports."""
        self.start_seconds(None)
        errors: dict[str, str] = {}
        for where in sorted(self.folder.glob(self.pattern), key=lambda each: -int("".join(filter(str.isdigit, each.stem)))):
            try:
                seconds, optimizer = self.start_seconds(where)
            except Exception as error:
                errors[where.name] = f"{type(error).__name__}: {error}"[:200]
                continue
            step = step_of(optimizer) - 1  # one was made before it could stop
            return Restored(max(0.0, seconds - self.start_seconds(None)[0]), step, errors)
        raise AssertionError(f"nothing loads: {errors}")

    def flush(self) -> None:
        """It syncs nothing. This is between two rounds, so that the next one is not slowed by what it left in the page cache."""
        sync_tree(self.folder)

    def saving(self, step: int, began: float) -> None:
        """Note one that was saved."""
        self.stalled += time.monotonic() - began
        self.saves += 1
        self.durable.append((step, time.monotonic()))


class HuggingFace(Framework):
    """Hugging Face's Trainer and its checkpoints: safetensors for the model, pickles for the rest, nothing synced."""

    pattern = "checkpoint-*"

    def run(self, begin: Callable[[], int | None], due: Callable[[int], bool], resume: Path | None) -> torch.optim.Optimizer:
        from transformers import Trainer, TrainerCallback, TrainingArguments
        from transformers.utils import logging

        logging.disable_progress_bar()
        way, batch = self, self.batch
        count = len(next(iter(batch.values())))

        class Hooks(TrainerCallback):
            """Asks for turns, and saves where it is due."""

            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if begin() is None:
                    control.should_training_stop = True

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                control.should_save, way.began = due(state.global_step), time.monotonic()

            def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                way.saving(state.global_step, way.began)

        arguments = TrainingArguments(
            output_dir=str(self.folder),
            max_steps=10**6,
            per_device_train_batch_size=count,
            learning_rate=LEARNING_RATE,
            optim="adamw_torch_fused",
            save_strategy="no",  # the callback says when
            save_total_limit=1,
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            ignore_data_skip=True,
        )
        data: Any = [{"index": torch.tensor(i)} for i in range(count * 1000)]
        arguments.remove_unused_columns = False
        trainer = Trainer(
            model=self.model, args=arguments, train_dataset=data, data_collator=lambda _: dict(batch), callbacks=[Hooks()]
        )
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


class Lightning(Framework):
    """Lightning's Trainer and its ModelCheckpoint: one pickle, nothing synced."""

    pattern = "*.ckpt"

    def run(self, begin: Callable[[], int | None], due: Callable[[int], bool], resume: Path | None) -> torch.optim.Optimizer:
        import lightning
        from lightning.pytorch.callbacks import Callback, ModelCheckpoint

        way, batch = self, self.batch

        class Module(lightning.LightningModule):
            """The model, its loss and its optimizer."""

            def __init__(self) -> None:
                super().__init__()
                self.inner = way.model

            def training_step(self, _: Any) -> torch.Tensor:
                return self.inner(**batch).loss

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE, fused=True)

        class Begin(Callback):
            """Asks for turns."""

            def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
                if begin() is None:
                    trainer.should_stop = True

        class Save(ModelCheckpoint):
            """Every step, but only where it is due."""

            def on_train_batch_end(self, trainer: Any, *rest: Any, **more: Any) -> None:
                if due(trainer.global_step):
                    began = time.monotonic()
                    super().on_train_batch_end(trainer, *rest, **more)
                    way.saving(trainer.global_step, began)

        save = Save(self.folder, filename="{step}", every_n_train_steps=1, save_top_k=1, save_on_train_epoch_end=False)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=10**6,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Begin(), save],
        )
        loader = torch.utils.data.DataLoader(range(1000), batch_size=None)
        trainer.fit(Module(), loader, ckpt_path=str(resume) if resume else None)
        return trainer.optimizers[0]
