"""What interrupts a step, or runs beside it in another thread, makes no checkpoint that holds parts of two states."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref

import instruments
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from waiting import until

import fxckpt
from fxckpt.graph.model.book import traces
from fxckpt.saving import flights, saver
from fxckpt.store import slots
from fxckpt.store.reader import Reader
from fxckpt.store.typed_json import decode_state

pytestmark = pytest.mark.usefixtures("one_thread")


class Loader:
    """A data loader that counts its batches; ``asked`` is called when its state is."""

    def __init__(self, asked=lambda self: None):
        self.batches, self.asked = 0, asked

    def __iter__(self):
        return self

    def state_dict(self):
        batches = self.batches
        self.asked(self)
        return {"batches": batches}

    def load_state_dict(self, state):
        self.batches = state["batches"]


class Training:
    """One step is one batch, so a checkpoint of step n holds a loader that counted n."""

    def __init__(self, directory, loader=None, size=16, **options):
        torch.manual_seed(0)
        self.model, self.loader, self.directory = nn.Sequential(nn.Linear(size, size), nn.Linear(size, size)), loader, directory
        self.loader = loader or Loader()
        self.opt = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        fxckpt.compile_step(
            self.opt,
            directory,
            model=self.model,
            update="native",
            keep=1000,
            **{"every": 1, "extra": {"loader": self.loader}, **options},
        )
        self.size = size

    def train(self, steps=1):
        for _ in range(steps):
            self.opt.zero_grad()
            self.model(torch.ones(2, self.size)).square().sum().backward()
            self.loader.batches += 1
            self.opt.step()

    def stored(self):
        """The loader's count in each checkpoint, by its step."""
        found = {}
        for each in fxckpt.checkpoints(self.directory):
            reader = Reader(each.path)
            early = decode_state(reader.record.state["early"], reader.state_tensors())
            found[each.step] = early["extra"]["loader"]["batches"]
        return found


@pytest.mark.parametrize("left", ["by its end", "by an exception"])
def test_weights_that_a_closure_changes_while_they_are_copied_drop_that_checkpoint(left, tmp_path):
    """A forward with ``max_norm`` inside the closure; or one that raised, after which the script scales the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(500, 64, max_norm=1.0), nn.Linear(64, 64))
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    fxckpt.compile_step(opt, tmp_path, model=model, every=1, update="native", keep=100, chunk_mb=1, staging_mb=0)
    seen, raising = {}, False

    def closure():
        opt.zero_grad()
        if raising:
            raise ValueError
        loss = model(torch.arange(500)).square().mean()
        loss.backward()
        return loss

    for step in range(1, 7):
        instruments.delay("copy", 20_000 if step > 2 else 0)
        if left == "by an exception" and step > 3:
            raising = True
            with pytest.raises(ValueError):
                opt.step(closure)
            raising = False
            with torch.no_grad():
                model[0].weight.mul_(0.5)
        opt.step(closure)
        seen[step] = model[0].weight.detach().clone()
    instruments.delay("copy", 0)
    with pytest.raises(fxckpt.FxckptError, match="changed in place"):
        opt.ckpt.flush()
    opt.ckpt.shutdown()
    assert opt.ckpt.statistics()["checkpoints_failed"] and fxckpt.checkpoints(tmp_path)
    for each in fxckpt.checkpoints(tmp_path):
        assert torch.equal(load_file(each.path / "model.safetensors")["0.weight"], seen[each.step]), each.step


@pytest.mark.parametrize("ends", ["after the copy", "much later"])
def test_an_operation_in_place_that_outlasts_the_copy_drops_the_checkpoint(ends, tmp_path, monkeypatch):
    """Operations count themselves when they end: one that runs while the last copy ends has not been counted by then. One that
    begins later is of no interest, whether or not the checkpoint is on the disk yet."""
    monkeypatch.setattr(flights, "LONGEST", 30.0 if ends == "after the copy" else 0.0)
    training = Training(tmp_path)
    training.train(2)
    training.opt.ckpt.flush()
    instruments.delay("pwrite", 300_000)
    training.train(1)
    training.opt.ckpt.end_step()
    (pending,) = training.opt.ckpt._run.saver.flights.under_way()
    if ends == "after the copy":
        assert pending.copy.copied(60)
    else:
        until(lambda: "being written" in pending.phase)  # it was looked at
    with torch.no_grad():
        training.model[0].weight.mul_(0.5)
    instruments.delay("pwrite", 0)
    if ends == "after the copy":
        with pytest.raises(fxckpt.FxckptError, match="changed in place"):
            training.opt.ckpt.flush()
    training.opt.ckpt.shutdown()
    found = training.opt.ckpt.statistics()
    assert found["checkpoints_started"] == found["checkpoints_committed"] + found["checkpoints_failed"] == 3
    assert set(training.stored()) == ({1, 2} if ends == "after the copy" else {1, 2, 3})


def test_saves_in_another_thread_hold_one_step_whatever_the_training_thread_is_at(tmp_path):
    training, errors, stop = Training(tmp_path, every=7), [], threading.Event()

    def saves():
        while not stop.is_set():
            try:
                training.opt.ckpt.save()
                training.opt.ckpt.flush()
            except BaseException as error:
                errors.append(error)

    thread = threading.Thread(target=saves)
    thread.start()
    training.train(150)
    stop.set()
    thread.join()
    training.opt.ckpt.shutdown()
    found = training.stored()
    assert not errors and len(found) > 5
    assert all(count in (step, step + 1) for step, count in found.items()), "the batch of a step is counted before the step"


def test_a_flush_in_another_thread_waits_for_the_end_of_the_step_and_closes_it(tmp_path):
    inside, waiting = threading.Event(), threading.Event()

    def on_layer(name, step, tensors):
        if step == 4:
            inside.set()
            waiting.wait(60)

    training, flushed = Training(tmp_path, on_layer=on_layer), []

    def flush():
        inside.wait(60)
        threading.Timer(0.1, waiting.set).start()
        training.opt.ckpt.flush(60)
        flushed.extend(training.stored())

    training.train(3)
    thread = threading.Thread(target=flush)
    thread.start()
    training.train(1)
    thread.join()
    assert 4 in flushed
    training.opt.ckpt.shutdown()


def test_a_flush_inside_a_step_waits_for_the_steps_before_it(tmp_path):
    training = Training(tmp_path, on_layer=lambda name, step, tensors: training.opt.ckpt.flush(60) if step == 3 else None)
    training.train(3)
    training.opt.ckpt.shutdown()
    assert training.stored() == {1: 1, 2: 2, 3: 3}


def test_a_shutdown_inside_a_step_ends(tmp_path):
    """As a handler of a signal would call it."""
    training = Training(tmp_path, on_layer=lambda name, step, tensors: training.opt.ckpt.shutdown(60) if step == 3 else None)
    training.train(4)
    assert training.stored() == {1: 1, 2: 2}


def test_timeouts_of_any_size_are_taken(tmp_path):
    training = Training(tmp_path)
    training.train(1)
    training.opt.ckpt.flush(float("inf"))
    training.opt.ckpt.flush(1e10)
    training.opt.ckpt.flush(-1)
    training.opt.ckpt.shutdown(1e10)
    assert training.stored() == {1: 1}


def test_ctrl_c_while_a_checkpoint_is_begun_leaves_none_that_nobody_closes(tmp_path, monkeypatch):
    training = Training(tmp_path)
    training.train(2)
    begin = saver.Saver.begin

    def interrupted(*args, **options):
        begin(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(saver.Saver, "begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.train(1)
    monkeypatch.undo()
    training.loader.batches -= 1
    training.train(2)
    training.opt.ckpt.shutdown(60)
    assert training.stored() == {1: 1, 2: 2, 3: 3, 4: 4}


def test_ctrl_c_while_a_step_captures_state_drops_its_checkpoint_and_counts_the_step(tmp_path):
    training = Training(tmp_path, Loader(lambda loader: os.kill(os.getpid(), signal.SIGINT) if loader.batches == 3 else None))
    training.train(2)
    with pytest.raises(KeyboardInterrupt):
        training.train(1)
    training.opt.ckpt.flush()
    training.train(1)
    training.opt.ckpt.shutdown()
    assert training.stored() == {1: 1, 2: 2, 4: 4}


def test_a_checkpoint_that_ends_in_the_middle_of_a_step_costs_only_itself(tmp_path):
    """As when the monitor dies: the thread that commits ends the checkpoint while layers are still handed over."""

    def on_layer(name, step, tensors):
        if step == 3:
            for pending in training.opt.ckpt._run.saver.flights.under_way():  # at the second layer it is there no more
                if pending.step == 3:
                    pending.give_up("for this test")
                    assert pending.done.wait(60)

    training = Training(tmp_path, on_layer=on_layer)
    training.train(4)
    training.opt.ckpt.shutdown()
    assert training.stored() == {1: 1, 2: 2, 4: 4}


def test_the_first_step_may_be_in_inference_mode(tmp_path):
    training = Training(tmp_path)
    for parameter in training.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with torch.inference_mode():
        training.opt.step()
    training.opt.ckpt.shutdown()
    assert set(training.stored()) == {1}


def trained(directory, **options):
    """A model, its optimizer with two steps behind it, and the gradients of a third."""
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    opt = fxckpt.compile_step(optimizer, directory, model=model, every=1, **options)
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
        opt.step()
        opt.zero_grad()
    opt.ckpt.flush()
    model(torch.ones(2, 4)).sum().backward()
    return model, opt


def test_a_step_that_is_left_by_an_exception_keeps_no_gradient(tmp_path, monkeypatch):
    model, opt = trained(tmp_path / "d")
    gradient = weakref.ref(model.weight.grad)
    monkeypatch.setattr(saver.Saver, "begin", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    opt.zero_grad()
    assert gradient() is None


def test_a_run_that_is_collected_in_its_own_committing_thread_ends_and_frees_its_store(tmp_path, monkeypatch):
    model, opt = trained(tmp_path / "d")
    opt.ckpt._run.saver.loop.stuck_after = 3
    collected, commit = threading.Event(), slots.Store.commit

    def collect_and_commit(store, *args):
        dropped.wait()
        gc.collect()
        collected.set()
        return commit(store, *args)

    dropped = threading.Event()
    monkeypatch.setattr(slots.Store, "commit", collect_and_commit)
    gc.disable()
    try:
        opt.step()
        opt.ckpt.end_step()
        circle = [opt]
        circle.append(circle)
        del opt, circle
        dropped.set()
        assert collected.wait(30)
    finally:
        gc.enable()
    until(lambda: not any(thread.name == "fxckpt-abandon" for thread in threading.enumerate()))
    again = fxckpt.compile_step(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), tmp_path / "d", model=model)
    assert fxckpt.load(optimizer=again).step == 3


def test_a_scaler_that_is_kept_does_not_keep_the_run(tmp_path):
    scaler = torch.amp.GradScaler("cpu")
    _, opt = trained(tmp_path / "d", extra={"scaler": scaler})
    run = weakref.ref(opt.ckpt._run)
    del opt
    gc.collect()
    assert run() is None


def test_a_forked_child_waits_for_no_lock_that_a_thread_of_its_parent_has(tmp_path):
    training = Training(tmp_path, on_layer=None)
    training.train(2)
    run, held, forked = training.opt.ckpt._run, threading.Event(), threading.Event()

    def holds() -> None:
        closing, flights = run.closing, run.saver.flights
        with closing.between_steps, closing._lock, run.capture.noting, flights.lock, run.saver.supply.lock, traces._lock:
            held.set()
            forked.wait(60)

    thread = threading.Thread(target=holds)
    thread.start()
    assert held.wait(60)
    if (pid := os.fork()) == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)
        try:
            training.train(2)
            ckpt = training.opt.ckpt
            for each in (
                ckpt.flush,
                ckpt.end_step,
                ckpt.statistics,
                lambda: ckpt.graph,
                lambda: ckpt.note(loss=1.0),
                ckpt.shutdown,
            ):
                each()
            training.opt.load_state_dict(training.opt.state_dict())
            os._exit(0)
        finally:
            os._exit(1)
    forked.set()
    thread.join()
    assert os.waitpid(pid, 0)[1] == 0
    training.train(1)
    training.opt.ckpt.shutdown()
    assert set(training.stored()) == {1, 2, 3}
