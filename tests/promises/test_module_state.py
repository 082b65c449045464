"""What a module keeps beside its tensors, and tensors of odd kinds: they come back, or are refused by name at compile_step."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from lives import batch, life, resumed
from torch import nn

import fxckpt

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def store(tmp_path):
    return tmp_path / "d"


def loss_of(model: nn.Module, opt, step: int) -> torch.Tensor:
    return model(batch(step, 6, 4)).square().mean()


# -- modes -----------------------------------------------------------------------------------------------------------------


def norm_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))


def freezing(model: nn.Sequential, opt, step: int) -> torch.Tensor:
    if step == 2:
        model[1].eval()
    return loss_of(model, opt, step)


def test_a_module_put_into_eval_mode_at_some_step_stays_there_after_a_resume_from_a_later_one(store, caplog):
    with caplog.at_level(logging.WARNING, logger="fxckpt"):
        plain, second = resumed(store, norm_net, freezing)
    assert [m.training for m in second.modules()] == [m.training for m in plain.modules()] and not second[1].training
    assert "these modules are in eval mode again, as at step 4: 1" in caplog.text


def test_weights_alone_for_inference_leave_the_modes_alone(store):
    life(store, norm_net, freezing, 4)
    model = norm_net().eval()
    fxckpt.load(store, model=model)
    assert not any(m.training for m in model.modules())


class KeepsNormsInEval(nn.Sequential):
    """Fine-tuning as many write it: ``train()`` leaves the norms alone."""

    def train(self, mode: bool = True):
        super().train(mode)
        self[1].eval()
        return self


def test_modes_come_back_one_by_one_whatever_train_does(store):
    def make():
        return KeepsNormsInEval(*norm_net())

    def loop(model, opt, step):
        if step == 1:
            model[1].train()
        return loss_of(model, opt, step)

    _, second = resumed(store, make, loop)
    assert second[1].training


# -- a state dict of one's own ---------------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    """Its scale is a plain attribute, which its own methods save and load."""

    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        self.amax = torch.ones(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.amax = torch.maximum(self.amax * 0.9, x.detach().abs().max())
        return super().forward(x / self.amax)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "amax"] = self.amax

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        self.amax = state_dict.pop(prefix + "amax")
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Hooked(nn.Linear):
    """The same with hooks, and a number in place of a tensor."""

    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        self.calls = 0
        self.register_state_dict_post_hook(Hooked.save)
        self.register_load_state_dict_pre_hook(Hooked.read)

    @staticmethod
    def save(module, state_dict, prefix, metadata):
        state_dict[prefix + "calls"] = module.calls

    @staticmethod
    def read(module, state_dict, prefix, *rest):
        module.calls = state_dict.pop(prefix + "calls")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x) / self.calls


class Wholesale(nn.Module):
    """A model whose ``state_dict`` is its own altogether, with other names and no arguments."""

    def __init__(self):
        super().__init__()
        self.net, self.scale = nn.Linear(4, 2), 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scale *= 0.9
        return self.net(x) * self.scale

    def state_dict(self):
        return {"linear." + name: tensor for name, tensor in self.net.state_dict().items()} | {"scale": self.scale}

    def load_state_dict(self, state, strict=True):
        self.scale = state.pop("scale")
        self.net.load_state_dict({name.removeprefix("linear."): tensor for name, tensor in state.items()})


CONTRACTS = [
    lambda: nn.Sequential(Scaled(4, 8), nn.Tanh(), Scaled(8, 1)),
    lambda: nn.Sequential(Hooked(4, 8), nn.Tanh(), nn.Sequential(Hooked(8, 1))),
    Wholesale,
]


@pytest.mark.parametrize("make", CONTRACTS, ids=["_save_to_state_dict", "hooks", "state_dict"])
def test_what_a_module_s_own_state_dict_adds_comes_back(make, store):
    resumed(store, make, loss_of)


def test_what_is_in_a_state_dict_under_another_name_is_not_stored_twice(store):
    life(store, Wholesale, loss_of, 2)
    from fxckpt.store.reader import Reader

    extra = Reader(fxckpt.latest(store).path).state_tensors()
    assert not [key for key in extra if "linear" in key]


def test_a_parent_s_hook_that_renames_its_children_s_keys_is_asked_with_all_of_them(store):
    def renames(module, state_dict, prefix, metadata):
        state_dict[prefix + "first"] = state_dict.pop(prefix + "0.weight")
        state_dict[prefix + "steps"] = module.steps

    def reads(module, state_dict, prefix, *rest):
        state_dict[prefix + "0.weight"] = state_dict.pop(prefix + "first")
        module.steps = state_dict.pop(prefix + "steps")

    def make():
        model = nn.Sequential(nn.Linear(4, 2))
        model.steps = 0
        model.register_state_dict_post_hook(renames)
        model.register_load_state_dict_pre_hook(reads)
        return model

    def loop(model, opt, step):
        model.steps += 1
        return loss_of(model, opt, step) / model.steps

    resumed(store, make, loop)


class Opaque(nn.Linear):
    """Saves what no checkpoint can hold."""

    def get_extra_state(self):
        return {"handle": object()}

    def set_extra_state(self, state):
        pass


def test_extra_state_that_cannot_be_stored_is_refused_at_compile_step_with_the_path(store):
    model = nn.Sequential(Opaque(2, 2))
    with pytest.raises(fxckpt.SetupError, match=r"modules/0/handle: a builtins\.object"):
        fxckpt.compile_step(torch.optim.SGD(model.parameters()), store, model=model)
    assert not store.exists()


# -- buffers whose shape changes -------------------------------------------------------------------------------------------


class Lazy(nn.Module):
    """A buffer that is empty until the first forward, set in place or replaced; and one registered as None."""

    def __init__(self, replaced: bool):
        super().__init__()
        self.net, self.replaced = nn.Linear(4, 4), replaced
        self.register_buffer("mean", torch.empty(0))
        self.register_buffer("later", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        now = x.detach().mean(0)
        if not self.mean.numel() and not self.replaced:
            self.mean.resize_(now.shape).zero_()
        self.mean = now.clone() if not self.mean.numel() else self.mean.lerp_(now, 0.1)
        self.later = self.mean * 2
        return self.net(x - self.mean) + self.later


@pytest.mark.parametrize("replaced", [False, True])
def test_a_buffer_that_is_empty_in_a_new_model_takes_the_stored_shape(replaced, store):
    resumed(store, lambda: Lazy(replaced), loss_of)


class Indexed(nn.Module):
    """Its buffer is empty, and of another type, until the first forward."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.register_buffer("chosen", torch.empty(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.chosen = x.argmax(1) if not self.chosen.numel() else (self.chosen + 1) % 4
        return self.net(x)[torch.arange(len(x)), self.chosen]


def test_an_empty_buffer_takes_the_stored_type_too(store):
    resumed(store, Indexed, loss_of)


class Codebook(nn.Module):
    """A table that grows, which its own method takes at any size."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.register_buffer("codes", torch.zeros(1, 4))
        self.rows = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.codes = torch.cat([self.codes, x.detach()[:1]])
        self.rows += 1
        return self.net(x) + self.codes.mean(0) * self.rows

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        self.codes = torch.empty_like(state_dict[prefix + "codes"])
        self.rows = len(self.codes)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def test_a_module_with_a_method_of_its_own_is_asked_whether_it_takes_another_shape(store):
    _, second = resumed(store, Codebook, loss_of)
    assert second.rows == 9


def test_being_asked_changes_nothing_of_a_model_that_another_tensor_does_not_fit(store):
    life(store, Codebook, loss_of, 3)
    model = Codebook()
    model.net = nn.Linear(4, 3)
    with pytest.raises(fxckpt.LayoutMismatch) as found:
        fxckpt.load(store, model=model)
    assert "net.weight" in str(found.value) and "codes" not in str(found.value)
    assert model.rows == 1 and model.codes.shape == (1, 4)


class Fixed(nn.Module):
    """A buffer that nobody asked to change."""

    def __init__(self, rows: int):
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(rows, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) + self.table.sum(0)


def test_a_buffer_of_another_shape_without_such_a_method_is_still_an_error(store):
    life(store, lambda: Fixed(2), loss_of, 2)
    with pytest.raises(fxckpt.LayoutMismatch, match=r"table: checkpoint F32\[2, 4\], live F32\[3, 4\]"):
        fxckpt.load(store, model=Fixed(3))


# -- buffers of odd kinds --------------------------------------------------------------------------------------------------


class Graph(nn.Module):
    """Propagates along a sparse matrix, which it changes."""

    def __init__(self, persistent: bool, coalesced: bool):
        super().__init__()
        self.net = nn.Linear(4, 4)
        links = torch.sparse_coo_tensor([[0, 1, 1], [1, 2, 2]], [1.0, 2.0, 3.0], (6, 6))
        self.register_buffer("links", links.coalesce() if coalesced else links, persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.links = self.links * 0.9
        return torch.sparse.mm(self.links, self.net(x))


@pytest.mark.parametrize("coalesced", [False, True])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_sparse_buffer_comes_back(persistent, coalesced, store):
    plain, second = resumed(store, lambda: Graph(persistent, coalesced), loss_of)
    assert second.links.is_coalesced() == plain.links.is_coalesced()
    assert torch.equal(second.links._values(), plain.links._values())
    again = Graph(persistent, coalesced)
    fxckpt.load(store, model=again)
    assert torch.equal(again.links._values(), plain.links._values())


ODD: list[tuple[str, Any]] = [
    ("csr", lambda: torch.eye(3).to_sparse_csr()),
    ("quantized", lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)),
    ("meta", lambda: torch.empty(3, device="meta")),
    ("nested", lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("make", [make for _, make in ODD], ids=[name for name, _ in ODD])
def test_a_buffer_that_cannot_be_stored_is_refused_by_name_at_compile_step(make, persistent, store):
    model = nn.Linear(3, 1)
    model.register_buffer("adjacency", make(), persistent=persistent)
    with pytest.raises(fxckpt.SetupError, match="adjacency"):
        fxckpt.compile_step(torch.optim.SGD(model.parameters()), store, model=model)
    assert not store.exists()


# -- numbers and generators among attributes -------------------------------------------------------------------------------


class Annealed(nn.Module):
    """Counts its forwards, has a rate that the loop changes behind the step, and draws masks from a generator of its own."""

    def __init__(self):
        super().__init__()
        self.layer, self.count, self.rate, self.last = nn.Linear(4, 4), 0, 1.0, None
        self.masks = torch.Generator().manual_seed(3)

    def forward(self, x):
        self.count += 1
        self.last = float(self.count) if self.count % 2 else None
        mask = torch.rand(4, generator=self.masks)
        return self.layer(x) * mask * self.rate * (1 + self.count + (self.last or 0.0))


def test_numbers_and_generators_among_attributes_of_modules_come_back_in_a_plain_loop(store):
    plain, second = resumed(store, lambda: nn.Sequential(nn.Linear(4, 4), Annealed()), loss_of)
    assert second[1].count == plain[1].count == 8
    assert (second[1].last, second[1].rate) == (plain[1].last, plain[1].rate)
    assert torch.equal(second[1].masks.get_state(), plain[1].masks.get_state())


def stepped(store, steps: int, rate: float = 1.0, anneal: bool = True) -> Annealed:
    """A loop with boundaries, whose rate is annealed behind the step; ``rate``: what the script sets before it loads."""
    torch.manual_seed(0)
    model = Annealed()
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    fxckpt.compile_step(opt, store, model=model, every=1, update="native")
    model.rate = rate
    fxckpt.load(optimizer=opt)
    for step in fxckpt.steps(steps, optimizer=opt):
        loss_of(model, opt, step).backward()
        opt.step()
        opt.zero_grad()
        model.rate *= 0.5 if anneal else 1.0
    opt.ckpt.shutdown()
    return model


def test_numbers_that_a_loop_changes_behind_the_step_come_back(store, tmp_path):
    whole = stepped(tmp_path / "whole", 6)
    stepped(store, 3)
    second = stepped(store, 6)
    assert (second.rate, second.count) == (whole.rate, whole.count) == (0.5**6, 6)
    assert torch.equal(second.layer.weight, whole.layer.weight)


def test_a_number_that_training_did_not_change_is_as_the_script_says_now(store):
    stepped(store, 3, anneal=False)
    assert stepped(store, 4, rate=0.25, anneal=False).rate == 0.25


def epochs(store, kill: int | None = None, rate: float | None = None) -> Annealed:
    """The head of each epoch changes the rate and draws from the module's generator; left at turn ``kill``. ``rate``: what the
    script sets behind its load."""
    torch.manual_seed(0)
    model, turns = Annealed(), 0
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    fxckpt.compile_step(opt, store, model=model, every=1, update="native")
    if fxckpt.load(optimizer=opt).step and rate is not None:
        model.rate = rate
    for _ in fxckpt.epochs(2, optimizer=opt):
        model.rate *= 0.5
        torch.rand(3, generator=model.masks)
        for x in fxckpt.batches([batch(each, 6, 4) for each in range(4)], optimizer=opt):
            if turns == kill:
                opt.ckpt.shutdown()
                return model
            turns += 1
            model(x).square().mean().backward()
            opt.step()
            opt.zero_grad()
    opt.ckpt.shutdown()
    return model


def test_what_the_head_of_a_resumed_epoch_does_to_modules_again_is_taken_back(store, tmp_path):
    whole = epochs(tmp_path / "whole")
    epochs(store, kill=2)
    second = epochs(store)
    assert (second.rate, second.count) == (whole.rate, whole.count)
    assert torch.equal(second.layer.weight, whole.layer.weight)


def test_a_number_that_is_set_behind_load_stays_so(store):
    epochs(store, kill=2)
    assert epochs(store, rate=8.0).rate == 4.0


def test_a_rollback_puts_numbers_back_to_what_they_were_and_drops_new_ones(store):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    fxckpt.compile_step(opt, store, model=model, every=1, keep=3, update="native")
    for step in fxckpt.steps(3, optimizer=opt):
        loss_of(model, opt, step).backward()
        opt.step()
        if step:
            model[1].p, model[1].turns = 0.1 * (step + 1), step
    opt.ckpt.flush()
    fxckpt.load(optimizer=opt, step=2)
    assert (model[1].p, model[1].turns) == (0.2, 1)
    fxckpt.load(optimizer=opt, step=1)
    assert model[1].p == 0.1 and not hasattr(model[1], "turns")


def test_a_generator_that_is_made_at_its_first_use_comes_back(store):
    class Lazy(nn.Linear):
        def forward(self, x):
            if not hasattr(self, "masks"):
                self.masks = torch.Generator().manual_seed(7)
            return super().forward(x) * torch.rand(4, generator=self.masks)

    resumed(store, lambda: nn.Sequential(Lazy(4, 4)), loss_of)


def test_what_a_module_has_registered_since_is_not_hidden_by_a_number_of_that_name(store, caplog):
    stepped(store, 3)

    class Registered(Annealed):
        def __init__(self):
            super().__init__()
            del self.rate
            self.register_buffer("rate", torch.ones(()), persistent=False)

    model = Registered()
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    fxckpt.compile_step(opt, store, model=model, update="native")
    fxckpt.load(optimizer=opt)
    opt.ckpt.shutdown()
    assert isinstance(model.rate, torch.Tensor) and model.count == 3
    assert "rate was 0.125, and is no number any more" in caplog.text
