"""Which program updates a parameter: one for each signature and way to branch, traced and hoisted once, compiled where asked."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from fxckpt.compat.optimizers import default_implementation, is_stock
from fxckpt.errors import SetupError
from fxckpt.graph.update import inductor
from fxckpt.graph.update.hoist import Program
from fxckpt.graph.update.specialize import specialize
from fxckpt.graph.update.trace import MakesState, NotTraceable, Signature, signature_of
from fxckpt.optim.bindings import BoundParam, is_dense
from fxckpt.optim.held import HeldWeakly

log: logging.Logger = logging.getLogger("fxckpt")

_shared_programs: dict[Signature, list[Program]] = {}
"""Traced updates of torch.optim's classes, for all runs of the process."""


class ProgramCache:
    """The programs of one optimizer. ``mode``: ``None`` (kept as flagged, compiled where the choice was left to PyTorch),
    ``"native"``, ``"inductor"``."""

    opt: HeldWeakly = HeldWeakly()

    def __init__(self, opt: torch.optim.Optimizer, mode: str | None):
        self.opt = opt
        self.mode: str | None = mode
        self.traced: dict[Signature, list[Program] | NotTraceable] = {}  # one for each way to branch, or why there is none
        self.missing: bool = True  # some parameter has no program
        self._warned = False  # that an update is not compiled

    def choose(self, members: Sequence[BoundParam]) -> str | None:
        """Find the program of each parameter; returns why the optimizer must run its own step, whole, or None."""
        whole = None
        if not is_stock(self.opt):
            if self.mode == "inductor":
                self._warn("only classes of torch.optim are compiled")
            return None
        for member in members:
            try:
                self._choose(member)
            except MakesState as reason:
                whole = str(reason) if member.state else whole
            except NotTraceable as reason:
                whole = str(reason)
        self.missing = any(m.program is None for m in members)
        return whole

    def _choose(self, member: BoundParam) -> None:
        """Find one parameter's program; none if the stock step made a sparse state. Raises NotTraceable, and MakesState where the
        stock step has to make its state first."""
        if any(isinstance(v, torch.Tensor) and not is_dense(v) for v in member.state.values()):
            return
        group = self.opt.param_groups[member.group]
        flag = "fused" if group.get("fused") else "foreach" if group.get("foreach") else None
        explicit = flag is not None or group.get("foreach") is False or group.get("fused") is False
        on_host = member.local.device.type == "cpu"
        if self.mode == "inductor" and not on_host:
            raise SetupError(
                f'update="inductor" compiles updates on the CPU; {member.name} is on {member.local.device}: use '
                'update="native", or leave it out'
            )
        native = self.mode == "native" or (self.mode is None and (explicit or not on_host))
        member.compile = not native
        if native:
            member.implementation = flag or ("single" if explicit else default_implementation(member.local))
        self.follow(member)

    def follow(self, member: BoundParam) -> Program:
        """A parameter's program, of the branches that its counts take now (RAdam rectifies from some step on)."""
        before = member.program
        if before is not None and not before.outcomes:
            return before
        found = member.program = self._program(member)
        if found is not before and member.compile:
            self._compile(member, found)
        return found

    def _program(self, member: BoundParam) -> Program:
        """The traced and hoisted update of this parameter's signature, for the branches it takes now; each made once."""
        opt, group, state = self.opt, self.opt.param_groups[member.group], member.state
        signature = signature_of(opt, group, member.local, state, member.implementation)
        known = self.traced.setdefault(signature, _shared_programs.setdefault(signature, []))
        if isinstance(known, NotTraceable):
            raise known.anew()
        for found in known:
            if not found.outcomes or found.asks([state[key] for key in found.counts], found.values(group)) == found.outcomes:
                return found
        described = type(opt).__name__, signature.implementation, signature.dtype
        try:
            found = specialize(opt, group, member.local, state, signature)
        except NotTraceable as reason:
            log.debug("%s (%s, %s) is not traced: %s", *described, reason)
            self.traced[signature] = reason.anew()
            raise
        log.debug(
            "traced %s (%s, %s): %d scalars, inputs %s, branches %s", *described, found.scalars, found.inputs, found.outcomes
        )
        known.append(found)
        return found

    def _compile(self, member: BoundParam, program: Program) -> None:
        """Have the program compiled, if the parameter's tensors are laid out alike; what Inductor cannot take stays native."""
        member.flat = False
        try:
            inductor.compile_body(program)
        except NotTraceable as reason:
            self._warn(str(reason))
            return
        tensors = [member.bound(kind, key) for kind, key in program.inputs if kind != "grad"]
        member.flat = all(inductor.same_layout(t, member.local) for t in tensors) and inductor.is_dense(member.local)
        if not member.flat:
            log.debug("%s keeps PyTorch's kernels: its tensors are not dense in one order", member.name)

    def _warn(self, reason: str) -> None:
        """Say once that an update is not compiled."""
        if not self._warned:
            self._warned = True
            log.warning("fxckpt: %s is updated by PyTorch's own kernels: %s", type(self.opt).__name__, reason)
