"""Tables in README.md and docs/benchmarks.md are what the results say, and a round of models.py says what happened in it."""

from __future__ import annotations

import importlib
import re
import signal
import sys
import time
from itertools import count
from multiprocessing import Pipe

import pytest
from repository import ROOT


@pytest.fixture(scope="module")
def module():
    """Imports from benchmarks/."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_each_table_is_what_the_script_makes_of_the_results(page, module):
    tables, text = module("tables"), (ROOT / page).read_text()
    assert page in tables.PAGES
    assert text == tables.filled(text), "python benchmarks/tables.py"


def test_each_table_has_a_place(module):
    tables = module("tables")
    places = re.findall("<!-- table: (.*?) -->", "".join((ROOT / page).read_text() for page in tables.PAGES))
    assert sorted(places) == sorted(tables.TABLES)


def test_a_figure_that_was_written_by_hand_is_replaced_and_an_unknown_table_refused(module):
    tables, text = module("tables"), (ROOT / "README.md").read_text()
    place = re.search(r"(<!-- table: .*?-->\n.*?)(\d\.\d\d)", text, re.DOTALL)
    other = text[: place.start(2)] + "9.99" + text[place.end(2) :]
    assert tables.filled(other) == text
    with pytest.raises(KeyError, match="of nothing"):
        tables.filled("<!-- table: of nothing -->\n<!-- end of table -->")


def way(label: str, ratio: float, seconds: float, held: float) -> dict:
    """A row of results."""
    plain = {"rounds": [1.0, 1.0], "peak_memory": 1e9}
    lost = {"mean": 1.0, "most": 2}
    row = {"ratio": ratio, "ratios": [ratio], "stall_seconds": 0.1, "peak_memory": 1e9, "held": held, "bytes": 1e9, "lost": lost}
    return {"label": label, "version": "1", "every": {"none": plain, "1": row, "10": row}, "kills": [{"seconds": seconds}]}


def test_what_others_do_better_is_named_and_what_they_do_worse_is_not(module):
    render = module("render")
    ways = {"fxckpt": way("fxckpt", 1.1, 2.0, 5e9), "a": way("A", 1.5, 1.0, 9e9), "b": way("B", 1.2, 3.0, 1e9)}
    ways["c"] = {"label": "C", "failed": "not installed"}
    found = render.losses({"models": {"m": {"label": "M", "ways": ways}}})
    assert found == "* restore: M 2.00 s, A 1.00 s\n* disk: M 5.00 GB, B 1.00 GB"
    assert render.absent({"ways": ways}) == ["C: not installed"]


def test_steps_lost_are_those_made_and_not_yet_durable_at_each_instant(module):
    """Steps of a second, from 11 on; that of 10 is durable half a second after the round began, that of 12 at 2.5 s."""
    duel = module("duel")
    made = [(11, 101.0), (12, 102.0), (13, 103.0)]
    found = {"began": 100.0, "seconds": 1.0, "steps": 3, "made": made, "durable": [(10, 100.5), (12, 102.5)]}
    mean, most = duel.lost(found, 2)
    # 2 until 100.5 (10, and 8 is durable), then 0; 1 from 101; 2 from 102; 0 from 102.5
    assert (mean, most) == (pytest.approx((0.5 * 2 + 0 + 1 + 0.5 * 2 + 0) / 3), 2)


def test_every_tenth_of_one_who_waits_loses_what_its_steps_say(module):
    """Ten steps of a second and a save of two: 0 to 9 steps for a second each, and ten while it saves."""
    lost = module("duel").tenth_lost(1.0, 1.2)
    assert (lost["mean"], lost["most"]) == (pytest.approx((45 + 2 * 10) / 12), 10)


def test_a_round_counts_its_steps_and_not_the_one_before_it(tmp_path, module):
    turns, saving = module("turns"), module("saving")
    ours, theirs = Pipe()
    for order in (turns.Order(2, 4, first=True), turns.Order(0, 1), None):
        ours.send(order)
    saver, saved = saving.Nothing(), []
    each = turns.Turns(saver, tmp_path, theirs)
    for step in each.take():
        if each.due(step):
            saver.save(step)
            saved.append(step)
    first, second = ours.recv(), ours.recv()
    assert (saved, first["saves"], second["saves"]) == ([1, 3, 5], 3, 0)
    assert [[step for step, _ in found["made"]] for found in (first, second)] == [[2, 3, 4, 5], [6]]
    assert first["steps"] == 4 and 0 < first["seconds"] < 1


def sleeps(pipe) -> None:
    """Gives one answer, and no other."""
    pipe.send("first")
    time.sleep(60)


def test_a_contestant_that_does_not_answer_is_ended(module):
    contest = module("contest")
    sleeper = contest.Contestant("sleeper", sleeps, kind="fork", limit=5.0)
    assert sleeper.answer() == "first"
    sleeper.limit = 0.1
    with pytest.raises(contest.Died, match="sleeper: no answer within"):
        sleeper.ask("again")
    assert sleeper.process.exitcode == -signal.SIGKILL


def test_each_one_is_first_in_a_round_and_each_one_follows_another(module):
    in_turn = module("contest").in_turn
    assert [in_turn(number, "abc") for number in range(3)] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]


def test_savers_restore_what_they_saved_and_the_optimizer_says_which_step(tmp_path, module):
    import torch

    savers, ways = module("savers"), module("ways")
    for maker in (savers.Fxckpt, savers.TorchSave, savers.Safetensors, savers.DCP):
        folder = tmp_path / maker.__name__
        folder.mkdir()
        first, second = (loop(maker(), ways, folder) for _ in range(2))
        first.train(Takes(3))
        found = second.restore()
        assert (found.step, found.errors) == (3, {})
        assert all(torch.equal(a, b) for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values()))
        second.saver.close()


class Takes:
    """Turns without a pipe: so many steps, each saved."""

    def __init__(self, steps: int):
        self.steps = steps

    def take(self):
        return iter(range(1, self.steps + 1))

    def due(self, step: int) -> bool:
        return True


def loop(saver, ways, folder):
    """A training of a model that gives its own loss."""
    import torch

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
            self.numbers = count()

        def forward(self, x):
            return type("Output", (), {"loss": self.inner(x).square().mean()})

    return ways.Loop(saver, Model(), {"x": torch.randn(8, 4)}, folder)


def test_other_numbers_of_ranks_read_a_tenth_more_than_they_need_at_most(module):
    """As checksums are laid; with one for each chunk, much more. Of one pair; what is in the tables is of all of them."""
    resharding = module("resharding")
    shapes = resharding.gpt2()
    for writers in (resharding.Layout(4), resharding.Layout(4, sharded=False), resharding.Layout(1)):
        found = resharding.pair(shapes, resharding.stored(shapes, writers), resharding.Layout(16))
        assert 1 <= found[resharding.OURS] <= 1.1 < found["4096"], writers
    recorded = resharding.json.loads((ROOT / "benchmarks/results/resharding.json").read_text())
    for of in recorded["models"].values():
        assert max(ratio for row in of[resharding.OURS].values() for ratio in row) <= 1.1
    for of in recorded["between"].values():
        for writer, readers in of.items():
            assert all(each[resharding.OURS] <= 1.1 for reader, each in readers.items() if "TP" not in f"{writer}{reader}"), (
                writer
            )


def test_each_layout_has_all_of_a_model_and_ranks_write_all_of_it_once(module):
    resharding = module("resharding")
    shapes = resharding.gpt2()
    whole = 12 * sum(resharding.math.prod(shape) for shape in shapes.values())
    for layout in (resharding.Layout(1), *resharding.DDP, *resharding.MESHES, *resharding.SHARDED):
        files = resharding.stored(shapes, layout)
        assert sum(resharding._bytes(box) for file, _ in files for _, box, _ in file) == whole, layout
        assert sum(resharding._bytes(box) for mine in resharding.held(shapes, layout) for box in mine.values()) >= whole
