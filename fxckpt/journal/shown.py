"""Whether steps on a device come out the same when they are made again: shown by the device itself, before anybody relies on it.

When a program updates its first parameters, their update is made twice: over copies, by the code that makes steps again for
``load``, and then in place by the run. Their bits are compared on the device. The answer comes behind the step, to the thread
that commits: no record is committed without it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxckpt.compat.optimizers import plain_class
from fxckpt.journal.replay import Again
from fxckpt.optim.bindings import BoundParam
from fxckpt.optim.stepper import Stepper
from fxckpt.saving.inventory import storable
from fxckpt.store.names import MODEL, OPTIMIZER, state_key

ENOUGH = 8 << 20
"""Bytes of parameters whose update is made twice, small ones first; of each program one at least, whatever its size. Their state
and gradients come on top."""

OTHER_BITS = "a step that was made again on {device}, as load() would, had other bits"
NOT_AGAIN = "the code that makes steps again took this one for one that cannot be"
NO_ROOM = "{device} had no memory for a few parameters' copies, to show that steps made again there have the same bits"

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Later = Callable[[torch.Tensor], Callable[[], torch.Tensor]]
"""Of a tensor on a device, what gives its value as it is behind what is in the stream now, and waits for it."""

Tensors = dict[tuple[str, str], torch.Tensor]


@dataclass(frozen=True)
class _Twice:
    """An update that is made twice: what it changes, and copies that it was made on already."""

    device: str
    live: Tensors
    again: Tensors
    programs: frozenset[object]


class Shown:
    """What was shown so far, and what is being compared. ``refused``: why steps are not to be relied on, once that is known."""

    def __init__(self, steppers: Sequence[Stepper], update: str | None, later: Later, is_remote: Callable[[torch.Tensor], bool]):
        self._steppers, self._update, self._later, self._is_remote = steppers, update, later, is_remote
        self._known: set[object] = set()  # programs, each with the optimizer and the group that it runs for
        self._twice: _Twice | None = None
        self._asked: deque[Callable[[], str | None]] = deque()  # of each comparison, what is wrong
        self.refused: str | None = None

    def begins(self, index: int, gradients: Sequence[torch.Tensor | None], device: str) -> None:
        """The update of this optimizer is about to run on ``device``: make that of parameters whose program was not seen yet."""
        self._twice = None
        stepper, known = self._steppers[index], self._known
        given = [(m, g) for m, g in zip(stepper.executor.arranged.members, gradients) if g is not None]
        if all((index, m.group, stepper.programs.follow(m)) in known for m, _ in given):
            return
        try:
            self._twice = self._made_on_copies(index, _chosen(index, given, known), device)
        except torch.OutOfMemoryError:
            self.refused = NO_ROOM.format(device=device)

    def _made_on_copies(self, index: int, chosen: Sequence[tuple[BoundParam, torch.Tensor]], device: str) -> _Twice | None:
        """One step of these parameters, by the code that makes steps again; None, with the reason noted, if it makes none."""
        opt, members = self._steppers[index].opt, [m for m, _ in chosen]
        live: Tensors = {(MODEL, m.name): m.local.detach() for m in members}
        live |= {(OPTIMIZER, state_key(index, key, m.name)): t for m in members for key, t in m.state.items()}
        again = {place: tensor.clone() for place, tensor in live.items()}
        settings = [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in opt.param_groups]
        saved: Mapping[str, Any] = {
            "class": plain_class(opt).__name__,
            "groups": [{"settings": s, "params": [m.name for m in members if m.group == i]} for i, s in enumerate(settings)],
            "state": {m.name: {"keys": list(m.state)} for m in members},
        }
        if not Again(index, saved, again, self._update).step(settings, {m.name: grad.detach().clone() for m, grad in chosen}):
            self.refused = NOT_AGAIN
            return None
        return _Twice(device, live, again, frozenset((index, m.group, m.program) for m in members))

    def forget(self) -> None:
        """No update is about to be compared."""
        self._twice = None

    def updated(self) -> None:
        """It has run: compare. Nothing waits for the device."""
        twice, self._twice = self._twice, None
        if twice is None:
            return
        try:
            self._compare(twice)
        except torch.OutOfMemoryError:
            self.refused = NO_ROOM.format(device=twice.device)

    def _compare(self, twice: _Twice) -> None:
        """Ask whether bits differ."""
        self._known |= twice.programs
        pairs = [(_bits(tensor), _bits(twice.again[place])) for place, tensor in twice.live.items()]
        here = [(a, b) for a, b in pairs if not self._is_remote(a)]
        there = [torch.ne(a, b).any() for a, b in pairs if self._is_remote(a)]
        if not all(torch.equal(a, b) for a, b in here):
            self.refused = OTHER_BITS.format(device=twice.device)
        if there:
            differ, device = self._later(torch.stack(there).any().reshape(1)), twice.device
            self._asked.append(lambda: OTHER_BITS.format(device=device) if differ().any() else None)

    def wait(self) -> str | None:
        """Why steps here are not to be relied on, None if they are: waits for what is being compared. In one thread only."""
        while self._asked:
            self.refused = self._asked.popleft()() or self.refused
        return self.refused


def _chosen(
    index: int, given: Sequence[tuple[BoundParam, torch.Tensor]], known: set[object]
) -> list[tuple[BoundParam, torch.Tensor]]:
    """Of each program that is not known one parameter at least, and more as long as they are small."""
    chosen, seen, nbytes = [], set(known), 0
    for member, grad in sorted(given, key=lambda each: each[0].local.nbytes):
        kind = index, member.group, member.program
        if kind not in seen or (kind not in known and nbytes + member.local.nbytes <= ENOUGH):
            seen.add(kind)
            nbytes += member.local.nbytes
            chosen.append((member, grad))
    return chosen


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its elements as integers: two that are no numbers are equal only if they have the same bits."""
    real = storable(tensor)
    return real if real.dtype is torch.bool else real.view(_BITS[real.element_size()])
