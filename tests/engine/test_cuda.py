"""The CUDA path without a device: the fake driver behind the engine, a stand-in for torch's streams before it."""

from __future__ import annotations

import ctypes
import errno
import json
from types import SimpleNamespace

import pytest
import torch
from digests import differences, stored
from small_models import Loader, conv, mlp
from small_training import Training, all_good
from standin import StandIn, a_step_while_copies_are_held, device, library, shaped, spread
from torch import nn
from torch.nn.functional import cross_entropy

import fxckpt
from fxckpt.compat import cuda
from fxckpt.errors import SaveFailed, SetupError
from fxckpt.run.clock import Applied
from fxckpt.store.reader import candidates

__all__ = ["device", "library"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("place", [shaped, spread, lambda tensor: 0], ids=["counts-on-host", "mixed", "all-on-device"])
@pytest.mark.parametrize("flags", [{"fused": True}, {"foreach": True}], ids=["fused", "foreach"])
def test_every_checkpoint_is_its_step_however_late_the_copies_run(tmp_path, device, place, flags):
    device.place = place
    training = Training(tmp_path, optimizer=lambda p, lr: torch.optim.AdamW(p, lr=lr, **flags)).train(8).end()
    assert all_good(tmp_path, training) == [8, 7, 6, 5, 4, 3, 2, 1]
    assert training.found["checkpoints_failed"] == 0 and device.fake.violations() == ""
    assert [device.fake.retained(d) for d in (0, 1)] == [0, 0]


def test_a_monitor_writes_what_devices_copied_into_its_memory(tmp_path, device):
    training = Training(tmp_path, optimizer=lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True), writer="monitor").train(6)
    assert all_good(tmp_path, training.end()) == [6, 5, 4, 3, 2, 1]
    assert training.found["checkpoints_failed"] == 0 and device.fake.violations() == ""


def test_a_fence_on_another_stream_than_the_one_that_trains_would_be_seen(tmp_path, device):
    """What the test above rests on: the stream matters."""
    device.fake.late(3000)
    elsewhere = device.fake.stream(0, host=False)
    device.training = {0: elsewhere}
    training = Training(tmp_path).train(8).end()
    torn = [c.record.step for c in candidates(tmp_path) if differences(stored(c.path), training.reference[c.record.step])]
    assert torn


def test_the_stream_is_the_one_that_is_current_at_each_step(tmp_path, device):
    two = [device.fake.stream(0), device.fake.stream(0)]
    training = Training(tmp_path)
    for step in range(8):
        device.training = {0: two[step // 2 % 2]}
        training.train(1)
        training.opt.ckpt.end_step()
    assert all_good(tmp_path, training.end()) == [8, 7, 6, 5, 4, 3, 2, 1]


def test_taking_checkpoints_from_a_device_changes_no_bits(tmp_path, device):
    plain = Training(None).train(8)
    taken = Training(tmp_path).train(8)
    assert differences(plain.now(), taken.now()) == [] and plain.losses == taken.losses


def test_a_run_goes_on_from_a_device_checkpoint_with_the_same_bits(tmp_path, device):
    whole = Training(None).train(9)
    Training(tmp_path).train(5).end()
    again = Training(tmp_path, seed=3)
    assert fxckpt.load().step == 5
    again.train(4)
    assert differences(whole.now(), again.now()) == [] and whole.losses[5:] == again.losses


def test_buffers_and_tensors_in_another_order_are_copied_in_order_on_the_training_stream(tmp_path, device, caplog):
    """BatchNorm's statistics change in the next forward; channels_last weights are not in the file's order."""
    caplog.set_level("INFO", "fxckpt")
    training = Training(tmp_path, make=conv, loader=Loader.of(3, 8, 8)).train(6).end()
    assert "copied on their device first" in caplog.text
    assert all_good(tmp_path, training) == [6, 5, 4, 3, 2, 1]


class Masked(nn.Module):
    """With a buffer that is not in the state dict and changes."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()
        self.register_buffer("seen", torch.zeros(3), persistent=False)

    def forward(self, x):
        with torch.no_grad():
            self.seen += 1
        return self.inner(x)


def test_a_transient_buffer_on_a_device_is_waited_for_by_the_committer_only(tmp_path, device):
    training = Training(tmp_path, make=Masked).train(3)
    a_step_while_copies_are_held(training, device.fake)
    training.end()
    assert device.fake.violations() == ""  # the committer made no call of torch's runtime, either
    again = Training(tmp_path, make=Masked, seed=5)
    fxckpt.load()
    assert again.model.seen.tolist() == training.model.seen.tolist() == [4, 4, 4]


def test_a_step_that_the_device_skipped_is_not_counted_as_an_update(tmp_path, device):
    device.place = lambda tensor: 0  # found_inf too
    training = Training(tmp_path, optimizer=lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True), extra={})
    scaler = torch.amp.GradScaler("cpu", init_scale=7.0)
    states = []
    for step in range(5):
        x, y = next(training.loader)
        scaler.scale(cross_entropy(training.forward(x), y)).backward()
        if step == 2:
            training.model[0].weight.grad[0, 0] = float("inf")
        scaler.step(training.opt)
        scaler.update()
        training.opt.zero_grad()
        states.append(training.now())
    training.opt.ckpt.flush()
    found = {c.record.step: c for c in candidates(tmp_path)}
    assert {step: c.record.updates for step, c in found.items()} == {1: 1, 2: 2, 3: 2, 4: 3, 5: 4}
    assert differences(stored(found[3].path), stored(found[2].path)) == []
    assert all(differences(stored(found[step].path), states[step - 1]) == [] for step in found)
    assert training.opt.ckpt._run.clock.applied.promise()() == 4


def test_a_step_inside_a_graph_capture_is_refused(tmp_path, device):
    training = Training(tmp_path).train(2)
    before = training.now()
    device.is_capturing = True
    with pytest.raises(SetupError, match=r"CUDA graph is captured.*call opt.step\(\) outside"):
        training.opt.step()
    device.is_capturing = False
    assert differences(before, training.now()) == []
    assert all_good(tmp_path, training.train(1).end())[0] == 3


class Extra:
    """An object of ``extra=`` whose state lies on a device: to read it inside a capture would break that."""

    def __init__(self, device: StandIn):
        self.device, self.read_in_capture, self.value = device, 0, 0

    def state_dict(self) -> dict[str, int]:
        self.read_in_capture += self.device.is_capturing
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def test_a_backward_that_is_captured_leaves_the_step_open(tmp_path, device):
    """And a gradient that was recorded, not computed, is none that waits for a step."""
    extra = Extra(device)
    training = Training(tmp_path, extra={"extra": extra}).train(2)
    x, y = next(training.loader)
    device.is_capturing = True
    cross_entropy(training.forward(x), y).backward()
    assert extra.read_in_capture == 0 and training.opt.ckpt._run.closing.open is not None
    device.is_capturing = False
    extra.value = 5  # what changes between the steps is the checkpoint's of step 2
    training.opt.step()  # after a replay
    training.reference[3] = training.now()
    training.end()
    assert all_good(tmp_path, training) == [3, 2, 1]
    records = {c.record.step: c.record for c in candidates(tmp_path)}
    assert '"value": 5' in json.dumps(records[2].state["late"]) and "accumulated" not in records[2].optimizers[0]


@pytest.mark.parametrize("make", [mlp, Masked], ids=["mlp", "transient-buffer"])
def test_a_capture_in_another_thread_is_not_disturbed(tmp_path, device, make):
    """From the opening of the devices to their end, in every thread."""
    device.place = lambda tensor: 0
    with device.fake.capture():
        training = Training(tmp_path, make=make).train(4).end()
    assert device.fake.violations() == "" and all_good(tmp_path, training) == [4, 3, 2, 1]


def test_counting_skipped_steps_disturbs_no_capture(tmp_path, device):
    device.place = lambda tensor: 0  # found_inf too
    training = Training(tmp_path, optimizer=lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True), extra={})
    scaler = torch.amp.GradScaler("cpu", init_scale=7.0)
    with device.fake.capture():
        for _ in range(3):
            x, y = next(training.loader)
            scaler.scale(cross_entropy(training.forward(x), y)).backward()
            scaler.step(training.opt)
            scaler.update()
            training.opt.zero_grad()
        training.end()
    assert device.fake.violations() == ""
    assert {c.record.step: c.record.updates for c in candidates(tmp_path)} == {1: 1, 2: 2, 3: 3}


def test_a_save_inside_a_capture_fails_and_takes_no_stream_into_the_graph(tmp_path, device):
    training = Training(tmp_path).train(2)
    training.opt.ckpt.flush()
    stream = ctypes.c_void_p(device.training[0])
    device.fake.library.fake_capture_stream(stream, 1)
    with pytest.raises(SaveFailed, match="STREAM_CAPTURE_UNSUPPORTED"):
        training.opt.ckpt.save()
    device.fake.library.fake_capture_stream(stream, 0)
    training.train(1).end()
    assert device.fake.violations() == "" and all_good(tmp_path, training) == [3, 2, 1]


@pytest.mark.parametrize("batch", [None, "0"], ids=["batches", "switched-off"])
def test_a_device_with_other_addresses_for_pinned_memory_gets_no_batch(tmp_path, device, monkeypatch, batch):
    """Where it has the same ones, batches can be switched off."""
    if batch is not None:
        monkeypatch.setenv("FXCKPT_CUDA_BATCH", batch)
    for ordinal in device.training:
        device.fake.library.fake_host_pointers(ordinal, int(batch is None))
    try:
        training = Training(tmp_path, chunk_mb=1).train(3).end()
    finally:
        for ordinal in device.training:
            device.fake.library.fake_host_pointers(ordinal, 1)
    assert (device.fake.library.fake_batches() > 0) == (batch is None)
    assert device.fake.violations() == "" and all_good(tmp_path, training) == [3, 2, 1]


def test_a_failing_driver_fails_the_checkpoint_and_not_the_training(tmp_path, device):
    training = Training(tmp_path).train(2)
    training.opt.ckpt.flush()
    device.fake.fail(2)
    training.train(1)
    with pytest.raises(SaveFailed, match=r"CUDA_ERROR_ILLEGAL_ADDRESS.*an illegal memory access") as caught:
        training.opt.ckpt.flush()
    assert caught.value.errno == errno.EREMOTEIO
    training.train(2).end()
    assert all_good(tmp_path, training) == [5, 4, 2, 1]
    assert not list(tmp_path.glob("*.bad"))  # the disk did nothing wrong


def test_a_device_that_is_gone_fails_every_checkpoint_and_no_step(tmp_path, device):
    training = Training(tmp_path).train(2)
    training.opt.ckpt.flush()
    device.fake.fail(1, 4, for_good=True)
    training.train(3)
    with pytest.raises(SaveFailed, match=r"cu[A-Z]"):
        training.opt.ckpt.flush()
    assert training.found["steps"] == 5 and training.found["checkpoints_failed"] == 3
    device.fake.fail(0)
    assert all_good(tmp_path, training) == [2, 1]


def test_without_a_driver_the_error_says_which_library_and_what_to_do(tmp_path, device):
    device.driver = "/nowhere/libcuda.so.1"
    with pytest.raises(SetupError, match=r"/nowhere/libcuda\.so\.1.*FXCKPT_DISABLE=1"):
        Training(tmp_path)
    device.driver = device.fake.path
    assert all_good(tmp_path, Training(tmp_path).train(1).end()) == [1]  # nothing was left behind: the lock is free


def test_staging_on_devices_is_never_too_small_to_make_progress(tmp_path, device):
    training = Training(tmp_path, staging_mb=0, chunk_mb=1).train(4).end()
    assert training.found["checkpoints_failed"] == 0 and all_good(tmp_path, training) == [4, 3, 2, 1]
    assert training.opt.ckpt._run.engine.staging_bytes == cuda.LEAST_CHUNKS << 20


@pytest.mark.parametrize("kind, hip, name", [("xpu", None, "xpu"), ("mps", None, "mps"), ("cuda", "6.4", "ROCm")])
def test_other_backends_are_refused_by_name(monkeypatch, kind, hip, name):
    monkeypatch.setattr(torch.version, "hip", hip)
    with pytest.raises(SetupError, match=rf"{name}.*FXCKPT_DISABLE=1"):
        cuda.check(SimpleNamespace(device=SimpleNamespace(type=kind)))


def test_applied_updates_are_counted_without_waiting():
    applied, asked = Applied(), []

    def skipped(value):
        return lambda: asked.append(value) or torch.tensor(float(value))

    applied.add()
    applied.add(skipped(1))
    applied.add(skipped(0))
    promise = applied.promise()
    applied.add(skipped(0))
    assert asked == []
    assert promise() == 2 and applied.promise()() == 3
    for _ in range(100):
        applied.add(skipped(0))
    assert applied.promise()() == 103
    applied.set(7)
    assert applied.promise()() == 7


def test_values_of_counts_come_row_by_row():
    rows = [[torch.tensor(3.0), torch.tensor(5)], [], [torch.tensor(1.0)]]
    assert cuda.count_values(rows) == [(3.0, 5), (), (1.0,)]


def test_the_generators_of_devices_are_kept(monkeypatch):
    from fxckpt.run.run import extra_state

    put = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [torch.tensor([1], dtype=torch.uint8)] * 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda saved, device: put.append((saved.tolist(), device)))
    extra_state.set_random_state(extra_state.random_state())
    assert put == [([1], 0)]  # of two devices one is left


class WithTransient(nn.Module):
    """A layer, and a buffer of three elements that is in no state dict."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 5)
        self.register_buffer("seen", torch.zeros(3), persistent=False)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("parameters_on", [0, None], ids=["another-device", "the-host"])
def test_a_transient_buffer_on_a_device_of_its_own_is_stored(parameters_on, device, tmp_path):
    device.place = lambda t: 1 if t.shape == (3,) else None if t.dim() == 0 else parameters_on
    model = WithTransient()
    opt = fxckpt.compile_step(torch.optim.AdamW(model.parameters(), foreach=False), tmp_path / "d", model=model, every=1)
    model(torch.ones(2, 4)).sum().backward()
    opt.step()
    opt.ckpt.flush()
    assert opt.ckpt.statistics()["checkpoints_committed"] == 1


def test_a_model_that_moves_to_a_device_after_compile_step_may_skip_steps_there(device, tmp_path):
    """Flags that a scaler leaves on the device are read 64 steps later, checkpoint or not."""
    found, moved = torch.zeros(()), []
    device.place = lambda t: 0 if moved and (t is found or t.dim()) else None
    model = nn.Linear(4, 5)
    opt = fxckpt.compile_step(torch.optim.AdamW(model.parameters(), fused=True), tmp_path / "d", model=model)
    moved.append(True)
    for _ in range(70):
        model(torch.ones(2, 4)).sum().backward()
        opt.grad_scale, opt.found_inf = torch.ones(()), found
        opt.step()
        opt.zero_grad()
    assert opt.ckpt.statistics()["steps"] == 70
