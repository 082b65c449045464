"""Every class of ``torch.optim``, every implementation and option it has, six steps beside PyTorch's own.

``FXCKPT_OPTIMIZERS=full`` (``make optimizers``) runs every case in every form, and compiles every case in three types. The
short version runs those that ``optimizer_cases.reaches`` says, and compiles the first of two classes.
"""

from __future__ import annotations

import os

import optimizer_cases as cases
import pytest
import torch
from repository import ROOT

from fxckpt.graph.update.trace import BY_SHAPE, ELEMENTWISE, WHOLE

DOCS = (ROOT / "docs" / "optimizers.md").read_text()
FULL = os.environ.get("FXCKPT_OPTIMIZERS") == "full"
COMPILED = [
    (name, i, dtype)
    for name in (cases.BOUNDS if FULL else [each for each in cases.BOUNDS if each in cases.SHORT])
    for i in range(len(cases.CASES[name]) if FULL else 1)
    for dtype in ([torch.float32, torch.float64, torch.bfloat16] if FULL else [torch.float32])
]
COMPILED += [] if FULL else [("Rprop", 0, torch.bfloat16)]  # whose scalars are tensors of that type


def test_every_class_of_this_torch_is_classified_and_every_option_of_it_tried():
    assert set(cases.CASES) == set(cases.classes())
    assert set(cases.CASES) == ELEMENTWISE | BY_SHAPE | set(WHOLE)
    for name, options in cases.CASES.items():
        tried = {"lr"} | {key for each in options for key in each}
        assert tried == cases.arguments(name) - set(cases.NEVER_ON_CPU), name


@pytest.mark.parametrize("name", cases.CASES)
def test_options_that_no_cpu_training_can_use_are_refused_by_pytorch(name):
    for option in cases.arguments(name) & set(cases.NEVER_ON_CPU):
        assert cases.refusal(name, {option: True}, "single") is not None


def cells_of(line: str) -> list[str]:
    """Of a row of the table."""
    return line.removesuffix(" |").split(" | ")


@pytest.mark.parametrize("name", cases.CASES)
def test_native_steps_have_the_bits_of_pytorch_and_the_table_says_how(name, one_thread):
    written = [cells_of(line) for line in DOCS.splitlines() if line.startswith(f"| {name} |")]
    current = []
    for options, cells, line in cases.rows(name, FULL):
        current.append(cells_of(line))
        for form, found in cells.items():
            if isinstance(found, cases.Outcome):
                assert found.identical, (options, form)
                assert found.whole is not None or found.programs, "nothing was traced"
    seen = [[old if new == cases.NOT_RUN else new for old, new in zip(*pair)] for pair in zip(written, current)]
    assert written == seen and len(written) == len(current), "docs/optimizers.md is not current: run make optimizers"


@pytest.mark.parametrize(("name", "index", "dtype"), COMPILED)
def test_compiled_steps_are_within_the_bound(name, index, dtype, inductor_cache, record_property):
    found = cases.outcome(name, cases.CASES[name][index], None, "inductor", dtype)
    record_property("k", found.worst)
    print(f"MEASURED {name} {cases.label(cases.CASES[name][index])} {dtype} k={found.worst:.2f} compiled={found.compiled}")
    assert found.whole is None
    assert found.compiled or cases.TENSOR in cases.CASES[name][index].values()
    assert found.worst <= cases.BOUNDS[name]


@pytest.mark.parametrize("name", sorted(BY_SHAPE))
def test_what_cannot_be_compiled_stays_native_and_says_so_once(name, caplog):
    with caplog.at_level("WARNING", logger="fxckpt"):
        found = cases.outcome(name, {}, None, "inductor")
    assert found.identical
    assert not found.compiled
    said = {r.getMessage() for r in caplog.records if "PyTorch's own kernels" in r.getMessage()}
    assert len(said) == 1
    assert len([r for r in caplog.records if r.getMessage() in said]) == 1
