"""``fxckpt.load`` into something else than what was saved: it says what differs, and touches nothing."""

from __future__ import annotations

import pytest
import torch
from helpers import Loader, Training, digest, mlp
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


@pytest.mark.parametrize("other", [
    lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    lambda params, lr: torch.optim.AdamW([{"params": [p]} for p in params], lr=lr)], ids=["class", "groups"])
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
