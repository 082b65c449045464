"""The port behind a StepGraph's ops: waits for copies, hands layers to the engine, notices changes made in between."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeGuard

import torch

from fxckpt.compat import cuda
from fxckpt.compat.spread import local
from fxckpt.engine import SLICE, Engine, Sources
from fxckpt.errors import Cancelled, FxckptError
from fxckpt.graph import ops
from fxckpt.journal.chain import Chain
from fxckpt.saving import plan
from fxckpt.saving.guard import Changed
from fxckpt.saving.in_flight import InFlight
from fxckpt.saving.inventory import storable
from fxckpt.saving.landing import Waiting
from fxckpt.saving.saver import Saver

log: logging.Logger = logging.getLogger("fxckpt")

OnLayer = Callable[[str, int, dict[str, torch.Tensor]], object]


class Emitter:
    """Hands the layers of the checkpoint under way to the engine, and guards what is being copied.

    ``current`` is the checkpoint being emitted, inside ``opt.step()`` or ``save``; ``changed_outside`` the keys of tensors
    that were seen to change outside ``opt.step()``; ``number`` is what StepGraphs pass to the ops.
    """

    def __init__(self, engine: Engine, saver: Saver, devices: cuda.Devices, on_layer: OnLayer | None):
        self.saver: Saver = saver
        self.devices: cuda.Devices = devices
        self.engine = engine
        self.ordinals: set[int] = set()  # the devices that the run's tensors lie on
        self.current: InFlight | None = None
        self.changed_outside: set[str] = set()
        self.number: int = ops.register_port(self)
        self.chain: Chain | None = None  # of the journal
        self.callback_error: Exception | None = None  # what on_layer raised in this step
        self.calling: bool = False  # on_layer runs, with no lock held that a copy or a commit needs
        self._on_layer = on_layer

    def fence(self, layer: int, tensors: Sequence[torch.Tensor]) -> None:
        """Wait until every copy of this layer is done."""
        self._wait(layer)

    def emit(self, layer: int, tensors: Sequence[torch.Tensor]) -> None:
        """Hand a layer to the engine, if a checkpoint is being taken."""
        if self.current is not None:
            self.hand_over(self.current, layer, tensors)

    def log(self, layer: int, gradients: Sequence[torch.Tensor | None]) -> None:
        """Hand the gradients that a layer is about to be updated with to the engine, if a record of the journal takes them."""
        pending = self.current
        if pending is None or pending.link is None or pending.layout.layers[layer].kind != "gradients":
            return
        self._log(pending, layer, Waiting([grad.detach() for grad in gradients if grad is not None]))

    def _log(self, pending: InFlight, layer: int, waiting: Waiting) -> None:
        """Hand over the gradients of a layer, copied in memory where they may change meanwhile: on a device the next replay of a
        graph writes over them, and moves no version."""
        found, tensors = pending.layout.layers[layer], waiting.tensors
        on_device = pending.link is not None and pending.link.device is not None
        mine = found.mine(tensors)
        if waiting.copied:
            self.hand_over_copies(pending, layer, mine)
        elif on_device or {e.key for e in found.entries} & self.changed_outside or (sources := self.sources(mine)) is None:
            copies = [snapshot(grad, e.key) for e, grad in zip(found.mine(found.entries), mine)]
            self.hand_over_copies(pending, layer, copies)
        else:
            pending.guard.watch_now(layer, tensors)
            self._hand_over(pending, layer, sources)

    def fence_all(self) -> None:
        """Look for changes, and wait until nothing is being copied."""
        self.look_for_changes()
        self._wait(-1)

    def _wait(self, layer: int) -> None:
        """Wait for a layer's copies, or for all (-1). A checkpoint whose copies make no progress is dropped by the committer (a
        hung disk), or from here if the committer hangs itself."""
        if self.engine is None or not self.engine.pending():
            return
        streams, waited = self._streams(), None
        while not self.engine.fence(layer, SLICE, streams):
            waited = waited or self.saver.flights.patience()
            if waited.over():
                self.saver.flights.drop_all("the disk hangs")

    def look_for_changes(self, numbers: Iterable[int] | None = None, layout: plan.Layout | None = None) -> None:
        """Drop checkpoints under way of which a tensor is not as its step left it; after this it may change.

        ``numbers``: the layers of the optimizer that is about to step, as ``layout`` numbers them; without them all layers.
        They are looked at together, before the first is updated: views of one buffer have one version counter.
        """
        for pending in self.saver.flights.under_way():
            if pending is self.current or (numbers is not None and not pending.layout.numbers_as(layout)):
                continue  # emitted in this very step, or it numbers its layers otherwise and was waited for with that layout
            all_of = pending.layout.number
            layers = [*all_of("update"), *all_of("frozen"), *all_of("gradients")] if numbers is None else list(numbers)
            pending.guard.let_go(layers, partial(self.discard, pending))
            if pending.link is not None:
                pending.link.let_go(layers)

    def discard(self, pending: InFlight, error: Changed) -> None:
        """A tensor of this checkpoint changed."""
        if pending.given_up is None and isinstance(error, Cancelled):
            log.warning("fxckpt: the checkpoint of step %d is dropped: %s", pending.step, error)
        elif pending.given_up is None and pending.fail(error):
            self.saver.tally.note_failure(pending.step, error)
        pending.give_up(str(error))

    def hand_over(self, pending: InFlight, layer: int, tensors: Sequence[torch.Tensor], copied: bool = False) -> None:
        """Hand a layer of this checkpoint to the engine, and a copy of it to ``on_layer``. ``copied``: a copy to the engine, too.

        What was seen to change outside ``opt.step()`` is handed over ``copied``, since nothing fences such changes: when the step
        closes, or at once if it is a forward that changes it.
        """
        found = pending.layout.layers[layer]
        if found.kind == "gradients":  # handed over before the update, or kept since a step before this one
            if pending.link is not None and (waiting := pending.link.waiting.pop(layer, None)) is not None:
                self._log(pending, layer, waiting)
            if self.chain is not None:
                self.chain.digest(pending, layer, self._streams)
            return
        if pending.link is not None and found.kind == "counts":  # a record has those of whole layers only
            tensors = [local(e.tensor) for e in found.entries]
        guard = pending.guard
        outside = self.changed_outside if found.kind == "update" and not copied else ()
        if outside and (keys := {e.key for e in found.entries} & outside):
            if not keys.issubset(guard.in_forward or ()):
                guard.deferred.append((layer, tensors))
                return
            copied = True
        if len(found.entries) != len(tensors):
            raise FxckptError(f"layer {found.name!r} was planned with {len(found.entries)} tensors, {len(tensors)} came")
        if found.kind != "counts" and not copied:
            guard.watch(layer, tensors)
        if found.sources is None or copied:
            mine = found.mine(list(zip(found.entries, tensors)))
            self.hand_over_copies(pending, layer, [snapshot(t, e.key) for e, t in mine])
        else:
            self._hand_over(pending, layer, found.sources)

    def hand_over_copies(self, pending: InFlight, layer: int, copies: Sequence[torch.Tensor]) -> None:
        """Hand over copies that were made for this checkpoint."""
        pending.guard.copies += copies
        self._hand_over(pending, layer, self.sources(copies))

    def _hand_over(self, pending: InFlight, layer: int, sources: Sources) -> None:
        """To the engine, and to ``on_layer``."""
        found = pending.layout.layers[layer]
        pending.emit(layer, sources, self._streams() if sources.devices else None)
        if self._on_layer is not None and found.kind == "update":
            try:
                self.calling = True
                self._on_layer(found.name, pending.step, {e.key: e.tensor.detach().clone() for e in found.entries})
            except Exception as error:
                self.callback_error = self.callback_error or error
            finally:
                self.calling = False

    def open_devices(self, tensors: Iterable[torch.Tensor]) -> None:
        """Make the engine ready for every device that the run's tensors lie on now."""
        self.ordinals |= self.devices.all_of(map(local, tensors))
        for ordinal in sorted(self.ordinals):
            self.engine.open_device(ordinal, self.devices.driver)

    def sources(self, tensors: Sequence[torch.Tensor]) -> Any:
        """What the engine reads: addresses, and the device of each. None if that must be copied in memory first: a device
        copies whole ranges, and files are in row-major order."""
        devices = [self.devices.of(t) for t in tensors]
        if any(device is not None and not t.is_contiguous() for t, device in zip(tensors, devices)):
            return None
        return Sources(plan.source_items(tensors), devices)

    def _streams(self) -> dict[int, int]:
        """The stream that each device trains on now."""
        return self.devices.streams(self.ordinals) if self.ordinals else {}

    def later(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """The value that a tensor on a device has after what was put into its stream so far. The result waits for it, in any
        thread, and gives a tensor in host memory."""
        self.open_devices([tensor])  # it may have come to its device after the last plan, or lie where no layer does
        source = tensor.detach().resolve_conj().resolve_neg().contiguous()
        shape, dtype = source.shape, source.dtype
        [(ordinal, stream)] = self.devices.streams(self.devices.all_of([tensor])).items()
        fetch = self.engine.fetch(source.data_ptr(), source.nbytes, ordinal, stream)

        def value() -> torch.Tensor:
            host = torch.empty(shape, dtype=dtype, device="cpu")
            fetch.read_into(host.data_ptr())
            return host

        return value

    def is_remote(self, tensor: object) -> TypeGuard[torch.Tensor]:
        """Is it a tensor on a device?"""
        return isinstance(tensor, torch.Tensor) and self.devices.is_on_one(tensor)


def snapshot(tensor: torch.Tensor, key: str) -> torch.Tensor:
    """A copy, in row-major order, for one checkpoint. On a device it is made in order on the current stream."""
    return storable(tensor, key).clone(memory_format=torch.contiguous_format)
