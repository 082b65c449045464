"""One optimizer as the run holds it: its bindings, its programs, and the strategy by which it steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

import torch

from fxckpt.compat.optimizers import is_stock, plain_class
from fxckpt.compat.spread import is_spread, spread_alike
from fxckpt.errors import SetupError
from fxckpt.graph.update.trace import ELEMENTWISE
from fxckpt.optim.bindings import Bindings, BoundParam
from fxckpt.optim.contract.wrappers import refuse_inner
from fxckpt.optim.executor import Executor
from fxckpt.optim.given import Given, given_to
from fxckpt.optim.held import HeldWeakly
from fxckpt.optim.programs import ProgramCache
from fxckpt.optim.rehearsal.step import RehearsedStep
from fxckpt.optim.strategy import SplitStep, Strategy, WholeStep

log: logging.Logger = logging.getLogger("fxckpt")


class Stepper:
    """The parts that run one optimizer's steps, and how far its step is. ``update_mode``: see ``ProgramCache``."""

    opt: HeldWeakly = HeldWeakly()

    def __init__(self, opt: torch.optim.Optimizer, update_mode: str | None):
        self.opt = opt
        self.given: Given = given_to(opt)  # by the script, before anything is loaded
        self.bindings: Bindings = Bindings(opt)
        self.programs: ProgramCache = ProgramCache(opt, update_mode)
        self.executor: Executor = Executor(opt)
        self.stock: bool = is_stock(opt)
        self.split: Strategy = SplitStep(opt, self.programs, self.executor) if self.stock else RehearsedStep(opt, self.executor)
        self.whole_step: WholeStep = WholeStep(opt)  # where gradients are scaled
        self.strategy: Strategy = self.split
        self.stepped = False  # in this process
        self.accumulated = True  # gradients may have arrived since its last step
        self.halfway = False  # a step is under way, or was left by an exception: some layers may be updated and some not

    @property
    def whole(self) -> str | None:
        """Why it runs its own step, whole."""
        return self.strategy.whole

    def bind(self, name_of: Callable[[torch.Tensor], str], sharing: Mapping[int, str]) -> None:
        """Read the optimizer anew: its parameters, their state, the program of each. ``name_of``: a parameter's name in files;
        ``sharing``: see inventory.shared_memory. ``executor.arrange`` must follow."""
        refuse_inner(self.opt)
        refuse_repeated(self.opt, name_of)
        members: list[BoundParam] = []
        for index, group in enumerate(self.opt.param_groups):
            for param in group["params"]:
                members.append(BoundParam(name_of(param), param, index, len(members), self.opt.state.get(param)))
        _check_spread_states(members)
        # Two parameters of one memory are updated twice a step, in PyTorch's order, and nothing may copy it in between.
        shared = next((sharing[id(m.param)] for m in members if id(m.param) in sharing), None)
        whole = shared or _why_spread_runs_whole(self.opt, members) or self.programs.choose(members)
        self.strategy = self.split if whole is None else WholeStep(self.opt, whole)
        self.bindings.take(members)
        flat = {id(m.program): m.flat for m in members if m.program is not None}
        name, compiled = type(self.opt).__name__, sum(flat.values())
        log.debug(
            "bound %d parameters of %s; they share %d traced updates (%d compiled)", len(members), name, len(flat), compiled
        )

    def gradients(self) -> list[torch.Tensor | None]:
        """Of its parameters, in their order: those that the step which is about to run is given, of DTensors this rank's part
        once that was read."""
        given = self.split.given if isinstance(self.split, SplitStep) else []
        return list(given) or [param.grad for param in self.executor.arranged.params]

    def describe(self) -> str:
        """One line: what runs a step; empty while no state exists yet to tell."""
        said = self.strategy.describe()
        return said and f"{plain_class(self.opt).__name__}: {said}"


def _check_spread_states(members: Iterable[BoundParam]) -> None:
    """Raise SetupError for state of a DTensor that is neither a number nor laid out as it is: who would a load give it to?"""
    for m in (m for m in members if is_spread(m.param)):
        for key, value in m.own.items():
            if isinstance(value, torch.Tensor) and value.dim() and not spread_alike(value, m.param):
                raise SetupError(
                    f"{m.name!r} is a DTensor, and its state {key!r} {list(value.shape)} is not laid out over ranks so: "
                    "no checkpoint could give it back. Use an optimizer whose state is shaped like its parameters, as most of "
                    "torch.optim's are (not LBFGS's)"
                )


def _why_spread_runs_whole(opt: torch.optim.Optimizer, members: Iterable[BoundParam]) -> str | None:
    """Why steps of DTensors are not updates of this rank's parts; None if they are, or there is no DTensor."""
    if not any(is_spread(m.param) for m in members) or (is_stock(opt) and plain_class(opt).__name__ in ELEMENTWISE):
        return None
    return f"{plain_class(opt).__name__} is not known to treat every element alike, and a rank has parts of its DTensors"


def refuse_repeated(opt: torch.optim.Optimizer, name_of: Callable[[torch.Tensor], str]) -> None:
    """Raise SetupError for a parameter that stands in the groups twice: its layer would be updated and stored twice."""
    groups: dict[int, int] = {}
    for index, group in enumerate(opt.param_groups):
        for param in group["params"]:
            if (before := groups.get(id(param))) is not None:
                where = f"groups {before} and {index}" if before != index else f"group {index} twice"
                raise SetupError(
                    f"{name_of(param)!r} is in {where} of the {plain_class(opt).__name__}'s param_groups: a step would update it "
                    "twice, and a checkpoint could not say with which settings. Leave it in one"
                )
            groups[id(param)] = index
