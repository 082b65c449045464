"""``model=``: one or several; what is trained is in one of them, or is refused with the way out."""

from __future__ import annotations

import logging

import pytest
import torch
from lives import batch, resumed
from small_models import eager
from torch import nn

import fxckpt

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def store(tmp_path):
    return tmp_path / "d"


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def adversaries(model, opt, step) -> torch.Tensor:
    generator, critic = model.values() if isinstance(model, dict) else model
    return critic(generator(batch(step, 8, 4))).square().mean()


@pytest.mark.parametrize("kind", [list, tuple, lambda pair: {"G": pair[0], "type": pair[1]}], ids=["list", "tuple", "dict"])
def test_several_models_resume_with_the_bits_and_buffers_of_each(kind, store):
    def make():
        pair = kind([net(), net()])
        return pair, pair

    resumed(store, make, adversaries)
    names = {key for layer in fxckpt.latest(store).layers for key in layer.keys}
    first, second = ("G", "type") if kind not in (list, tuple) else ("0", "1")
    assert {f"{first}.0.weight", f"{second}.1.running_mean"} <= names


def test_several_models_are_loaded_for_inference_by_the_same_names(store):
    plain, _ = resumed(store, lambda: (pair := [net(), net()], pair)[1:] * 2, adversaries)
    again = [net(), net()]
    assert fxckpt.load(store, model=again).missing == ()
    assert all(torch.equal(a, b) for m, n in zip(plain, again) for a, b in zip(m.state_dict().values(), n.state_dict().values()))
    assert torch.equal(plain[1][1].running_mean, again[1][1].running_mean)


def test_giving_several_models_changes_none_of_them(store):
    pair = {"G": net(), "D": net()}
    before = [list(vars(each)) for each in pair.values()]
    opt = torch.optim.SGD([p for each in pair.values() for p in each.parameters()])
    fxckpt.compile_step(opt, store, model=pair)
    assert [list(vars(each)) for each in pair.values()] == before and list(pair) == ["G", "D"]


WRONG = [([], "empty"), ([nn.Linear(1, 1), 3], "'1' is a int"), ({"a.b": nn.Linear(1, 1)}, "without dots"), ("model", "is a str")]


@pytest.mark.parametrize(("given", "says"), WRONG, ids=[says for _, says in WRONG])
def test_what_is_no_model_is_refused(given, says, store):
    with pytest.raises(fxckpt.SetupError, match=says):
        fxckpt.compile_step(torch.optim.SGD(nn.Linear(1, 1).parameters()), store, model=given)


def optimizer(*models: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for each in models for p in each.parameters()], lr=0.1)


class Critic(nn.Module):
    """A network whose buffers would be forgotten."""

    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def test_what_is_trained_in_a_model_that_was_not_given_is_refused_at_once_by_its_class(store):
    generator, critic = net(), Critic()
    with pytest.raises(fxckpt.SetupError, match=r"(?s)Critic.*model=\[a, b\]"):
        fxckpt.compile_step([optimizer(critic), optimizer(generator)], store, model=generator)
    assert not store.exists()


def test_a_parameter_of_no_module_needs_no_model(store):
    model, loose = net(), nn.Parameter(torch.ones(4))
    opt = torch.optim.SGD([*model.parameters(), loose], lr=0.1)
    fxckpt.compile_step(opt, store, model=model, every=1)
    fxckpt.load()
    (model(batch(0, 8, 4)) * loose).square().sum().backward()
    opt.step()
    opt.ckpt.flush()
    assert "optimizer0.0.4" in {key for layer in fxckpt.latest(store).layers for key in layer.keys}


def step(model: nn.Module, opt: torch.optim.Optimizer) -> None:
    model(batch(0, 8, 4)).square().sum().backward()
    opt.step()


@pytest.mark.parametrize("named", [False, True], ids=["by position", "named, with buffers"])
def test_an_uncompiled_model_that_was_not_given_is_refused_at_the_first_step(named, store):
    model = net()
    opt = torch.optim.SGD(model.named_parameters() if named else model.parameters(), lr=0.1)
    fxckpt.compile_step(opt, store, every=1000)
    before = model[0].weight.detach().clone()
    with pytest.raises(fxckpt.SetupError, match="Pass model= to compile_step"):
        step(model, opt)
    assert torch.equal(model[0].weight, before)


def test_without_model_a_compiled_one_has_its_buffers_in_the_checkpoint_and_gets_them_back(store):
    counts, seen = [], []
    for value in (7.0, 0.0):
        torch._dynamo.reset()  # a second model of the same code would be served without being shown
        torch.manual_seed(0)
        model = net()
        model.register_buffer("seen", torch.full((2,), value), persistent=False)
        opt, forward = optimizer(model), eager(model)
        fxckpt.compile_step(opt, store, every=1)
        fxckpt.load()
        step(forward, opt)
        opt.ckpt.shutdown()
        counts.append(int(model[1].num_batches_tracked))
        seen.append(model.seen.tolist())
    assert counts == [1, 2] and seen == [[7, 7], [7, 7]]


class Keeps(nn.Linear):
    """Keeps something that is no tensor."""

    def get_extra_state(self):
        return {"count": 3}

    def set_extra_state(self, state):
        pass


def test_without_model_a_compiled_one_that_keeps_more_than_tensors_is_refused(store):
    torch._dynamo.reset()
    model = nn.Sequential(Keeps(4, 4))
    opt, forward = optimizer(model), eager(model)
    fxckpt.compile_step(opt, store, every=1)
    with pytest.raises(fxckpt.SetupError, match="only with model="):
        step(forward, opt)


class Ordered(nn.Module):
    """Two layers of one shape, in one order or the other."""

    def __init__(self, order: str):
        super().__init__()
        for name in order:
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


def one_compiled_step(store, order: str) -> None:
    torch._dynamo.reset()
    model = Ordered(order)
    opt, forward = optimizer(model), eager(model)
    fxckpt.compile_step(opt, store, every=1)
    fxckpt.load()
    step(forward, opt)
    opt.ckpt.shutdown()


def test_layers_loaded_by_position_into_each_other_are_noticed_when_names_are_known(store):
    one_compiled_step(store, "ab")
    with pytest.raises(fxckpt.LayoutMismatch, match=r"checkpoint a\.weight, live b\.weight"):
        one_compiled_step(store, "ba")


def test_what_was_loaded_by_position_goes_on_where_the_names_are_those_of_the_checkpoint(store):
    one_compiled_step(store, "ab")
    one_compiled_step(store, "ab")
    assert fxckpt.latest(store).step == 2


# -- what a resumed run would not have -------------------------------------------------------------------------------------


class Scheduled(nn.Module):
    """Compiled anew for each value of its number."""

    def __init__(self):
        super().__init__()
        self.net, self.turn = nn.Linear(4, 4), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) * (1 + self.turn / 7)


def test_a_recompile_limit_that_is_reached_in_a_run_is_said_once_with_the_way_out(store, caplog):
    torch._dynamo.reset()
    model = Scheduled()
    opt, forward = optimizer(model), eager(model)
    fxckpt.compile_step(opt, store, model=model, every=1)
    fxckpt.load()
    with torch._dynamo.config.patch(recompile_limit=2), caplog.at_level(logging.WARNING, logger="fxckpt"):
        for model.turn in range(2):
            step(forward, opt)
        assert "recompile limit" not in caplog.text
        for model.turn in range(2, 5):
            step(forward, opt)
    said = [record.getMessage() for record in caplog.records if record.name == "fxckpt"]
    assert len(said) == 1 and "torch._dynamo.config.recompile_limit" in said[0] and "mark_dynamic" in said[0]


def test_without_model_a_layer_in_another_mode_than_its_model_is_said_once(store, caplog):
    torch._dynamo.reset()
    model = net()
    model[1].eval()
    opt, forward = optimizer(model), eager(model)
    fxckpt.compile_step(opt, store, every=1)
    fxckpt.load()
    with caplog.at_level(logging.WARNING, logger="fxckpt"):
        for _ in range(2):
            step(forward, opt)
    said = [record.getMessage() for record in caplog.records if record.name == "fxckpt"]
    assert len(said) == 1 and "without model=" in said[0] and said[0].endswith(": 1")
