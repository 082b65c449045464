"""Steps made again: a checkpoint's tensors and the records behind it give what training had, by the same updates as then.

The optimizers are new ones of the same classes over the tensors that they are given. Their steps run by the same programs as a
run's do, without a StepGraph: which code updates a parameter depends on its state and the step's inputs only.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fxckpt.errors import Corrupt
from fxckpt.graph.model.layers import Layer
from fxckpt.journal.digests import digest
from fxckpt.journal.layout import gradient_key, layer_label
from fxckpt.journal.machine import adds_up, machine
from fxckpt.journal.repeatable import REPEATABLE
from fxckpt.optim.stepper import Stepper
from fxckpt.saving.inventory import storable
from fxckpt.saving.plan import source_items
from fxckpt.store.boxes import Box
from fxckpt.store.checks import list_of
from fxckpt.store.dtypes import Tensor, item_size
from fxckpt.store.journaled import Broken
from fxckpt.store.names import GRADIENTS, MODEL, OPTIMIZER, state_key
from fxckpt.store.parts import box_of
from fxckpt.store.reader import Reader
from fxckpt.store.record import Journal, LayerRecord, Record, TensorRecord
from fxckpt.store.typed_json import decode_state

log: logging.Logger = logging.getLogger("fxckpt")

Tensors = Mapping[tuple[str, str], torch.Tensor]
"""By file and key."""

Groups = Sequence[Mapping[str, Any]]
"""The settings of an optimizer's groups."""

_GROUPS = list_of(list_of(lambda value: isinstance(value, dict)))


@dataclass(frozen=True)
class Found:
    """What was read of a record: with how many threads its steps were made; of each step, in their order, the optimizer's number
    and its groups' settings; the gradients by their parameters, and what it has whole by its place."""

    threads: int
    steps: Sequence[tuple[int, Groups]]
    gradients: Mapping[str, torch.Tensor]
    whole: Mapping[tuple[str, str], torch.Tensor]


class Again:
    """One optimizer whose steps are made again. ``index``: its number; ``saved``: what the checkpoint's record says of it,
    decoded; ``tensors``: those of the checkpoint, which its steps change."""

    def __init__(self, index: int, saved: Mapping[str, Any], tensors: Tensors, update: str | None):
        if saved["class"] not in REPEATABLE:
            raise Corrupt("the journal", f"it is of the optimizer {saved['class']!r}, whose steps are not journalled")
        self.params: Mapping[str, torch.Tensor] = {n: tensors[MODEL, n] for g in saved["groups"] for n in g["params"]}
        groups = [{**group["settings"], "params": [self.params[n] for n in group["params"]]} for group in saved["groups"]]
        self._opt: torch.optim.Optimizer = getattr(torch.optim, saved["class"])(groups)
        for name, described in saved["state"].items():
            state = {key: tensors[OPTIMIZER, state_key(index, key, name)] for key in described["keys"]}
            self._opt.state[self.params[name]] = state
        self._name_of = {id(param): name for name, param in self.params.items()}
        self._stepper = Stepper(self._opt, update)

    def step(self, groups: Groups, gradients: Mapping[str, torch.Tensor]) -> bool:
        """One step, by the code that made it before. False if it is none that can be made again from gradients."""
        if len(groups) != len(self._opt.param_groups):
            return False
        for group, settings in zip(self._opt.param_groups, groups):
            group.update(settings)
        for name, param in self.params.items():
            found = gradients.get(name)
            param.grad = None if found is None else found.to(param.device)
        stepper = self._stepper
        try:
            with torch.no_grad():
                if stepper.bindings.stale():
                    self._bind()
                if stepper.strategy.own_part(None) is not None or stepper.whole is not None:
                    return False
                stepper.strategy.run(None)
        finally:
            for param in self.params.values():
                param.grad = None
        return True

    def _bind(self) -> None:
        stepper, names = self._stepper, tuple(self.params)
        stepper.bind(lambda param: self._name_of[id(param)], {})
        stepper.executor.arrange(stepper.bindings.members, [Layer("all", names)], [], [0], None, {})


class Replay:
    """Makes steps again. ``tensors``: all parameters and all optimizer state of the checkpoint ``base``, read already, which the
    steps change. ``optimizers``: what the base's record says of them, decoded. ``boxes``: which parts of their wholes they are,
    of those that are. ``device``: the name of that on which parameters lie; None: host memory."""

    def __init__(
        self,
        base: Record,
        optimizers: Sequence[Mapping[str, Any]],
        tensors: Tensors,
        update: str | None,
        boxes: Mapping[tuple[str, str], Box],
        device: str | None,
    ):
        self._tensors, self._boxes = tensors, boxes
        self._wholes = {t.key: tuple(t.shape) for t in base.tensors(MODEL)}
        self._optimizers = [Again(index, saved, tensors, update) for index, saved in enumerate(optimizers)]
        self._params = {name: param for each in self._optimizers for name, param in each.params.items()}
        self._layers = dict(_labelled(base, self._optimizers, self._parts()))
        self._sums = adds_up(saved["class"] for saved in optimizers)
        self._here = machine(self._sums, device)
        self._room: tuple[dict[str, torch.Tensor], ...] = ({}, {})  # for the gradients of a step and of the next one, in turns
        self._digested: dict[str, int] = {}  # layer -> the number of the last record that it was compared in

    def _parts(self) -> Mapping[str, Box]:
        """By name, the boxes of parameters that are not all of them."""
        given = {key: box for (file, key), box in self._boxes.items() if file == MODEL}
        return {key: box for key, box in given.items() if box[1] != self._wholes[key]}

    def make(self, readers: Sequence[Reader]) -> None:
        """All steps of these records. Raises Broken, with the tensors in the middle of it."""
        began = time.monotonic()
        steps = f"step {readers[0].record.step} to {readers[-1].record.step}"
        count = sum(len(_journal(each).order) for each in readers)
        log.info("fxckpt: making %s again from the journal: %d updates", steps, count)
        self._check_machine(readers)
        # The thread reads a record while the step before it is made.
        with ThreadPoolExecutor(1, "fxckpt-journal") as thread, _same_threads(), torch.autocast("cpu", enabled=False):
            ahead = thread.submit(self._read, readers[0], 0)
            for index, reader in enumerate(readers):
                try:
                    found = ahead.result()
                    if index + 1 < len(readers):
                        ahead = thread.submit(self._read, readers[index + 1], index + 1)
                    self._step(reader, found)
                except Corrupt as error:
                    raise Broken(index, error) from error
                self._compare(index, reader)
        log.info("fxckpt: made %s again from the journal: %d updates in %.3g s", steps, count, time.monotonic() - began)

    def _check_machine(self, readers: Sequence[Reader]) -> None:
        """Raises Broken for the first record whose step has other bits here, most likely, and says where that may be."""
        here, others = self._here, [_journal(each).machine for each in readers]
        if all(each == here for each in others):
            return
        if self._sums:
            index = next(i for i, each in enumerate(others) if each != here)
            what = f"its step adds elements up, and was made with {others[index]}; here is {here}, where sums may have other bits"
            raise Broken(index, Corrupt(readers[index].path, what))
        what = "fxckpt: they were made with %s, and here is %s: should that give other bits, a layer that is compared tells"
        log.warning(what, " and with ".join(sorted({*others} - {here})), here)

    def _read(self, reader: Reader, index: int) -> Found:
        """All of a record that its steps take."""
        journal, room = _journal(reader), self._room[index % 2]
        places = {t.place: t for t in reader.record.tensors()}
        given = [name for name in self._params if (GRADIENTS, gradient_key(name)) in places]
        wanted = {(GRADIENTS, gradient_key(name)): self._gradient(name, journal, room) for name in given}
        whole = {place: tensor for place, tensor in self._tensors.items() if place in places and place[0] != GRADIENTS}
        whole = {place: tensor for place, tensor in whole.items() if place[0] == OPTIMIZER or place[1] in self._params}
        landing = {place: torch.empty(tensor.shape, dtype=tensor.dtype) for place, tensor in whole.items()}
        boxes = {place: self._boxes[MODEL, name] for place, name in zip(wanted, given) if (MODEL, name) in self._boxes}
        boxes |= {place: self._boxes[place] for place in landing if place in self._boxes}
        both = {place: storable(tensor) for place, tensor in {**wanted, **landing}.items()}
        for place, tensor in both.items():
            _check_fits(reader, places[place], tensor, boxes.get(place))
        reader.read_into(dict(zip(both, source_items(list(both.values())))), boxes=boxes or None)
        groups = decode_state(journal.groups, _StateTensors(reader))
        if not _GROUPS(groups) or len(groups) != len(journal.order) or max(journal.order, default=0) >= len(self._optimizers):
            raise Corrupt(reader.path, f"its steps are not those of the {len(self._optimizers)} optimizers of its checkpoint")
        return Found(journal.threads, list(zip(journal.order, groups)), {name: room[name] for name in given}, landing)

    def _step(self, reader: Reader, found: Found) -> None:
        """Make its steps; then set what it has whole."""
        if found.threads != torch.get_num_threads():
            torch.set_num_threads(found.threads)
        for index, groups in found.steps:
            if not self._optimizers[index].step(groups, found.gradients):
                raise Corrupt(reader.path, "its step is not one that can be made again from gradients")
        with torch.no_grad():
            for place, tensor in found.whole.items():
                self._tensors[place].copy_(tensor)

    def _gradient(self, name: str, journal: Journal, room: dict[str, torch.Tensor]) -> torch.Tensor:
        """A tensor for this gradient, in the order of memory that it had: kernels go by it."""
        param, strides = self._params[name], journal.strides.get(name)
        wanted = param.stride() if strides is None else tuple(strides)
        found = room.get(name)
        if found is None or found.stride() != wanted:
            if len(wanted) != param.dim() or sum((n - 1) * s for n, s in zip(param.shape, wanted)) >= max(param.numel(), 1):
                raise Corrupt("the journal", f"the gradient of {name!r} has strides {wanted}, which are none of its shape")
            found = room[name] = torch.empty_strided(param.shape, wanted, dtype=param.dtype)
        return found

    def _compare(self, index: int, reader: Reader) -> None:
        """Compare the layers that this record has digests of. Raises Broken: the last step that is good is that of the record in
        which the layer was compared before."""
        journal = _journal(reader)
        for name, crc in journal.digests.items():
            layer = self._layers.get(name)
            if layer is None and self._boxes:
                continue  # of other parts than these
            found = None if layer is None else digest(self._tensors[t.place] for t in layer.tensors)
            if found != crc:
                of_step = f"layer {name!r} of step {reader.record.step}"
                what = f"{of_step}, made again, is not what training had (CRC-32C {found}, not {crc})"
                if journal.machine != self._here:
                    what += f"; it was trained with {journal.machine}, and this is {self._here}"
                raise Broken(self._digested.get(name, 0), Corrupt(reader.path, what, layer=name))
            self._digested[name] = index + 1


def _labelled(base: Record, optimizers: Sequence[Again], parts: Mapping[str, Box]) -> Iterator[tuple[str, LayerRecord]]:
    """The layers that steps update, as digests call them. ``parts``: the boxes of parameters that are not all of them."""
    owner = {name: index for index, each in enumerate(optimizers) for name in each.params}
    for layer in base.layers:
        if base.ranks:  # their parts have the tensors in another order than one process would
            layer = dataclasses.replace(layer, tensors=tuple(sorted(layer.tensors, key=lambda each: each.place)))
        if layer.kind == "update" and (mine := [owner[t.key] for t in layer.tensors if t.key in owner]):
            of = {t.key: parts[t.key] for t in layer.tensors if t.key in parts}
            yield layer_label(mine[0], layer.name, of), layer


def _journal(reader: Reader) -> Journal:
    """What makes its record one of a journal. Raises Corrupt if it is none."""
    if reader.record.journal is None:
        raise Corrupt(reader.path, "it is no record of a journal")
    return reader.record.journal


@contextmanager
def _same_threads() -> Iterator[None]:
    """Behind it PyTorch has as many threads as before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def _check_fits(reader: Reader, place: TensorRecord, real: torch.Tensor, box: Box | None) -> None:
    """A record's tensor must have the type and shape of what it is of, which may be a ``box`` of it: another program may have
    written it."""
    offset, shape = box or box_of(place)
    inside = len(offset) == len(place.shape) and all(at + n <= size for at, n, size in zip(offset, shape, place.shape))
    if not inside or tuple(shape) != tuple(real.shape) or item_size(place.dtype) != real.element_size():
        raise Corrupt(reader.path, f"{place.key!r} is {place.dtype}{list(place.shape)}, of another shape than in its checkpoint")


class _StateTensors(Mapping[str, Tensor]):
    """The tensors of a record's extra state, read when the first is asked for: settings are numbers, most often."""

    def __init__(self, reader: Reader):
        self._reader = reader

    @functools.cached_property
    def _found(self) -> Mapping[str, Tensor]:
        return self._reader.state_tensors()

    def __getitem__(self, key: str) -> Tensor:
        return self._found[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)
