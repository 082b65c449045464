"""The whole step as one listing, and what the passes put into a backward graph: printed and compared."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from graph_models import GPT, ConvNet, book
from in_backward_runs import WARM_UP, Net, batch, begun
from interpreted import interpreted
from torch import nn

import fxckpt

__all__ = ["book", "interpreted"]  # fixtures


@pytest.fixture(autouse=True)
def small(book, one_thread):
    """One thread, and a book of the test's own."""


def backward(graphs):
    """The ops of the last backward graph, by their kinds; ours with the parameters' numbers and what they wait for."""
    lines, collapsed = [], 0
    for node in graphs[-1].graph.nodes:
        if node.op != "call_function":
            continue
        name = getattr(node.target, "_schema", None) and node.target._schema.name
        if not (name or "").startswith("fxckpt::"):
            collapsed += 1
            continue
        lines += [f"... {collapsed} ops"] if collapsed else []
        collapsed = 0
        if name == "fxckpt::pin_reader":
            lines.append(f"pin_reader({node.args[0]})")
        else:
            lines.append(f"layer_ready({node.args[0]}, inputs {node.args[1]}, after {node.args[2]}, layer {node.args[4]})")
    return "\n".join([*lines, f"... {collapsed} ops"])


def listed(build, data=batch, loop=None):
    run = begun(build=build)
    for step in range(WARM_UP + 1):
        if loop is None:
            run.step(data(step))
        else:
            loop(run, step)
    return str(run.opt.ckpt.graph)


def short(text):
    """Without the lines of the ops, of which ``test_step_graph`` has a golden."""
    return "\n".join(line for line in text.splitlines() if "ckpt_" not in line)


def images(step):
    return torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(step))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x))).square().mean()


class Broken(Plain):
    def forward(self, x):
        x = torch.relu(torch.compile(self.up, backend=fxckpt.backend)(x))
        return self.down(x).square().mean()


def clipped(run, step):
    run.compiled(batch(step)).backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.01)
    run.opt.step()
    run.opt.zero_grad()


def test_listing_of_an_mlp(interpreted):
    assert_expected_inline(listed(Plain), """""")


def test_listing_and_pins_of_a_layer_norm(interpreted):
    assert_expected_inline(short(listed(Net)), """""")
    assert_expected_inline(backward(interpreted), """""")


def test_listing_of_a_tied_gpt(interpreted):
    assert_expected_inline(short(listed(GPT, images)), """""")


def test_listing_of_a_convolution_with_batch_norm(interpreted):
    assert_expected_inline(short(listed(ConvNet, images)), """""")
    assert_expected_inline(backward(interpreted), """""")


def test_listing_with_a_layer_that_is_not_compiled(interpreted):
    assert_expected_inline(short(listed(Broken)), """""")


def test_listing_of_a_loop_that_clips(interpreted):
    assert_expected_inline(short(listed(Plain, loop=clipped)), """""")
