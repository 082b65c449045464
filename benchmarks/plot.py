"""The picture of models.json: step time against none, each round a dot, for each model and way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from render import CADENCES, Numbers, measured

COLOURS = {"1": "#c44e52", "10": "#4c72b0", "auto": "#55a868"}


def draw(numbers: Numbers, path: Path) -> None:
    """Write it; the same results make the same file."""
    settings = {"svg.hashsalt": "fxckpt", "svg.fonttype": "none", "font.size": 9}
    with plt.rc_context(settings):
        models = list(numbers["models"].values())
        figure, panels = plt.subplots(1, len(models), figsize=(3.2 * len(models) + 1.6, 2.9), sharey=True, squeeze=False)
        for panel, model in zip(panels[0], models):
            rounds(panel, model)
        panels[0][0].legend(loc="lower right", frameon=False)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def rounds(panel: Any, model: Numbers) -> None:
    """One model: a row for each way, the cadences above each other, the medians as bars."""
    ways = list(measured(model).values())
    for place, (every, name) in enumerate(CADENCES.items()):
        for row, way in enumerate(ways):
            if (found := way["every"].get(every)) is not None:
                at = row + 0.24 * (place - 1)
                panel.plot(found["ratios"], [at] * len(found["ratios"]), "o", ms=3, alpha=0.6, color=COLOURS[every])
                label = name.strip("`") if row == 0 else None
                panel.plot([found["ratio"]], [at], "|", ms=9, mew=2, color=COLOURS[every], label=label)
    panel.set_title(model["label"])
    panel.set_xscale("log")
    panel.set_xlabel("step time against none")
    panel.axvline(1.0, lw=0.8, color="black")
    panel.set_yticks(range(len(ways)), [way["label"] for way in ways])
    panel.grid(axis="x", which="both", lw=0.3)
    panel.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    panel.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    panel.set_xticks(
        ticks(max(ratio for way in ways for each in CADENCES for ratio in way["every"].get(each, {}).get("ratios", [1])))
    )
    panel.set_ylim(len(ways) - 0.5, -0.5)


def ticks(most: float) -> list[float]:
    """Marks of an axis that goes so far."""
    return [mark for mark in (1, 1.5, 2, 3, 5, 10, 20, 50) if mark <= 1.2 * most]
