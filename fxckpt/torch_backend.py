"""The torch.compile backend: Inductor, with a reader beside it.

    model = torch.compile(model, backend=fxckpt.backend)     # or backend="fxckpt"

It compiles exactly as ``torch.compile(backend="inductor")`` would, and on the way notes, for the run that
checkpoints the model, what the graph's parameters and buffers are called and in which order gradients become
final. The graph is only read. Nothing of the reading can fail training: an error in it is logged, and the
order falls back.

The package imports this module to have ``fxckpt.backend`` at hand, so torch is imported only when it is
called.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import fx

    from fxckpt.graph.backward.region import Region
    from fxckpt.graph.model.book import Placer
    from fxckpt.graph.model.joint import JointTrace
    from fxckpt.graph.whole.cut import Cut, Piece

log: logging.Logger = logging.getLogger("fxckpt")


def backend(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile ``gm`` with Inductor and record its trace in the process's book.

    ``mode`` and ``options`` mean what they mean to ``torch.compile``. ``options={"inner": compiler}`` has
    another backend compile, by name or as a callable; it gets the other options. With ``FXCKPT_DISABLE=1``
    nothing is read.
    """
    from fxckpt.compat.tracing_step import forget_source_of_none
    from fxckpt.graph.ops import step_port
    from fxckpt.graph.whole.cut import steps_in

    forget_source_of_none()
    if steps := steps_in(gm):
        for step in steps:
            step_port(step.args[2]).traced()  # type: ignore[arg-type]
        return _whole(gm, example_inputs, mode, options)
    return _part(gm, example_inputs, mode, options)


def _whole(
    gm: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None, options: dict[str, Any] | None
) -> Callable[..., Any]:
    """A graph with ``opt.step()`` in it: what stands before and behind the step is compiled, and the step is not."""
    from fxckpt.compat.inductor import compile_with
    from fxckpt.graph.backward.placing import Placing
    from fxckpt.graph.whole.cut import NotCut, cut
    from fxckpt.graph.whole.forward_part import forward_part
    from fxckpt.graph.whole.running import compiled

    _record(forward_part(gm), example_inputs)
    try:
        parts = cut(gm, example_inputs)
    except NotCut as why:
        log.warning("fxckpt: a function with opt.step() in it runs as PyTorch without a compiler would run it: %s", why)
        return gm
    placed = _placed_whole(gm, example_inputs, parts, options)

    def compile_piece(piece: Piece) -> Callable[..., Any]:
        if placed is None or piece is not parts.parts[0]:
            return compile_with(piece.module, piece.examples, mode, options)
        placer, region = placed
        return placer.around(region, compile_with(piece.module, piece.examples, mode, options, Placing(region).options))

    return compiled(parts, compile_piece)


def _placed_whole(
    gm: fx.GraphModule, example_inputs: Sequence[Any], parts: Cut, options: dict[str, Any] | None
) -> tuple[Placer, Region] | None:
    """The run with ``updates="in_backward"`` whose step stands behind the first piece, and the inputs and outputs of that piece
    which are its parameters and their gradients."""
    from fxckpt.graph.whole.cut import first_region

    placer, region = _placer_of(gm, example_inputs, *first_region(parts))
    if placer is None or region is None or (options or {}).get("inner", "inductor") != "inductor":
        return None
    return placer, region


def _part(
    gm: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None, options: dict[str, Any] | None
) -> Callable[..., Any]:
    """A graph of a model, or a part of one."""
    from fxckpt.compat.inductor import compile_with_backend, compile_with_inductor
    from fxckpt.config import disabled  # imported here like torch: `import fxckpt` is cheap

    options = dict(options or {})
    inner = options.pop("inner", "inductor")
    read = None if disabled() else _reader(_record(gm, example_inputs))
    placer, region = (None, None) if disabled() else _placer_of(gm, example_inputs)
    if inner != "inductor":
        compiled = compile_with_backend(inner, gm, example_inputs, mode, options, read)
    elif region is None:
        compiled = compile_with_inductor(gm, example_inputs, mode, options, read)
    else:
        compiled = _compile_placed(region, gm, example_inputs, mode, options, read)
    return compiled if placer is None or region is None else placer.watched(region, compiled)


def reset() -> None:
    """Forget what Inductor keeps; ``torch._dynamo.reset()`` asks the backends in use."""
    from fxckpt.compat.inductor import reset_cudagraphs

    reset_cudagraphs()


backend.reset = reset  # type: ignore[attr-defined]  # torch looks for it there
backend.cuts_at_steps = True  # type: ignore[attr-defined]  # so opt.step() may be an op of the graphs that it gets


def _record(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> JointTrace | None:
    """Put the forward graph into the book, which tells the runs. A run may refuse: its exception goes up."""
    from fxckpt.graph.model.book import traces
    from fxckpt.graph.model.joint import read_dynamo

    try:
        trace = read_dynamo(gm, example_inputs)
    except Exception as error:
        traces.could_not_read("a forward graph", error)
        return None
    return traces.record(trace)


def _placer_of(
    gm: fx.GraphModule, example_inputs: Sequence[Any], run: int | None = None, known: Region | None = None
) -> tuple[Placer | None, Region | None]:
    """The run with ``updates="in_backward"`` that trains what is in this graph, and which of its inputs are that; none, most
    often. ``run``: only that of this number; ``known``: a region without inputs."""
    from fxckpt.graph.model.book import traces

    if not traces.placers:
        return None, None
    from fxckpt.graph import passes
    from fxckpt.graph.backward.region import Region, bind_inputs_pass

    names = traces.models.names_by_id()
    for placer in [each for each in traces.placers if run in (None, each.number)]:
        region, layer_of = replace(known or Region(), bound=[], ids=[]), functools.partial(placer.layer_of, names)
        try:
            passes.run(gm, {bind_inputs_pass: {"inputs": example_inputs, "layer_of": layer_of, "region": region}})
        except Exception as error:
            traces.could_not_read("the inputs of a graph", error)
        else:
            if region.bound:
                return placer, region
    return None, None


def _compile_placed(
    region: Region,
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    mode: str | None,
    options: dict[str, Any],
    read: Callable[[fx.Graph], None] | None,
) -> Callable[..., Any]:
    """Inductor, with the updates of the region's layers placed in its backward."""
    from fxckpt.compat.inductor import compile_with_inductor
    from fxckpt.graph.backward.placing import Placing

    return compile_with_inductor(gm, example_inputs, mode, options, read, Placing(region).options)


def _reader(trace: JointTrace | None) -> Callable[[fx.Graph], None]:
    """What looks at the joint graph when (and if) it is built."""
    from fxckpt.graph.model.book import traces
    from fxckpt.graph.model.joint import read_joint

    def read(graph: fx.Graph) -> None:
        try:
            reads = read_joint(graph)
            if reads and trace is not None:
                traces.annotate(trace, reads)
        except Exception as error:
            traces.could_not_read("a joint graph", error)

    return read
