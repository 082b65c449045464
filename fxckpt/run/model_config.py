"""The configuration of a model of Transformers, which every record has: with it a checkpoint is opened without the script."""

from __future__ import annotations

import json
from typing import Any

import torch

LONGEST = 64 << 10
"""Bytes; a longer one (thousands of labels) would make every record longer."""


def config_of(model: torch.nn.Module | None) -> str | None:
    """The text of its ``config.json``, as ``save_pretrained`` writes it; None if it is no such model, or does not say. A wrapper
    that hands on the attributes of what it wraps has another model's names, so the class is asked."""
    if model is None or not isinstance(getattr(type(model), "config_class", None), type):
        return None
    try:
        found: dict[str, Any] = json.loads(model.config.to_json_string())  # type: ignore[union-attr, operator]
        text = json.dumps({**found, "architectures": found.get("architectures") or [type(model).__name__]}, allow_nan=False)
    except Exception:  # somebody else's class
        return None
    return text if len(text) <= LONGEST else None
