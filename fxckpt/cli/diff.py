"""Compare two checkpoints of a store, by default its newest two: which layers changed, and by how much.

For each layer, over all its elements: the share that changed, |b - a| / |a| (Euclidean norms) and the largest |b - a|, for
the parameters and, in the last column, |b - a| / |a| for the optimizer's state. Both are verified first, and held, so that a
trainer may go on.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fxckpt.cli import common
from fxckpt.errors import NoCheckpoint
from fxckpt.store.dtypes import DTYPES, item_size, numpy_dtype
from fxckpt.store.names import OPTIMIZER, kind_of
from fxckpt.store.reader import Candidate, Reader

HELP = "which layers changed between two steps, and by how much"

PIECE = 4 << 20  # elements at a time: a bound for memory, whatever the tensors' sizes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", help="the store")
    which = common.WHICH.replace("default: latest", "default: the newest but one")
    parser.add_argument("a", nargs="?", metavar="A", help=which)
    parser.add_argument("b", nargs="?", metavar="B", help="as A; default: the newest")
    parser.add_argument("--tensors", action="store_true", help="a line for each tensor instead of each layer")


@dataclass
class Change:
    """How two versions of the same elements differ; of several tensors, taken together."""

    elements: int = 0
    changed: int = 0
    squares_a: float = 0.0
    squares_difference: float = 0.0
    largest: float = 0.0

    def add(self, other: Change) -> None:
        """Take in another tensor's, or another piece's."""
        self.elements += other.elements
        self.changed += other.changed
        self.squares_a += other.squares_a
        self.squares_difference += other.squares_difference
        self.largest = float(np.maximum(self.largest, other.largest))  # NaN if one of both is

    @property
    def relative(self) -> float:
        """|b - a| / |a|; infinite if only a is zero."""
        if self.squares_difference == 0:
            return 0.0
        return math.sqrt(self.squares_difference / self.squares_a) if self.squares_a else math.inf

    def to_json(self) -> dict[str, Any]:
        return {"elements": self.elements, "changed": self.changed, "relative": self.relative, "largest": self.largest}


@dataclass
class Row:
    """A layer or a tensor."""

    name: str
    parameters: Change = field(default_factory=Change)
    state: Change = field(default_factory=Change)
    only_in: str | None = None  # "a" or "b"

    def to_json(self) -> dict[str, Any]:
        parameters, state = self.parameters.to_json(), self.state.to_json()
        return {"name": self.name, "only_in": self.only_in, "parameters": parameters, "state": state}


def run(args: argparse.Namespace) -> int:
    a, b = _pair(args.dir, args.a, args.b)
    with common.whole_checkpoint(args.dir, a) as first, common.whole_checkpoint(args.dir, b) as second:
        return _run(args, first, second)


def _run(args: argparse.Namespace, first: Reader, second: Reader) -> int:
    """Of two whole checkpoints."""
    total = first.record.nbytes + second.record.nbytes
    with first.held(), second.held(), common.Progress("comparing", 2 * total) as progress:
        for reader in (first, second):
            reader.verify(progress.advance)
        rows = list(compare(first, second, args.tensors, progress))
    if args.json:
        common.print_json({"a": str(first.path), "b": str(second.path), "rows": [row.to_json() for row in rows]})
    else:
        _print(rows, first, second)
    return common.OK


def _pair(directory: str, a: str | None, b: str | None) -> tuple[Reader, Reader]:
    """Both, as the command line names them; the newest two whose records verify if it names none. Raises NoCheckpoint."""
    if a is not None:
        return common.open_checkpoint(directory, a), common.open_checkpoint(directory, b)
    found = [each for each in common.look_at_all(directory) if isinstance(each, Candidate)]
    if len(found) < 2:
        raise NoCheckpoint(f"{directory} has {len(found)} checkpoint{'s' * (len(found) != 1)}: two are compared")
    return Reader(found[1].path), Reader(found[0].path)


def compare(first: Reader, second: Reader, tensors: bool, progress: common.Progress) -> Iterator[Row]:
    """The layers (or tensors) of the first, a piece at a time, then those that only the second has. Both are held."""
    others = {tensor.place: tensor for tensor in second.record.tensors()}
    for layer in first.record.layers:
        rows: dict[str, Row] = {}
        for tensor in layer.tensors:
            name = tensor.key if tensors else layer.name or "(root)"
            row = rows.setdefault(name, Row(name))
            other = others.pop(tensor.place, None)
            if other is None or (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
                rows[tensor.key] = Row(tensor.key, only_in="a" if other is None else "a (other shape or type in b)")
                continue
            total = row.state if kind_of(tensor.file) == OPTIMIZER else row.parameters
            item = item_size(tensor.dtype)
            for at in range(0, tensor.nbytes, PIECE * item):
                n = min(PIECE * item, tensor.nbytes - at)
                a, b = first.held_bytes(tensor, at, n), second.held_bytes(other, at, n)
                total.add(_compare(a, b, tensor.dtype))
                progress.advance(2 * n)
        yield from (row for row in rows.values() if row.only_in or row.parameters.elements or row.state.elements)
    yield from (Row(key, only_in="b") for _, key in others)


def _compare(a: bytes, b: bytes, dtype: str) -> Change:
    """Two versions of the same elements, by their bits and by their values."""
    item = item_size(dtype)
    same = np.frombuffer(a, np.uint8) == np.frombuffer(b, np.uint8)
    changed = int(np.count_nonzero(~same.reshape(-1, item).all(axis=1)))
    left, right = values(a, dtype), values(b, dtype)
    with np.errstate(all="ignore"):
        difference = np.abs(right - left) if changed else np.zeros(1)
        difference = np.where(left == right, 0.0, difference) if changed else difference  # inf - inf is no difference
        squares, squares_difference = float(np.square(np.abs(left)).sum()), float(np.square(difference).sum())
        return Change(len(a) // item, changed, squares, squares_difference, float(difference.max(initial=0.0)))


def values(raw: bytes, dtype: str) -> np.ndarray:
    """The elements as doubles (complex ones stay complex)."""
    if dtype == "C64":
        return np.frombuffer(raw, np.complex64).astype(np.complex128)
    if dtype == "BF16":  # the upper half of a float
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    known = numpy_dtype(dtype)
    if known is not None:
        return np.frombuffer(raw, known).astype(np.float64)
    import torch  # the 8-bit floats

    return torch.frombuffer(bytearray(raw), dtype=getattr(torch, DTYPES[dtype].torch)).to(torch.float64).numpy()


def _print(rows: list[Row], first: Reader, second: Reader) -> None:
    common.say(f"a: step {first.record.step}, {first.path}\nb: step {second.record.step}, {second.path}\n")
    lines = []
    for row in rows:
        if row.only_in:
            lines.append((row.name, f"only in {row.only_in}", "", "", ""))
            continue
        own, shown = row.parameters, ("-", "-", "-")
        if own.elements:
            shown = f"{own.changed / own.elements:.1%}", f"{own.relative:.3g}", f"{own.largest:.3g}"
        lines.append((row.name, *shown, f"{row.state.relative:.3g}" if row.state.elements else "-"))
    common.print_table(("LAYER", "CHANGED", "RELATIVE", "LARGEST", "STATE"), lines, left=(0,))
    if not any(row.only_in or row.parameters.changed or row.state.changed for row in rows):
        common.say("\nno difference")
