"""Which tensor is called what, in which order layers are updated, which number each has, and where it lies in the files."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from fxckpt.compat.buckets import rebuilding, settle, why_not_settled
from fxckpt.compat.dynamo import untraced
from fxckpt.compat.ranks import rank, world_size
from fxckpt.compat.spread import box_of, is_spread, local
from fxckpt.compat.unreduced import holding
from fxckpt.config import Config
from fxckpt.graph.model.arrivals import FirstBackward
from fxckpt.graph.model.book import traces
from fxckpt.graph.model.layers import gradient_order, group_layers, layer_edges
from fxckpt.optim.stepper import Stepper
from fxckpt.run.emitting import Emitter
from fxckpt.run.hooks import GradientHooks
from fxckpt.saving import plan
from fxckpt.saving.inventory import Inventory, check_storable, is_position, shared_memory, take, trained_by
from fxckpt.saving.ownership import check_names, check_owned
from fxckpt.saving.share import Share

log: logging.Logger = logging.getLogger("fxckpt")


class Arrangement:
    """Binds the optimizers' tensors, names them, and numbers their layers; anew whenever one of them was replaced.

    ``inventory`` names every tensor, ``layout`` is the plan of the next checkpoint (None: to be made), ``unsaid`` that
    something was bound since somebody told the user what runs a step.
    """

    def __init__(
        self, model: torch.nn.Module | None, optimizers: Sequence[torch.optim.Optimizer], emitter: Emitter, config: Config
    ):
        self.model: torch.nn.Module | None = model
        self.emitter: Emitter = emitter
        self.steppers: list[Stepper] = [Stepper(opt, config.update) for opt in optimizers]
        for stepper in self.steppers:
            stepper.executor.journals = config.journal != 1 and stepper.stock
        self.inventory: Inventory = Inventory()
        self.layout: plan.Layout | None = None
        self.unsaid: bool = True
        self.hooks: GradientHooks = GradientHooks()
        self._config = config
        self._expected: dict[str, torch.Tensor] = {}  # by the names of a checkpoint that was loaded by position
        self._owned: frozenset[int] = frozenset()  # parameters whose owners were looked for
        self._layout_key: Any = None
        self._by_checked: dict[int | None, plan.Layout] = {}  # layouts that differ in whose part is checksummed as well
        self._arranged: Any = None
        self._first_order: list[torch.Tensor] = []  # in which gradients came first, until they have names
        self.summed: list[str] | None = None  # see ``settle_sums``; rank 0's alone counts
        self._first_backward: FirstBackward | None = None
        if emitter.engine is not None:
            self._first_backward = FirstBackward(optimizers, untraced(self.hooks.first_backward))

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """In the order in which the user gave them."""
        return [stepper.opt for stepper in self.steppers]

    def release(self) -> None:
        """Nothing will be stepped any more: let go of all tensors. A StepGraph refers to what executes it."""
        for stepper in self.steppers:
            vars(stepper.executor).clear()
        self.steppers.clear()
        if self.emitter.chain is not None:
            self.emitter.chain.stop()
            self.emitter.chain = None
        self.model, self.inventory, self.layout, self.hooks = None, Inventory(), None, GradientHooks()
        self._by_checked = {}

    def refresh(self, copies: bool = True) -> None:
        """Bind whatever was replaced since the last step, and write the StepGraphs if names, order or state changed. ``copies``:
        also where only a copy would notice (``Bindings.stale``)."""
        if self._first_backward is not None and (seen := self._first_backward.order()):
            self._first_backward.stop()  # all gradients arrived: the book takes their order
            self._first_backward = None
            traces.arrived(seen, self.model)
            self._first_order = seen
        stale = [s for s in self.steppers if s.bindings.stale(copies)]
        key = self._key()
        if not stale and key == self._arranged:
            return
        self.emitter.fence_all()  # copies under way still read the old tensors
        self._check_owned()
        self.inventory = take(self.model, self.optimizers, traces)
        if self._first_order and self.summed is None and world_size() > 2 and rebuilding(self._first_order):
            self.summed = [self.inventory.name_of(p) for p in self._first_order] if rank() == 0 else []
        self._first_order = []
        if self._expected:
            self._check_expected()
        sharing = shared_memory({**self.inventory.trained, **self.inventory.frozen})
        for stepper in self.steppers if key != self._arranged else stale:
            stepper.bind(self.inventory.name_of, sharing)
        self.unsaid = True
        self._number_layers()
        self.hooks.hook(self.steppers)
        self._arranged = self._key()

    def settle_sums(self, summed: list[str]) -> None:
        """Sum gradients from the first backward on as the process did that wrote the checkpoint which was loaded. ``summed``: the
        parameters, in the order in which its first backward had their gradients. All ranks call it together; where it cannot be,
        it is said."""
        self.summed = summed
        if self._first_backward is None or self._first_backward.order():  # it has come already, in this process
            return
        found = rebuilding(trained_by(self.optimizers))
        if why := "that it did not exist yet" if not found else next(filter(None, map(why_not_settled, found)), ""):
            log.warning(
                "fxckpt: the first backward behind this load sums gradients in another order than the run before did, so this is "
                "no bit-exact continuation: DistributedDataParallel makes its buckets anew, and %s kept fxckpt from making them "
                "as they were. Wrap the model before load()", why
            )  # fmt: skip
            return
        named = take(self.model, self.optimizers, traces).trained
        self._first_backward.deaf = True
        try:
            for each in found:
                settle(each, [named[name] for name in summed if name in named])
        finally:
            self._first_backward.deaf = False

    def _check_owned(self) -> None:
        """Before a step of other parameters than were looked at: each is in a model that is known, or in no module."""
        params = frozenset(map(id, trained_by(self.optimizers)))
        if params == self._owned:
            return
        check_owned(self.model, self.optimizers, traces)
        if self.model is None:
            check_storable(take(None, self.optimizers, traces))
        self._owned = params

    def expect(self, places: Mapping[str, str]) -> None:
        """A load put what was called so in its checkpoint where ``places`` says, by the names of now: positions, some of them."""
        inventory = take(self.model, self.optimizers, traces)
        self._expected = {old: inventory.trained[new] for old, new in places.items() if new in inventory.trained}

    def _check_expected(self) -> None:
        """Once the compiler has told names: are they those of the checkpoint that was loaded by position?"""
        names = {old: self.inventory.name_of(p) for old, p in self._expected.items() if id(p) in self.inventory.name_by_id}
        check_names(names)
        self._expected = {old: p for old, p in self._expected.items() if is_position(names.get(old, ""))}

    def look_for_names(self) -> None:
        """Before a checkpoint, and once the script's own code ran between here and its layout: name all there is, and bind anew
        if a parameter moved in its model (``torch.nn.utils.prune`` renames it)."""
        self.inventory = take(self.model, self.optimizers, traces)
        bound = ((m, self.inventory.trained.get(m.name)) for each in self.steppers for m in each.bindings.members)
        if self.model is not None and any(found is not member.param for member, found in bound):
            for stepper in self.steppers:
                stepper.bindings.invalidate()

    def halfway(self) -> bool:
        """Was a step left by an exception in its middle, with some layers updated and some not?"""
        return any(stepper.halfway for stepper in self.steppers)

    def have_gradients(self) -> bool:
        """Does a parameter have one, which waits for a step, be it that FSDP2 holds it back?"""
        return any(p.grad is not None for p in trained_by(self.optimizers)) or bool(holding(self.model))

    def _key(self) -> Any:
        """Changes when names or the order may have become known; the order is kept once a checkpoint was taken."""
        return (self.emitter.saver.tally.started > 0 and not self.inventory.positional) or traces.version

    def _number_layers(self) -> None:
        """Give every layer of a step its number, in the order in which steps update them, and write the StepGraphs."""
        numbers = itertools.count()
        for stepper in self.steppers:
            members = stepper.bindings.members
            named = [(m.name, m.param) for m in members]
            places = gradient_order(named, traces)
            layers = group_layers(places, self._config.layer)
            counts_number = next(numbers) if any(m.counts() for m in members) else None
            edges = layer_edges(layers, traces, named)
            stepper.executor.arrange(members, layers, edges, [next(numbers) for _ in layers], counts_number, places)
        self.layout = self._layout_key = None  # it keeps the tensors of the old bindings alive
        self._by_checked = {}

    def _layers(self) -> list[plan.EngineLayer]:
        """All layers by their numbers; those that no step updates come behind the others."""
        numbered: dict[int, plan.EngineLayer] = {}
        for index, stepper in enumerate(self.steppers):
            arranged = stepper.executor.arranged
            if arranged.counts_number is not None:
                numbered[arranged.counts_number] = plan.counts_layer(index, stepper)
            numbered.update(zip(arranged.numbers, plan.updated_layers(index, stepper)))
        numbered.update(enumerate(plan.other_layers(self.inventory, self.emitter.changed_outside), start=len(numbered)))
        return [numbered[number] for number in range(len(numbered))]

    def _laid_out(self, checked: int | None) -> plan.Layout:
        """What this process writes, and where. ``checked``: the rank whose part it checksums as well, where several write."""
        emitter, (rank, world), layers = self.emitter, self.emitter.saver.store.part, self._layers()
        emitter.open_devices(e.tensor for layer in layers for e in layer.entries)
        make = partial(plan.make_layout, emitter.engine, layers, emitter.changed_outside, emitter.sources)
        if world == 1:
            return make()
        share, own = Share(rank, world, checked), frozenset(self.inventory.buffers)
        alike, beside = share.take(layers, own)
        layout = make(share.files, share.checked_files)
        layout.share, layout.own, layout.alike = share, own, alike
        layout.beside = {} if self._config.on_divergence == "off" else beside
        return layout

    def _next_checked(self) -> int | None:
        """The rank whose part the next checkpoint is to checksum as well: in turn each that has what this one has."""
        rank, world = self.emitter.saver.store.part
        if world == 1 or self._config.on_divergence == "off":
            return None
        alike = set(range(world))
        for box in (box_of(param) for param in self.inventory.trained.values() if is_spread(param)):
            alike &= set(() if box is None else box.holders)
        others = sorted(alike - {rank}, key=lambda other: (other - rank) % world)
        return others[self.emitter.saver.tally.started % len(others)] if others else None

    def current_layout(self) -> plan.Layout:
        """The plan for the tensors as they are bound and named now; made anew when one was replaced."""
        emitter = self.emitter
        fixed = tuple((n, local(t).data_ptr()) for n, t in self.inventory.frozen.items())
        moving = tuple((n, t.shape, t.dtype) for n, t in self.inventory.buffers.items())
        key = (tuple(s.bindings.number for s in self.steppers), fixed, moving, frozenset(emitter.changed_outside))
        if key != self._layout_key or self.layout is None:
            if self.layout is not None:
                emitter.fence_all()  # layer numbers change their meaning
            self._by_checked, self._layout_key, self.layout = {}, key, None
        if (checked := self._next_checked()) not in self._by_checked:
            made = self._by_checked[checked] = self._laid_out(checked)
            made.numbering = next(iter(self._by_checked.values())).numbering
        self.layout = self._by_checked[checked]
        return self.layout
