"""Where a training starts and what it leaves: over a store that has checkpoints, the listing, and ``fxckpt.steps``."""

from __future__ import annotations

import time

import pytest
from digests import differences, stored
from small_models import Loader, conv, mlp
from small_training import Training
from torch.nn import functional as F
from waiting import committed

import fxckpt

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def store(tmp_path):
    return tmp_path / "d"


# ---- starting over ----


def test_checkpointing_into_a_store_that_was_not_loaded_is_an_error_that_says_what_to_do(store):
    Training(store).train(2).end()
    training = Training(store, seed=9)
    with pytest.raises(fxckpt.StoreNotLoaded, match=r"load.*fresh=True"):
        training.train(1)
    assert sorted(committed(store)) == ["step-000000001", "step-000000002"]


def test_fresh_starts_over_and_the_old_ones_go_as_new_ones_come(store):
    Training(store).train(5).end()
    training = Training(store, seed=9, fresh=True, keep=2).train(1)
    training.opt.ckpt.flush()
    again = fxckpt.latest(store)
    assert again.step == 1 and differences(stored(again.path), training.reference[1]) == []
    training.train(3).end()
    assert fxckpt.load(store, model=mlp()).step == 4


def test_loading_and_then_training_needs_no_fresh(store):
    Training(store).train(2).end()
    training = Training(store, seed=9)
    fxckpt.load()
    training.train(2).end()
    assert fxckpt.latest(store).step == 4


# ---- listing ----


def test_checkpoints_lists_every_layer_with_where_and_what_it_is(store):
    began = time.time()
    training = Training(store, make=conv, loader=Loader.of(3, 8, 8)).train(3)
    training.opt.ckpt.save("best")
    training.end()
    found = fxckpt.checkpoints(store)
    assert [(each.step, each.name) for each in found] == [(1, None), (2, None), (3, None), (3, "best")]
    assert [each.generation for each in found] == sorted({each.generation for each in found})
    last = found[-1]
    layers = {layer.name: layer for layer in last.layers}
    assert sum(layer.parameters for layer in last.layers) == sum(p.numel() for p in training.model.parameters())
    head = layers["7"]
    at = {key: i for i, key in enumerate(head.keys)}
    assert head.shapes[at["7.weight"]] == (4, 32) and head.dtypes[at["7.weight"]] == "F32"
    assert {"7.weight", "7.bias", "exp_avg/7.weight", "exp_avg_sq/7.bias", "step/7.weight"} <= set(head.keys)
    assert (head.step, head.checkpoint_id, head.parameters) == (3, last.generation, 4 * 32 + 4)
    assert began < head.timestamp <= time.time() and began < last.time <= time.time()
    for each in last.layers:
        raw = (last.path / each.files[0]).read_bytes()
        assert 0 < each.offset < len(raw)
    keys = [key for layer in last.layers for key in layer.keys]
    assert len(keys) == len(set(keys)) and set(keys) == set(training.now())
    assert last.nbytes == sum(p.stat().st_size for p in last.path.glob("*.safetensors"))


def test_latest_verifies_and_can_be_told_not_to(store):
    assert fxckpt.latest(store) is None and fxckpt.checkpoints(store) == []
    Training(store).train(2).end()
    file = store / "step-000000002" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert (fxckpt.latest(store).step, fxckpt.latest(store, verify=False).step) == (1, 2)


# ---- the loop of fxckpt.steps ----


def test_steps_starts_at_the_loaded_iteration_and_counts_turns(store):
    def loop(training: Training, n: int, stop: int) -> list[int]:
        turns = []
        for step in fxckpt.steps(n):
            turns.append(step)
            x, y = next(training.loader)
            F.cross_entropy(training.forward(x), y).backward()
            if step % 2:
                training.opt.step()
                training.opt.zero_grad()
            if step == stop:
                break
        return turns

    first = Training(store)
    assert loop(first, 10, 5) == [0, 1, 2, 3, 4, 5]
    first.end()
    again = Training(store, seed=9)
    restored = fxckpt.load()
    assert (restored.step, restored.updates, restored.iteration) == (2, 2, 4)
    assert loop(again, 10, 99) == [4, 5, 6, 7, 8, 9] and loop(again, 10, 99) == []
    again.opt.ckpt.flush()


def test_a_turn_that_raises_before_its_update_is_not_counted(store):
    training = Training(store)
    with pytest.raises(ZeroDivisionError):
        for step in fxckpt.steps(10):
            if step == 3:
                raise ZeroDivisionError
            training.train(1)
    training.opt.ckpt.save("crash")
    again = Training(store, seed=9) if training.end() else None
    assert fxckpt.load(name="crash").iteration == 3 and list(zip(range(1), fxckpt.steps(10))) == [(0, 3)]
    again.end()


def test_two_steps_in_a_turn_leave_one_checkpoint_of_its_end(store):
    training = Training(store)
    for _ in fxckpt.steps(3):
        training.train(2)
    training.opt.ckpt.flush()
    assert [each.step for each in fxckpt.checkpoints(store)] == [2, 4, 6]
    for each in fxckpt.checkpoints(store):
        assert differences(stored(each.path), training.reference[each.step]) == []
