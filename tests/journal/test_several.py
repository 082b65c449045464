"""Several optimizers in one run with a journal: a record holds the step of each that stepped, and they are made again with the
bits that training had."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from digests import digest
from journal_lives import journalled, net, signed, whole
from torch import nn

import fxckpt
from fxckpt.cli import main
from fxckpt.errors import Corrupt
from fxckpt.journal.made import Made
from fxckpt.store.journaled import durable_steps
from fxckpt.store.reader import Reader, candidates, records

STEPS = 16

FULL = os.environ.get("FXCKPT_OPTIMIZERS") == "full"


class Pair(nn.Module):
    """A generator and a discriminator."""

    def __init__(self):
        super().__init__()
        self.g = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4))
        self.d = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.1), nn.Tanh(), nn.Linear(6, 1))


@dataclass(frozen=True)
class Case:
    """A training: its model, its optimizers, one turn of it. ``order``: which optimizers' steps its records have."""

    model: Callable[[], nn.Module]
    make: Callable[[Any], list[torch.optim.Optimizer]]
    turn: Callable[[Life, int], object]
    order: Sequence[tuple[int, ...]]


class Life:
    """One life of a case, which begins with a load. ``states`` after each step, by its number; ``at`` what a load gave."""

    def __init__(
        self,
        root: Path,
        case: Case,
        *,
        boundaries: bool,
        schedulers: bool = True,
        load: dict[str, Any] | None = None,
        **options: Any,
    ):
        torch.manual_seed(0)
        self.case, self.boundaries = case, boundaries
        self.model = case.model()
        self.opts = case.make(self.model)
        made = [torch.optim.lr_scheduler.ExponentialLR, lambda opt, rate: torch.optim.lr_scheduler.OneCycleLR(opt, 0.02, 200)]
        self.schedulers = [make(opt, 0.95) for make, opt in zip(made, self.opts)] if schedulers else []
        self.scalers = [torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=4) for _ in self.opts]
        options = {"every": 1, "keep": 9, "journal": 6, "update": "native", **options}
        self.before: Callable[[int], object] = lambda step: None
        kept = {"schedulers": self.schedulers, **{f"scaler{i}": each for i, each in enumerate(self.scalers)}}
        fxckpt.compile_step(self.opts, root, model=self.model, extra=kept, **options)
        self.restored = fxckpt.load(**(load or {}))
        self.at = self.now()
        self.states: dict[int, str] = {}

    @property
    def run(self) -> Any:
        return self.opts[0].ckpt

    def now(self) -> str:
        """A digest of model, optimizers, schedulers and scalers."""
        return digest(self.model, *(dict(opt.state_dict().items()) for opt in self.opts), *self.schedulers,
                      *(each.state_dict() for each in self.scalers))  # fmt: skip

    def numbers(self, upto: int) -> Iterator[int]:
        yield from fxckpt.steps(upto) if self.boundaries else range(self.run.statistics()["steps"], upto)

    def train(self, upto: int) -> Life:
        """Make steps until there are so many."""
        for step in self.numbers(upto):
            self.before(step)
            self.case.turn(self, step)
            for each in self.schedulers:
                each.step()
            self.states[step + 1] = self.now()
        return self

    def end(self) -> Life:
        self.run.shutdown()
        return self


def of_matrices_and_others(model: nn.Module) -> list[torch.optim.Optimizer]:
    """The weights of a module and its bias have different ones."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    return [torch.optim.RMSprop(matrices, lr=1e-3, momentum=0.9), torch.optim.AdamW(others, lr=1e-2)]


def both_at_once(life: Life, step: int) -> None:
    life.model(torch.randn(4, 2, 6, 6)).square().mean().backward()
    nn.utils.clip_grad_norm_(life.model.parameters(), 0.5)
    if step % 3 == 2:
        life.model[0].bias.grad = None
    for opt in life.opts:
        opt.step()
    for opt in life.opts:
        opt.zero_grad()


def second_now_and_then(life: Life, step: int) -> None:
    """The first steps in each turn, behind it the second in every third, with what was accumulated."""
    life.model(torch.randn(4, 2, 6, 6)).square().mean().backward()
    life.opts[0].step()
    life.opts[0].zero_grad()
    if step % 3 == 1:
        life.opts[1].step()
        life.opts[1].zero_grad()


def first_now_and_then(life: Life, step: int) -> None:
    """The other way round: in a loop without boundaries the last one of the list steps last."""
    life.model(torch.randn(4, 2, 6, 6)).square().mean().backward()
    for number in (0, 1) if step % 3 == 1 else (1,):
        life.opts[number].step()
        life.opts[number].zero_grad()


def of_the_pair(model: Pair) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.d.parameters(), lr=1e-2, momentum=0.9), torch.optim.Adam(model.g.parameters(), lr=1e-2)]


def in_turns(life: Life, step: int) -> None:
    """As in the usual script: the generator's backward adds to the gradients that the discriminator's step used."""
    model, (d, g) = life.model, life.opts
    d.zero_grad()
    fake = model.g(torch.randn(5, 3))
    (model.d(torch.randn(5, 4)).mean() - model.d(fake.detach()).mean()).backward()
    d.step()
    g.zero_grad()
    model.d(fake).mean().backward()
    g.step()


def clipped_weights(life: Life, step: int) -> None:
    """The discriminator's weights are clamped between the two steps."""
    model, (d, g) = life.model, life.opts
    (model.d(torch.randn(5, 4)).mean() - model.d(model.g(torch.randn(5, 3)).detach()).mean()).backward()
    d.step()
    with torch.no_grad():
        model.d[0].weight.clamp_(-0.3, 0.3)
    d.zero_grad()
    model.d(model.g(torch.randn(5, 3))).mean().backward()
    g.step()
    for opt in (d, g):
        opt.zero_grad()


def clipped_before(life: Life, step: int) -> None:
    """A layer of each is clamped before its step, and in some turns behind both."""
    model, (d, g) = life.model, life.opts
    for part, opt in ((model.d, d), (model.g, g)):
        with torch.no_grad():
            part[3].weight.clamp_(-0.1, 0.1)
        (model.d(torch.randn(5, 4)).mean() - model.d(model.g(torch.randn(5, 3))).mean()).backward()
        opt.step()
        model.zero_grad()
    if step % 4 == 0:
        with torch.no_grad():
            model.g[0].weight.mul_(0.9)


def scaled(life: Life, step: int) -> None:
    """Each with a scaler; now and then there is an inf in the gradients of one only, or in both."""
    life.model(torch.randn(4, 2, 6, 6)).square().mean().backward()
    for number, (opt, scaler) in enumerate(zip(life.opts, life.scalers)):
        scaler.scale(torch.zeros(()))
        if step % 7 in (number + 2, 5):
            opt.param_groups[0]["params"][0].grad.fill_(float("inf"))
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()


CASES = {
    "both": Case(net, of_matrices_and_others, both_at_once, [(0, 1)]),
    "second now and then": Case(net, of_matrices_and_others, second_now_and_then, [(0,), (0, 1)]),
    "first now and then": Case(net, of_matrices_and_others, first_now_and_then, [(1,), (0, 1)]),
    "in turns": Case(Pair, of_the_pair, in_turns, [(0, 1)]),
    "clamped": Case(Pair, of_the_pair, clipped_weights, [(0, 1)]),
    "clamped before": Case(Pair, of_the_pair, clipped_before, [(0, 1)]),
    "scaled": Case(net, of_matrices_and_others, scaled, [(0, 1), (0,), (1,)]),
}
PLAIN = [name for name in CASES if name not in ("second now and then", "clamped before")] if FULL else ["both", "scaled"]


def orders(root: Path) -> set[tuple[int, ...]]:
    return {whole(each).record.journal.order for each in records(root)}


def fulls(root: Path) -> list[int]:
    return sorted(whole(each).record.step for each in candidates(root))


@pytest.mark.parametrize(("case", "boundaries"), [*((name, True) for name in CASES), *((name, False) for name in PLAIN)], ids=str)
def test_each_step_of_two_optimizers_goes_on_with_the_bits_of_a_run_without_a_journal(root, one_thread, case, boundaries):
    def life(place: str, **options: Any) -> Life:
        return Life(root / place, CASES[case], boundaries=boundaries, **options)

    stock = life("stock", journal=1).train(STEPS).end()
    through = life("through").train(STEPS).end()
    assert through.states == stock.states
    if boundaries or case != "scaled":  # a leader that is skipped has no checkpoint in a loop without boundaries
        assert set(CASES[case].order) <= orders(root / "through")
        assert len(fulls(root / "through")) <= 5 and len(journalled(root / "through")) >= 11, fulls(root / "through")
    for step in durable_steps(root / "through")[-6::2]:
        shutil.copytree(root / "through", root / f"from {step}")
        found = life(f"from {step}", load={"step": step})
        assert found.restored.step == step and found.at == stock.states[step], step
        found.train(STEPS).end()
        assert found.states == {at: state for at, state in stock.states.items() if at > step}, step


@pytest.mark.skipif(not FULL, reason="compiles for ten seconds: set FXCKPT_OPTIMIZERS=full")
@pytest.mark.parametrize("case", ["both", "second now and then"])
def test_compiled_updates_of_two_optimizers_are_made_again(root, one_thread, inductor_cache, case):
    stock = Life(root / "stock", CASES[case], boundaries=True, journal=1, update=None).train(STEPS).end()
    through = Life(root / "a", CASES[case], boundaries=True, update=None).train(STEPS - 1).end()
    assert through.states.items() <= stock.states.items() and orders(root / "a") == set(CASES[case].order)
    found = Life(root / "a", CASES[case], boundaries=True, update=None)
    assert found.restored.path.name.startswith("journal") and found.at == stock.states[STEPS - 1]
    assert found.train(STEPS).end().states[STEPS] == stock.states[STEPS]


def test_a_process_that_dies_between_two_steps_of_a_turn_goes_on_from_the_record_before(root, one_thread):
    through = Life(root / "a", CASES["both"], boundaries=True)
    step = through.opts[1].step

    def dying() -> None:
        if through.run.statistics()["steps"] == 12:
            through.run.flush()
            shutil.copytree(root / "a", root / "b")
        step()

    through.opts[1].step = dying
    through.train(STEPS).end()
    after = Life(root / "b", CASES["both"], boundaries=True)
    assert after.restored.path.name == "journal-000000011" and after.at == through.states[11]
    assert after.train(STEPS).end().states[STEPS] == through.states[STEPS]


def held_in_the_middle(life: Life, step: int) -> None:
    """Each kind of checkpoint and wait that a script may ask for between two steps of a turn."""
    life.model(torch.randn(4, 2, 6, 6)).square().mean().backward()
    life.opts[0].step()
    if step == 8:
        life.run.save("middle")
    if step == 9:
        life.run.flush()
    if step == 10:
        life.run.save()
    life.opts[1].step()
    for opt in life.opts:
        opt.zero_grad()


@pytest.mark.parametrize("boundaries", [True, False])
def test_saves_between_two_steps_of_a_turn_leave_the_bits_as_they_are(root, one_thread, boundaries):
    case = Case(net, of_matrices_and_others, held_in_the_middle, [])
    life = Life(root, case, boundaries=boundaries).train(13).end()
    assert {9, 10} <= set(journalled(root)), "a named save, and a wait, are nothing to the journal"
    for step in (9, 11, 12, 13):
        found = Life(root, case, boundaries=boundaries, load={"step": step}).end()
        assert (found.restored.step, found.at) == (step, life.states[step]), step


def between_steps(change: Callable[[torch.Tensor], object], when: Callable[[int], bool]) -> Case:
    """A case that changes the first gradient of the first optimizer behind its step, before that of the second."""

    def turn(life: Life, step: int) -> None:
        life.model(torch.randn(4, 2, 6, 6)).square().mean().backward()
        life.opts[0].step()
        if when(step):
            change(life.model[0].weight.grad)
        life.opts[1].step()
        for opt in life.opts:
            opt.zero_grad()

    return Case(net, of_matrices_and_others, turn, [])


@pytest.mark.parametrize(
    ("change", "when"),
    [
        (lambda grad: grad.zero_(), lambda step: True),
        (lambda grad: grad.data.zero_(), lambda step: True),
        (lambda grad: grad.zero_(), lambda step: step == 11),
    ],
    ids=["each turn", "past its counter", "once, late"],
)
def test_gradients_that_change_between_two_steps_are_stored_as_their_step_had_them(root, one_thread, change, when):
    case = between_steps(change, when)
    life = Life(root, case, boundaries=True).train(STEPS).end()
    assert len(fulls(root)) <= 5 and life.run.statistics()["checkpoints_failed"] == 0
    steps = durable_steps(root)
    for step in (*steps[2:6], *steps[-5::2]):
        found = Life(root, case, boundaries=True, load={"step": step}).end()
        assert found.restored.skipped == () and found.at == life.states[step], step


def unfreezing(life: Life, step: int) -> None:
    """The last layer gets a group of its own in the second optimizer."""
    life.model(torch.randn(4, 2, 6, 6)).square().mean().backward()
    for opt in life.opts:
        opt.step()
        opt.zero_grad()
    if step == 9:
        add_group(life.model, life.opts)


def add_group(model: nn.Module, opts: list[torch.optim.Optimizer]) -> None:
    model[-1].requires_grad_(True)
    opts[1].add_param_group({"params": list(model[-1].parameters()), "lr": 0.05})


def test_a_group_that_is_added_to_one_of_two_optimizers_begins_the_journal_anew(root, one_thread):
    def frozen() -> nn.Module:
        model = net()
        model[-1].requires_grad_(False)
        return model

    def some(model: nn.Module) -> list[torch.optim.Optimizer]:
        params = [p for p in model.parameters() if p.requires_grad]
        return [torch.optim.SGD(params[:2], lr=1e-2, momentum=0.9), torch.optim.AdamW(params[2:], lr=1e-2)]

    def more(model: nn.Module) -> list[torch.optim.Optimizer]:
        opts = some(model)
        add_group(model, opts)
        return opts

    def constant(make: Callable[[nn.Module], list[torch.optim.Optimizer]]) -> Case:
        return Case(frozen, make, unfreezing, [(0, 1)])

    life = Life(root, constant(some), boundaries=True, schedulers=False).train(STEPS).end()
    assert journalled(root)[-1] == STEPS and {10, 11} & set(fulls(root))
    for step in (8, 9, 13, 14, 16):
        make = more if step > 9 else some
        found = Life(root, constant(make), boundaries=True, schedulers=False, load={"step": step}).end()
        assert (found.restored.step, found.at) == (step, life.states[step]), step


def twice(life: Life, step: int) -> None:
    for number in (0, 0, 1) if step >= 4 else (0, 1):
        life.model(torch.randn(4, 2, 6, 6)).square().mean().backward()
        life.opts[number].step()
        for opt in life.opts:
            opt.zero_grad()


def test_turns_in_which_one_steps_twice_are_stored_in_full_and_it_is_said(root, one_thread, caplog):
    case = Case(net, of_matrices_and_others, twice, [])
    with caplog.at_level(logging.WARNING, "fxckpt"):
        life = Life(root, case, boundaries=True).train(10).end()
    assert sum("RMSprop makes several steps from one checkpoint to the next" in each for each in caplog.messages) == 1
    assert journalled(root) == [3, 4]
    assert Life(root, case, boundaries=True).end().at == life.states[10]


def test_one_that_is_not_repeatable_is_named_and_all_is_stored_in_full(root, one_thread, caplog):
    class Own(torch.optim.SGD):
        """Of a class that is not PyTorch's."""

    def with_own(model: nn.Module) -> list[torch.optim.Optimizer]:
        first, second = of_matrices_and_others(model)
        return [first, Own(second.param_groups[0]["params"], lr=1e-2)]

    case = Case(net, with_own, both_at_once, [])
    with caplog.at_level(logging.WARNING, "fxckpt"):
        Life(root, case, boundaries=True).train(5).end()
    assert journalled(root) == [] and fulls(root) == [1, 2, 3, 4, 5]
    assert sum("no journal: Own is not of torch.optim" in each for each in caplog.messages) == 1


@pytest.fixture
def trained(root, one_thread):
    """A life of the first case, of twelve steps."""
    return Life(root, CASES["both"], boundaries=True).train(12).end()


def test_the_layers_of_both_are_compared_with_what_training_had(root, trained):
    """Though a module's weight and bias make layers of the same name."""
    names = {name for each in records(root) for name in whole(each).record.journal.digests}
    assert "0" in names and "optimizer1:6" in names
    for wrong in ("0", "optimizer1:6"):
        path = next(whole(e).path for e in records(root) if wrong in whole(e).record.journal.digests)
        record = Reader(path).record
        vars(record.journal)["digests"] = {wrong: record.journal.digests[wrong] ^ 1}
        (path / "commit.json").write_bytes(record.to_bytes())
        with pytest.raises(Corrupt, match="is not what training had"):
            Life(root, CASES["both"], boundaries=True, load={"step": record.step})
        for run in list(fxckpt.run.run.live_runs):
            run.shutdown()


def test_layers_that_only_their_steps_change_are_gradients_in_a_record(root, trained):
    found = [{layer.kind for layer in whole(each).record.layers} for each in records(root)]
    assert found == [{"gradients", "buffers"}] * len(found)


def test_weights_of_two_optimizers_step_load_without_them(root, trained):
    torch.manual_seed(9)
    model = net()
    assert fxckpt.load(root, model=model).step == 12
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), trained.model.state_dict().values()))


def test_export_writes_the_state_of_both(root, trained, tmp_path):
    assert main(["export", str(root), str(tmp_path / "model.pt"), "--format", "torch", "--optimizer"]) == 0
    found = torch.load(tmp_path / "model.pt", weights_only=False)
    for number, opt in enumerate(trained.opts):
        mine, theirs = found["optimizer"][number]["state"], opt.state_dict()["state"]
        assert all(torch.equal(mine[i][key], theirs[i][key]) for i in theirs for key in theirs[i])
    assert main(["verify", str(root), "--replay"]) == 0


def formats(root: Path) -> dict[int, int]:
    """By step, the format of each record."""
    paths = [whole(each).path / "commit.json" for each in records(root)]
    return {json.loads(path.read_text())["step"]: json.loads(path.read_text())["format"] for path in paths}


def test_records_of_one_optimizer_keep_their_format_and_those_of_several_have_another(root, trained):
    from journal_lives import Life as Alone

    assert set(formats(root).values()) == {5}
    Alone(root / "alone").train(5).end()
    assert set(formats(root / "alone").values()) == {2}


@pytest.mark.parametrize("order", [[0], [0, 0], [1, 0, 2], [7, 8], [-1, 0], [True, 1], "01", None], ids=str)
def test_an_order_that_no_run_writes_is_damage(root, trained, order):
    newest = max((whole(each) for each in records(root)), key=lambda each: each.record.step)
    body = json.loads(Reader(newest.path).record.to_bytes())
    body["journal"]["order"] = order
    (newest.path / "commit.json").write_bytes(signed(body))
    assert Life(root, CASES["both"], boundaries=True).end().restored.step == newest.record.step - 1


def test_gradients_are_let_go_when_their_step_closes(root, one_thread):
    life, held = Life(root, CASES["both"], boundaries=True), []

    def look(step: int) -> None:
        life.run.flush()
        held.append(sum(isinstance(each, Made) for each in gc.get_objects()))

    life.before = look
    life.train(6).end()
    assert len(fulls(root)) == 2 and held == [0] * 6


def changed_once(place: str, key: str) -> Case:
    """A case in which one tensor is changed once, late, when nothing is being copied: before both steps, between, or behind."""

    def change(life: Life, step: int, here: str) -> None:
        if (step, here) == (9, place):
            life.run.flush()
            with torch.no_grad():
                life.model.get_parameter(key).mul_(0.5)

    def turn(life: Life, step: int) -> None:
        change(life, step, "before")
        life.model(torch.randn(4, 2, 6, 6)).square().mean().backward()
        life.opts[0].step()
        change(life, step, "between")
        life.opts[1].step()
        for opt in life.opts:
            opt.zero_grad()
        change(life, step, "behind")

    return Case(net, of_matrices_and_others, turn, [])


@pytest.mark.parametrize("key", ["4.weight", "4.bias"])
@pytest.mark.parametrize("place", ["before", "between", "behind"])
def test_what_changes_once_outside_of_both_steps_is_stored_whole(root, one_thread, place, key):
    case = changed_once(place, key)
    life = Life(root, case, boundaries=True).train(12).end()
    assert fulls(root) == [1, 2, 8], "a record has it"
    for step in (10, 11):
        found = Life(root, case, boundaries=True, load={"step": step}).end()
        assert found.restored.skipped == () and found.at == life.states[step], step


def test_gradients_in_another_order_of_memory_are_made_again_in_it(root, one_thread):
    def turn(life: Life, step: int) -> None:
        life.model(torch.randn(4, 2, 6, 6)).square().mean().backward()
        life.model[6].weight.grad = life.model[6].weight.grad.t().contiguous().t()
        for opt in life.opts:
            opt.step()
            opt.zero_grad()

    case = Case(net, of_matrices_and_others, turn, [])
    life = Life(root, case, boundaries=True).train(5).end()
    assert [whole(each).record.journal.strides for each in records(root)] == [{"6.weight": [1, 2]}] * 3
    assert Life(root, case, boundaries=True).end().at == life.states[5]
