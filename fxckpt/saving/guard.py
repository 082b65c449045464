"""Notices tensors that change while a checkpoint copies them, outside ``opt.step()``: such a checkpoint would be torn.

Each tensor's version counter is noted at the end of the step that handed it over, and compared before the next step changes
it, when the step closes and once all is copied. Counters see operations in place, when they end, and not those on ``.data``,
so some elements are compared as well.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Sequence

import torch

from fxckpt.compat.spread import is_spread, local
from fxckpt.compat.tensors import version_of
from fxckpt.engine import crc32c
from fxckpt.errors import Cancelled, FxckptError
from fxckpt.saving.plan import Layout

WAY_OUT = (
    "Loop with fxckpt.steps(n), or fxckpt.epochs(n) and fxckpt.batches(loader): their boundaries are exact, "
    "and name in extra= what an iteration prepares for the next one"
)
"""What to do about a loop that leaves no instant to take a checkpoint of."""


class Changed(FxckptError):
    """A tensor was changed outside ``opt.step()`` while it was being copied, so the checkpoint would be torn."""


class ChangedInTurns(Changed, Cancelled):
    """The same in a loop with boundaries: no failure, for the tensor is copied there from now on."""


class Mixed(Changed):
    """The same where nothing can be done about it the next time."""


_FIRST = 3
"""Checkpoints in which all tensors are looked at, from end to end: a loop that writes past version counters does so from the
first turn on. Later ones look at one layer in turn, at a few elements, which takes some 30 µs."""

_FEW = 256

Look = tuple[list[int], list[tuple[int, int] | None]]
"""The versions of a layer's tensors; and a checksum of elements of each, with the address they were read from, or nothing."""


def glimpse(tensor: torch.Tensor, whole: bool = False, shift: int = 0) -> int | None:
    """The checksum of its elements, or of a few of them, evenly apart, from which one on ``shift`` says. None where they cannot
    be read at once.

    Nothing here is large enough for torch to use OpenMP: with a team of its own, the thread that commits would slow down all
    others of the process, since libgomp's threads spin less where there are more of them than cores.
    """
    tensor = local(tensor)
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.is_quantized:
        return None
    if not tensor.is_contiguous():  # channels_last, say: in the order of memory it is
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        tensor = tensor.detach().permute(order)
        if not tensor.is_contiguous():
            return None
    if whole and tensor.numel():
        return crc32c((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
    flat = tensor.detach().view(-1)
    apart = -(-flat.numel() // _FEW) or 1
    copy = flat[shift % apart :: apart].clone()  # memory that numpy has seen cannot be resized any more
    return crc32c(copy.view(torch.uint8).numpy().data)


def fingerprint(tensor: torch.Tensor) -> int:
    """What is the same of tensors with the same values. One on a device is waited for."""
    found = glimpse(tensor, whole=True)
    if found is None:
        found = int(tensor.detach().contiguous().view(-1).view(torch.uint8).sum(dtype=torch.int64))
    return found


def _changed(before: Look, after: Look) -> list[int]:
    """Which tensors of the layer were changed? Other memory in a tensor's place is none that a copy reads."""
    if before == after:
        return []
    moved = {i for i, (a, b) in enumerate(zip(before[0], after[0])) if a != b}
    seen = {i for i, (a, b) in enumerate(zip(before[1], after[1])) if a and b and a[0] == b[0] and a[1] != b[1]}
    return sorted(moved | seen)


class Guard:
    """Watches over the memory that one checkpoint is copied from.

    ``bounded``: it is of a boundary. ``in_forward``: the parameters that a forward changes, which a boundary need not know;
    None: nobody knows. ``deferred`` are the layers to copy when the step closes, and their tensors; ``copies`` are snapshots
    made for this checkpoint alone, which live until they are copied.
    """

    def __init__(self, step: int, layout: Layout, number: int):
        """``number``: which checkpoint of the run this is. What is done on ``.data`` or by numpy moves no version counter, so
        elements are compared, too; see ``_FIRST``."""
        self.bounded = False
        self.in_forward: frozenset[str] | None = None
        self.deferred: list[tuple[int, Sequence[torch.Tensor]]] = []
        self.copies: list[torch.Tensor] = []
        self._step, self._layout, self._number = step, layout, number
        self._seen: dict[int, Sequence[torch.Tensor]] = {}  # layer -> its tensors
        self._looks: dict[int, Look] = {}  # how they were after the step
        self._looking = threading.Lock()  # held while they are compared and forgotten

    def watch(self, layer: int, tensors: Sequence[torch.Tensor]) -> None:
        """These were handed over in this step, which may go on to change them."""
        self._seen[layer] = tensors
        self._looks.pop(layer, None)

    def watch_now(self, layer: int, tensors: Sequence[torch.Tensor]) -> None:
        """The same of what nothing may change from here on, the rest of the step included: gradients."""
        self._seen[layer] = tensors
        self._looks[layer] = self._look(layer, tensors)

    def note_versions(self) -> None:
        """Remember how what was handed over looks at the end of its step. Not at its emit: tensors that are views of one
        buffer count their changes together, and later updates of the same step are no changes behind our back."""
        for layer, tensors in self._seen.items():
            if layer not in self._looks:
                self._looks[layer] = self._look(layer, tensors)

    def _look(self, layer: int, tensors: Sequence[torch.Tensor]) -> Look:
        """How they look now."""
        versions = [version_of(tensor) for tensor in tensors]
        found = self._layout.layers[layer]
        for at, each in enumerate(found.entries):
            # What is done to a DTensor moves its own counter, not that of the part which lies here. Entries of gradients have
            # their parameters, and a step moves those.
            if is_spread(each.tensor) and found.kind != "gradients":
                versions[at] += version_of(each.tensor)
        first = self._number < _FIRST
        if not first and (layer + self._number) % len(self._layout.layers):
            return versions, []
        seen = [glimpse(tensor, first, self._number) for tensor in tensors]
        return versions, [None if found is None else (t.data_ptr(), found) for t, found in zip(tensors, seen)]

    def watch_again(self) -> None:
        """A step was left in its middle: what it did not come to is being copied still, and must not change unseen."""
        with self._looking:
            self.note_versions()

    def let_go(self, layers: Iterable[int], changed: Callable[[Changed], None]) -> None:
        """A step waits for the copies of these layers and then changes them. Tells ``changed`` what was changed before. The lock
        is held throughout, or the thread that commits would take what the step changes for a change behind our back."""
        with self._looking:
            layers = list(layers)
            try:
                self.compare(layers)
            except Changed as error:
                changed(error)
            for layer in layers:
                self._looks.pop(layer, None)

    def check_unchanged(self) -> None:
        """Once all is copied: is every tensor as its step left it, if no later step has looked since? Raises Changed with the
        tensor's name, and remembers it: a frozen one is copied with the buffers from now on."""
        with self._looking:
            self.compare([*self._layout.number("frozen"), *self._layout.number("update"), *self._layout.number("gradients")])
            self._looks.clear()
            self._seen.clear()  # what changes from here on, no copy sees
        self.copies.clear()

    def compare(self, layers: Iterable[int]) -> None:
        """Raises Changed, with all names, if tensors of these layers are not as they were after their step."""
        changed = []
        for layer in layers:
            if (before := self._looks.get(layer)) is not None:
                entries = self._layout.layers[layer].entries
                changed += [entries[i] for i in _changed(before, self._look(layer, self._seen[layer]))]
        if changed:
            raise self.changed([entry.key for entry in changed], sum(local(entry.tensor).nbytes for entry in changed))

    def changed(self, keys: Sequence[str], nbytes: int) -> Changed:
        """The error for these tensors; the layout remembers them: they are copied in memory from now on, when a step closes, or
        at its end if a forward changes them."""
        names = ", ".join(map(repr, keys[:8])) + (" ..." if keys[8:] else "")
        verb = "were" if keys[1:] else "was"
        what = f"{names} {verb} changed in place outside opt.step() while the checkpoint of step {self._step} was being copied"
        if self.in_forward is None:
            return Mixed(f"{what}, which would mix two iterations; that checkpoint is discarded. {WAY_OUT}.")
        self._layout.changed_outside |= set(keys)
        size = f"which takes {nbytes / 2**20:.1f} MiB for each checkpoint in flight"
        kind = ChangedInTurns if self.bounded else Changed
        return kind(f"{what}; that checkpoint is discarded. From now on they are copied in memory, {size}")
