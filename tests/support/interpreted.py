"""Compiles as Inductor does, up to the passes that change its backward graph, and runs the result eagerly: no C++ is compiled."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx as compile_fx
import torch._inductor.config as inductor_config


def interpret(graph: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
    """In place of Inductor's code generation."""
    from torch._inductor.custom_graph_pass import get_custom_graph_passes

    for each in get_custom_graph_passes(inductor_config.post_grad_custom_post_pass):
        each(graph.graph)
    graph.recompile()
    graphs.append(graph)

    def boxed(args: list[Any]) -> Any:
        given = list(args)
        args.clear()
        with torch.no_grad():
            return graph.forward(*given)

    boxed._boxed_call = True
    return boxed


graphs: list[torch.fx.GraphModule] = []
"""All that was compiled since the fixture began."""


@pytest.fixture
def interpreted(monkeypatch):
    """What is compiled by ``backend=fxckpt.backend`` is interpreted. Returns the graphs, forwards and backwards."""
    graphs.clear()
    monkeypatch.setattr(compile_fx, "compile_fx", functools.partial(compile_fx.compile_fx, inner_compile=interpret))
    with inductor_config.patch(force_disable_caches=True):
        yield graphs
