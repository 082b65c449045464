"""benchmarks/gpu.py keeps what it measured, whatever ends it: it may have a device for ten minutes only."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
from repository import ROOT


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks/gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "benchmarks"))


def test_each_part_is_in_the_file_as_soon_as_it_ends_and_an_exception_loses_its_own(tmp_path, gpu):
    path = tmp_path / "gpu.json"
    report = gpu.Report(path, numbers := {"models": {}})
    report.part(numbers, "one", lambda: 1)
    report.part(numbers, "two", lambda: 1 / 0)
    assert json.loads(path.read_text()) == {"models": {}, "one": 1, "two": {"failed": "ZeroDivisionError: division by zero"}}
    with pytest.raises(KeyboardInterrupt):
        report.part(numbers, "three", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert json.loads(path.read_text())["one"] == 1


def test_what_is_worth_most_comes_first(gpu, monkeypatch, tmp_path):
    """The ratio at every step of the first model, then the bits, then the other models; contestants come last."""
    ran = []
    monkeypatch.setattr(gpu, "run_cases", lambda name, device, folder, todo, key, report, end: ran.append((name, key)))
    monkeypatch.setattr(gpu, "kill_and_resume", lambda *_: ran.append("resume") or {"same": True})
    monkeypatch.setattr(gpu, "rates_and_picture", lambda *_: ran.append("rates"))
    args = type("Args", (), {"minutes": 1, "models": ["124M", "350M"], "rehearse": True})
    gpu.everything(args, gpu.torch.device("cpu"), tmp_path, gpu.Report(None, {"models": {}}))
    assert ran == [("124M", "cases"), "resume", "resume", "rates", ("350M", "cases"), ("124M", "more"), ("350M", "more")]
    assert list(gpu.cases()) == ["none", "fxckpt every=1 thread", "none again"]


@pytest.mark.parametrize("journal", [1, 4])
def test_a_case_has_its_figures_and_gives_the_optimizer_back(gpu, tmp_path, journal):
    training = gpu.Training("tiny", gpu.torch.device("cpu"))
    found = gpu.with_fxckpt(training, tmp_path, 0.0, 1, "thread", journal)
    assert found["checkpoints_failed"] == 0 and (found["records_committed"] > 0) == (journal > 1)
    assert found["steps"] > 3 and type(training.opt) is gpu.torch.optim.AdamW and not hasattr(training.opt, "ckpt")
