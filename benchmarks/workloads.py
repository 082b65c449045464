"""The models that people know: transformers' configurations with random weights, in sizes that two cores train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Batch = dict[str, torch.Tensor]


def resnet(quick: bool) -> nn.Module:
    """ResNet-50, the configuration that transformers begins with."""
    from transformers import ResNetConfig, ResNetForImageClassification

    shape: dict[str, Any] = {"hidden_sizes": [32, 64], "depths": [1, 1], "embedding_size": 16} if quick else {}
    return ResNetForImageClassification(ResNetConfig(num_labels=1000, **shape))


def bert(quick: bool) -> nn.Module:
    """BERT-base with its head for masked words."""
    from transformers import BertConfig, BertForMaskedLM

    shape: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 256} if quick else {}
    return BertForMaskedLM(BertConfig(**shape))


def gpt2(quick: bool) -> nn.Module:
    """GPT-2 with 124M parameters; the output layer shares the embedding's weight."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape: dict[str, Any] = {"n_layer": 2, "n_embd": 96, "n_head": 4} if quick else {}
    return GPT2LMHeadModel(GPT2Config(use_cache=False, **shape))


def pictures(count: int, size: int) -> Batch:
    """Noise, with labels."""
    return {"pixel_values": torch.randn(count, 3, size, size), "labels": torch.randint(0, 1000, (count,))}


def words(count: int, length: int) -> Batch:
    """Random words, each its own label."""
    found = torch.randint(0, 30000, (count, length))
    return {"input_ids": found, "labels": found}


@dataclass(frozen=True)
class Workload:
    """A model and what it is trained on."""

    label: str
    build: Callable[[bool], nn.Module]
    batch: Callable[[], Batch]
    batch_label: str


WORKLOADS = {
    "resnet50": Workload("ResNet-50", resnet, lambda: pictures(4, 128), "4 pictures of 128 × 128"),
    "bert": Workload("BERT-base", bert, lambda: words(1, 128), "128 words"),
    "gpt2": Workload("GPT-2 124M", gpt2, lambda: words(1, 128), "128 words"),
}


def make(key: str, quick: bool) -> tuple[nn.Module, Batch]:
    """The same model and batch each time, ready to be trained."""
    torch.manual_seed(0)
    model = WORKLOADS[key].build(quick)
    return model.train(), WORKLOADS[key].batch()
