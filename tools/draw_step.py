"""Draw where the updates of a step and the copies of its checkpoint lie, after the backward and inside it, as docs/step.svg.

Six layers of one size; a forward takes 0.30 of a step, the backward 0.55, the updates 0.15, and the disk 0.60 for a checkpoint.

python tools/draw_step.py [FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

LAYERS, FORWARD, BACKWARD, UPDATES, DISK = 6, 0.30, 0.55, 0.15, 0.60
SHOWN = 1.6  # steps

LEFT, STEP, ROW, BAR = 92, 400, 30, 20  # px: the labels, one step, a row, a bar in it
INK, FAINT, LINE = "#0f172a", "#475569", "#cbd5e1"
FILL = {"forward": "#e2e8f0", "backward": "#bfdbfe", "update": "#f59e0b", "copy": "#86efac", "gradients": "#fca5a5"}


@dataclass
class Times:
    """When everything happens, in steps: bars of (kind, layer, begin, end), and how many layers have gradients from when on."""

    bars: list[tuple[str, int, float, float]] = field(default_factory=list)
    gradients: list[tuple[float, int]] = field(default_factory=lambda: [(-1.0, 0)])


def times(inside: bool) -> Times:
    """Two steps, and the one before them; layers are numbered in the order of their updates, in which one disk copies them."""
    found, disk, held = Times(), -1.0, 0
    for step in range(-1, 2):
        now = step + FORWARD
        found.bars.append(("forward", 0, step, now))
        order = [(kind, layer) for layer in range(LAYERS) for kind in ("backward", "update")]
        for kind, layer in order if inside else sorted(order, key=lambda each: each[0]):
            end = now + (BACKWARD if kind == "backward" else UPDATES) / LAYERS
            found.bars.append((kind, layer, now, end))
            if kind == "backward":
                held += 1
                found.gradients.append((now, held))
            else:
                begin = max(disk, end)
                disk = begin + DISK / LAYERS
                found.bars.append(("copy", layer, begin, disk))
            if kind == "update" and inside:
                held -= 1
                found.gradients.append((end, held))
            now = end
        held = 0
        found.gradients.append((now, held))  # zero_grad
    return found


def shown(begin: float, end: float) -> tuple[float, float]:
    """What of it is in the picture."""
    return max(begin, 0.0), min(end, SHOWN)


def panel(title: str, inside: bool, top: int) -> Iterator[str]:
    """The rows of one way, below its title."""
    found, rows = times(inside), {"forward": 0, "backward": 0, "update": 0, "copy": 1}
    yield f'<text x="8" y="{top + 14}" fill="{INK}" font-weight="bold">{title}</text>'
    for number, label in enumerate(("training", "copies", "gradients")):
        yield f'<text x="8" y="{top + 38 + ROW * number}" fill="{FAINT}">{label}</text>'
    for kind, layer, *span in found.bars:
        begin, end = shown(*span)
        if begin < end:
            x, width = LEFT + begin * STEP, (end - begin) * STEP
            y = top + 24 + ROW * rows[kind]
            yield f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{FILL[kind]}" stroke="white"/>'
            if kind == "forward":
                yield f'<text x="{x + 6:.1f}" y="{y + 14}" fill="{FAINT}">forward</text>'
            elif kind != "update" and width > 12:
                yield f'<text x="{x + width / 2:.1f}" y="{y + 14}" fill="{FAINT}" text-anchor="middle">{LAYERS - layer}</text>'
    base = top + 24 + 2 * ROW + BAR
    for (start, held), (stop, _) in zip(found.gradients, [*found.gradients[1:], (2.0, 0)]):
        begin, end = shown(start, stop)
        if held and begin < end:
            height, width = held * BAR / LAYERS, (end - begin) * STEP
            y = base - height
            yield (
                f'<rect x="{LEFT + begin * STEP:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
                f'fill="{FILL["gradients"]}"/>'
            )
    yield f'<line x1="{LEFT}" x2="{LEFT + SHOWN * STEP:.0f}" y1="{base}" y2="{base}" stroke="{LINE}"/>'


def draw() -> str:
    """The picture."""
    width, height, below = LEFT + int(SHOWN * STEP) + 8, 272, 24 + 3 * ROW + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="monospace" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *panel('updates="after_backward"', False, 4),
        *panel('updates="in_backward"', True, 4 + below),
        f'<line x1="{LEFT + STEP}" x2="{LEFT + STEP}" y1="24" y2="{2 * below}" stroke="{FAINT}" stroke-dasharray="3,3"/>',
        f'<text x="{LEFT + STEP + 4}" y="18" fill="{FAINT}">next step</text>',
    ]
    x = 8
    for kind, label in {
        "backward": "backward, by layer",
        "update": "updates",
        "copy": "copies, by layer",
        "gradients": "",
    }.items():
        label = label or "memory of gradients"
        parts.append(f'<rect x="{x}" y="{height - 18}" width="10" height="10" fill="{FILL[kind]}"/>')
        parts.append(f'<text x="{x + 15}" y="{height - 9}" fill="{FAINT}">{label}</text>')
        x += 40 + int(6.6 * len(label))
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).resolve().parent.parent / "docs" / "step.svg")
    Path(path).write_text(draw())
