"""The list of all passes, in the order in which they run, each with its contract.

    one parameter's traced step:   mark_host, snapshot_counts; hoist.split cuts it into scalars and a body
    the scalars' graphs:           native_calls
    a body, by what runs it:       native_calls (list kernels), widen_to_lists, call_methods, or tensor_scalars (Inductor)
    the StepGraph:                 write_updates, place_fences, place_logs (with a journal), place_emits, verify_schedule
    Dynamo's graph:                bind_inputs
    Inductor's backward graph:     find_legal_points, pin_readers, place_updates; then verify_backward checks its schedule

A new pass is a function ``xxx_pass(gm, …) -> gm`` in the file of its subject, a line in ``PASSES``, and a key where its graph is
made (specialize.py, inductor.py, step_graph.py, backward/placing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.fx as fx

from fxckpt.graph.backward.legal import find_legal_points_pass
from fxckpt.graph.backward.place import pin_readers_pass, place_updates_pass
from fxckpt.graph.backward.region import bind_inputs_pass
from fxckpt.graph.contract import SWITCH, ContractError, Pass, run_passes, switched_off
from fxckpt.graph.schedule import place_emits_pass, place_fences_pass, place_logs_pass, verify_schedule_pass, write_updates_pass
from fxckpt.graph.update.foreach import call_methods_pass, widen_to_lists_pass
from fxckpt.graph.update.hoist import mark_host_pass, native_calls_pass, snapshot_counts_pass
from fxckpt.graph.update.tensor_scalars import tensor_scalars_pass

PASSES = (
    Pass(mark_host_pass, provides=("host marks",)),
    Pass(snapshot_counts_pass, requires=("host marks",), provides=("host first",)),
    Pass(native_calls_pass),
    Pass(widen_to_lists_pass, requires=("operators",), provides=("lists",)),
    Pass(call_methods_pass, requires=("operators",), provides=("methods",)),
    Pass(tensor_scalars_pass, requires=("operators",), provides=("tensor scalars",)),
    Pass(write_updates_pass, provides=("updates",)),
    Pass(place_fences_pass, requires=("updates",), provides=("fences",)),
    Pass(place_logs_pass, requires=("updates", "fences"), provides=("logs",)),
    Pass(place_emits_pass, requires=("updates", "fences"), provides=("emits",)),
    Pass(verify_schedule_pass, requires=("updates", "fences", "emits"), provides=("verified",)),
    Pass(bind_inputs_pass, provides=("region",)),
    Pass(find_legal_points_pass, requires=("region",), provides=("legal points",)),
    Pass(pin_readers_pass, requires=("legal points",), provides=("pins",)),
    Pass(place_updates_pass, requires=("legal points", "pins"), provides=("placed updates",)),
)

Chosen = Mapping[Callable[..., fx.GraphModule], Mapping[str, Any]]
"""Passes, with their arguments but the graph."""


def run(gm: fx.GraphModule, chosen: Chosen, given: Iterable[str] = (), wanted: Sequence[str] = ()) -> fx.GraphModule:
    """``gm`` after the chosen passes, in the order of ``PASSES``; see contract.run_passes. Raises ContractError, too, if a pass
    that does not exist is to be switched off."""
    names = [each.name for each in PASSES]
    if unknown := sorted(switched_off() - set(names)):
        raise ContractError(f"{SWITCH} names {', '.join(unknown)}; the passes are {', '.join(names)}")
    passes = [replace(each, arguments=chosen[each.function]) for each in PASSES if each.function in chosen]
    return run_passes(gm, passes, given, wanted)
