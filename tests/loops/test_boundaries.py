"""A checkpoint is of the instant between two iterations, whoever steps in them and whatever lies around them."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable
from pathlib import Path

import instruments
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import fxckpt


class Killed(Exception):
    """In place of SIGKILL: a script ends here, and what was not committed is lost."""


class Life:
    """One life of a script: two networks, an optimizer each, a scheduler, a loader of ten batches. ``dies``: in that turn."""

    def __init__(self, directory: Path | None, dies: int = -1, **options):
        torch.manual_seed(0)
        self.a = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3))
        self.b = nn.Linear(4, 2)
        self.opts = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (self.a, self.b)]
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.opts[0], 0.9)
        self.loader = [torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i in range(10)]
        self.weights = torch.ones(6, dtype=torch.double)
        data = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
        self.weighted = DataLoader(data, 2, sampler=WeightedRandomSampler(self.weights, 12))
        self.dies, self.turns, self.seen = dies, 0, {"heads": 0, "turns": 0}
        self.ours = directory is not None
        if self.ours:
            both = nn.ModuleList([self.a, self.b])
            extra = {"scheduler": self.scheduler, "seen": self.seen, "weights": self.weights}
            fxckpt.compile_step(self.opts, directory, model=both, extra=extra, update="native", **{"every": 1, **options})
            fxckpt.load()
            torch.rand(5)  # drawn before the loop: no run that goes on draws it here

    def turn(self) -> None:
        """What a script does in each iteration, at its end."""
        self.turns += 1
        if self.turns == self.dies:
            raise Killed

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)).square().mean()

    def step(self, x: torch.Tensor, order: tuple[int, ...] = (0, 1)) -> None:
        self.loss(x).backward()
        for i in order:
            self.opts[i].step()
            self.opts[i].zero_grad()

    def bits(self) -> list[torch.Tensor]:
        states = [value for opt in self.opts for state in opt.state.values() for value in state.values()]
        tensors = [
            self.weights,
            *self.a.state_dict().values(),
            *self.b.state_dict().values(),
            *states,
            torch.tensor([*self.scheduler.get_last_lr(), self.opts[0].param_groups[0]["lr"], *self.seen.values()]),
        ]
        return [t.clone() for t in tensors if isinstance(t, torch.Tensor)]


def live(script: Callable[[Life], None], directory: Path | None, dies: int = -1, **options) -> Life:
    """One life; one that dies leaves what was committed."""
    life = Life(directory, dies, **options)
    with contextlib.suppress(Killed):
        script(life)
    if life.ours:
        life.opts[0].ckpt.shutdown()
    return life


def check(
    script: Callable[[Life], None], plain: Callable[[Life], None] | None, tmp_path: Path, deaths: list[int], **options
) -> Life:
    """Plain, whole, and killed again and again: the same bits. Returns the last life."""
    whole = live(script, tmp_path / "whole", **options)
    for dies in deaths:
        live(script, tmp_path / "killed", dies, **options)
    last = live(script, tmp_path / "killed", **options)
    for name, a, b in zip(range(1000), whole.bits(), last.bits()):
        assert torch.equal(a, b), name
    if plain is not None:
        torch.manual_seed(0)
        stock = Life(None)
        torch.rand(5)
        plain(stock)
        for name, a, b in zip(range(1000), whole.bits(), stock.bits()):
            assert torch.equal(a, b), name
    return last


def epochs_of(batches: Callable, epochs: Callable) -> Callable[[Life], None]:
    def script(life: Life) -> None:
        for _ in epochs(3):
            for x in batches(life.loader):
                life.step(x)
                life.turn()
            life.scheduler.step()
            life.turn()

    return script


@pytest.mark.parametrize("deaths", [[1], [10], [11], [12, 3], [5, 5, 5], [22], [33]])
def test_a_run_goes_on_in_the_middle_of_an_epoch_behind_its_last_batch_and_at_its_end(deaths, tmp_path):
    check(epochs_of(fxckpt.batches, fxckpt.epochs), epochs_of(iter, range), tmp_path, deaths)


HEADS = {
    "a scheduler made anew": lambda life, epoch: epoch == 1 and torch.optim.lr_scheduler.LinearLR(life.opts[0], 0.1),
    "a setting multiplied": lambda life, epoch: life.opts[0].param_groups[0].update(lr=life.opts[0].param_groups[0]["lr"] * 0.5),
    "a setting set": lambda life, epoch: life.opts[0].param_groups[0].update(lr=0.1 / (1 + epoch)),
    "a value of extra counted": lambda life, epoch: life.seen.update(heads=life.seen["heads"] + 1, turns=0),
    "the scheduler": lambda life, epoch: life.scheduler.step(),
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_what_the_head_of_an_epoch_does_to_settings_plain_values_and_schedulers_is_done_once(head, tmp_path, caplog):
    def script(life: Life) -> None:
        for epoch in fxckpt.epochs(3):
            head(life, epoch)
            for x in fxckpt.batches(life.loader):
                life.step(x)
                life.seen["turns"] += 1
                life.turn()

    check(script, None, tmp_path, [4, 3, 10])
    assert "changes it again" not in caplog.text


@pytest.mark.parametrize("deaths", [[3], [8, 2], [14]])
def test_weights_of_a_sampler_in_extra_that_the_turns_write_come_back(deaths, tmp_path):
    def script(life: Life) -> None:
        for _ in fxckpt.epochs(3):
            for x in fxckpt.batches(life.weighted):
                life.step(x)
                life.weights[life.opts[0].ckpt.batch % 6] += x.sum().abs().double()
                life.turn()

    check(script, None, tmp_path, deaths)


@pytest.mark.parametrize("deaths", [[3], [9, 1], [20], [21], [29, 8], [25, 2]])
def test_what_lies_between_two_loops_is_done_once(deaths, tmp_path):
    def script(life: Life) -> None:
        group = life.opts[0].param_groups[0]
        for _ in fxckpt.epochs(2):
            for x in fxckpt.batches(life.loader):
                life.step(x)
                life.turn()
        group["lr"] *= 0.1
        life.seen["heads"] += 1
        life.noise = torch.rand(4)
        for _ in fxckpt.epochs(4):
            for x in fxckpt.batches(life.loader):
                life.step(x + life.noise)
                life.turn()

    last = check(script, None, tmp_path, deaths)
    assert last.seen["heads"] == 1


def test_where_one_is_can_be_asked_for(tmp_path):
    seen = []

    def script(life: Life) -> None:
        ckpt = life.opts[0].ckpt
        for epoch in fxckpt.epochs(2):
            for i, x in enumerate(fxckpt.batches(life.loader), ckpt.batch):
                assert (ckpt.epoch, ckpt.batch) == (epoch, i)
                life.step(x)
                seen.append((epoch, i))
                life.turn()

    live(script, tmp_path, dies=13)
    assert seen == [(0, i) for i in range(10)] + [(1, 0), (1, 1), (1, 2)]
    seen.clear()
    life = Life(tmp_path)
    found = fxckpt.load()
    assert (found.epoch, found.batch) == (1, 2)
    script(life)
    life.opts[0].ckpt.shutdown()
    assert seen == [(1, i) for i in range(2, 10)]


def test_epochs_without_batches_and_without_an_end_are_boundaries(tmp_path):
    def script(life: Life) -> None:
        for _ in fxckpt.epochs():
            for x in life.loader:  # all of it runs again
                life.step(x)
            life.scheduler.step()
            life.turn()
            if life.scheduler.last_epoch == 6:
                break

    check(script, None, tmp_path, [2, 2])


ORDERS = {
    "the list's last first": [(1, 0)],
    "only the first": [(0,)],
    "only the second": [(1,)],
    "one three times, then the other": [(0, 0, 0, 1)],
    "one every third turn": [(1,), (1,), (1, 0)],
    "none every second turn": [(0, 1), ()],
    "another order each time": [(0, 1), (1, 0), (1, 0, 1), (0,)],
    "one after another": [(0,)] * 7 + [(1,)] * 7,
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize("every", [1, 3])
def test_optimizers_may_step_in_any_order_and_number(order, every, tmp_path):
    def script(life: Life) -> None:
        for step in fxckpt.steps(14):
            life.step(life.loader[step % 10], order[step % len(order)])
            life.turn()

    last = check(script, None, tmp_path, [5, 4], every=every)
    found = last.opts[0].ckpt.statistics()
    assert found["checkpoints_failed"] == 0 and found["checkpoints_committed"] > 0
    assert every > 1 or found["last_committed_step"] == found["steps"]


def test_optimizers_that_step_inside_the_backward_have_checkpoints_of_the_boundary(tmp_path):
    def script(life: Life) -> None:
        a, b = life.opts
        next(life.a.parameters()).register_post_accumulate_grad_hook(lambda p: a.step())
        life.b.weight.register_post_accumulate_grad_hook(lambda p: b.step())
        for step in fxckpt.steps(12):
            life.loss(life.loader[step % 10]).backward()
            a.zero_grad(), b.zero_grad()
            life.turn()

    check(script, None, tmp_path, [5, 4])


def test_without_a_boundary_steps_inside_the_backward_are_refused_before_a_mixture_can_be_taken(tmp_path):
    a, b = nn.Linear(4, 4), nn.Linear(4, 2)
    first, last = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (a, b))
    for m, opt in ((a, first), (b, last)):
        m.weight.register_post_accumulate_grad_hook(lambda p, opt=opt: opt.step())
    fxckpt.compile_step([first, last], tmp_path, model=nn.ModuleList([a, b]), every=1, update="native")
    with pytest.raises(fxckpt.SetupError, match=r"mix two steps.*fxckpt\.steps"):
        b(a(torch.ones(2, 4))).sum().backward()
    last.ckpt.shutdown()
    assert fxckpt.checkpoints(tmp_path) == []


def test_without_a_boundary_an_optimizer_that_leads_and_does_not_step_is_said(tmp_path, caplog):
    life = Life(tmp_path)
    for x in life.loader:
        life.step(x, (0,))
    life.opts[0].ckpt.shutdown()
    assert caplog.text.count("no checkpoint is taken") == 1


def test_what_an_iteration_changes_after_its_step_is_in_its_checkpoint_from_the_first_on(tmp_path):
    def script(life: Life) -> None:
        for step in fxckpt.steps(8):
            life.step(life.loader[step])
            with torch.no_grad():
                life.a[0].weight.clamp_(-0.2, 0.2)  # trained
                life.a[1].running_mean.mul_(0.5)  # a buffer
            life.scheduler.step()
            torch.rand(3)
            life.turn()

    last = check(script, None, tmp_path, [1, 2, 3])
    assert last.opts[0].ckpt.statistics()["checkpoints_skipped"] == 0


def values(*modules: nn.Module) -> list[torch.Tensor]:
    """All parameters, as they are now."""
    return [p.detach().clone() for module in modules for p in module.parameters()]


def check_stored(directory: Path, size: int, after: list[list[torch.Tensor]]) -> None:
    """Each checkpoint holds two square layers as its iteration left them."""
    for found in fxckpt.checkpoints(directory):
        again = [nn.Linear(size, size), nn.Linear(size, size)]
        fxckpt.load(directory, model=again, step=found.step)
        assert all(torch.equal(a, b) for a, b in zip(values(*again), after[found.step - 1], strict=True))


def test_an_average_of_the_weights_costs_no_checkpoint(tmp_path):
    model, average = nn.Linear(64, 64), nn.Linear(64, 64).requires_grad_(False)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    fxckpt.compile_step(opt, tmp_path, model=[model, average], every=1, update="native", keep=9, staging_mb=0, threads=1)
    instruments.delay("copy", 5000)
    after = []
    for _ in fxckpt.steps(5):
        model(torch.ones(2, 64)).sum().backward()
        opt.step()
        with torch.no_grad():
            average.weight.lerp_(model.weight, 0.5)
        after.append(values(model, average))
    opt.ckpt.shutdown()
    assert opt.ckpt.statistics()["checkpoints_committed"] == 5
    check_stored(tmp_path, 64, after)


def test_a_loop_over_batches_inside_another_one_is_only_data(tmp_path):
    def script(life: Life) -> None:
        for _ in fxckpt.epochs(2):
            for x in fxckpt.batches(life.loader):
                for y in fxckpt.batches(life.loader[:2]):
                    life.step(x + y)
                life.turn()

    check(script, None, tmp_path, [4, 8])


def test_batches_drawn_inside_of_steps_go_on_over_the_ends_of_passes(tmp_path):
    def endless(life: Life):
        while True:
            yield from fxckpt.batches(life.loader)

    def script(life: Life) -> None:
        source = endless(life)
        for _ in fxckpt.steps(25):
            life.step(next(source))
            life.turn()

    def plain(life: Life) -> None:
        for step in range(25):
            life.step(life.loader[step % 10])

    check(script, plain, tmp_path, [4, 8, 9])


def test_two_loaders_side_by_side(tmp_path):
    def script(life: Life) -> None:
        for x, y in zip(fxckpt.batches(life.loader), fxckpt.batches(list(reversed(life.loader)))):
            life.step(x - y)
            life.turn()

    check(script, None, tmp_path, [4, 3])


@pytest.mark.parametrize("left", ["break", "continue", "exception"])
def test_iterations_that_are_left_early(left, tmp_path):
    def script(life: Life) -> None:
        for _ in fxckpt.epochs(3):
            try:
                for i, x in enumerate(fxckpt.batches(life.loader), life.opts[0].ckpt.batch):
                    life.step(x)
                    life.turn()
                    if i == 6 and left == "break":
                        break
                    if i == 6 and left == "continue":
                        continue
                    if i == 6 and left == "exception":
                        raise ValueError
                    life.scheduler.step()
            except ValueError:
                pass
            life.scheduler.step()
            life.turn()

    check(script, None, tmp_path, [3, 5, 9])


@pytest.mark.parametrize("end", ["flush", "shutdown"])
def test_an_iteration_that_was_interrupted_is_made_again_whatever_ends_the_script(end, tmp_path):
    life = Life(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        for i, x in enumerate(fxckpt.batches(life.loader)):
            life.step(x)
            if i == 3:
                raise KeyboardInterrupt
            life.scheduler.step()
    getattr(life.opts[0].ckpt, end)()
    assert fxckpt.checkpoints(tmp_path)[-1].step == 3
    life.opts[0].ckpt.shutdown()


def test_steps_behind_a_loop_that_was_left_have_checkpoints(tmp_path):
    life = Life(tmp_path)
    for _ in fxckpt.steps(3):
        life.step(life.loader[0])
        break
    for x in life.loader[1:4]:
        life.step(x)
    life.opts[0].ckpt.flush()
    assert [each.step for each in fxckpt.checkpoints(tmp_path)] == [3, 4]
    life.opts[0].ckpt.shutdown()


def test_a_second_loop_that_trains_in_one_epoch_is_refused_with_the_way_out(tmp_path):
    life = Life(tmp_path)
    for x in fxckpt.batches(life.loader):
        life.step(x)
    with pytest.raises(fxckpt.SetupError, match=r"fxckpt\.epochs"):
        for x in fxckpt.batches(life.loader):
            life.step(x)
    life.opts[0].ckpt.shutdown()
    assert fxckpt.checkpoints(tmp_path)[-1].step == 10


def test_a_loop_over_batches_that_does_not_train_may_follow(tmp_path):
    def script(life: Life) -> None:
        for _ in fxckpt.epochs(3):
            for x in fxckpt.batches(life.loader):
                life.step(x)
                life.turn()
            life.a.eval()
            for x in fxckpt.batches(tuple(life.loader)):
                life.a(x)
            life.a.train()
            life.turn()

    check(script, None, tmp_path, [4, 8, 11])


def test_accumulation_closes_each_iteration_and_keeps_the_gradients(tmp_path):
    def script(life: Life) -> None:
        for _ in fxckpt.epochs(2):
            for i, x in enumerate(fxckpt.batches(life.loader), life.opts[0].ckpt.batch):
                life.loss(x).backward()
                if i % 3 == 2:
                    for opt in life.opts:
                        opt.step()
                        opt.zero_grad()
                life.turn()

    check(script, None, tmp_path, [4, 7])


def test_flush_inside_an_iteration_waits_for_those_before_it(tmp_path):
    life = Life(tmp_path)
    for step in fxckpt.steps(3):
        life.step(life.loader[step])
        life.opts[0].ckpt.flush()
        assert life.opts[0].ckpt.statistics()["last_committed_step"] == (step or None)
    life.opts[0].ckpt.shutdown()
    assert fxckpt.checkpoints(tmp_path)[-1].step == 3


def test_a_checkpoint_that_begins_with_the_guessed_last_step_is_handed_over_layer_by_layer(tmp_path, caplog):
    """From the second iteration on the layers are emitted inside the step, not at the boundary."""
    caplog.set_level(logging.DEBUG, "fxckpt")
    life = Life(tmp_path)
    emitted = []
    emitter = life.opts[0].ckpt._run.emitter
    real = emitter.hand_over
    emitter.hand_over = lambda *args, **how: (emitted.append(life.where), real(*args, **how))[1]
    for step in fxckpt.steps(3):
        life.where = step, "in the step"
        life.step(life.loader[step])
        life.where = step, "at the boundary"
    life.opts[0].ckpt.shutdown()
    assert {where for where in emitted if where[1] == "in the step"} == {(1, "in the step"), (2, "in the step")}


def test_a_length_is_the_loaders(tmp_path):
    life = Life(tmp_path)
    assert len(fxckpt.batches(life.loader)) == 10
    with pytest.raises(TypeError):
        len(fxckpt.batches(iter(life.loader)))
    life.opts[0].ckpt.shutdown()


def test_a_load_inside_a_pass_goes_back_in_all_but_the_data(tmp_path):
    """A script that goes back after a bad loss: the batches go on, and so they do after a resume."""
    seen = []

    def script(life: Life) -> None:
        for i, x in enumerate(fxckpt.batches(life.loader), life.opts[0].ckpt.batch):
            life.step(x)
            seen.append(i)
            life.turn()
            if i == 5:
                life.opts[0].ckpt.flush()
                fxckpt.load(step=4)

    check(script, None, tmp_path, [8], keep=9)
    assert seen == [*range(10), *range(8), *range(7, 10)]


def test_what_is_written_through_data_is_in_the_checkpoint_of_its_iteration(tmp_path):
    """Weights clipped and a target that follows, as they are written in many places: no version counter moves."""
    model, target = nn.Linear(300, 300), nn.Linear(300, 300).requires_grad_(False)
    opt = torch.optim.RMSprop(model.parameters(), lr=0.01)
    fxckpt.compile_step(opt, tmp_path, model=[model, target], every=1, update="native", keep=9, staging_mb=0, threads=1)
    instruments.delay("copy", 5000)
    after = []
    for _ in fxckpt.steps(7):
        model(torch.ones(2, 300)).sum().backward()
        opt.step()
        for p, q in zip(model.parameters(), target.parameters()):
            p.data.clamp_(-0.01, 0.01)
            q.data.copy_(0.9 * q.data + 0.1 * p.data)
        after.append(values(model, target))
    opt.ckpt.shutdown()
    assert opt.ckpt.statistics()["checkpoints_committed"] == 7
    check_stored(tmp_path, 300, after)


def test_one_number_of_many_that_numpy_writes_is_in_the_checkpoint_of_its_iteration(tmp_path):
    model, other = nn.Linear(600, 600), nn.Linear(600, 600).requires_grad_(False)
    opt = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    fxckpt.compile_step(opt, tmp_path, model=[model, other], every=1, update="native", keep=9, chunk_mb=1)
    after = []
    for _ in fxckpt.steps(5):
        model(torch.ones(2, 600)).sum().backward()
        opt.step()
        time.sleep(0.1)  # its chunk is full, and copied
        model.weight.detach().numpy()[123, 45] += 1.0
        after.append(values(model, other))
    opt.ckpt.shutdown()
    check_stored(tmp_path, 600, after)


def test_steps_inside_of_epochs_count_each_iteration_once(tmp_path):
    def script(life: Life) -> None:
        for epoch in fxckpt.epochs(3):
            for step in fxckpt.steps(5 * (epoch + 1)):
                life.step(life.loader[step % 10])
                life.turn()
            life.scheduler.step()

    def plain(life: Life) -> None:
        for step in range(15):
            life.step(life.loader[step % 10])
            if step % 5 == 4:
                life.scheduler.step()

    check(script, plain, tmp_path, [3, 4, 5])


def drawn_loader(seed: int | None = None) -> DataLoader:
    """Shuffled, from the global generator or from one of its own."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    rows = torch.randn(24, 4, generator=torch.Generator().manual_seed(5))
    return DataLoader(TensorDataset(rows), batch_size=6, shuffle=True, generator=generator)


@pytest.mark.parametrize("deaths", [[2], [4, 3], [5, 1, 2]])
def test_shuffled_loaders_side_by_side_draw_as_pytorch_s_do(deaths, tmp_path):
    def zipped(batches: Callable, epochs: Callable) -> Callable[[Life], None]:
        def script(life: Life) -> None:
            first, second = drawn_loader(), drawn_loader()
            for _ in epochs(3):
                for (x,), (y,) in zip(batches(first), batches(second)):
                    life.step(x + y)
                    life.turn()

        return script

    check(zipped(fxckpt.batches, fxckpt.epochs), zipped(iter, range), tmp_path, deaths)


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("deaths", [[4, 2], [3, 3, 3]])
def test_iterators_that_are_made_at_the_head_of_each_epoch_and_held_go_on(deaths, anew, tmp_path):
    def held(batches: Callable, epochs: Callable, batch: Callable[[Life], int]) -> Callable[[Life], None]:
        def script(life: Life) -> None:
            first, second = drawn_loader(1), drawn_loader()
            for _ in epochs(3):
                if anew:
                    first, second = drawn_loader(3), drawn_loader()
                one = iter(batches(first))
                two = iter(batches(second))
                for _ in range(batch(life), 3):  # of four batches: neither pass is found to be exhausted
                    (x,), (y,) = next(one), next(two)
                    life.step(x + y)
                    life.turn()

        return script

    ours = held(fxckpt.batches, fxckpt.epochs, lambda life: life.opts[0].ckpt.batch)
    check(ours, held(iter, range, lambda life: 0), tmp_path, deaths)


def test_a_pass_that_goes_on_from_one_epoch_into_the_next_is_refused(tmp_path):
    life = Life(tmp_path)
    endless = iter(fxckpt.batches(life.loader))
    with pytest.raises(fxckpt.SetupError, match=r"an epoch has ended since its last batch.*fxckpt\.steps"):
        for _ in fxckpt.epochs(2):
            for _ in range(4):
                life.step(next(endless))
    life.opts[0].ckpt.shutdown()
    assert fxckpt.checkpoints(tmp_path)[-1].step == 4


def test_an_iterator_that_is_let_go_of_in_a_later_epoch_drops_no_checkpoint(tmp_path):
    life = Life(tmp_path)
    for epoch in fxckpt.epochs(2):
        one = iter(fxckpt.batches(life.loader[:2]))
        for _ in range(2):
            life.step(next(one))
        if epoch == 0:
            held = one
        elif epoch == 1:
            del held
    del one
    life.opts[0].ckpt.shutdown()
    assert [each.step for each in fxckpt.checkpoints(tmp_path)][-1] == 4


def test_a_pass_over_a_loader_inside_of_a_pass_over_it_is_one_of_its_own(tmp_path):
    def script(life: Life) -> None:
        loader = drawn_loader()
        for _ in fxckpt.epochs(2):
            for (x,) in fxckpt.batches(loader):
                life.step(x)
                with torch.no_grad():
                    for (y,) in fxckpt.batches(loader):
                        life.a(y)
                life.turn()

    check(script, None, tmp_path, [2, 3])


@pytest.mark.parametrize("deaths", [[2], [6], [9, 2], [5, 5]])
def test_loaders_that_take_turns_keep_their_own_generators(deaths, tmp_path):
    def turns(batches: Callable, epochs: Callable) -> Callable[[Life], None]:
        def script(life: Life) -> None:
            both = drawn_loader(1), drawn_loader(2)
            for epoch in epochs(4):
                for (x,) in batches(both[epoch % 2]):
                    life.step(x)
                    life.turn()

        return script

    check(turns(fxckpt.batches, fxckpt.epochs), turns(iter, range), tmp_path, deaths)


def test_what_the_head_of_an_epoch_draws_it_draws_again(tmp_path):
    def script(life: Life) -> None:
        for _ in fxckpt.epochs(3):
            subset = [life.loader[i] for i in torch.randperm(10)[:4]]
            for x in fxckpt.batches(subset):
                life.step(x)
                life.turn()

    check(script, None, tmp_path, [2, 3, 3])


def test_what_the_head_of_an_epoch_changes_is_said_and_a_step_in_it_is_refused(tmp_path, caplog):
    life = Life(tmp_path / "a")
    for _ in fxckpt.epochs(2):
        life.a[1].running_mean.zero_()
        for x in fxckpt.batches(life.loader[:2]):
            life.step(x)
    life.opts[0].ckpt.shutdown()
    assert caplog.text.count("'0.1.running_mean' changed in an epoch before its loop over fxckpt.batches") == 1
    life = Life(tmp_path / "b")
    with pytest.raises(fxckpt.SetupError, match=r"a step was made in an epoch before its loop"):
        for _ in fxckpt.epochs(2):
            life.step(life.loader[0])
            for x in fxckpt.batches(life.loader):
                life.step(x)
    life.opts[0].ckpt.shutdown()
    assert fxckpt.checkpoints(tmp_path / "b") == []


@pytest.mark.parametrize("named", [False, True])
def test_a_save_in_the_middle_of_an_iteration_is_not_what_a_run_goes_on_with(named, tmp_path):
    numbers = itertools.count()

    def script(life: Life) -> None:
        for _ in fxckpt.epochs(2):
            for i, x in enumerate(fxckpt.batches(life.loader[:4]), life.opts[0].ckpt.batch):
                life.step(x)
                if i == 2:
                    life.opts[0].ckpt.save(f"best-{next(numbers)}" if named else None)
                    life.turn()
                life.scheduler.step()
                life.turn()

    check(script, None, tmp_path, [3, 1, 4])


def test_a_loop_that_has_nothing_left_to_do_in_a_new_run_is_said(tmp_path, caplog):
    life = Life(tmp_path)
    for n in (2, 2):
        for _ in fxckpt.epochs(n):
            life.step(life.loader[0])
    life.opts[0].ckpt.shutdown()
    assert caplog.text.count("fxckpt.epochs(2) has nothing left to do") == 1
