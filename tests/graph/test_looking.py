"""The graph is something to look at: what is printed, drawn and logged is what runs."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import torch
from graph_models import book, front_end
from model_cases import Gpt, language
from repository import ROOT
from torch import nn

import fxckpt
from fxckpt.graph.model.layers import block_of
from fxckpt.graph.step_graph import UpdateTimer
from fxckpt.optim import programs

__all__ = ["book"]  # the fixture


def two_layers(every=1, **options):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.fc1, model.fc2 = nn.Linear(4, 8), nn.Linear(8, 2)
    opt = fxckpt.compile_step(
        torch.optim.AdamW(model.parameters(), fused=True), writer="mock", every=every, model=model, **options
    )
    for _ in range(3):
        model(torch.ones(3, 4)).sum().backward()
        opt.step()
        opt.zero_grad()
    return opt.ckpt.graph


def without_comments(code: str) -> str:
    return "\n".join(re.sub(r"\s+#.*$", "", line) for line in code.strip().splitlines())


def test_the_readme_shows_exactly_what_a_two_layer_model_prints():
    shown = re.findall(r"```\w*\n(def forward\(self, run.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(shown) == 1
    assert without_comments(shown[0]) == str(two_layers())


def test_update_times_are_measured_where_layers_run_one_by_one(book):
    graph = two_layers()
    assert set(graph.times) == {"fc1", "fc2"}
    assert all(clock.calls == 2 for clock in graph.clocks)  # the first step is the stock one: it makes the state
    assert all(seconds > 0 for seconds in graph.times.values())
    for text in (graph.table(), graph.dot()):
        assert text.count(" ms") == 2
        assert "fc2" in text


def test_a_graph_that_ran_bare_has_no_times(book):
    graph = two_layers(every=100)
    assert graph.times == {}
    assert " ms" not in graph.table()


def test_a_clock_keeps_the_shortest_call():
    clock = UpdateTimer()
    for seconds in (0.5, 0.25, 0.75):
        clock.add(seconds)
    assert (clock.calls, clock.shortest) == (3, 0.25)


def test_why_a_layer_stands_where_it_does_is_printed(book):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.compiled, model.eager, model.unused = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(2, 2)
    opt = fxckpt.compile_step(torch.optim.AdamW(model.parameters()), writer="mock", every=1, model=model)
    compiled = torch.compile(model.compiled, backend=fxckpt.backend, options={"inner": front_end})
    for _ in range(2):
        model.eager(compiled(torch.ones(3, 4))).sum().backward()
        opt.step()
    graph = opt.ckpt.graph
    origins = {layer.name: graph.why[layer.name].origin for layer in graph.layers}
    assert origins == {"eager": "arrival", "compiled": "joint", "unused": "registration"}
    assert [line.split("tensors")[1].strip() for line in graph.table().splitlines()] == [
        "arrived #1", f"graph 0 op 0 (joint {graph.why['compiled'].final})", "never seen #4",
    ]  # fmt: skip
    assert graph.why["unused.bias"].position == 5
    assert list(graph.why)[3:] == list(graph.order)


def test_layers_by_module_by_block_and_by_a_function(book, tmp_path):
    torch.manual_seed(0)
    for layer, expected in (
        ("module", ["head", "ln_f", "h.1.down"]),
        ("block", ["head", "ln_f", "h.1", "h.0", "wpe", "wte"]),
        (lambda name: "all", ["all"]),
    ):
        model, batch = Gpt(depth=2), language()
        compiled = torch.compile(model, backend=fxckpt.backend, options={"inner": "eager"})
        opt = fxckpt.compile_step(
            torch.optim.SGD(model.parameters(), lr=0.1, foreach=True), writer="mock", every=1, model=model, layer=layer
        )
        compiled(**batch).backward()
        opt.step()
        graph = opt.ckpt.graph
        assert [one.name for one in graph.layers][: len(expected)] == expected
        assert sorted(graph.order) == sorted(name for name, _ in model.named_parameters())
        opt.ckpt.graph.draw(str(tmp_path / "graph.svg"))
        titles = [t.text for t in ET.parse(tmp_path / "graph.svg").iter("{http://www.w3.org/2000/svg}title")]
        assert sorted(titles) == sorted(one.name for one in graph.layers)
        opt.ckpt.shutdown()


def drawing(svg: str) -> tuple[dict[str, str], int]:
    """Each box's note without its time, and the number of arrows."""
    names = {"s": "http://www.w3.org/2000/svg"}
    root = ET.fromstring(svg)
    boxes = {}
    for group in root.findall("s:g", names):
        note = group.findall("s:text", names)[1].text
        boxes[group.find("s:title", names).text] = re.sub(r", [\d.]+ ms$", "", note)
    return boxes, len(root.findall("s:path", names))


def without_times(line: str) -> str:
    return " ".join(re.sub(r", [\d.]+ ms", "", line).split())


def test_the_drawing_and_the_table_in_the_docs_are_what_their_script_makes(book, tmp_path):
    page = (ROOT / "docs" / "graph.md").read_text()
    spec = importlib.util.spec_from_file_location("draw_graph", ROOT / "tools" / "draw_graph.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    graph = module.graph(2)
    graph.draw(str(tmp_path / "now.svg"))
    assert drawing((ROOT / "docs" / "graph.svg").read_text()) == drawing((tmp_path / "now.svg").read_text())
    first, last = (part.splitlines() for part in re.search(r"```text\n(   1 .*?)\.\.\.\n(.*?)```", page, re.DOTALL).groups())
    table = [without_times(line) for line in graph.table().splitlines()]
    assert [without_times(line) for line in first] == table[: len(first)]
    assert [without_times(line) for line in last] == table[-len(last) :]
    assert {block_of(f"{layer.name}.") for layer in graph.layers} == {"wte", "wpe", "ln_f", *(f"h.{i}" for i in range(4))}


def test_what_the_passes_did_is_logged(book, caplog, monkeypatch):
    monkeypatch.setattr(programs, "_shared_programs", {})  # whatever other tests traced
    model, batch = Gpt(depth=3), language()
    for block in model.h:
        block.compile(backend=fxckpt.backend, options={"inner": "eager"})
    with caplog.at_level(logging.DEBUG, logger="fxckpt"):
        opt = fxckpt.compile_step(torch.optim.AdamW(model.parameters(), fused=True), writer="mock", every=1, model=model)
        for _ in range(2):
            model(**batch).backward()
            opt.step()
    text = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("fxckpt"))
    for told in (
        "traced a graph with region 0: 12 parameters",
        "also serves 12 parameters like h.2.ln_1.weight",
        "traced AdamW (fused",
        "scalars, inputs",
        "bound 41 parameters of AdamW; they share 1 traced",
        "wrote the StepGraph: 22 layers in the order ['head', 'ln_f', 'h.2.down'",
        "bucketed 41 parameters (1 sets of scalars)",
        "the stock step updates 41 parameters",
    ):
        assert told in text, text


def test_why_something_fell_back_is_logged(caplog):
    class Foreign(torch.optim.SGD):
        def step(self, closure=None):
            self.steps = getattr(self, "steps", 0) + 1
            return super().step(closure)

    model = nn.Linear(4, 4)
    with caplog.at_level(logging.DEBUG, logger="fxckpt"):
        opt = fxckpt.compile_step(Foreign(model.parameters(), lr=0.1), writer="mock", every=1, model=model)
        for _ in range(2):
            model(torch.ones(2, 4)).sum().backward()
            opt.step()
    whole = opt.ckpt._run.steppers[0].whole
    assert whole
    assert any(whole in record.getMessage() for record in caplog.records)
    assert [layer.name for layer in opt.ckpt.graph.layers] == ["(root)"]


def test_torch_logs_knows_our_logger_and_shows_it():
    """TORCH_LOGS takes the name of any logger, and sets its level before the package is imported."""
    code = (
        "import logging, torch, fxckpt\nprint(logging.getLogger('fxckpt').getEffectiveLevel())\nm = torch.nn.Linear(2, 2)\n"
        "o = fxckpt.compile_step(torch.optim.SGD(m.parameters(), lr=0.1, foreach=True), model=m, writer='mock', every=1)\n"
        "m(torch.ones(1, 2)).sum().backward(); o.step()"
    )
    env = {**os.environ, "TORCH_LOGS": "+fxckpt", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(logging.DEBUG)]
    for told in ("bound 2 parameters of SGD", "wrote the StepGraph: 1 layers", "traced SGD (foreach"):
        assert told in done.stderr
