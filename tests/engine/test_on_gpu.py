"""What only a CUDA device can show. ``benchmarks/device.sh`` runs these where there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from gpu_run import Run, same
from repository import SUPPORT
from torch import nn
from torch.nn import functional as F

import fxckpt
from fxckpt.cli import main
from fxckpt.errors import SetupError
from fxckpt.store.journaled import durable_steps
from fxckpt.store.reader import candidates, records

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

FLAGS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "single": {"foreach": False}, "capturable": {"capturable": True}}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_every_checkpoint_is_its_step(tmp_path, flags):
    Run(tmp_path, flags=flags).train(12).check(least=12)


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_taking_checkpoints_changes_no_bits(tmp_path, flags):
    same(Run(None, flags=flags).train(8).now(), Run(tmp_path, flags=flags).train(8).now())


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_a_run_goes_on_with_the_same_bits(tmp_path, flags):
    whole = Run(None, flags=flags).train(9)
    Run(tmp_path, flags=flags).train(5).opt.ckpt.shutdown()
    again = Run(tmp_path, flags=flags, seed=7)
    again.step_number = fxckpt.load(optimizer=again.opt).step
    assert again.step_number == 5
    same(whole.now(), again.train(4).now())
    places = {key: t.device.type for s in again.opt.state.values() for key, t in s.items()}
    assert places == {key: t.device.type for s in whole.opt.state.values() for key, t in s.items()}


def test_training_on_another_stream(tmp_path):
    run, stream = Run(tmp_path), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run.train(10)
    torch.cuda.current_stream().wait_stream(stream)
    run.check(least=10)


def test_slow_steps_and_slow_copies_keep_their_order(tmp_path):
    """The device is behind the host by whole iterations: waits must be on the device."""
    run = Run(tmp_path, max_async=3)
    for _ in range(10):
        torch.cuda._sleep(20_000_000)
        run.train(1)
    run.check(least=10)


def conv() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.Flatten(), nn.Linear(16 * 36, 8)
    )
    return model.to(memory_format=torch.channels_last)


def test_buffers_and_channels_last(tmp_path):
    torch.backends.cudnn.deterministic = True
    Run(tmp_path, make=conv).train(8).check(least=8)


def test_the_training_loop_never_waits_for_the_device(tmp_path):
    run = Run(tmp_path, max_async=3).train(3, keep=False)
    run.train_without_waiting(4)
    assert run.opt.ckpt.statistics()["last_committed_step"] == 7


def test_nothing_is_allocated_on_the_device(tmp_path):
    def peak(run: Run) -> int:
        run.train(3, keep=False)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run.train(5, keep=False)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    assert peak(Run(tmp_path)) <= peak(Run(None))


def test_a_step_that_the_device_skipped_is_not_counted(tmp_path):
    run = Run(tmp_path, make=lambda: nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)))
    scaler = torch.amp.GradScaler("cuda", init_scale=1000.0)
    for step in range(5):
        x, y = run.batch()
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(run.model(x), y)
        scaler.scale(loss).backward()
        if step == 2:
            run.model[0].weight.grad[0, 0] = float("inf")
        scaler.step(run.opt)
        scaler.update()
        run.opt.zero_grad()
        run.step_number += 1
        run.states[run.step_number] = run.now()
    run.check(least=5)
    assert {c.record.step: c.record.updates for c in candidates(tmp_path)} == {1: 1, 2: 2, 3: 2, 4: 3, 5: 4}


def test_a_step_under_capture_is_refused_and_one_outside_works(tmp_path):
    run = Run(tmp_path, flags=FLAGS["capturable"], make=lambda: nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))).train(3)
    x, y = run.batch()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run.opt.zero_grad()
            F.cross_entropy(run.model(x), y).backward()
    torch.cuda.current_stream().wait_stream(stream)
    refused = []
    run.opt.zero_grad()
    with torch.cuda.graph(graph):
        F.cross_entropy(run.model(x), y).backward()
        try:
            run.opt.step()
        except SetupError as error:
            refused.append(str(error))
    assert refused and "outside" in refused[0]
    for _ in range(4):
        graph.replay()
        run.opt.step()
        run.step_number += 1
        run.states[run.step_number] = run.now()
    run.check(least=7)


SPLIT = {name: FLAGS[name] for name in ("fused", "foreach", "single")}


@pytest.mark.parametrize("flags", SPLIT.values(), ids=SPLIT)
def test_steps_of_a_journal_made_again_have_the_bits_of_training(tmp_path, flags):
    """What no other test can show: a device's kernels give the same bits twice, and ``fxckpt verify --replay`` says so."""
    run = Run(tmp_path, flags=flags, journal=6).train(20)
    run.check(least=4)
    assert len(run.check_journal()) >= 14 and durable_steps(tmp_path) == [*range(1, 21)]
    made_on = {each.record.journal.machine for each in records(tmp_path)}
    assert len(made_on) == 1 and torch.cuda.get_device_name() in made_on.pop()
    run.opt.ckpt.shutdown()
    assert main(["verify", "--replay", str(tmp_path)]) == 0


@pytest.mark.parametrize("flags", SPLIT.values(), ids=SPLIT)
def test_a_run_goes_on_from_a_record_of_the_journal_with_the_same_bits(tmp_path, flags):
    whole = Run(None, flags=flags).train(12)
    Run(tmp_path, flags=flags, journal=20).train(7).opt.ckpt.shutdown()
    again = Run(tmp_path, flags=flags, seed=7, journal=20)
    again.step_number = fxckpt.load(optimizer=again.opt).step
    assert again.step_number == 7
    same(whole.now(), again.train(5).now())


def test_a_journal_of_channels_last_weights_and_buffers(tmp_path):
    torch.backends.cudnn.deterministic = True
    run = Run(tmp_path, make=conv, journal=20).train(9)
    run.opt.ckpt.shutdown()
    again = Run(tmp_path, make=conv, seed=7, journal=20)
    assert fxckpt.load(optimizer=again.opt).step == 9
    same(run.now(), again.now())


def test_slow_steps_and_slow_copies_of_gradients_keep_their_order(tmp_path):
    """Gradients wait for the copy engine while the allocator looks for memory."""
    run = Run(tmp_path, max_async=3, journal=20)
    for _ in range(12):
        torch.cuda._sleep(20_000_000)
        run.train(1)
    assert len(run.check_journal()) >= 10 and durable_steps(tmp_path) == [*range(1, 13)]


def test_a_training_loop_with_a_journal_never_waits_for_the_device(tmp_path):
    run = Run(tmp_path, max_async=3, journal=20).train(3, keep=False)
    run.train_without_waiting(4)
    assert run.opt.ckpt.statistics()["last_committed_step"] == 7 and run.opt.ckpt.statistics()["records_committed"] >= 4


def test_weights_in_host_memory_are_those_of_a_step_that_the_device_makes_again(tmp_path):
    run = Run(tmp_path, journal=20).train(8)
    run.opt.ckpt.shutdown()
    model = Run.mlp()
    assert fxckpt.load(tmp_path, model=model).step == 8
    same(dict(model.state_dict()), {name: run.states[8][name] for name in model.state_dict()})


def test_compiled_updates_are_refused(tmp_path):
    with pytest.raises(SetupError, match="inductor"):
        Run(tmp_path, flags={}, update="inductor").train(2)


def test_a_device_that_is_not_there_is_named_by_the_driver():
    from fxckpt.engine import Engine

    engine = Engine(staging_bytes=64 << 20)
    with pytest.raises(SetupError, match=r"cuDeviceGet.*CUDA_ERROR_INVALID_DEVICE"):
        engine.open_device(63)
    engine.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    ],
    ids=["one-connection", "expandable", "uncached"],
)
def test_settings_of_the_driver_and_of_the_allocator(tmp_path, settings):
    script = (
        f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); from pathlib import Path\n"
        f"from gpu_run import Run; Run(Path({str(tmp_path / 'store')!r})).train(8).check(least=8)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | settings, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
