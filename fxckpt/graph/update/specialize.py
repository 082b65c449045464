"""From an optimizer's step to a Program: traced, its scalars hoisted, and what is left in the form that runs it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx

from fxckpt.graph import passes
from fxckpt.graph.update.foreach import call_methods_pass, widen_to_lists_pass
from fxckpt.graph.update.hoist import Program, counts_of, mark_host_pass, native_calls_pass, snapshot_counts_pass, split
from fxckpt.graph.update.trace import MakesState, NotTraceable, Signature, trace


def hoist(gm: fx.GraphModule, signature: Signature) -> Program:
    """The program of a traced update. Raises NotTraceable; see hoist.split."""
    first: passes.Chosen = {mark_host_pass: {"counts": counts_of(signature)}, snapshot_counts_pass: {}}
    program = split(passes.run(gm, first, wanted=("host first",)), signature)
    native: passes.Chosen = {native_calls_pass: {}}
    return replace(
        program,
        host=passes.run(program.host, native),
        branches=program.branches and passes.run(program.branches, native),
        # Bodies of single-tensor operators stay as they are: the form that runs them is made from the operators.
        body=passes.run(program.body, native) if program.style == "columns" else program.body,
    )


def specialize(
    opt: torch.optim.Optimizer, group: dict[str, Any], param: torch.Tensor, state: dict[str, Any], signature: Signature
) -> Program:
    """Trace and split the update for the branches that the step would take with the counts in ``state`` now.

    Raises NotTraceable. List kernels that cannot be told apart per parameter are called with lists of one.
    """
    if signature.implementation == "single":
        return _specialize(opt, group, param, state, signature, 1)
    try:
        return _specialize(opt, group, param, state, signature, 2)
    except MakesState:
        raise
    except NotTraceable:
        return _specialize(opt, group, param, state, signature, 1)


def _specialize(
    opt: torch.optim.Optimizer,
    group: dict[str, Any],
    param: torch.Tensor,
    state: dict[str, Any],
    signature: Signature,
    count: int,
) -> Program:
    """Guess how the branches go, look, and trace again along the right ones."""
    script: tuple[bool, ...] = ()
    for _ in range(16):
        program = hoist(trace(opt, group, param, state, signature, count=count, script=script), signature)
        truth = program.asks([state[key] for key in program.counts], program.values(group))
        if truth == program.outcomes:
            return program
        script = truth  # right up to the first wrong one, and a good guess from there on
    raise NotTraceable("its branches do not settle")


@functools.lru_cache(256)
def over_lists(program: Program) -> Program | None:
    """The same program with list kernels, or None if an operator of it has none. For CPU tensors only."""
    if program.style == "columns":
        return program
    arguments = {
        "columns": len(program.inputs),
        "dtypes": (program.signature.dtype, *program.dtypes),
        "loops": program.signature.implementation == "rehearsed",
    }
    try:
        body = passes.run(program.body, {widen_to_lists_pass: arguments}, given=("operators",))
    except NotTraceable:
        return None
    return None if body is program.body else replace(program, style="columns", body=body)  # the pass may be switched off


@functools.lru_cache(256)
def by_methods(program: Program) -> Program:
    """The same program with methods of ``torch.Tensor``; see call_methods_pass."""
    return replace(program, body=passes.run(program.body, {call_methods_pass: {}}, given=("operators",)))
