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

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import fx

    from fxckpt.graph.model.joint import JointTrace


def backend(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile ``gm`` with Inductor and record its trace in the process's book.

    ``mode`` and ``options`` mean what they mean to ``torch.compile``. ``options={"inner": compiler}`` has
    another backend compile, by name or as a callable; it gets the other options. With ``FXCKPT_DISABLE=1``
    nothing is read.
    """
    from fxckpt.compat.inductor import compile_with_backend, compile_with_inductor
    from fxckpt.config import disabled  # imported here like torch: `import fxckpt` is cheap

    options = dict(options or {})
    inner = options.pop("inner", "inductor")
    read = None if disabled() else _reader(_record(gm, example_inputs))
    if inner == "inductor":
        return compile_with_inductor(gm, example_inputs, mode, options, read)
    return compile_with_backend(inner, gm, example_inputs, mode, options, read)


def reset() -> None:
    """Forget what Inductor keeps; ``torch._dynamo.reset()`` asks the backends in use."""
    from fxckpt.compat.inductor import reset_cudagraphs

    reset_cudagraphs()


backend.reset = reset  # type: ignore[attr-defined]  # torch looks for it there


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
