"""``opt.ckpt`` and the options of ``compile_step``: saves, shutdown, callbacks, and what is refused at once."""

from __future__ import annotations

import threading

import pytest
import torch
from digests import differences, snapshot, stored
from small_models import mlp
from small_training import Training, all_good
from torch import nn
from waiting import committed

import fxckpt

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def store(tmp_path):
    return tmp_path / "d"


# ---- the handle ----


def test_shutdown_is_idempotent_and_training_goes_on_without_checkpoints(store):
    training = Training(store).train(2)
    for _ in range(3):
        training.opt.ckpt.shutdown()
    training.train(2)
    training.opt.ckpt.flush()
    assert all_good(store, training)[0] == 2 and training.found["last_committed_step"] == 2
    with pytest.raises(fxckpt.SetupError, match="shut down"):
        training.opt.ckpt.save()
    Training(store, seed=1)  # the lock is free


def test_an_optimizer_can_be_taken_again_after_shutdown_but_not_before(store, tmp_path):
    training = Training(store).train(1)
    with pytest.raises(fxckpt.SetupError, match="shutdown"):
        fxckpt.compile_step(training.opt, tmp_path / "other")
    training.opt.ckpt.shutdown()
    fxckpt.compile_step(training.opt, tmp_path / "other", model=training.model, every=1, update="native")
    training.train(1)
    training.opt.ckpt.flush()
    assert fxckpt.latest(tmp_path / "other").step == 1 and fxckpt.latest(store).step == 1


def test_named_saves_are_kept_and_can_be_made_again(store):
    training = Training(store, keep=1).train(2)
    training.opt.ckpt.save("two")
    training.train(6)
    training.opt.ckpt.save("eight")
    training.train(2)
    training.opt.ckpt.flush()
    for name, step in (("two", 2), ("eight", 8)):
        found = fxckpt.load(store, model=(model := mlp()), name=name)
        assert found.step == step and found.path == store / "named" / name
        assert differences(snapshot(model), snapshot_of_model(training.reference[step])) == []
    assert [each.name for each in fxckpt.checkpoints(store)].count(None) == 1


def snapshot_of_model(reference: dict) -> dict:
    return {key: t for key, t in reference.items() if "/" not in key}


def test_a_name_that_is_taken_or_no_name_raises_and_leaves_what_is_there(store):
    training = Training(store).train(1)
    training.opt.ckpt.save("best")
    training.train(1)
    with pytest.raises(fxckpt.FxckptError, match="best"):
        training.opt.ckpt.save("best")
    for bad in ("../out", "a/b", "", ".hidden", "x" * 300, "step-000000007", "x.tmp", "\ud800", "\x1b[31m"):
        with pytest.raises(fxckpt.SetupError):
            training.opt.ckpt.save(bad)
    assert fxckpt.load(store, model=mlp(), name="best").step == 1
    training.train(1)
    training.opt.ckpt.flush()
    assert training.found["last_committed_step"] == 3


def test_a_run_that_was_killed_behind_a_named_save_takes_it_again(store):
    """As the same command does, which goes on from the step before it."""
    training = Training(store, every=2).train(3)
    training.opt.ckpt.save("third")
    training.opt.ckpt._run.saver.abandon()
    training = Training(store, every=2)
    assert fxckpt.load(optimizer=training.opt, step=2).step == 2
    training.train(1).opt.ckpt.save("third")
    training.end()
    found = fxckpt.load(store, model=(model := mlp()), name="third")
    assert found.step == 3
    assert differences(snapshot(model), snapshot_of_model(training.reference[3])) == []


def test_save_takes_the_state_as_it_is_now(store):
    training = Training(store, every=100).train(3)
    with torch.no_grad():
        training.model[0].weight.zero_()
    training.opt.ckpt.save()
    found = fxckpt.latest(store)
    assert found.step == 3
    assert differences(stored(found.path), snapshot(training.model, training.opt)) == []


def test_save_before_the_first_step(store):
    training = Training(store)
    training.opt.ckpt.save("start")
    training.train(2)
    training.opt.ckpt.flush()
    assert fxckpt.load(name="start").step == 0
    assert training.opt.state == {} or len(training.opt.state) == 0
    training.train(1)
    training.opt.ckpt.flush()


def test_on_layer_gets_copies_that_it_may_keep(store):
    kept = []
    training = Training(store, on_layer=lambda name, step, tensors: kept.append((name, step, tensors)), every=2).train(4)
    training.opt.ckpt.flush()
    assert [(name, step) for name, step, _ in kept] == [("3", 2), ("0", 2), ("3", 4), ("0", 4)]
    for name, step, tensors in kept:
        assert set(tensors) == {f"{key}{name}.{what}" for key in ("", "exp_avg/", "exp_avg_sq/") for what in ("weight", "bias")}
        assert all(torch.equal(t, training.reference[step][key]) for key, t in tensors.items())
        assert not any(t.requires_grad for t in tensors.values())


def test_another_thread_that_looks_at_the_graph_waits_for_the_step(store):
    training, seen = Training(store, on_layer=lambda *_: looked()), []

    def looked() -> None:
        if not seen:
            seen.append(threading.Thread(target=lambda: seen.append(str(training.opt.ckpt.graph))))
            seen[0].start()
            seen[0].join(0.2)
            assert seen[0].is_alive()

    training.train(1)
    seen[0].join()
    assert "ckpt_emit" in seen[1]
    training.end()


def test_disabled_by_the_environment_is_plain_pytorch(store, monkeypatch, caplog):
    monkeypatch.setenv("FXCKPT_DISABLE", "1")
    training = Training(store).train(3)
    assert fxckpt.load().step == 0 and "FXCKPT_DISABLE" in caplog.text
    training.opt.ckpt.flush()
    training.opt.ckpt.end_step()
    training.opt.ckpt.save("best")
    with training.opt.ckpt.trace(store / "trace.json"):
        training.opt.ckpt.note(loss=1.0)
    assert list(fxckpt.steps(2)) == [0, 1]
    training.opt.ckpt.shutdown()
    assert not store.exists()
    assert differences(training.now(), Training(None).train(3).now()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"every": 0}, "every"),
        ({"every": "often"}, "every"),
        ({"keep": 0}, "keep"),
        ({"max_async": 0}, "max_async"),
        ({"update": "jit"}, "update"),
        ({"on_error": "ignore"}, "on_error"),
        ({"preset": "fast"}, "preset"),
        ({"layer": "row"}, "layer"),
        ({"staging_mb": -1}, "staging_mb"),
        ({"extra": {"x": 3}}, r"extra\['x'\]"),
    ],
)
def test_wrong_options_raise_at_once_and_leave_the_optimizer_and_the_disk_alone(options, says, store):
    opt = torch.optim.SGD(mlp().parameters(), lr=0.1)
    with pytest.raises(fxckpt.SetupError, match=says):
        fxckpt.compile_step(opt, store, **options)
    assert type(opt) is torch.optim.SGD
    assert not store.exists() or committed(store) == []
    fxckpt.compile_step(opt, store)  # nothing is in the way


def test_what_cannot_be_checkpointed_raises_at_once(store):
    sparse = nn.Parameter(torch.sparse_coo_tensor(torch.tensor([[0], [1]]), torch.ones(1), (2, 2), check_invariants=True))
    with pytest.raises(fxckpt.SetupError, match="sparse"):
        fxckpt.compile_step(torch.optim.SGD([sparse], lr=0.1), store)
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(fxckpt.SetupError, match=r"'0\.weight', a parameter without a shape yet: run one forward"):
        fxckpt.compile_step(torch.optim.SGD(lazy.parameters(), lr=0.1), store, model=lazy)
    with pytest.raises(fxckpt.SetupError, match=r"parameter 1 of group 0 of optimizer 0.* on meta"):
        fxckpt.compile_step(torch.optim.SGD([nn.Parameter(torch.zeros(2, device=d)) for d in ("cpu", "meta")], lr=0.1), store)
    turned = nn.Parameter(torch.zeros(2, dtype=torch.complex64).conj())
    with pytest.raises(fxckpt.SetupError, match=r"parameter 0 .*conjugated.*resolve_conj"):
        fxckpt.compile_step(torch.optim.SGD([turned], lr=0.1), store)
    for opt in ([], [mlp()], "adam"):
        with pytest.raises(fxckpt.SetupError):
            fxckpt.compile_step(opt, store)
    shared = nn.Parameter(torch.zeros(2))
    with pytest.raises(fxckpt.SetupError, match="two optimizers"):
        fxckpt.compile_step([torch.optim.SGD([shared], lr=0.1), torch.optim.SGD([shared], lr=0.1)], store)
