"""Pictures of the layer graph: text for a terminal, dot for graphviz, and SVG without it.

Each box is a layer with its place in the update order; an arrow says that its output reaches another layer in
the forward. The SVG layout is layered: a layer stands one row below the lowest one that feeds it. A deep
model would give a strip nobody can read, so rows are folded into columns, read top to bottom and left to
right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from fxckpt.graph.model.layers import Layer, Place, block_of

Edges = Sequence[tuple[str, str]]

_BOX, _GAP, _ROW, _LINE, _PAD = 34, 12, 52, 15, 24  # px: box height, space between, row, text line, margin
_CHAR = 6.6  # px a character of the label takes at 11 px monospace
_INK, _FAINT, _EDGE, _BORDER = "#0f172a", "#475569", "#64748b", "#94a3b8"
_TINTS = ("#dbeafe", "#dcfce7", "#fef3c7", "#fce7f3", "#ede9fe", "#e0f2fe")


def to_text(
    layers: Sequence[Layer],
    edges: Edges,
    sizes: Mapping[str, int] | None = None,
    times: Mapping[str, float] | None = None,
    why: Mapping[str, Place] | None = None,
) -> str:
    """One line per layer in update order: size, time, parameters, why it stands there, and the layers that its output reaches.

    ``sizes`` are bytes, ``times`` seconds, ``why`` places, all by layer name.
    """
    width = max((len(layer.name) for layer in layers), default=0)
    reasons = {layer.name: f"  {why[layer.name]}" if why else "" for layer in layers}
    longest = max(map(len, reasons.values()), default=0)
    lines = []
    for at, layer in enumerate(layers, 1):
        reaches = ", ".join(b for a, b in edges if a == layer.name)
        note = _note(layer.name, sizes, times)
        lines.append(
            f"{at:4d}  {layer.name:{width}s}  {note:>18s}  {len(layer.params):3d} tensors"
            + (f"{reasons[layer.name]:{longest}s}  -> {reaches}" if reaches else reasons[layer.name])
        )
    return "\n".join(lines)


def to_dot(
    layers: Sequence[Layer], edges: Edges, sizes: Mapping[str, int] | None = None, times: Mapping[str, float] | None = None
) -> str:
    """A graphviz digraph; layers of one block share a cluster."""
    lines = ["digraph layers {", '  node [shape=box, style="rounded,filled", fillcolor="#dbeafe", fontname=monospace];']
    for number, (block, members) in enumerate(_blocks(layers).items()):
        inside = len(members) > 1
        if inside:
            lines += [f"  subgraph cluster_{number} {{", f"    label={_quoted(block)};"]
        for at, layer in members:
            label = "\n".join(_label(at, layer.name, sizes, times))
            lines.append(f"  {'  ' * inside}{_quoted(layer.name)} [label={_quoted(label)}];")
        if inside:
            lines.append("  }")
    lines += [f"  {_quoted(a)} -> {_quoted(b)};" for a, b in edges]
    return "\n".join([*lines, "}"])


def to_svg(
    layers: Sequence[Layer], edges: Edges, sizes: Mapping[str, int] | None = None, times: Mapping[str, float] | None = None
) -> str:
    """A self-contained SVG document."""
    boxes = _layout(layers, edges, sizes, times)
    width = max((box.x + box.width for box in boxes.values()), default=0) + _PAD
    height = max((box.y + _BOX for box in boxes.values()), default=0) + _PAD
    size = f'width="{width:.0f}" height="{height:.0f}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" {size} '
        'font-family="monospace" font-size="11">',
        f'<rect {size} fill="white"/>',
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{_EDGE}"/></marker></defs>',
    ]
    parts += [_arrow(boxes[a], boxes[b]) for a, b in edges if a in boxes and b in boxes]
    parts += [_drawn(name, box) for name, box in boxes.items()]
    return "\n".join([*parts, "</svg>"]) + "\n"


@dataclass(frozen=True)
class _Box:
    """Where the SVG shows a layer, and what stands in it."""

    x: float
    y: float
    width: float
    column: int
    row: int
    tint: str
    lines: tuple[str, ...]


def _layout(
    layers: Sequence[Layer], edges: Edges, sizes: Mapping[str, int] | None, times: Mapping[str, float] | None
) -> dict[str, _Box]:
    labels = {layer.name: _label(at, layer.name, sizes, times) for at, layer in enumerate(layers, 1)}
    tint = {
        layer.name: _TINTS[number % len(_TINTS)]
        for number, members in enumerate(_blocks(layers).values())
        for _, layer in members
    }
    boxes: dict[str, _Box] = {}
    x = float(_PAD)
    for column, rows in enumerate(_fold(_rows(layers, edges))):
        width = max(len(line) for row in rows for name in row for line in labels[name]) * _CHAR + 2 * _GAP
        step = width + _GAP
        longest = max(map(len, rows))
        for at, row in enumerate(rows):
            left = x + (longest - len(row)) * step / 2
            for number, name in enumerate(row):
                y = _PAD + at * _ROW
                boxes[name] = _Box(left + number * step, y, width, column, at, tint[name], labels[name])
        x += longest * step + 3 * _GAP
    return boxes


def _rows(layers: Sequence[Layer], edges: Edges) -> list[list[str]]:
    """The layers by their distance from the input, in forward order (the update order backwards) where that
    is free.
    """
    names = [layer.name for layer in reversed(layers)]
    depth = dict.fromkeys(names, 0)
    feeds = [(a, b) for a, b in edges if a in depth and b in depth]
    feeds.sort(key=lambda edge: names.index(edge[0]))
    for _ in names:  # one round where names are in forward order; the bound is for edges that make a circle
        before = dict(depth)
        for a, b in feeds:
            depth[b] = max(depth[b], depth[a] + 1)
        if depth == before:
            break
    seen = {name for edge in feeds for name in edge}
    loose = [name for name in names if name not in seen]
    rows: list[list[str]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for name in names:
        if name in seen:
            rows[depth[name]].append(name)
    return [row for row in rows if row] + [[name] for name in loose]


def _fold(rows: Sequence[list[str]]) -> list[list[list[str]]]:
    """Cut the rows into equal columns, together about as high as wide; where a block ends, if one does
    nearby.
    """
    columns = max(1, round(len(rows) / max(12, (len(rows) * 4.5) ** 0.5)))
    height = len(rows) / columns
    blocks = [_block(row[0]) for row in rows]
    ends = [at for at in range(1, len(rows)) if blocks[at] != blocks[at - 1]]
    cuts = [0]
    for ideal in (round(number * height) for number in range(1, columns)):
        near = [at for at in ends if abs(at - ideal) <= height / 4 and at > cuts[-1]]
        cuts.append(min(near, key=lambda at: abs(at - ideal), default=ideal))
    return [list(rows[a:b]) for a, b in zip(cuts, [*cuts[1:], len(rows)]) if a < b]


def _arrow(a: _Box, b: _Box) -> str:
    right, left = a.x + a.width, b.x
    from_y, to_y = a.y + _BOX / 2, b.y + _BOX / 2
    if a.column == b.column and b.row == a.row + 1:
        path = f"M{a.x + a.width / 2:.0f},{a.y + _BOX:.0f} L{b.x + b.width / 2:.0f},{b.y:.0f}"
    elif a.column == b.column:  # past the rows between, on the right
        far = b.x + b.width
        side = max(right, far) + 2 * _GAP
        path = f"M{right:.0f},{from_y:.0f} C{side:.0f},{from_y:.0f} {side:.0f},{to_y:.0f} {far:.0f},{to_y:.0f}"
    else:  # through the gap in front of the later column
        gap = left - 2 * _GAP
        turn = 6 if to_y > from_y else -6
        path = (
            f"M{right:.0f},{from_y:.0f} H{gap - 6:.0f} "
            f"Q{gap:.0f},{from_y:.0f} {gap:.0f},{from_y + turn:.0f} "
            f"V{to_y - turn:.0f} Q{gap:.0f},{to_y:.0f} {gap + 6:.0f},{to_y:.0f} H{left:.0f}"
        )
    return f'<path d="{path}" fill="none" stroke="{_EDGE}" marker-end="url(#arrow)"/>'


def _drawn(name: str, box: _Box) -> str:
    left = box.x + _GAP
    top = box.y + 14  # the first line's baseline
    text = "".join(
        f'<text x="{left:.0f}" y="{top + at * _LINE:.0f}" fill="{color}">{escape(line)}</text>'
        for at, (line, color) in enumerate(zip(box.lines, (_INK, _FAINT)))
    )
    return (
        f'<g><title>{escape(name)}</title><rect x="{box.x:.0f}" y="{box.y:.0f}" width="{box.width:.0f}" '
        f'height="{_BOX}" rx="5" fill="{box.tint}" stroke="{_BORDER}"/>{text}</g>'
    )


def _blocks(layers: Sequence[Layer]) -> dict[str, list[tuple[int, Layer]]]:
    """The layers by block, in forward order, each with its place in the update order."""
    blocks: dict[str, list[tuple[int, Layer]]] = {}
    for at, layer in reversed(list(enumerate(layers, 1))):
        blocks.setdefault(_block(layer.name), []).append((at, layer))
    return blocks


def _block(layer: str) -> str:
    return block_of(layer + ".")  # block_of takes the name of a parameter


def _label(at: int, name: str, sizes: Mapping[str, int] | None, times: Mapping[str, float] | None) -> tuple[str, ...]:
    note = _note(name, sizes, times)
    return (name, f"update {at}" + (f", {note}" if note else ""))


def _note(name: str, sizes: Mapping[str, int] | None, times: Mapping[str, float] | None) -> str:
    parts = []
    if sizes and name in sizes:
        parts.append(_bytes(sizes[name]))
    if times and name in times:
        parts.append(f"{times[name] * 1e3:.2f} ms")
    return ", ".join(parts)


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def _quoted(text: str) -> str:
    """A dot string; a line break in ``text`` becomes one in the label."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
