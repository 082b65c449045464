"""The whole step as one listing, and what the passes put into a backward graph: printed and compared."""

from __future__ import annotations

import re

import pytest
import torch
from doc_blocks import blocks
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
    """One of its layers is compiled, and the other is not."""

    def forward(self, x):
        x = torch.relu(torch.compile(self.up, backend=fxckpt.backend)(x))
        return self.down(x).square().mean()


def called_as_it_is(run, step):
    run.compiled = run.model
    run.step(batch(step))


def clipped(run, step):
    run.compiled(batch(step)).backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.01)
    run.opt.step()
    run.opt.zero_grad()


def test_listing_of_an_mlp(interpreted):
    assert_expected_inline(
        listed(Plain),
        """\
def forward(self, run : int, counts, down, up):
    ...  # forward of graph 0
    torch.ops.fxckpt.ckpt_fence(counts, run, 0, 'counts')
    scalars = self.scalars(counts)
    torch.ops.fxckpt.ckpt_emit(counts, run, 0, 'counts')
    ...  # backward of graph 0, until the gradients of 'down' are final
    torch.ops.fxckpt.ckpt_fence(down, run, 1, 'down')
    update_down = self.update_down(down, scalars)
    torch.ops.fxckpt.ckpt_emit(down, run, 1, 'down')
    ...  # backward of graph 0, until the gradients of 'up' are final
    torch.ops.fxckpt.ckpt_fence(up, run, 2, 'up')
    update_up = self.update_up(up, scalars)
    torch.ops.fxckpt.ckpt_emit(up, run, 2, 'up')
    ...  # the rest of the backward
    # opt.step()
    return None""",
    )


def test_listing_and_pins_of_a_layer_norm(interpreted):
    assert_expected_inline(
        short(listed(Net)),
        """\
def forward(self, run : int, counts, fc2, norm, fc1):
    ...  # forward of graph 0
    scalars = self.scalars(counts)
    ...  # backward of graph 0, until the gradients of 'fc2' are final
    update_fc2 = self.update_fc2(fc2, scalars)
    ...  # backward of graph 0, until the gradients of 'norm' are final
    update_norm = self.update_norm(norm, scalars)
    ...  # backward of graph 0, until the gradients of 'fc1' are final
    update_fc1 = self.update_fc1(fc1, scalars)
    ...  # the rest of the backward
    # opt.step()
    return None""",
    )
    assert_expected_inline(
        backward(interpreted),
        """\
... 12 ops
layer_ready([mm_1, view], inputs [5, 6], after [mm], layer 2)
... 1 ops
pin_reader(mul_5)
... 20 ops
layer_ready([sum_4, sum_5], inputs [3, 4], after [mul_5], layer 1)
... 7 ops
layer_ready([mm_2, view_1], inputs [0, 1], after [], layer 0)
... 0 ops""",
    )


def test_listing_of_a_tied_gpt(interpreted):
    assert_expected_inline(
        short(listed(GPT, images)),
        """\
def forward(self, run : int, counts, ln_f, h_1_down, h_1_up, h_1_ln, h_0_down, h_0_up, h_0_ln, wpe, wte):
    ...  # forward of graph 0
    scalars = self.scalars(counts)
    ...  # backward of graph 0, until the gradients of 'ln_f' are final
    update_ln_f = self.update_ln_f(ln_f, scalars)
    ...  # backward of graph 0, until the gradients of 'h.1.down' are final
    update_h_1_down = self.update_h_1_down(h_1_down, scalars)
    ...  # backward of graph 0, until the gradients of 'h.1.up' are final
    update_h_1_up = self.update_h_1_up(h_1_up, scalars)
    ...  # backward of graph 0, until the gradients of 'h.1.ln' are final
    update_h_1_ln = self.update_h_1_ln(h_1_ln, scalars)
    ...  # backward of graph 0, until the gradients of 'h.0.down' are final
    update_h_0_down = self.update_h_0_down(h_0_down, scalars)
    ...  # backward of graph 0, until the gradients of 'h.0.up' are final
    update_h_0_up = self.update_h_0_up(h_0_up, scalars)
    ...  # backward of graph 0, until the gradients of 'h.0.ln' are final
    update_h_0_ln = self.update_h_0_ln(h_0_ln, scalars)
    ...  # backward of graph 0, until the gradients of 'wpe' are final
    update_wpe = self.update_wpe(wpe, scalars)
    ...  # backward of graph 0, until the gradients of 'wte' are final
    update_wte = self.update_wte(wte, scalars)
    ...  # the rest of the backward
    # opt.step()
    return None""",
    )


def test_listing_of_a_convolution_with_batch_norm(interpreted):
    assert_expected_inline(
        short(listed(ConvNet, images)),
        """\
def forward(self, run : int, counts, head, bn, conv):
    ...  # forward of graph 0
    scalars = self.scalars(counts)
    ...  # backward of graph 0, until the gradients of 'head' are final
    update_head = self.update_head(head, scalars)
    ...  # backward of graph 0, until the gradients of 'bn' are final
    update_bn = self.update_bn(bn, scalars)
    ...  # backward of graph 0, until the gradients of 'conv' are final
    update_conv = self.update_conv(conv, scalars)
    ...  # the rest of the backward
    # opt.step()
    return None""",
    )
    assert_expected_inline(
        backward(interpreted),
        """\
... 8 ops
layer_ready([mm_1, view], inputs [8, 9], after [mm], layer 2)
... 9 ops
pin_reader(mul_6)
... 3 ops
pin_reader(add_4)
... 13 ops
pin_reader(mul_8)
... 11 ops
pin_reader(mul_12)
... 8 ops
layer_ready([mul_15, sum_3], inputs [6, 7], after [add_4, mul_12, mul_6, mul_8], layer 1)
... 3 ops
layer_ready([getitem_3, getitem_4], inputs [1, 2], after [getitem_3, getitem_4], layer 0)
... 0 ops""",
    )


def test_listing_with_a_layer_that_is_not_compiled(interpreted):
    assert_expected_inline(
        short(listed(Broken, loop=called_as_it_is)),
        """\
def forward(self, run : int, counts, down, up):
    ...  # forward of graph 0
    scalars = self.scalars(counts)
    ...  # backward of graph 0, until the gradients of 'up' are final
    update_up = self.update_up(up, scalars)
    ...  # the rest of the backward
    # opt.step()
    # after the backward: no op of a compiled backward brings the gradient of 'down.bias'
    update_down = self.update_down(down, scalars)
    return None""",
    )


def test_listing_of_a_loop_that_clips(interpreted):
    assert_expected_inline(
        short(listed(Plain, loop=clipped)),
        """\
def forward(self, run : int, counts, down, up):
    ...  # forward and backward
    # opt.step()
    scalars = self.scalars(counts)
    # after the backward: the gradient of 'down.bias' is changed between backward and opt.step()
    update_down = self.update_down(down, scalars)
    # after the backward: the gradient of 'up.bias' is changed between backward and opt.step()
    update_up = self.update_up(up, scalars)
    return None""",
    )


# ---- what is printed is what runs ----------------------------------------------------------------------------------------


def printed(text):
    """The ops of a listing in order, those of the counts left out, with the line between backward and step."""
    found = []
    for line in text.splitlines():
        op = re.search(
            r"ckpt_(fence|emit)\(.*, '(.*)'\)|(update)_\w+ = self\.update_\w+\((\w+), scalars\)|# (opt\.step)\(\)", line
        )
        if op is not None and "'counts'" not in line:
            found.append(tuple(part for part in op.groups() if part))
    return found


def recorded(run, data):
    """The same of one step as it runs."""
    found, parts = [], run.opt.ckpt._run
    executor, emitter = parts.steppers[0].executor, parts.emitter
    names = {number: layer.name for number, layer in zip(executor.arranged.numbers, executor.arranged.graph.layers)}

    def noting(op, real):
        def call(number, tensors):
            if number in names:
                found.append((op, names[number]))
            real(number, tensors)

        return call

    emitter.fence, emitter.emit = noting("fence", emitter.fence), noting("emit", emitter.emit)
    for layer, calls in zip(executor.arranged.graph.layers, executor.prepared.by_layer):
        calls.insert(0, lambda _, name=layer.name: found.append(("update", name)))
    loss = run.compiled(data)
    loss.backward()
    found.append(("opt.step",))
    run.opt.step()
    return found


def test_each_op_runs_where_the_listing_has_it(interpreted):
    run = begun(build=Broken)
    run.compiled = run.model
    for step in range(WARM_UP + 1):
        run.step(batch(step))
    shown = str(run.opt.ckpt.graph)
    inside, late = [[(op, name) for op in ("fence", "update", "emit")] for name in ("up", "down")]
    assert printed(shown) == recorded(run, batch(9)) == [*inside, ("opt.step",), *late]


def test_the_readme_shows_what_is_printed():
    [block] = [each for each in blocks("README.md") if each.text.startswith("def forward(")]
    shown = re.sub(r" +#.*", "", block.text).strip()
    model = nn.Sequential()
    model.fc1, model.fc2 = nn.Linear(4, 8), nn.Linear(8, 2)
    opt = fxckpt.compile_step(torch.optim.AdamW(model.parameters(), fused=True), writer="mock", every=1, model=model)
    for _ in range(2):
        model(torch.ones(3, 4)).sum().backward()
        opt.step()
    assert shown == str(opt.ckpt.graph)


def test_the_page_on_the_graph_shows_what_is_printed(interpreted):
    [block] = [each for each in blocks("docs/graph.md") if each.text.startswith("def forward(")]
    assert block.text.strip() == listed(Plain)
