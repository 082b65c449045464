"""Pictures of the layer graph."""

from __future__ import annotations

import importlib.util
import sys
import xml.etree.ElementTree as ET
from itertools import pairwise

import expecttest
import pytest
from repository import ROOT

from fxckpt.graph.draw import to_dot, to_svg, to_text
from fxckpt.graph.model.layers import Layer, Place

SVG = "{http://www.w3.org/2000/svg}"


def deep(blocks, parts=("ln", "up", "down")):
    """A transformer-like chain in update order, with its edges in forward order."""
    names = ["wte", *(f"h.{i}.{part}" for i in range(blocks) for part in parts), "head"]
    return tuple(Layer(name, (f"{name}.weight",)) for name in reversed(names)), tuple(pairwise(names))


def boxes(svg):
    root = ET.fromstring(svg)
    found = {}
    for group in root.findall(f"{SVG}g"):
        rect, title = group.find(f"{SVG}rect"), group.find(f"{SVG}title")
        x, y, width, height = (float(rect.get(k)) for k in ("x", "y", "width", "height"))
        found[title.text] = (x, y, x + width, y + height)
    return root, found


SIZES = {"wte": 3 << 20, "h.0.ln": 512, "h.0.up": 150_000, "head": 5 << 30}


class Golden(expecttest.TestCase):
    def test_text(self):
        layers, edges = deep(1, ("ln", "up"))
        self.assertExpectedInline(
            to_text(layers, edges, SIZES, {"head": 0.00125}),
            """\
   1  head      5.0 GiB, 1.25 ms    1 tensors
   2  h.0.up             146 KiB    1 tensors  -> head
   3  h.0.ln               512 B    1 tensors  -> h.0.up
   4  wte                3.0 MiB    1 tensors  -> h.0.ln""",
        )

    def test_text_with_reasons(self):
        layers, edges = deep(1, ("ln",))
        places = [Place("arrival", 3), Place("joint", 12, 0, 153), Place("registration", 0)]
        self.assertExpectedInline(
            to_text(layers, edges, why={layer.name: place for layer, place in zip(layers, places)}),
            """\
   1  head                          1 tensors  arrived #3
   2  h.0.ln                        1 tensors  graph 0 op 12 (joint 153)  -> head
   3  wte                           1 tensors  never seen #0              -> h.0.ln""",
        )

    def test_dot(self):
        layers, edges = deep(1, ("ln", "up"))
        self.assertExpectedInline(
            to_dot(layers, edges, SIZES),
            """\
digraph layers {
  node [shape=box, style="rounded,filled", fillcolor="#dbeafe", fontname=monospace];
  "wte" [label="wte\\nupdate 4, 3.0 MiB"];
  subgraph cluster_1 {
    label="h.0";
    "h.0.ln" [label="h.0.ln\\nupdate 3, 512 B"];
    "h.0.up" [label="h.0.up\\nupdate 2, 146 KiB"];
  }
  "head" [label="head\\nupdate 1, 5.0 GiB"];
  "wte" -> "h.0.ln";
  "h.0.ln" -> "h.0.up";
  "h.0.up" -> "head";
}""",
        )


@pytest.mark.parametrize("blocks", [1, 12, 48])
def test_boxes_do_not_overlap_and_every_edge_is_drawn(blocks):
    layers, edges = deep(blocks)
    root, found = boxes(to_svg(layers, edges))
    assert set(found) == {layer.name for layer in layers}
    assert len(root.findall(f"{SVG}path")) == len(edges)
    all_boxes = list(found.values())
    for at, (left, top, right, bottom) in enumerate(all_boxes):
        for other in all_boxes[at + 1 :]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_a_deep_model_is_folded_to_about_a_page():
    layers, edges = deep(12, ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"))
    root, found = boxes(to_svg(layers, edges))
    width, height = float(root.get("width")), float(root.get("height"))
    assert 0.5 < width / height < 2
    columns = {}
    for name, (left, *_rest) in found.items():
        columns.setdefault(left, []).append(name)
    tops = [min(names, key=lambda n: found[n][1]) for names in columns.values()]
    assert all(name == "wte" or name.endswith(".ln_1") for name in tops)  # cut between blocks


def test_labels_fit_their_boxes():
    layers, edges = deep(2)
    root, found = boxes(to_svg(layers, edges, {"h.0.up": 123 << 20}, {"h.0.up": 0.123}))
    for group in root.findall(f"{SVG}g"):
        right = found[group.find(f"{SVG}title").text][2]
        for text in group.findall(f"{SVG}text"):
            assert float(text.get("x")) + 6.6 * len(text.text) <= right


def test_odd_names_are_escaped():
    layers = (Layer('a<b>&"c', ("x",)), Layer("(root)", ("y",)))
    edges = (("(root)", 'a<b>&"c'),)
    _, found = boxes(to_svg(layers, edges))
    assert set(found) == {'a<b>&"c', "(root)"}
    assert r'"(root)" -> "a<b>&\"c";' in to_dot(layers, edges)


def test_nothing_and_loose_layers_and_circles_can_be_drawn():
    assert boxes(to_svg((), ()))[1] == {}
    loose = tuple(Layer(name, (name,)) for name in "abc")
    assert len(boxes(to_svg(loose, ()))[1]) == 3
    assert len(boxes(to_svg(loose, (("a", "b"), ("b", "a"))))[1]) == 3
    assert to_text((), ()) == ""


def draw_step():
    """The script, imported."""
    spec = importlib.util.spec_from_file_location("draw_step", ROOT / "tools/draw_step.py")
    script = sys.modules["draw_step"] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(script)
    return script


def test_the_picture_of_a_step_is_what_its_script_draws():
    assert (ROOT / "docs/step.svg").read_text() == draw_step().draw(), "python tools/draw_step.py"


def test_inside_the_backward_updates_and_copies_begin_earlier_and_gradients_are_fewer():
    script = draw_step()
    found = {inside: script.times(inside) for inside in (False, True)}
    first = {inside: min(begin for kind, _, begin, _ in each.bars if kind == "copy") for inside, each in found.items()}
    assert first[True] < first[False] - script.BACKWARD / 2
    assert [max(held for _, held in found[inside].gradients) for inside in (False, True)] == [script.LAYERS, 1]
