"""Steps of the journal in a load: made again over the tensors of the checkpoint that was read, live ones where there are any."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxckpt.compat import cuda
from fxckpt.compat.spread import local
from fxckpt.errors import Corrupt, LayoutMismatch, SetupError
from fxckpt.journal.repeatable import flushes_denormals
from fxckpt.journal.replay import Replay
from fxckpt.loading import apply
from fxckpt.loading.match import Match, match_tensors
from fxckpt.loading.schema import Saved, check_encoded, decode
from fxckpt.loading.target import Target
from fxckpt.store import names
from fxckpt.store.journaled import Broken, Journaled
from fxckpt.store.reader import Reader
from fxckpt.store.record import Record


def open_journal(found: Journaled, rank: int = 0, read: Callable[[str], bytes] | None = None) -> list[Reader]:
    """Readers of its records, as this ``rank`` had them; ``read``: as ``Reader`` takes it. Raises Broken for the first that is
    damaged, SetupError where no step can be made again."""
    if flushes_denormals():
        what = "the journal's steps were made with numbers near zero as they are, which torch.set_flush_denormal(True) sets to 0"
        raise SetupError(f"{what}: call it behind fxckpt.load()")
    readers: list[Reader] = []
    for each in found.records:
        try:
            reader = Reader(each.path, rank, read)
            check_encoded(reader.record, str(reader.path / names.COMMIT))
            readers.append(reader)
        except Corrupt as error:
            raise Broken(len(readers), error) from error
    return readers


def verify(journal: Sequence[Reader] | None) -> None:
    """Read all of it. Raises Broken for the first record that is damaged."""
    for good, reader in enumerate(journal or ()):
        try:
            reader.verify()
        except Corrupt as error:
            raise Broken(good, error) from error


def decoded(journal: Sequence[Reader], base: Record) -> Saved:
    """What its last record says. Raises Broken."""
    last = journal[-1]
    try:
        return decode(last.record, last.state_tensors(), str(last.path / names.COMMIT), base)
    except Corrupt as error:
        raise Broken(len(journal) - 1, error) from error


Tensors = Mapping[tuple[str, str], torch.Tensor]


def beside(base: Reader, saved: Saved, match: Match, target: Target) -> dict[tuple[str, str], torch.Tensor]:
    """By file and key, what steps update and nobody has: to be read with the rest. Where there is no optimizer it is the state,
    made for the steps only. Raises LayoutMismatch if something of an optimizer that is there is missing."""
    wanted = [(names.MODEL, name) for each in saved.optimizers for group in each["groups"] for name in group["params"]]
    wanted += [(names.OPTIMIZER, key) for key in saved.places]
    missing = [place for place in wanted if place not in match.tensors]
    if missing and target.optimizers:
        listed = "".join(f"\n  {key}" for _, key in missing[:8])
        raise LayoutMismatch(f"steps of the journal are made again with all that they update; not live:{listed}")
    live = {place: t for place, t in match.tensors.items() if place in wanted}
    return new_tensors(base.record, saved.optimizers, live)


def new_tensors(base: Record, optimizers: Sequence[Mapping[str, Any]], live: Tensors) -> dict[tuple[str, str], torch.Tensor]:
    """New ones for what ``live`` lacks of the parameters and state of these optimizers, in the order of memory that they had."""
    places = {t.place: t for t in base.tensors()}
    made = Match()
    for index, optimizer, group in ((i, each, group) for i, each in enumerate(optimizers) for group in each["groups"]):
        for name in group["params"]:
            described = optimizer["state"].get(name, {"keys": [], "strides": {}, "complex": [], "plain": {}})
            param = live.get((names.MODEL, name))
            if param is None:
                place = places[names.MODEL, name]
                same = (described["strides"][key] for key in described["keys"] if key in described["strides"])
                strides = next((each for each in same if len(each) == len(place.shape)), None)
                param = made.tensors[names.MODEL, name] = apply.state_tensor(place, strides, None, False, torch.device("cpu"))
            keys = {key: places.get((names.OPTIMIZER, names.state_key(index, key, name))) for key in described["keys"]}
            apply.make_state(keys, described, param, group["settings"], {}, made)
    return {place: tensor for place, tensor in made.tensors.items() if place not in live}


def make(base: Reader, journal: Sequence[Reader], saved: Saved, tensors: Tensors) -> None:
    """Make its steps, in place, where they were made: on a device, or in host memory. Raises Broken."""
    first = journal[0].record.journal
    assert first is not None
    boxes = apply.boxes_of(tensors)
    parts = {place: local(t) for place, t in tensors.items()}
    devices = cuda.Devices()
    device = _device_of(journal, devices)
    there, name = _brought_to(device, saved.optimizers, parts, devices)
    Replay(base.record, saved.optimizers, there, first.update, boxes, name).make(journal)
    with torch.no_grad():
        for place, tensor in parts.items():
            if there[place] is not tensor:
                tensor.copy_(there[place])


def _device_of(journal: Sequence[Reader], devices: cuda.Devices) -> torch.device | None:
    """Where its steps are made; None: in host memory. Raises Broken where there is no such device."""
    made = [each.record.journal for each in journal]
    kinds = [None if each is None else each.device for each in made]
    for at, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise Broken(at, Corrupt(journal[at].path, "its step was made elsewhere than that of the record before it"))
    if kinds[0] is None:
        return None
    if (found := devices.there()) is None:
        by = "" if made[0] is None else f" ({made[0].machine})"
        raise Broken(0, Corrupt(journal[0].path, f"its step was made on a CUDA device{by}, and here is none to make it again on"))
    return found


def _brought_to(
    device: torch.device | None, optimizers: Sequence[Mapping[str, Any]], tensors: Tensors, devices: cuda.Devices
) -> tuple[dict[tuple[str, str], torch.Tensor], str | None]:
    """What steps update, on the device or in host memory: copies of what lies elsewhere. Counts and what was kept in host memory
    are there. And what the device is called that parameters lie on."""
    there, name = dict(tensors), None
    for index, optimizer, group in ((i, each, group) for i, each in enumerate(optimizers) for group in each["groups"]):
        for param in group["params"]:
            described = optimizer["state"].get(param, {"keys": []})
            places = {(names.OPTIMIZER, names.state_key(index, key, param)): key for key in described["keys"]}
            kept = {at for at, key in places.items() if apply.lies_on_host(key, tensors[at].dim(), described, group["settings"])}
            for at in ((names.MODEL, param), *places):
                remote = device is not None and at not in kept
                if remote != devices.is_on_one(tensors[at]):
                    there[at] = tensors[at].detach().to(device if remote else "cpu")
            if name is None and (ordinal := devices.of(there[names.MODEL, param])) is not None:
                name = devices.name(ordinal)
    return there, name


def set_what_is_whole(journal: Sequence[Reader], target: Target) -> dict[str, torch.Tensor]:
    """Set the buffers and frozen parameters that the last record has; those whose owners are not known yet are returned. Raises
    Broken."""
    last = journal[-1]
    match = match_tensors(last.record, target)
    if match.wrong:
        raise LayoutMismatch("\n".join([f"the record of step {last.record.step} does not fit:", *match.wrong]))
    try:
        apply.read_tensors(last, {place: t for place, t in match.tensors.items() if place[0] == names.MODEL})
        held = apply.read_later(last, match.later)
    except Corrupt as error:
        raise Broken(len(journal) - 1, error) from error
    apply.set_buffers(match, target)
    return held
