"""``opt.step()`` inside a compiled function: whether it becomes an op of the graph, and what that op does.

Dynamo asks while it traces, and the op runs between two compiled pieces (``graph/whole``): it is ``opt.step()`` itself, with the
gradients of the graph. Where it cannot be that, the graph breaks at the step, and this says why, once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from fxckpt.compat.inductor import refused
from fxckpt.compat.optimizers import has_pre_hooks, plain_class
from fxckpt.compat.ranks import world_size
from fxckpt.compat.tensors import hooks_of
from fxckpt.compat.tracing_step import Traced, traced_so_far
from fxckpt.errors import SetupError
from fxckpt.graph import ops
from fxckpt.run.arrangement import Arrangement
from fxckpt.run.clock import RunStatus
from fxckpt.run.closing import Closing
from fxckpt.run.in_graph import InGraph

log: logging.Logger = logging.getLogger("fxckpt")

Step = Callable[[torch.optim.Optimizer], object]
"""``opt.step()`` as a script calls it."""


class OneGraph:
    """The steps of one run as compiled functions make them. ``name`` is the run's number as text, which Dynamo always takes for
    a constant; a number that it has seen change would be a symbol. ``params`` are the lists of parameters in its optimizer's
    groups, the very same: Dynamo reads them from here, since it would guard all settings of a group that it sees, and compile
    anew when a scheduler sets one."""

    def __init__(
        self,
        arrangement: Arrangement,
        closing: Closing,
        status: RunStatus,
        step: Step,
        in_graph: Callable[[], InGraph | None],
    ):
        self.name: str = str(arrangement.emitter.number)
        self.params: list[list[torch.Tensor]] = []
        self._arrangement, self._closing, self._status, self._step = arrangement, closing, status, step
        self._in_graph = in_graph
        self._said: set[str] = set()
        ops.register_step_port(arrangement.emitter.number, self)
        self.look()

    def look(self) -> None:
        """The groups may be others now."""
        steppers = self._arrangement.steppers
        self.params = [group["params"] for group in steppers[0].opt.param_groups] if len(steppers) == 1 else []

    # ---- while Dynamo traces ---------------------------------------------------------------------------------------------

    def refuses_step(self, usual: bool) -> bool:
        """Is ``opt.step()``, which Dynamo is tracing, no op of its graph? Then it is said why. ``usual``: it is given nothing,
        and no GradScaler scales the gradients."""
        traced = traced_so_far(self._arrangement.steppers[0].opt)
        why = self._against(traced, usual)
        if why and (traced is None or traced.begins or not self._said):  # what is left behind a break has lost its backward
            self.say(why)
        return bool(why)

    def traced(self) -> None:
        """See ``ops.StepPort``. Raises SetupError if the function reads the optimizer's state, and the step is the first: Dynamo
        would take what there is before it for what there is behind it."""
        opt = self._arrangement.steppers[0].opt
        found = traced_so_far(opt)
        if found is not None and found.state and not opt.state:
            raise refused(
                "a compiled function reads the optimizer's state, and its first call makes the first opt.step(), which makes "
                "that state. Make one step outside of it, or read the state outside"
            )

    def refuses_zeroing(self) -> bool:
        """Is ``zero_grad()`` to be left to PyTorch, which hides it from Dynamo, since the step is no op of this graph, or will
        not be one?"""
        traced = traced_so_far(self._arrangement.steppers[0].opt)
        if traced is None or self._against_all(traced, usual=True):
            return True
        return ops.optimizer_step not in traced.targets and not traced.begins

    def _against(self, traced: Traced | None, usual: bool) -> str:
        """Why the step is no op; empty if it is."""
        if traced is None:
            return "nothing is known of the compile that is under way"
        if why := self._against_all(traced, usual):
            return why
        if not traced.backward:
            return (
                "there is no backward in its graph. Dynamo traces loss.backward() with torch._dynamo.config.trace_autograd_ops = "
                "True, if what the function returns is detached; TORCH_LOGS=graph_breaks says what broke it"
            )
        if traced.context:
            return "it is called with gradients off, or inside autocast"
        if traced.waits:
            return f"{traced.waits} is changed before it, which Dynamo does behind the graph"
        return ""

    def _against_all(self, traced: Traced, usual: bool) -> str:
        """What is so whatever stands in the graph."""
        steppers = self._arrangement.steppers
        if not self._status.enabled:
            return "FXCKPT_DISABLE=1"
        if not getattr(traced.backend, "cuts_at_steps", False):
            return "the function is not compiled with backend=fxckpt.backend"
        if len(steppers) != 1:
            return "several optimizers make one run"
        if world_size() > 1:
            return "gradients are averaged over ranks behind the backward"
        [stepper] = steppers
        if not stepper.stock:
            return f"{plain_class(stepper.opt).__name__} is no class of torch.optim, and may read more than gradients"
        if not usual:
            return "it is given a closure, or a GradScaler scales the gradients"
        if has_pre_hooks(stepper.opt):
            return "there are hooks in front of opt.step()"
        if any(hooks_of(param) for group in stepper.opt.param_groups for param in group["params"]):
            return "there are hooks on parameters, which a backward in the graph does not call"
        return ""

    def say(self, why: str) -> None:
        """Once for each reason; ``opt.ckpt.graph.why`` has the last one."""
        if why in self._said:
            return
        self._said.add(why)
        why = f"opt.step() is no op of a compiled function's graph: {why}"
        for stepper in self._arrangement.steppers:
            stepper.executor.refuse_graph(why)
        log.warning("fxckpt: %s. It runs outside of the graph, as from a loop", why)

    def called_outside(self, by_itself: bool) -> None:
        """Compiled code calls ``opt.step()`` outside of any graph. ``by_itself``: it is all that was compiled."""
        if by_itself:
            self.say(
                "torch.compile(opt.step) compiles nothing, since fxckpt has compiled the step already (update=). Compile the "
                "function that holds forward, backward and step"
            )
        elif not self._said:
            self.say("Dynamo has not come to it (TORCH_LOGS=graph_breaks says why)")

    # ---- while the compiled function runs --------------------------------------------------------------------------------

    def step(self, params: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> None:
        """See ``ops.StepPort``. What no autograd hook told is told here: the backward came, and what was left by the step before
        is complete."""
        opt = self._arrangement.steppers[0].opt
        trained = [p for group in opt.param_groups for p in group["params"]]
        if list(map(id, trained)) != list(map(id, params)):
            raise SetupError(
                "the parameters of the optimizer are not those that this function was compiled for: groups were changed by other "
                "means than add_param_group() and load_state_dict(). Call torch._dynamo.reset() behind such a change"
            )
        if any(map(hooks_of, params)):
            raise SetupError(
                "hooks were put on parameters behind the compile of this function, and the backward in its graph did not call "
                "them. Call torch._dynamo.reset() behind that"
            )
        inside = self._in_graph()
        if self._status.active and (inside is None or not inside.open):
            self._closing.backward_in_graph()
        before = [param.grad for param in params]
        try:
            for param, gradient in zip(params, gradients if inside is None else inside.given_back(params, gradients)):
                param.grad = gradient
            self._step(opt)
        finally:  # Dynamo knows what they are behind the graph, and may take what they were from them
            for param, gradient in zip(params, before):
                param.grad = gradient
