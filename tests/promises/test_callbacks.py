"""``opt.ckpt.on_commit`` and ``on_failure``: told of every checkpoint, by whatever writer, and never in the way of one."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from pathlib import Path

import pytest
import torch
from repository import ROOT
from small_training import Training
from torch import nn

import fxckpt
from fxckpt.errors import SaveFailed
from fxckpt.store.reader import Reader
from fxckpt.store.slots import Store


@pytest.mark.parametrize("writer", ["thread", "monitor", "mock"])
def test_each_checkpoint_is_told_in_order_by_the_thread_that_commits_before_flush_returns(writer, root):
    training = Training(root, writer=writer)
    told: list[fxckpt.Committed] = []
    threads, found = set(), []

    @training.opt.ckpt.on_commit
    def tell(done: fxckpt.Committed) -> None:
        told.append(done)
        threads.add(threading.current_thread().name)
        if done.path is not None:
            found.append((Reader(done.path).record.step, Reader(done.path).record.generation))

    assert callable(tell)
    for loss in (3.0, 2.0):
        training.train()
        training.opt.ckpt.note(loss=loss)
    training.opt.ckpt.flush()
    assert [(each.step, each.iteration, each.metrics) for each in told] == [(1, 1, {"loss": 3.0}), (2, 2, {"loss": 2.0})]
    assert threads == {"fxckpt-commit"} and all(each.nbytes > 0 and each.seconds > 0 and each.time > 0 for each in told)
    if writer == "mock":
        assert [(each.path, each.generation) for each in told] == [(None, None)] * 2
    else:
        assert found == [(each.step, each.generation) for each in told]
        training.opt.ckpt.save("mine")
        assert told[-1].path == root / "named" / "mine"
    training.end()


def fails(*_: object, **__: object) -> None:
    raise SaveFailed("pwrite", "somewhere", 0, 28)


@pytest.mark.parametrize("where", ["begin", "commit"])
def test_a_failure_is_told_with_its_error_and_training_goes_on(where, root, monkeypatch):
    training = Training(root).train()
    told: list[fxckpt.Failed | fxckpt.Committed] = []
    training.opt.ckpt.flush()
    training.opt.ckpt.on_failure(told.append)
    training.opt.ckpt.on_commit(told.append)
    with monkeypatch.context() as patch:
        patch.setattr(Store, where, fails)
        training.train()
        with pytest.raises(SaveFailed):
            training.opt.ckpt.flush()
    training.train()
    training.end()
    assert [(type(each), each.step) for each in told] == [(fxckpt.Failed, 2), (fxckpt.Committed, 3)]
    assert isinstance(told[0].error, SaveFailed) and told[0].error.errno == 28


def test_a_state_that_can_no_longer_be_captured_is_told_as_a_failure(root):
    class Counter:
        broken = False

        def state_dict(self) -> dict:
            if self.broken:
                raise RuntimeError("no more")
            return {"n": 1}

        def load_state_dict(self, state: dict) -> None: ...

    counter = Counter()
    training = Training(root, extra={"c": counter}).train()
    told: list[fxckpt.Failed] = []
    training.opt.ckpt.on_failure(told.append)
    training.opt.ckpt.flush()
    counter.broken = True
    training.train()
    with pytest.raises(RuntimeError, match="no more"):
        training.opt.ckpt.flush()
    training.opt.ckpt.shutdown()
    assert [each.step for each in told] == [2] and "no more" in str(told[0].error)
    assert (training.found["checkpoints_failed"], training.found["checkpoints_skipped"]) == (1, 0)


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_callback_that_raises_costs_nothing_and_is_logged_once(error, root, caplog):
    training = Training(root)
    told: list[int] = []

    @training.opt.ckpt.on_commit
    def bad(done: fxckpt.Committed) -> None:
        told.append(done.step)
        raise error("of the logger")

    training.opt.ckpt.on_commit(lambda done: told.append(-done.step))
    training.train(3)
    training.end()
    assert told == [1, -1, 2, -2, 3, -3] and [each.step for each in fxckpt.checkpoints(root)] == [1, 2, 3]
    assert len([m for m in caplog.messages if "a callback for checkpoints" in m]) == 1


@pytest.mark.parametrize("method", ["flush", "save", "shutdown"])
def test_what_waits_for_the_committer_is_refused_inside_a_callback(method, root):
    training = Training(root)
    raised: list[Exception] = []

    @training.opt.ckpt.on_commit
    def tell(done: fxckpt.Committed) -> None:
        try:
            getattr(training.opt.ckpt, method)()
        except fxckpt.SetupError as error:
            raised.append(error)

    training.train().end()
    assert len(raised) == 1 and f"opt.ckpt.{method}()" in str(raised[0]) and "in the thread that trains" in str(raised[0])


def test_a_callback_that_holds_its_optimizer_does_not_keep_the_run_alive(root):
    def begin() -> weakref.ref:
        model = nn.Linear(2, 2)
        opt = fxckpt.compile_step(torch.optim.SGD(model.parameters()), root, model=model, update="native")
        opt.ckpt.on_commit(lambda done: opt.ckpt.statistics())
        return weakref.ref(opt.ckpt._run)

    run = begin()
    gc.collect()
    assert run() is None


def test_the_example_for_tensorboard_writes_what_it_says(root, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "watching.md").read_text()
    code = re.search(r"```python\n(from torch.utils.tensorboard.*?)```", text, re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    training = Training(root)
    exec(code[1], {"opt": training.opt, "fxckpt": fxckpt})
    training.train(3)
    training.end()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in Path(tmp_path).rglob("events.out.*")}
    events = EventAccumulator(str(folder)).Reload()
    assert [each.step for each in events.Scalars("checkpoint/seconds")] == [1, 2, 3]
