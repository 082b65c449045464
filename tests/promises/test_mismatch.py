"""``fxckpt.load`` into something else than what was saved: it says what differs, and touches nothing."""

from __future__ import annotations

import pytest
import torch
from digests import digest
from small_models import Loader, mlp
from small_training import Training
from torch import nn

import fxckpt

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def store(tmp_path):
    return tmp_path / "d"


class Changed(nn.Sequential):
    """The mlp with another last layer, and one more."""

    def __init__(self):
        super().__init__(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 5), nn.Linear(5, 4))


def test_a_changed_model_is_an_error_that_lists_names_and_shapes_side_by_side(store):
    Training(store).train(1).end()
    training = Training(store, make=Changed)
    before = digest(training.now()), torch.get_rng_state()
    with pytest.raises(fxckpt.LayoutMismatch) as found:
        fxckpt.load()
    message = str(found.value)
    assert "3.weight: checkpoint F32[4, 16], live F32[5, 16]" in message
    assert "3.bias" in message and "4.weight: not in the checkpoint" in message and "0.weight" not in message
    assert digest(training.now()) == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_a_changed_model_without_strict_gets_what_fits_and_lists_the_rest(store):
    first = Training(store).train(1).end()
    model = Changed()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    restored = fxckpt.load(store, model=model, strict=False)
    assert torch.equal(model[0].weight, first.model[0].weight) and torch.equal(model[0].bias, first.model[0].bias)
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in ("3.weight", "3.bias", "4.weight"))
    assert set(restored.missing) == {"3.weight", "3.bias", "4.weight", "4.bias"}


def test_a_smaller_model_lists_what_is_only_in_the_checkpoint(store):
    first = Training(store, make=Changed).train(1).end()
    model = nn.Sequential(nn.Linear(8, 16))
    with pytest.raises(fxckpt.LayoutMismatch, match=r"4\.weight: only in the checkpoint"):
        fxckpt.load(store, model=model)
    restored = fxckpt.load(store, model=model, strict=False)
    assert {"3.weight", "3.bias", "4.weight", "4.bias"} <= set(restored.unexpected) and restored.missing == ()
    assert torch.equal(model[0].weight, first.model[0].weight)


def test_a_group_that_was_added_in_training_is_an_error_that_says_how_to_load(store):
    first = Training(store)
    first.opt.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "lr": 0.1})
    first.train(1).end()
    again = Training(store)
    with pytest.raises(fxckpt.LayoutMismatch, match=r"parameters per group.*\n.*fxckpt\.latest\(dir\).*add_param_group first"):
        fxckpt.load(optimizer=again.opt)


@pytest.mark.parametrize(
    "other",
    [
        lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
        lambda params, lr: torch.optim.AdamW([{"params": [p]} for p in params], lr=lr),
    ],
    ids=["class", "groups"],
)
def test_another_optimizer_is_an_error(other, store):
    Training(store).train(1).end()
    training = Training(store, optimizer=other)
    before = digest(training.now())
    with pytest.raises(fxckpt.LayoutMismatch, match="optimizer"):
        fxckpt.load()
    assert digest(training.now()) == before


def test_another_type_of_parameter_is_an_error(store):
    Training(store).train(1).end()
    with pytest.raises(fxckpt.LayoutMismatch, match=r"checkpoint F32\[16, 8\], live BF16\[16, 8\]"):
        fxckpt.load(store, model=mlp().to(torch.bfloat16))


def test_extra_that_is_new_or_gone_is_an_error_unless_not_strict(store):
    Training(store).train(2).end()
    training = Training(store, seed=9, extra={"s": torch.optim.swa_utils.AveragedModel(mlp()), "new": Loader.of(8)})
    with pytest.raises(fxckpt.LayoutMismatch) as found:
        fxckpt.load()
    assert "extra['new']: not in the checkpoint" in str(found.value) and "extra/data" in str(found.value)
    training.end()
    training = Training(store, seed=9, extra={"new": Loader.of(8)})
    restored = fxckpt.load(strict=False)
    assert "extra/new" in restored.missing and {"extra/data", "extra/s"} <= set(restored.unexpected)
    assert restored.step == 2


class Pair(nn.Module):
    """Two layers, made in this order; ``width`` is b's."""

    def __init__(self, order: str, width: int = 4):
        super().__init__()
        for name in order:
            self.add_module(name, nn.Linear(4, 4 if name == "a" else width))


def pair(order: str, width: int = 4, *, groups: bool = False, named: bool = False, **options) -> tuple:
    """A model and its optimizer, in a run if options of one are given."""
    torch.manual_seed(0)
    model = Pair(order, width)
    params = model.named_parameters() if named else model.parameters()
    if groups:
        params = [{"params": getattr(model, name).parameters()} for name in order]
    opt = torch.optim.AdamW(params)
    if options:
        fxckpt.compile_step(opt, every=1, update="native", **({} if named else {"model": model}), **options)
    return model, opt


def train_pair(model: Pair, opt, steps: int = 3) -> dict:
    """Train it; its moments by name."""
    for _ in range(steps):
        x = torch.randn(3, 4)
        (sum((i + 1) * model.get_submodule(name)(x).pow(2).sum() for i, name in enumerate("ab"))).backward()
        opt.step()
        opt.zero_grad()
    return moments(model, opt)


def moments(model: Pair, opt) -> dict:
    return {name: opt.state[p]["exp_avg"].clone() for name, p in model.named_parameters() if p in opt.state}


@pytest.mark.parametrize("named", [False, True], ids=["names of the model", "names of the optimizer"])
@pytest.mark.parametrize("width", [4, 7], ids=["same shapes", "other shapes"])
def test_optimizer_state_goes_to_the_parameter_of_that_name_in_whatever_order_they_are(width, named, store):
    model, opt = pair("ab", width, named=named, dir=store)
    before = train_pair(model, opt)
    opt.ckpt.shutdown()
    model, opt = pair("ba", width, named=named, dir=store)
    assert fxckpt.load().step == 3
    after = moments(model, opt)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    train_pair(model, opt, 1)


def test_a_parameter_in_another_group_than_it_was_is_an_error_that_names_it(store):
    model, opt = pair("ab", groups=True, dir=store)
    train_pair(model, opt)
    opt.ckpt.shutdown()
    model, opt = pair("ba", groups=True, dir=store)
    with pytest.raises(fxckpt.LayoutMismatch, match=r"a\.weight: checkpoint optimizer 0, group 0; live optimizer 0, group 1"):
        fxckpt.load()


def test_without_strict_what_has_another_shape_starts_anew_and_the_rest_keeps_its_state(store):
    model, opt = pair("ab", dir=store)
    before = train_pair(model, opt)
    opt.ckpt.shutdown()
    model, opt = pair("ab", 7, dir=store)
    restored = fxckpt.load(strict=False)
    assert set(restored.missing) == {"b.weight", "b.bias"}
    after = moments(model, opt)
    assert after.keys() == {"a.weight", "a.bias"} and all(torch.equal(before[name], after[name]) for name in after)
    train_pair(model, opt, 1)
    opt.ckpt.flush()


def test_without_strict_a_model_with_one_more_layer_keeps_the_state_of_the_others(store):
    model, opt = pair("a", dir=store)
    before = {}
    for _ in range(2):
        model.a(torch.ones(1, 4)).sum().backward()
        opt.step()
        before = moments(model, opt)
    opt.ckpt.shutdown()
    model, opt = pair("ba", dir=store)
    with pytest.raises(fxckpt.LayoutMismatch, match=r"b\.weight: not in the checkpoint"):
        fxckpt.load()
    restored = fxckpt.load(strict=False)
    assert set(restored.missing) == {"b.weight", "b.bias"} and restored.step == 2
    after = moments(model, opt)
    assert after.keys() == {"a.weight", "a.bias"} and all(torch.equal(before[name], after[name]) for name in after)
    train_pair(model, opt, 1)
