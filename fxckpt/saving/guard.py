"""Notices tensors that change while a checkpoint copies them, outside ``opt.step()``: such a checkpoint would be torn.

Each tensor's version counter is noted at the end of the step that handed it over, and compared before the next step changes
it, when the step closes and once all is copied. Counters see operations in place, when they end, and not those on ``.data``,
so some elements are compared as well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

import torch

from fxckpt.compat.tensors import version_of
from fxckpt.errors import Cancelled, FxckptError
from fxckpt.saving.plan import Entry, Layout

WAY_OUT = "Loop with fxckpt.steps(n), or fxckpt.epochs(n) and fxckpt.batches(loader): their boundaries are exact"
"""What to do about a loop that leaves no instant to take a checkpoint of."""


class Changed(FxckptError):
    """A tensor was changed outside ``opt.step()`` while it was being copied, so the checkpoint would be torn."""


class ChangedInTurns(Changed, Cancelled):
    """The same where it is known when to copy them: no failure, for that is done from now on."""


_ALL = 3  # checkpoints in which elements of all tensors are looked at
_AT_ONCE = 128  # layers of which parameters are looked at in each one later
_ELEMENTS = 256

Look = tuple[int, bytes | None]
"""A tensor's version, and some of its elements."""


def glimpse(tensor: torch.Tensor) -> bytes | None:
    """A few hundred of its elements, as bytes; None where they cannot be read at once."""
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or not tensor.is_contiguous() or tensor.is_quantized:
        return None
    flat = tensor.detach().view(-1)
    if not (count := flat.numel()):
        return b""
    return flat[:: -(-count // _ELEMENTS)].clone().view(torch.uint8).numpy().tobytes()


class Guard:
    """Watches over the memory that one checkpoint is copied from.

    ``in_forward``: the parameters that a forward changes, which a boundary need not know; None: nobody knows. ``deferred`` are
    the layers to copy when the step closes, and their tensors; ``copies`` are snapshots made for this checkpoint alone, which
    live until they are copied.
    """

    def __init__(self, step: int, layout: Layout, number: int):
        """``number``: which checkpoint of the run this is. What is done on ``.data`` or by numpy moves no version counter, so
        some elements are compared, too: of all tensors in the first checkpoints, later of so many parameters in turn."""
        self.in_forward: frozenset[str] | None = None
        self.deferred: list[tuple[int, Sequence[torch.Tensor]]] = []
        self.copies: list[torch.Tensor] = []
        self._step, self._layout, self._number = step, layout, number
        self._seen: dict[int, tuple[Sequence[torch.Tensor], list[Look]]] = {}  # layer -> its tensors, after the step
        self._looking = threading.Lock()  # held while they are compared and forgotten

    def watch(self, layer: int, tensors: Sequence[torch.Tensor]) -> None:
        """These were handed over in this step, which may go on to change them."""
        self._seen[layer] = (tensors, [])

    def note_versions(self) -> None:
        """Remember how what was handed over looks at the end of its step. Not at its emit: tensors that are views of one
        buffer count their changes together, and later updates of the same step are no changes behind our back."""
        for layer, (tensors, looks) in self._seen.items():
            if not looks:
                looks.extend(map(self._look, self._layout.layers[layer].entries, tensors))

    def _look(self, entry: Entry, tensor: torch.Tensor) -> Look:
        """How it looks now."""
        in_turn = entry.file == 0 and (len(entry.key) + self._number) % (1 + len(self._layout.layers) // _AT_ONCE) == 0
        return version_of(tensor), glimpse(tensor) if in_turn or self._number < _ALL else None

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
                if (found := self._seen.get(layer)) is not None:
                    found[1].clear()

    def check_unchanged(self) -> None:
        """Once all is copied: is every tensor as its step left it, if no later step has looked since? Raises Changed with the
        tensor's name, and remembers it: a frozen one is copied with the buffers from now on."""
        with self._looking:
            self.compare([*self._layout.number("frozen"), *self._layout.number("update")])
            self._seen.clear()  # what changes from here on, no copy sees
        self.copies.clear()

    def compare(self, layers: Iterable[int]) -> None:
        """Raises Changed, with all names, if tensors of these layers are not as they were after their step."""
        changed = []
        for layer in layers:
            tensors, looks = self._seen.get(layer, ((), []))
            entries = self._layout.layers[layer].entries
            changed += [entry for entry, tensor, look in zip(entries, tensors, looks) if self._look(entry, tensor) != look]
        if changed:
            raise self._changed([entry.key for entry in changed], sum(entry.tensor.nbytes for entry in changed))

    def _changed(self, keys: Sequence[str], nbytes: int) -> Changed:
        """The error for these tensors; the layout remembers them: they are copied in memory from now on, when a step closes, or
        at its end if a forward changes them."""
        names = ", ".join(map(repr, keys[:8])) + (" ..." if keys[8:] else "")
        verb = "were" if keys[1:] else "was"
        what = f"{names} {verb} changed in place outside opt.step() while the checkpoint of step {self._step} was being copied"
        if self.in_forward is None:
            return Changed(f"{what}, which would mix two iterations; that checkpoint is discarded. {WAY_OUT}.")
        self._layout.changed_outside |= set(keys)
        size = f"which takes {nbytes / 2**20:.1f} MiB for each checkpoint in flight"
        return ChangedInTurns(f"{what}; that checkpoint is discarded. From now on they are copied in memory, {size}")
