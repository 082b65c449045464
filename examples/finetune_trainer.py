"""Fine-tune a language model with Hugging Face's Trainer; killed at any step, the same command goes on with the same bits.

    python examples/finetune_trainer.py

The model is tiny, with random weights, and the data are sequences that count up. What fxckpt needs are an import and one line.
"""

from __future__ import annotations

import torch
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import fxckpt.hf

WORDS, LENGTH = 32, 12


class Counting(Dataset):
    """Sequences that count up from somewhere, one word in eight replaced at random each time that it is read."""

    def __init__(self, count: int, seed: int, noise: float = 0.125):
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(WORDS, (count, 1), generator=generator)
        self.words, self.noise = (start + torch.arange(LENGTH)) % WORDS, noise

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        words = self.words[i]
        noisy = torch.where(torch.rand(LENGTH) < self.noise, torch.randint(WORDS, (LENGTH,)), words)
        return {"input_ids": noisy, "labels": words}


def main() -> None:
    set_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": WORDS, "n_positions": LENGTH}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    arguments = TrainingArguments(
        output_dir="out",
        num_train_epochs=4,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=4,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        logging_steps=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Counting(96, seed=1),
        eval_dataset=Counting(32, seed=2, noise=0.0),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    fxckpt.hf.attach(trainer, "ckpt", every=1)
    trainer.train()
    trainer.save_model("model")


if __name__ == "__main__":
    main()
