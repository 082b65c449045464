"""``python -m fxckpt``: each command on good, damaged and live stores, its JSON and its exit status."""

from __future__ import annotations

import io as text_io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from digests import differences, digest, snapshot
from repository import ROOT
from safetensors.torch import load_file
from small_models import mlp
from small_training import Training
from storing import all_verify, overlay, start

import fxckpt
from fxckpt.cli import COMMANDS, common, main
from fxckpt.cli.bench import interval
from fxckpt.cli.diff import Change, _compare
from fxckpt.errors import NoCheckpoint
from fxckpt.store.dtypes import DTYPES, raw_tensor
from fxckpt.store.reader import Reader, checkpoints


@pytest.fixture
def store(root):
    """Steps 10 (kept for good), 11 and 12, and step 12 as "mine"; closed."""
    trainer = start(root, keep=2, keep_every=10, keep_best="loss")
    for step in range(8, 13):
        trainer.save(step, loss=20.0 - step)
    trainer.save(12, name="mine")
    trainer.close()
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A real store of three steps, and what was trained."""
    directory = tmp_path_factory.mktemp("trained") / "d"
    training = Training(directory, keep=5).train(3)
    training.opt.ckpt.save("mine")
    return directory, training.end()


def run(capsys, *words) -> tuple[int, dict]:
    """Exit status of a command with ``--json``, and what it printed."""
    status = main([str(word) for word in (*words, "--json")])
    return status, json.loads(capsys.readouterr().out)


def text(capsys, *words) -> tuple[int, str]:
    status = main([str(word) for word in words])
    return status, capsys.readouterr().out


def flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


def tree(path: Path) -> dict[str, bytes]:
    """All files below ``path`` with their content, and all directories.

    Not the lock's content: to close any descriptor of it would end the lock of a trainer in this process.
    """
    return {str(each.relative_to(path)): each.read_bytes() if each.is_file() and each.name != "lock" else b""
            for each in path.rglob("*")}  # fmt: skip


# ---- ls, inspect, verify ----


def test_ls_lists_every_checkpoint_with_why_it_is_kept_and_what_was_noted(capsys, store):
    status, found = run(capsys, "ls", store)
    assert status == 0
    assert [(row["step"], row["kept"], row["name"], row["best"]) for row in found["checkpoints"]] == [
        (10, "steps", None, False),
        (11, None, None, False),
        (12, None, None, True),
        (12, "named", "mine", False),
    ]
    assert found["checkpoints"][1]["metrics"] == {"loss": 9.0}
    status, shown = text(capsys, "ls", store)
    assert status == 0 and len(shown.splitlines()) == 5 and "loss=9" in shown and "step-000000012" in shown


def test_a_damaged_record_is_listed_and_is_exit_status_3(capsys, store):
    (store / "step-000000011" / "commit.json").write_bytes(b"{}")
    status, found = run(capsys, "ls", store)
    assert status == 3 and "SHA-256" in found["checkpoints"][1]["damaged"] and found["checkpoints"][1]["step"] == 11
    assert "damaged: step-000000011: its SHA-256" in text(capsys, "ls", store)[1]


def test_an_empty_store_is_no_error(capsys, root):
    start(root).close()
    assert text(capsys, "ls", root) == (0, "no checkpoints\n") == text(capsys, "verify", root)


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"doctor", "bench", "import"}))
def test_what_is_not_there_or_no_store_is_exit_status_4_and_nothing_is_made(command, capsys, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("mine")
    rest = {"diff": ["1", "2"], "export": [tmp_path / "out", "--format", "torch"], "plot": ["-o", tmp_path / "run.svg"]}.get(
        command, []
    )
    for place in ("nothing", "other"):
        status, found = run(capsys, command, tmp_path / place, *rest)
        assert status == 4 and found["error"]["type"] == "NotAStore"
    assert set(tree(tmp_path)) == {"other", "other/notes"}


@pytest.mark.parametrize(("which", "path"), [
    ([], "named/mine"), (["latest"], "named/mine"), (["11"], "step-000000011"), (["12"], "step-000000012"),
    (["mine"], "named/mine"), (["named/mine"], "named/mine"), (["step-000000010"], "step-000000010"),
])  # fmt: skip
def test_a_checkpoint_is_chosen_by_step_by_name_or_by_its_directory(which, path, capsys, store):
    status, found = run(capsys, "inspect", store, *which)
    assert status == 0 and found["path"] == str(store / path)
    assert run(capsys, "inspect", store / path) == (0, found)


def test_of_two_checkpoints_of_a_step_the_newer_one_is_meant(capsys, root):
    trainer = start(root, keep=5)
    for step in (1, 2):
        trainer.save(step)
    trainer.store.mark_loaded(1)
    trainer.save(2)
    trainer.close()
    assert run(capsys, "inspect", root, "2")[1]["generation"] == 3
    assert run(capsys, "inspect", root, "step-000000002")[1]["generation"] == 2


def test_a_checkpoint_that_is_not_there_is_exit_status_4_and_says_what_is(capsys, store):
    status, found = run(capsys, "inspect", store, "99")
    assert status == 4 and "there is: mine, 12, 11, 10" in found["error"]["message"]


def test_inspect_shows_what_the_record_says(capsys, trained):
    directory, training = trained
    status, found = run(capsys, "inspect", directory, "3")
    assert status == 0 and (found["step"], found["updates"], found["extra"]) == (3, 3, ["data", "s"])
    assert found["optimizers"][0]["class"] == "AdamW" and found["optimizers"][0]["groups"][0]["parameters"] == 4
    assert found["optimizers"][0]["groups"][0]["settings"]["weight_decay"] == 0.01
    assert sum(layer["parameters"] for layer in found["layers"]) == sum(p.numel() for p in training.model.parameters())
    shown = text(capsys, "inspect", directory, "3", "--tensors")[1]
    assert "exp_avg/3.weight" in shown and "4×16" in shown and "AdamW: 4 tensors" in shown


def test_verify_names_the_file_the_layer_and_the_offset(capsys, store):
    flip(store / "step-000000011" / "optimizer.safetensors", 9000)
    (store / "step-000000012" / "commit.json").write_bytes(b"{}")
    status, found = run(capsys, "verify", store)
    assert status == 3
    assert {Path(each["path"]).name: each["verdict"] for each in found["checkpoints"]} == {
        "step-000000010": "good",
        "step-000000011": "damaged",
        "step-000000012": "damaged",
        "mine": "good",
    }
    bad = next(each for each in found["checkpoints"] if each["path"].endswith("11"))
    assert (bad["file"], bad["offset"], bad["layer"]) == ("optimizer.safetensors", 8192, "a, b")
    assert [main(["verify", str(store), which]) for which in ("10", "mine", "11", "12")] == [0, 0, 3, 3]
    assert main(["verify", str(store / "step-000000011")]) == 3


# ---- diff ----


def test_diff_says_which_layers_changed_and_by_how_much(capsys, store):
    status, found = run(capsys, "diff", store, "10", "12")
    assert status == 0 and [row["name"] for row in found["rows"]] == ["a", "b"]
    for row in found["rows"]:  # every element of step N's tensors is N
        for part in (row["parameters"], row["state"]):
            assert (part["elements"], part["changed"], part["largest"]) == (2000, 2000, 2.0)
            assert part["relative"] == pytest.approx(0.2)
    status, shown = text(capsys, "diff", store, "12", "mine")
    assert status == 0 and "no difference" in shown
    assert {row["name"] for row in run(capsys, "diff", store, "10", "12", "--tensors")[1]["rows"]} == {
        "a.weight",
        "b.weight",
        "exp_avg/a.weight",
        "exp_avg/b.weight",
    }


def test_diff_finds_the_one_layer_that_changed(capsys, tmp_path):
    training = Training(tmp_path / "d", optimizer=lambda params, lr: torch.optim.SGD(params, lr=lr))
    training.model[0].requires_grad_(False)
    training.train(2).end()
    rows = {row["name"]: row["parameters"] for row in run(capsys, "diff", tmp_path / "d", "1", "2")[1]["rows"]}
    assert rows["0"]["changed"] == 0 and rows["0"]["relative"] == 0 and rows["3"]["changed"] > 0
    before, after = training.reference[1]["3.weight"].double(), training.reference[2]["3.weight"].double()
    tensors = {row["name"]: row["parameters"] for row in run(capsys, "diff", tmp_path / "d", "1", "2", "--tensors")[1]["rows"]}
    assert tensors["3.weight"]["relative"] == pytest.approx(((after - before).norm() / before.norm()).item())
    assert tensors["3.weight"]["largest"] == pytest.approx((after - before).abs().max().item())


def test_diff_lists_what_is_in_one_only(capsys, root):
    first = start(root, keep=5, items=100)
    first.save(1)
    first.close()
    second = start(root, keep=5, items=200)
    second.save(2)
    second.close()
    rows = run(capsys, "diff", root, "1", "2")[1]["rows"]
    assert {row["name"] for row in rows} == {"a.weight", "b.weight", "exp_avg/a.weight", "exp_avg/b.weight"}
    assert all("other shape" in row["only_in"] for row in rows)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_diff_counts_and_measures_every_type(dtype):
    kind = getattr(torch, DTYPES[dtype].torch)
    a = torch.tensor([0, 1, 1, 1]).to(kind)
    b = torch.tensor([1, 1, 1, 1]).to(kind) if dtype in ("BOOL", "F8_E8M0") else torch.tensor([0, 1, 4, 1]).to(kind)
    raw = (bytes(raw_tensor(t).data) if dtype != "C64" else t.numpy().tobytes() for t in (a, b))
    found = _compare(*raw, dtype)
    wide = torch.complex128 if dtype == "C64" else torch.float64
    away = (b.to(wide) - a.to(wide)).abs()
    assert (found.elements, found.changed, found.largest) == (4, int((a.to(wide) != b.to(wide)).sum()), away.max().item())
    assert found.relative == pytest.approx((away.norm() / a.to(wide).norm()).item())


def test_diff_sees_bits_where_values_say_nothing():
    a, b = np.array([0.0, np.nan, np.inf], np.float32), np.array([-0.0, np.nan, np.inf], np.float32)
    assert _compare(a.tobytes(), b.tobytes(), "F32").changed == 1
    assert Change().relative == 0.0 and Change(1, 1, 0.0, 4.0, 2.0).relative == float("inf")


# ---- export ----


def test_an_exported_torch_file_loads_into_the_model_and_the_optimizer(capsys, trained, tmp_path):
    directory, training = trained
    status, found = run(capsys, "export", directory, tmp_path / "x.pt", "--format", "torch", "--optimizer", "--which", "2")
    assert status == 0 and found["step"] == 2
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    model = mlp()
    opt = torch.optim.AdamW(model.parameters(), lr=9.0)
    model.load_state_dict(loaded["model"])
    opt.load_state_dict(loaded["optimizer"])
    assert loaded["step"] == 2 and differences(snapshot(model, opt), training.reference[2]) == []
    assert opt.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.9**2), "the scheduler had stepped"


class Tied(torch.nn.Module):
    """Tied weights, buffers, a weight that is not row-major, and state of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.norm, self.a, self.b = torch.nn.BatchNorm2d(3), torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.seen = 0

    def get_extra_state(self) -> int:
        return self.seen

    def set_extra_state(self, state: int) -> None:
        self.seen = state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.b(self.a(self.norm(self.conv(x)).mean((2, 3))))


def two_optimizers(model: Tied) -> list[torch.optim.Optimizer]:
    first = torch.optim.SGD(model.conv.parameters(), lr=0.1, momentum=0.9)
    rest = [p for name, p in model.named_parameters() if not name.startswith("conv.")]
    return [first, torch.optim.Adam(rest, lr=0.01)]


def test_an_export_has_ties_buffers_module_state_and_every_optimizer(capsys, tmp_path):
    model = Tied()
    optimizers = fxckpt.compile_step(two_optimizers(model), tmp_path / "d", model=model, every=1, update="native")
    for _ in range(2):
        model(torch.randn(4, 2, 6, 6)).square().mean().backward()
        for opt in optimizers:
            opt.step()
            opt.zero_grad()
    optimizers[0].ckpt.shutdown()
    assert run(capsys, "export", tmp_path / "d", tmp_path / "x", "--format", "torch", "--optimizer")[0] == 0
    loaded, again = torch.load(tmp_path / "x", weights_only=True), Tied()
    others = two_optimizers(again)
    again.load_state_dict(loaded["model"])
    for opt, state in zip(others, loaded["optimizer"], strict=True):
        opt.load_state_dict(state)
    assert again.seen == 2 and again.b.weight is again.a.weight
    assert digest(again) == digest(model)
    for opt, other in zip(optimizers, others, strict=True):
        assert digest(other.state_dict()["state"]) == digest(opt.state_dict()["state"])
        assert other.param_groups[0]["lr"] == opt.param_groups[0]["lr"]


def test_an_exported_model_alone_is_its_state_dict(capsys, trained, tmp_path):
    directory, training = trained
    assert run(capsys, "export", directory, tmp_path / "x.pt", "--format", "torch")[0] == 0
    model = mlp()
    model.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True))
    assert differences(snapshot(model), training.model.state_dict()) == []


@pytest.mark.parametrize("shard", ["1GB", "600"])
def test_exported_safetensors_have_an_index_that_finds_every_tensor(shard, capsys, trained, tmp_path):
    directory, training = trained
    assert run(capsys, "export", directory, tmp_path / "hf", "--format", "safetensors", "--shard", shard)[0] == 0
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) == (1 if shard == "1GB" else 2)
    held = {name: load_file(tmp_path / "hf" / file)[name] for name, file in index["weight_map"].items()}
    assert differences(held, training.model.state_dict()) == []
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in held.values())
    assert sum(len(load_file(tmp_path / "hf" / file)) for file in files) == len(held)


def test_an_exported_dcp_directory_loads_with_torch(capsys, trained, tmp_path):
    directory, training = trained
    assert run(capsys, "export", directory, tmp_path / "dcp", "--format", "dcp", "--optimizer", "--which", "mine")[0] == 0
    model = mlp()
    state = {"model": model.state_dict(), "optimizer": {"state": {"0.weight": {"exp_avg": torch.zeros(16, 8)}}}}
    dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert differences(state["model"], training.model.state_dict()) == []
    assert torch.equal(state["optimizer"]["state"]["0.weight"]["exp_avg"], training.reference[3]["exp_avg/0.weight"])


@pytest.mark.parametrize("format", ["torch", "safetensors", "dcp"])
def test_an_export_of_a_damaged_checkpoint_is_exit_status_3_and_leaves_nothing(format, capsys, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "d")
    flip(tmp_path / "d" / "step-000000003" / "model.safetensors", 4000)
    status, found = run(capsys, "export", tmp_path / "d", tmp_path / "out", "--format", format, "--which", "3")
    assert status == 3 and "model.safetensors" in found["error"]["path"]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_an_export_overwrites_nothing(capsys, trained, tmp_path):
    (tmp_path / "x").write_text("mine")
    assert run(capsys, "export", trained[0], tmp_path / "x", "--format", "torch")[0] == 2
    assert (tmp_path / "x").read_text() == "mine"


@pytest.mark.parametrize("format", ["torch", "safetensors", "dcp"])
def test_an_export_that_cannot_be_written_says_so_and_leaves_nothing(format, capsys, trained, tmp_path):
    status, found = run(capsys, "export", trained[0], tmp_path / "no" / "x", "--format", format)
    assert status == 2 and "not a directory" in found["error"]["message"] and list(tmp_path.iterdir()) == []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        status, found = run(capsys, "export", trained[0], tmp_path / "x", "--format", format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 1 and found["error"]["type"] in ("SaveFailed", "OSError") and list(tmp_path.iterdir()) == []


# ---- prune ----


def test_prune_keeps_the_newest_those_kept_for_good_the_best_and_named_saves(capsys, root):
    trainer = start(root, keep=6, keep_every=10, keep_best="loss")
    for step in range(8, 15):
        trainer.save(step, loss=abs(step - 11))
    trainer.save(9, name="mine")
    trainer.close()
    before = tree(root)
    status, planned = run(capsys, "prune", root, "--keep", "1", "--dry-run")
    assert status == 0 and tree(root) == before
    status, done = run(capsys, "prune", root, "--keep", "1")
    assert status == 0 and done["removed"] == planned["removed"] and done["verified"] == 1
    assert [(each.step, each.name) for each in checkpoints(root)] == [(10, None), (11, None), (14, None), (9, "mine")]
    assert not list(root.glob("*.partial"))
    all_verify(root)
    assert run(capsys, "prune", root, "--keep", "1")[1]["removed"] == []
    run(capsys, "prune", root, "--keep", "1", "--keep-best", "none", "--lasting")
    assert [each.step for each in checkpoints(root)] == [14, 9]
    again = start(root, keep=2)
    again.save(15)
    again.close()


def test_prune_relies_only_on_what_it_has_verified(capsys, root):
    trainer = start(root, keep=9)
    for step in range(1, 6):
        trainer.save(step)
    trainer.close()
    flip(root / "step-000000005" / "model.safetensors", 9000)
    flip(root / "step-000000003" / "model.safetensors", 9000)
    status, done = run(capsys, "prune", root, "--keep", "2")
    assert status == 0 and [each.step for each in checkpoints(root)] == [2, 4]
    assert {(Path(row["path"]).name, row["why"]) for row in done["removed"] if row["why"] != "waiting slot"} == {
        ("step-000000005", "damaged"),
        ("step-000000003", "damaged"),
        ("step-000000001", "older"),
    }


def test_prune_removes_nothing_when_nothing_verifies(capsys, store):
    for path in store.glob("step-*/model.safetensors"):
        flip(path, 9000)
    before = tree(store)
    status, found = run(capsys, "prune", store, "--keep", "1")
    assert status == 3 and "none is removed" in found["error"]["message"] and tree(store) == before


def test_prune_of_a_store_that_is_written_to_is_exit_status_5_and_changes_nothing(capsys, root):
    trainer = start(root, keep=5)
    for step in (1, 2, 3):
        trainer.save(step)
    before = tree(root)
    done = subprocess.run([sys.executable, "-m", "fxckpt", "prune", root, "--keep", "1"], capture_output=True, text=True)
    assert done.returncode == 5 and str(os.getpid()) in done.stderr and tree(root) == before
    assert main(["prune", str(root), "--keep", "1", "--dry-run"]) == 0 and tree(root) == before
    trainer.save(4)  # the lock is still ours
    trainer.close()


def test_prune_says_what_it_could_not_remove(capsys, store, monkeypatch):
    overlay(monkeypatch, store)
    status, found = run(capsys, "prune", store, "--keep", "1")
    assert status == 1 and found["left"] == [str(store / "step-000000011")] and (store / "step-000000011").exists()
    assert all("slot-" in each["path"] for each in found["removed"])


def test_prune_removes_bad_directories_when_asked_to(capsys, store):
    (store / "slot-7.bad").mkdir()
    run(capsys, "prune", store)
    assert (store / "slot-7.bad").is_dir()
    run(capsys, "prune", store, "--bad")
    assert not (store / "slot-7.bad").exists()


# ---- bench, doctor ----


def test_bench_measures_and_leaves_nothing(capsys, tmp_path):
    words = ["--size", "8MiB", "--seconds", "0", "--chunk", "1MiB", "--parameters", "1M", "--step", "0.1"]
    status, found = run(capsys, "bench", tmp_path, *words)
    assert status == 0 and list(tmp_path.iterdir()) == []
    disk = found["disk"]
    for name in ("write_new", "overwrite", "read"):
        assert disk[f"{name}_bytes_per_second"] > 0
    assert disk["overwrites"] >= 3 and found["interval"]["state_bytes"] == 12_000_000
    assert "in place" in text(capsys, "bench", tmp_path, *words)[1]


def test_the_interval_is_as_short_as_the_disk_can_keep_up_with():
    disk = {"overwrite_bytes_per_second": 1e9, "read_bytes_per_second": 2e9, "commit_seconds": 0.0}
    found = interval(disk, 84 * 10**9, 10.0)
    assert (found["every"], found["write_seconds"], found["restore_seconds"]) == (9, 84.0, 42.0)
    assert found["bytes_per_day"] == pytest.approx(84e9 * 86400 / 90)
    assert interval(disk, 10**6, 10.0)["every"] == 1 and interval(disk, 10**6, 10.0)["bytes_per_day_auto"] == 1e6 * 1440


@pytest.mark.parametrize("words", [["--step", "1"], ["--state", "1GB"], ["--size", "1kB"], ["--size", "9999TB"]])
def test_bench_refuses_what_cannot_be_measured(words, capsys, tmp_path):
    status, found = run(capsys, "bench", tmp_path, *words)
    assert status == 2 and found["error"]["type"] == "SetupError" and list(tmp_path.iterdir()) == []


def test_doctor_reports_everything_and_who_writes_and_leaves_nothing(capsys, root):
    trainer = start(root)
    trainer.save(1)
    before = tree(root)
    status, found = run(capsys, "doctor", root)
    seen = {each["what"]: each for each in found["findings"]}
    assert status == 0 and tree(root) == before
    assert {"torch", "engine", "CUDA", "space", "O_DIRECT", "write leases", "store"} <= set(seen)
    assert seen["torch"]["detail"] == torch.__version__ and "CRC-32C by" in seen["engine"]["detail"]
    assert f"1 checkpoints; process {os.getpid()} writes to it" in seen["store"]["detail"]
    outside = subprocess.run([sys.executable, "-m", "fxckpt", "doctor", root], capture_output=True, text=True)
    assert f"process {os.getpid()} writes to it" in outside.stdout
    trainer.save(2)  # to ask did not cost the lock
    trainer.close()
    assert "nobody writes" in text(capsys, "doctor", root)[1]


def test_doctor_says_what_is_wrong_and_is_exit_status_1(capsys, tmp_path):
    for name in ("notes", "lock"):
        (tmp_path / name).write_text("mine")
    status, found = run(capsys, "doctor", tmp_path)
    assert status == 1 and [each["what"] for each in found["findings"] if each["verdict"] == "wrong"] == ["store"]


# ---- on a live store ----


def test_every_command_is_safe_while_a_trainer_writes(root, tmp_path, capsys):
    trainer = start(root, keep=3, max_async=1)
    for step in range(1, 4):
        trainer.save(step)
    stop, failed = threading.Event(), []

    def train() -> None:
        step = 4
        try:
            while not stop.is_set():
                trainer.save(step)
                step += 1
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    statuses, first = [], trainer.store
    try:
        for i in range(5):
            newest = checkpoints(root)[-1].step
            commands = (["ls", root], ["verify", root], ["inspect", root], ["prune", root, "--dry-run"], ["doctor", root],
                        ["watch", root, "--once"],
                        ["diff", root, "latest", "latest"],
                        ["export", root, tmp_path / f"{i}", "--format", "safetensors"])  # fmt: skip
            statuses += [(words[0], main([str(word) for word in words])) for words in commands]
            assert checkpoints(root)[-1].step >= newest
    finally:
        stop.set()
        thread.join()
    capsys.readouterr()
    assert failed == [] and first is trainer.store
    assert {(name, status) for name, status in statuses if name in ("ls", "verify", "doctor", "watch")} == {
        ("ls", 0),
        ("watch", 0),
        ("verify", 0),
        ("doctor", 0),
    }
    assert {status for _, status in statuses} <= {0, common.NOTHING}, "at worst it was taken back before it was read"
    exported = [load_file(path) for path in tmp_path.glob("*/model-*.safetensors")]
    assert exported
    for held in exported:
        assert len({held[key].unique().item() for key in held}) == 1, "of one step"
    assert all_verify(root)
    trainer.close()


def test_a_held_checkpoint_does_not_change_while_its_slot_is_used_again(root):
    trainer = start(root, keep=1, max_async=1)
    reader = Reader(trainer.save(1))
    with reader.held():
        for step in range(2, 8):
            trainer.save(step)
        assert not (root / "step-000000001").exists()
        reader.verify()
        a = np.zeros(2000, np.float32)
        reader.read_into({("model.safetensors", "a.weight"): (a.ctypes.data, None, None)})
        assert (a == 1).all() and (reader.state_tensors()["rng"] == 1).all()
    with pytest.raises(NoCheckpoint):
        reader.verify()
    with pytest.raises(NoCheckpoint), reader.held():
        pass
    trainer.close()


# ---- the command line itself ----


def command(*words, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "fxckpt", *map(str, words)], capture_output=True, text=True, **options)


def test_torch_is_imported_only_where_it_is_needed(store):
    code = ("import sys; from fxckpt.cli import main\n"
            "print([main(line.split('|')) for line in sys.argv[1:]], 'torch' in sys.modules, file=sys.stderr)")  # fmt: skip
    commands = (["ls", store], ["inspect", store], ["verify", store], ["diff", store, "10", "12"], ["doctor", store],
                ["bench", store, "--size", "8MiB", "--seconds", "0"], ["prune", store, "--dry-run"],
                ["export", store, store / "out", "--format", "safetensors"], ["watch", store, "--once"],
                ["import", store / "out", store / "again"])  # fmt: skip
    lines = ["|".join(map(str, words)) for words in commands]
    done = subprocess.run([sys.executable, "-c", code, *lines], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1:] == [f"{[0] * len(commands)} False"], done.stderr


def test_errors_go_to_standard_error_and_json_has_them_too(store):
    done = command("inspect", store, "99")
    assert (done.returncode, done.stdout) == (4, "") and done.stderr.startswith("fxckpt: ") and "Traceback" not in done.stderr
    assert command("export", store, "x").returncode == 2  # argparse: --format is missing


def test_a_reader_that_has_seen_enough_is_no_error(store):
    words = [sys.executable, "-m", "fxckpt", "inspect", store, "--tensors"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


class Screen(text_io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal_and_nowhere_else(monkeypatch, store, capsys):
    main(["verify", str(store)])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    main(["verify", str(store)])
    assert re.search(r"step-000000010 \[#+ *\] +\d+%", screen.getvalue()) and screen.getvalue().endswith("\r\x1b[K")


@pytest.mark.parametrize(("written", "meant"), [("350MB", 350_000_000), ("4GiB", 4 << 30), ("7B", 7 * 10**9), ("1.5k", 1500),
                                                ("12", 12), ("2 TB", 2 * 10**12)])  # fmt: skip
def test_amounts_are_written_as_people_do(written, meant):
    assert common.amount(written) == meant


def test_the_manual_has_every_command_and_exit_status():
    manual = (ROOT / "docs" / "cli.md").read_text()
    for name in COMMANDS:
        assert f"## `{name}`" in manual and f"$ fxckpt {name} " in manual
    statuses = {common.OK: "done", common.FAILED: "failed", common.USAGE: "usage", common.CORRUPT: "verify",
                common.NOTHING: "no such", common.IN_USE: "trainer"}  # fmt: skip
    for status, word in statuses.items():
        assert re.search(rf"^\| {status} \|.*{word}", manual, re.MULTILINE), status


def test_the_version_of_the_listing_and_of_the_library_agree(capsys, store):
    rows = run(capsys, "ls", store)[1]["checkpoints"]
    assert [row["generation"] for row in rows] == [each.generation for each in fxckpt.checkpoints(store)]
