"""The custom ops: ``ckpt_fence`` and ``ckpt_emit`` around an update, with a journal ``ckpt_log``; in a backward ``layer_ready``.

    scalars = scalars(counts)                       # once a step, on the host; fenced and emitted like a layer
    ckpt_fence([w, exp_avg, ...], run, 3, "h.0")    # wait until the last checkpoint has copied this layer
    ckpt_log([w.grad, ...], run, 3, "h.0")          # hand the gradients to the engine, in a record of the journal
    update_h_0([w, exp_avg, ...], scalars)          # change it in place
    ckpt_emit([w, exp_avg, ...], run, 3, "h.0")     # hand it to the engine; the copy runs during the next iteration

They take the layer's tensors, though the engine knows their addresses, to show which values each op orders. They return nothing,
so whatever removes unused nodes must be told that they have effects: see ``has_side_effect`` below, and never run dead code
elimination on a StepGraph. They live between the compiled pieces, never inside one: there, an op that reads a mutated input may
see a temporary that is copied back at the end. ``run`` is the number under which a live run registered its port.

``layer_ready`` does live inside compiled code, that of a backward, and takes no parameter. It tells whoever listens to the region
whose backward runs that a layer's gradients are final and its parameters read for the last time; see ``graph/backward``.

``optimizer_step`` stands in Dynamo's graph of a function that makes whole steps, forward to ``opt.step()``. It says that it
changes the parameters, which are the live ones in Dynamo's graph. It is never compiled: see ``graph/whole``.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.fx as fx


class Port(Protocol):
    """What a run offers to the ops."""

    def fence(self, layer: int, tensors: Sequence[torch.Tensor]) -> None:
        """Return once every copy of ``layer`` that is under way is done; raises to stop the update."""

    def emit(self, layer: int, tensors: Sequence[torch.Tensor]) -> None:
        """Start copying ``layer``."""

    def log(self, layer: int, gradients: Sequence[torch.Tensor | None]) -> None:
        """Start copying the gradients that ``layer`` is about to be updated with; None of parameters that have none."""


_LIBRARY = torch.library.Library("fxckpt", "DEF")
# Written by hand: a schema inferred from annotations would give `int` arguments as SymInt and cost a wrapper per call.
_LIBRARY.define("ckpt_fence(Tensor[] tensors, int run, int layer, str name) -> ()")
_LIBRARY.define("ckpt_emit(Tensor[] tensors, int run, int layer, str name) -> ()")
_LIBRARY.define("ckpt_log(Tensor?[] gradients, int run, int layer, str name) -> ()")

# ``after`` is there for the order alone: the op runs behind what computes it. Region and layer are arguments since no pass
# runs where the code comes from Inductor's cache.
_LIBRARY.define("layer_ready(Tensor[] gradients, int[] inputs, Tensor[] after, str region, int layer) -> ()")
_LIBRARY.define("pin_reader(Tensor value) -> ()")
_LIBRARY.define("optimizer_step(Tensor(a!)[] params, Tensor?[] gradients, int run) -> ()")

Listener = Callable[[Sequence[torch.Tensor], Sequence[int], str, int], None]
"""Told of a layer: its gradients, the inputs that they belong to, the region's token, the layer's number."""

_LISTENER: list[Listener] = []


class StepPort(Protocol):
    """What a run offers to ``optimizer_step``."""

    def step(self, params: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> None:
        """Make ``opt.step()`` with these gradients."""

    def traced(self) -> None:
        """Dynamo has traced a function with the op in it to its end; raises to refuse it."""


_STEP_PORTS: weakref.WeakValueDictionary[int, StepPort] = weakref.WeakValueDictionary()

_PORTS: weakref.WeakValueDictionary[int, Port] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count(1)


def register_port(port: Port) -> int:
    """Give a run the number that its graphs pass to the ops, and that no other run ever has; it is held weakly."""
    number = next(_NUMBERS)
    _PORTS[number] = port
    return number


def register_step_port(number: int, port: StepPort) -> None:
    """Make ``port`` the one of run ``number``; it is held weakly."""
    _STEP_PORTS[number] = port


def step_port(number: int) -> StepPort:
    """That of run ``number``. Raises RuntimeError if the run is gone."""
    port = _STEP_PORTS.get(number)
    if port is None:
        raise RuntimeError(f"optimizer_step of run {number}: that run is gone, with the optimizer that compile_step returned")
    return port


def _port(run: int, op: str, name: str) -> Port:
    port = _PORTS.get(run)
    if port is None:
        raise RuntimeError(
            f"{op}({name!r}) of run {run}: that run is gone. A StepGraph works only while the optimizer "
            "that compile_step returned is alive; run opt.step() instead of a kept graph."
        )
    return port


def _fence(tensors: Sequence[torch.Tensor], run: int, layer: int, name: str) -> None:
    _port(run, "ckpt_fence", name).fence(layer, tensors)


def _emit(tensors: Sequence[torch.Tensor], run: int, layer: int, name: str) -> None:
    _port(run, "ckpt_emit", name).emit(layer, tensors)


def _log(gradients: Sequence[torch.Tensor | None], run: int, layer: int, name: str) -> None:
    _port(run, "ckpt_log", name).log(layer, gradients)


def _fake(tensors: Sequence[torch.Tensor | None], run: int, layer: int, name: str) -> None:
    """Under fake tensors there is nothing to wait for and nothing to copy."""


def listen(listener: Listener | None) -> None:
    """Who is told of layers from now on: the run whose region's backward begins, or nobody."""
    _LISTENER[:] = [] if listener is None else [listener]


def _layer_ready(
    gradients: Sequence[torch.Tensor], inputs: Sequence[int], after: Sequence[torch.Tensor], region: str, layer: int
) -> None:
    for listener in _LISTENER:
        listener(gradients, inputs, region, layer)


def _pin_reader(value: torch.Tensor) -> None:
    """That it is called is all."""


def _optimizer_step(params: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None], run: int) -> None:
    step_port(run).step(params, gradients)


def _fake_layer_ready(*_: object) -> None:
    """Fake tensors are no gradients."""


for _name, _function, _as_fake in (
    ("ckpt_fence", _fence, _fake),
    ("ckpt_emit", _emit, _fake),
    ("ckpt_log", _log, _fake),
    ("layer_ready", _layer_ready, _fake_layer_ready),
    ("pin_reader", _pin_reader, _pin_reader),
    ("optimizer_step", _optimizer_step, _fake_layer_ready),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxckpt::{_name}", _as_fake, lib=_LIBRARY)

ckpt_fence: Callable[..., Any] = torch.ops.fxckpt.ckpt_fence.default
ckpt_emit: Callable[..., Any] = torch.ops.fxckpt.ckpt_emit.default
ckpt_log: Callable[..., Any] = torch.ops.fxckpt.ckpt_log.default
layer_ready: Callable[..., Any] = torch.ops.fxckpt.layer_ready.default
pin_reader: Callable[..., Any] = torch.ops.fxckpt.pin_reader.default
optimizer_step: Callable[..., Any] = torch.ops.fxckpt.optimizer_step.default
for _op in (ckpt_fence, ckpt_emit, ckpt_log, layer_ready, pin_reader, optimizer_step):
    fx.node.has_side_effect(_op)
