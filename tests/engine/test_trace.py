"""The picture of a run: it can be read, its times are the machine's, and copies lie beside the next iteration."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
from small_training import Training
from standin import device, library
from torch.profiler import ProfilerActivity, profile

from fxckpt.errors import SetupError
from fxckpt.saving import tracing

__all__ = ["device", "library"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")


def spans(path) -> dict[str, list[dict]]:
    """The spans of fxckpt in a file, by the name of their track, each with its begin and end in nanoseconds."""
    found = json.loads(path.read_text())
    ours = [e for e in found["traceEvents"] if e.get("cat") == "fxckpt"]
    pid = {e["pid"] for e in ours}
    assert len(pid) == 1
    names = {e["tid"]: e["args"]["name"] for e in found["traceEvents"] if e["name"] == "thread_name" and e["pid"] in pid}
    out: dict[str, list[dict]] = {}
    for event in ours:
        begin = event["ts"] * 1e3 + found["baseTimeNanoseconds"]
        out.setdefault(names[event["tid"]], []).append({**event, "begin": begin, "end": begin + event["dur"] * 1e3})
    return out


def test_copies_writes_and_commits_are_on_tracks_of_their_own(tmp_path):
    before = time.time_ns()
    training = Training(tmp_path / "store", threads=2)
    with training.opt.ckpt.trace(tmp_path / "t.json"):
        training.train(3)
        training.opt.ckpt.flush()
    found = spans(tmp_path / "t.json")
    assert [e["args"]["step"] for e in found["commits"]] == [1, 2, 3]
    assert [e["args"]["step"] for e in found["steps"]] == [1, 2, 3]
    writers = [e for track, events in found.items() if track.startswith("writer") for e in events]
    names = {e["name"] for e in writers}
    assert {"copy 3", "write 3"} <= names or {"copy 0", "write 0"} <= names, names
    assert {e["args"].get("step") for e in writers} == {1, 2, 3}
    everything = [e for events in found.values() for e in events]
    assert all(before - 1e6 <= e["begin"] <= e["end"] <= time.time_ns() + 1e6 for e in everything)
    assert json.loads((tmp_path / "t.json").read_text())["fxckpt"] == {"dropped": 0}


def test_spans_of_a_track_follow_each_other_or_nest(tmp_path):
    """What overlaps otherwise would be drawn wrong."""
    training = Training(tmp_path / "store", staging_mb=8)
    with training.opt.ckpt.trace(tmp_path / "t.json"):
        training.train(6)
        training.opt.ckpt.flush()
    for track, events in spans(tmp_path / "t.json").items():
        open_until: list[float] = []
        for event in sorted(events, key=lambda e: (e["begin"], -e["end"])):
            while open_until and open_until[-1] <= event["begin"] + 1000:
                open_until.pop()
            assert not open_until or event["end"] <= open_until[-1] + 1000, (track, event)  # times have microseconds
            open_until.append(event["end"])


def test_each_layers_copy_runs_beside_the_next_iteration(tmp_path, device):
    training = Training(tmp_path / "store", optimizer=lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True)).train(2)
    training.opt.ckpt.flush()
    with training.opt.ckpt.trace(tmp_path / "t.json"):
        device.fake.hold(True)  # the device is late: no copy runs before opt.step() has returned
        training.train(1)
        device.fake.hold(False)
        training.train(1)
        training.opt.ckpt.flush()
    found = spans(tmp_path / "t.json")
    step = next(e for e in found["steps"] if e["args"]["step"] == 3)
    copies = [e for e in found["copies from cuda:0"] if e["args"]["step"] == 3]
    assert {e["args"]["layer"] for e in copies} == {"0", "3"}
    assert all(e["end"] > step["end"] for e in copies)
    assert all(e["end"] <= c["begin"] for e in copies for c in found["commits"] if c["args"]["step"] == 3)
    assert found["copies issued"] and all(e["args"]["bytes"] > 0 for e in copies)


def test_a_profile_of_torch_is_shown_beside_it_on_the_same_clock(tmp_path):
    training = Training(tmp_path / "store").train(1)
    with training.opt.ckpt.trace(tmp_path / "both.json", beside=tmp_path / "torch.json"):
        with profile() as profiler:
            training.train(2)
        profiler.export_chrome_trace(str(tmp_path / "torch.json"))
        training.opt.ckpt.flush()
    both = json.loads((tmp_path / "both.json").read_text())
    theirs = [e for e in both["traceEvents"] if e.get("cat") == "cpu_op"]
    first, last = min(e["ts"] for e in theirs), max(e["ts"] + e["dur"] for e in theirs)
    steps = [e for e in both["traceEvents"] if e.get("cat") == "fxckpt" and e["name"].startswith("opt.step()")]
    assert len(steps) == 2 and all(first < e["ts"] and e["ts"] < last for e in steps)
    assert {e["pid"] for e in steps}.isdisjoint(e["pid"] for e in theirs)


def test_the_environment_traces_a_whole_run(tmp_path, monkeypatch):
    monkeypatch.setenv("FXCKPT_TRACE", str(tmp_path / "run.json"))
    training = Training(tmp_path / "store").train(2)
    with pytest.raises(SetupError, match="traced already"), training.opt.ckpt.trace(tmp_path / "other.json"):
        pass
    training.end()
    written = list(tmp_path.glob("run*.json"))  # with a number, if this process had runs before
    assert len(written) == 1
    assert [e["args"]["step"] for e in spans(written[0])["commits"]] == [1, 2]


def test_what_does_not_fit_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(tracing, "SPANS", 2)
    training = Training(tmp_path / "store")
    with training.opt.ckpt.trace(tmp_path / "t.json"):
        training.train(4)
        training.opt.ckpt.flush()
    assert sum(map(len, spans(tmp_path / "t.json").values())) == 4  # two of the engine, two of the run
    assert json.loads((tmp_path / "t.json").read_text())["fxckpt"]["dropped"] > 0


def test_a_profile_that_is_none_is_refused(tmp_path):
    (tmp_path / "torch.json").write_text("[]")
    training = Training(tmp_path / "store").train(1)
    tracing = training.opt.ckpt.trace(tmp_path / "t.json", beside=tmp_path / "torch.json")
    with pytest.raises(SetupError, match="no Chrome trace"), tracing:
        pass


@pytest.fixture
def processed():
    """What Perfetto's own trace processor makes of a file. The Python package fetches that program from the network, unless
    ``TRACE_PROCESSOR`` is the path of one."""
    perfetto = pytest.importorskip("perfetto.trace_processor")
    running = []

    def load(path):
        config = perfetto.TraceProcessorConfig(bin_path=os.environ.get("TRACE_PROCESSOR"))
        try:
            running.append(perfetto.TraceProcessor(trace=str(path), config=config))
        except Exception as error:
            if config.bin_path is not None:
                raise
            pytest.skip(f"the trace processor cannot be fetched here: {error}")
        return running[-1]

    yield load
    for processor in running:
        processor.close()


def test_perfetto_shows_each_layers_copy_beside_pytorchs_next_iteration(tmp_path, device, processed):
    training = Training(tmp_path / "store", optimizer=lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True)).train(2)
    training.opt.ckpt.flush()
    with training.opt.ckpt.trace(tmp_path / "both.json", beside=tmp_path / "torch.json"):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            device.fake.hold(True)  # copies end in the next backward
            training.train(1)
            handle = training.model[0].weight.register_hook(lambda _: (device.fake.hold(False), training.opt.ckpt.flush())[0])
            training.train(1)
            handle.remove()
        profiler.export_chrome_trace(str(tmp_path / "torch.json"))
        training.opt.ckpt.flush()
    processor = processed(tmp_path / "both.json")
    assert [
        (row.name, row.value) for row in processor.query("select name, value from stats where severity = 'error' and value > 0")
    ] == []
    slices = list(
        processor.query(
            "select s.name, s.ts, s.ts + s.dur as end, s.category, t.name as track, "
            "extract_arg(s.arg_set_id, 'args.layer') as layer, extract_arg(s.arg_set_id, 'args.step') as step "
            "from slice s join thread_track tt on s.track_id = tt.id join thread t using (utid)"
        )
    )
    ours = [row for row in slices if row.category == "fxckpt"]
    assert {"steps", "commits", "copies issued", "copies from cuda:0"} <= {row.track for row in ours}
    (before,) = (row for row in ours if row.track == "steps" and row.step == 3)
    (after,) = (row for row in ours if row.track == "steps" and row.step == 4)
    forward = [row for row in slices if row.name == "aten::addmm" and before.end <= row.ts and row.end <= after.ts]
    copies = [row for row in ours if row.track == "copies from cuda:0" and row.step == 3]
    assert {row.layer for row in copies} == {"0", "3"} and forward
    assert all(copy.ts < row.ts and row.end < copy.end <= after.ts for copy in copies[:1] for row in forward)
    assert all(row.end <= commit.ts for row in copies for commit in ours if commit.track == "commits" and commit.step == 3)
