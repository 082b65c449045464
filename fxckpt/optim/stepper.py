"""One optimizer as the run holds it: its bindings, its programs, and the strategy by which it steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from fxckpt.compat.optimizers import is_stock, plain_class
from fxckpt.graph.model.layers import Layer, Place
from fxckpt.graph.step_graph import StepGraph
from fxckpt.optim.bindings import Bindings
from fxckpt.optim.bound_param import BoundParam
from fxckpt.optim.executor import Executor
from fxckpt.optim.programs import ProgramCache
from fxckpt.optim.rehearsal.step import RehearsedStep
from fxckpt.optim.strategy import SplitStep, Strategy, WholeStep

log: logging.Logger = logging.getLogger("fxckpt")


class Stepper:
    """The parts that run one optimizer's steps, and how far its step is.

    ``update_mode``: see ``ProgramCache``.
    """

    def __init__(self, opt: torch.optim.Optimizer, update_mode: str | None):
        self.opt = opt
        self.bindings: Bindings = Bindings(opt)
        self.programs: ProgramCache = ProgramCache(opt, update_mode)
        self.executor: Executor = Executor(opt)
        self.split: Strategy = (
            SplitStep(opt, self.programs, self.executor) if is_stock(opt) else RehearsedStep(opt, self.executor)
        )
        self.whole_step: WholeStep = WholeStep(opt)  # where gradients are scaled
        self.strategy: Strategy = self.split
        self.stepped = False  # in this process
        self.accumulated = True  # gradients may have arrived since its last step
        self.halfway = False  # a step is under way, or was left by an exception: some layers may be updated and some not
        self._warned = False  # of state that belongs to no parameter

    # -- binding ----------------------------------------------------------------------------------------------------

    def bind(self, name_of: Callable[[torch.Tensor], str], sharing: Mapping[int, str]) -> None:
        """Read the optimizer anew: its parameters, their state, the program of each. ``name_of``: a parameter's name in files;
        ``sharing``: see inventory.shared_memory. ``arrange`` must follow."""
        members: list[BoundParam] = []
        for index, group in enumerate(self.opt.param_groups):
            for param in group["params"]:
                members.append(BoundParam(name_of(param), param, index, len(members), self.opt.state.get(param)))
        # Two parameters of one memory are updated twice a step, in PyTorch's order, and nothing may copy it in between.
        shared = next((sharing[id(m.param)] for m in members if id(m.param) in sharing), None)
        whole = self.programs.choose(members) if shared is None else shared
        self.strategy = self.split if whole is None else WholeStep(self.opt, whole)
        self._warn_of_foreign_state()
        self.bindings.take(members)
        programs = {id(m.program): m.flat for m in members if m.program is not None}
        log.debug(
            "bound %d parameters of %s; they share %d traced updates (%d compiled)",
            len(members),
            type(self.opt).__name__,
            len(programs),
            sum(programs.values()),
        )

    def _warn_of_foreign_state(self) -> None:
        """Say once which state no checkpoint can hold."""
        strange = [key for key in self.opt.state if not isinstance(key, torch.Tensor)]
        if strange and not self._warned:
            self._warned = True
            log.warning(
                "fxckpt: %s keeps state %s that belongs to no parameter; no checkpoint holds it. Give it as extra=, or a "
                "resumed run starts without it",
                type(self.opt).__name__,
                ", ".join(map(repr, strange)),
            )

    def invalidate(self) -> None:
        """Forget the bindings: tensors were replaced, or a parameter group was added."""
        self.bindings.invalidate()

    def replaced(self) -> list[str]:
        """Names of the parameters whose tensors are not those that were bound."""
        return self.bindings.replaced()

    def arrange(
        self,
        layers: Sequence[Layer],
        edges: Sequence[tuple[str, str]],
        numbers: Sequence[int],
        counts_number: int | None,
        places: Mapping[str, Place],
    ) -> None:
        """Write the StepGraph for these layers, by the engine's numbers of them and of the counts (None: there are none)."""
        self.executor.arrange(self.members, layers, edges, numbers, counts_number, places)

    def describe(self) -> str:
        """One line: what runs a step; empty while no state exists yet to tell."""
        said = self.strategy.describe()
        return said and f"{plain_class(self.opt).__name__}: {said}"

    # -- what was bound and arranged --------------------------------------------------------------------------------

    @property
    def whole(self) -> str | None:
        """Why it runs its own step, whole."""
        return self.strategy.whole

    @property
    def bound(self) -> int:
        """How often tensors were bound: a plan made for another binding is void."""
        return self.bindings.number

    @property
    def members(self) -> list[BoundParam]:
        """The parameters, in the order of the groups."""
        return self.bindings.members

    @property
    def graph(self) -> StepGraph:
        """The StepGraph."""
        return self.executor.arranged.graph

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Layers in update order."""
        return self.graph.layers

    @property
    def numbers(self) -> Sequence[int]:
        """The engine's numbers of the layers."""
        return self.executor.arranged.numbers

    @property
    def counts_number(self) -> int | None:
        """The engine's number of the counts, None if there are none."""
        return self.executor.arranged.counts_number

    def layer_members(self) -> list[list[BoundParam]]:
        """The parameters of each layer, in layer order."""
        return self.executor.arranged.owned

    def handed_over(self) -> list[tuple[int, list[torch.Tensor]]]:
        """What the graph hands to each emit, by the engine's number: the counts first, when there are any."""
        return self.executor.arranged.handed_over
