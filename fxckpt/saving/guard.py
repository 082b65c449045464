"""Notices tensors that change while a checkpoint copies them, outside ``opt.step()``: such a checkpoint would be torn.

Each tensor's version counter is noted at the end of the step that handed it over, and compared before the next step changes
it, when the step closes and once all is copied. Counters see operations in place, when they end, and not those on ``.data``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

import torch

from fxckpt.compat.tensors import version_of
from fxckpt.errors import Cancelled, FxckptError
from fxckpt.saving.plan import Layout

ADVICE = {
    "update": "If your loop or a forward changes it every time (clamped weights, nn.Embedding with max_norm), loop with `for "
    "step in fxckpt.steps(n)`: it is copied at the end of each turn then.",
    "frozen": "From now on it is copied at the end of opt.step(). If your loop changes it after that (a target network), loop "
    "with `for step in fxckpt.steps(n)`: it is copied at the end of each turn then.",
}
"""What to do about a change, by the kind of layer."""


class Changed(FxckptError):
    """A tensor was changed outside ``opt.step()`` while it was being copied, so the checkpoint would be torn."""


class ChangedInTurns(Changed, Cancelled):
    """The same in a loop of ``fxckpt.steps``: no failure, for the tensor is copied at the ends of turns from now on."""


class Guard:
    """Watches over the memory that one checkpoint is copied from.

    ``turn``: it was begun inside a turn of fxckpt.steps. ``deferred`` are the layers to copy when that ends, and their tensors;
    ``copies`` are snapshots made for this checkpoint alone, which live until they are copied.
    """

    def __init__(self, step: int, layout: Layout):
        self.turn = False
        self.deferred: list[tuple[int, Sequence[torch.Tensor]]] = []
        self.copies: list[torch.Tensor] = []
        self._step, self._layout = step, layout
        self._versions: dict[int, tuple[Sequence[torch.Tensor], list[int]]] = {}  # layer -> its tensors, after the step
        self._looking = threading.Lock()  # held while they are compared and forgotten

    def watch(self, layer: int, tensors: Sequence[torch.Tensor]) -> None:
        """These were handed over in this step, which may go on to change them."""
        self._versions[layer] = (tensors, [])

    def note_versions(self) -> None:
        """Remember how what was handed over looks at the end of its step. Not at its emit: tensors that are views of one
        buffer count their changes together, and later updates of the same step are no changes behind our back."""
        for tensors, versions in self._versions.values():
            if not versions:
                versions.extend(map(version_of, tensors))

    def watch_again(self) -> None:
        """A step was left in its middle: what it did not come to is being copied still, and must not change unseen."""
        with self._looking:
            self.note_versions()

    def let_go(self, layers: Iterable[int], changed: Callable[[Changed], None]) -> None:
        """A step waits for the copies of these layers and then changes them. Tells ``changed`` what was changed before. The lock
        is held throughout, or the thread that commits would take what the step changes for a change behind our back."""
        with self._looking:
            for layer in layers:
                try:
                    self.compare(layer)
                except Changed as error:
                    changed(error)
                if (found := self._versions.get(layer)) is not None:
                    found[1].clear()

    def check_unchanged(self) -> None:
        """Once all is copied: is every tensor as its step left it, if no later step has looked since? Raises Changed with the
        tensor's name, and remembers it: a frozen one is copied with the buffers from now on."""
        with self._looking:
            for layer in [*self._layout.number("frozen"), *self._layout.number("update")]:
                self.compare(layer)
            self._versions.clear()  # what changes from here on, no copy sees
        self.copies.clear()

    def compare(self, layer: int) -> None:
        """Raises Changed if a tensor of this layer has another version than after its step."""
        tensors, versions = self._versions.get(layer, ((), []))
        for i, (tensor, version) in enumerate(zip(tensors, versions)):
            if version_of(tensor) != version:
                raise self._changed(layer, i)

    def _changed(self, layer: int, index: int) -> Changed:
        """The error for this tensor; the layout remembers it."""
        found = self._layout.layers[layer]
        key = found.entries[index].key
        self._layout.changed_outside.add(key)
        what = f"{key!r} was changed in place outside opt.step() while the checkpoint of step {self._step} was being copied"
        what += "; that checkpoint is discarded."
        if not self.turn:
            return Changed(f"{what} {ADVICE[found.kind]}")
        size = f"{sum(e.tensor.nbytes for e in found.entries) / 2**20:.1f} MiB for each checkpoint in flight"
        return ChangedInTurns(f"{what} From now on its layer is copied in memory at the end of each turn, which takes {size}")
