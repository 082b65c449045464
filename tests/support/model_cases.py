"""Tiny models of the kinds that people train: from ``transformers`` with random weights, and some written here.

Each entry builds a model and one batch for it: ``model(**batch)`` is a scalar loss.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY, WIDTH, LENGTH = 48, 16, 8
Batch = dict[str, torch.Tensor]


def tokens() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (3, LENGTH))


def transformer(config: str, model: str, batch: Callable[[], Batch], **options: Any) -> Callable[[], Pretrained]:
    """A model of ``transformers`` by its classes' names, imported when it is built."""

    def build() -> nn.Module:
        import transformers

        logging.getLogger("transformers").setLevel(logging.ERROR)
        return Pretrained(getattr(transformers, model)(getattr(transformers, config)(**options)).train())

    build.batch = batch
    return build


class Pretrained(nn.Module):
    """The model's loss alone; what else its output holds is no business of a training loop."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return self.inner(**batch).loss


def language() -> Batch:
    ids = tokens()
    return {"input_ids": ids, "labels": ids}


def translation() -> Batch:
    return {"input_ids": tokens(), "labels": tokens()}


def picture() -> Batch:
    return {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.randint(0, 3, (3,))}


LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "use_cache": False,
}
BERT = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": transformer(
        "GPT2Config",
        "GPT2LMHeadModel",
        language,
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        use_cache=False,
    ),
    "bert": transformer("BertConfig", "BertForMaskedLM", language, vocab_size=VOCABULARY, **BERT),
    "llama": transformer("LlamaConfig", "LlamaForCausalLM", language, **LLAMA),
    "vit": transformer("ViTConfig", "ViTForImageClassification", picture, image_size=16, patch_size=8, num_labels=3, **BERT),
    "t5": transformer(
        "T5Config",
        "T5ForConditionalGeneration",
        translation,
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        use_cache=False,
    ),
    "mixtral": transformer("MixtralConfig", "MixtralForCausalLM", language, num_local_experts=3, num_experts_per_tok=1, **LLAMA),
}


# ---- written here --------------------------------------------------------------------------------------------------


class ConvNet(nn.Module):
    """As in ``timm``: a stem, depthwise blocks with layer scale and stochastic depth, squeeze and excite, two kinds of norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 2, 2, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.stages = nn.ModuleList([ConvBlock(8) for _ in range(2)])
        self.norm, self.head = nn.GroupNorm(2, 8), nn.Linear(8, 3)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.stem(pixel_values)
        for stage in self.stages:
            x = stage(x)
        return F.cross_entropy(self.head(self.norm(x).mean((2, 3))), labels)


class ConvBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width)
        self.up, self.down = nn.Conv2d(width, 16, 1), nn.Conv2d(16, width, 1)
        self.squeeze, self.excite = nn.Linear(16, 4), nn.Linear(4, 16)
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.gelu(self.up(self.norm(self.depthwise(x))))
        y = y * self.excite(F.relu(self.squeeze(y.mean((2, 3))))).sigmoid()[:, :, None, None]
        return x + F.dropout(torch.ones(len(x), 1, 1, 1), 0.1, self.training) * self.scale * self.down(y)


class Odd(nn.Module):
    """A tied weight, a layer called twice, a parameter that nothing uses, complex and non-persistent buffers."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.shared, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.spare = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        turns = torch.outer(torch.arange(LENGTH), torch.arange(WIDTH // 2) / WIDTH)
        self.register_buffer("rotation", torch.polar(torch.ones_like(turns), turns))
        self.register_buffer("mask", torch.ones(LENGTH, LENGTH).tril(), persistent=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.seen += input_ids.numel()
        x = self.shared(self.tokens(input_ids))
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * self.rotation
        x = x + self.mask @ torch.view_as_real(pairs).flatten(-2)
        x = self.norm(x + torch.tanh(self.shared(x)))
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Gpt(nn.Module):
    """Blocks that are alike; ``breaks``: the graph breaks before the first and after the last."""

    def __init__(self, depth: int = 3, breaks: bool = False):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.h = nn.ModuleList([GptBlock() for _ in range(depth)])
        self.ln_f, self.head, self.breaks = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False), breaks

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1]))
        if self.breaks:
            torch._dynamo.graph_break()
        for block in self.h:
            x = block(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return F.cross_entropy(self.head(self.ln_f(x)).flatten(0, 1), labels.flatten())


class GptBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.attn, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.ln_2, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attn(self.ln_1(x)).chunk(3, -1)
        x = x + F.dropout(self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True)), 0.1, self.training)
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


def written(build: Callable[[], nn.Module], batch: Callable[[], Batch]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return build()

    make.batch = batch
    return make


WRITTEN_HERE = {
    "convnet": written(ConvNet, picture),
    "odd": written(Odd, language),
    "gpt": written(Gpt, language),
    "gpt with graph breaks": written(lambda: Gpt(breaks=True), language),
}
MODELS |= WRITTEN_HERE
