"""``fxckpt import``: every format's bits, what comes along and what does not, and that nothing in a source is ever run."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from digests import differences
from safetensors.torch import save_file
from small_models import mlp
from storing import fast_directory, start
from torch import nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

import fxckpt
from fxckpt.cli import main
from fxckpt.importing import writing
from fxckpt.store import about
from fxckpt.store.reader import Reader
from fxckpt.store.slots import Store

State = dict[str, torch.Tensor]


@pytest.fixture
def place(tmp_path):
    with fast_directory(tmp_path) as directory:
        yield directory


class Odd(nn.Module):
    """Tied weights, buffers of whole numbers, other types of elements, a weight that is not row-major, state of its own."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.norm, self.a, self.b = nn.BatchNorm2d(3), nn.Linear(3, 3), nn.Linear(3, 3)
        if tied:
            self.b.weight = self.a.weight
        self.small = nn.Parameter(torch.randn(5).bfloat16())
        self.turn = nn.Parameter(torch.randn(2, 2, dtype=torch.complex64))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.register_buffer("count", torch.tensor(7))


def with_dcp(state: object, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=path, no_dist=True)
    return path


def torch_file(state: State, place: Path) -> Path:
    torch.save(state, place / "x.pt")
    return place / "x.pt"


def old_torch_file(state: State, place: Path) -> Path:
    torch.save(state, place / "x.pt", _use_new_zipfile_serialization=False)
    return place / "x.pt"


def lightning(state: State, place: Path) -> Path:
    torch.save({"state_dict": state, "pytorch-lightning_version": "2"}, place / "x.ckpt")
    return place / "x.ckpt"


def safetensors_file(state: State, place: Path) -> Path:
    save_file({name: value.clone().contiguous() for name, value in state.items()}, place / "x.safetensors")
    return place / "x.safetensors"


def folder(state: State, place: Path, kind: str, shards: int) -> Path:
    """As ``save_pretrained`` writes one."""
    (place / "hf").mkdir()
    name, end = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    parts = [dict(list(state.items())[at::shards]) for at in range(shards)]
    files = [f"{name}.{end}" if shards == 1 else f"{name}-{at + 1:05}-of-{shards:05}.{end}" for at in range(shards)]
    for part, file in zip(parts, files):
        held = {key: value.clone().contiguous() for key, value in part.items()}
        save_file(held, place / "hf" / file) if end == "safetensors" else torch.save(held, place / "hf" / file)
    if shards > 1:
        where = {key: file for part, file in zip(parts, files) for key in part}
        (place / "hf" / f"{name}.{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (place / "hf" / "config.json").write_text('{"model_type": "odd"}')
    return place / "hf"


FORMATS: dict[str, Callable[[State, Path], Path]] = {
    "torch": torch_file, "old torch": old_torch_file, "lightning": lightning, "safetensors": safetensors_file,
    "hf": lambda state, place: folder(state, place, "safetensors", 1),
    "hf in shards": lambda state, place: folder(state, place, "safetensors", 3),
    "hf bin": lambda state, place: folder(state, place, "bin", 1),
    "hf bin in shards": lambda state, place: folder(state, place, "bin", 2),
    "dcp": lambda state, place: with_dcp(state, place / "dcp"),
    "dcp of a dict": lambda state, place: with_dcp({"model": state}, place / "dcp"),
}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_imported_loads_with_the_same_bits_whatever_format_it_came_in(format, place):
    model, again, untied = Odd(), Odd(), Odd(tied=False)
    done = fxckpt.import_checkpoint(FORMATS[format](model.state_dict(), place), place / "store")
    Reader(done.path).verify()
    assert done.path.name == "step-000000000" and set(done.left_out) <= {"pytorch-lightning_version"}
    for other in (again, untied):  # a tie comes under both of its names, and may have been two tensors
        found = fxckpt.load(place / "store", model=other)
        assert differences(other.state_dict(), model.state_dict()) == [] and found.imported == str(done.source)
    assert again.b.weight is again.a.weight


def test_a_tied_model_refuses_two_tensors_that_differ(place):
    fxckpt.import_checkpoint(torch_file(Odd(tied=False).state_dict(), place), place / "store")
    with pytest.raises(fxckpt.LayoutMismatch, match=r"b\.weight: only in the checkpoint"):
        fxckpt.load(place / "store", model=Odd())


def test_a_tie_that_is_stored_under_its_other_name_goes_to_the_one_tensor(place):
    model, again = Odd(), Odd()
    state = model.state_dict()
    del state["a.weight"]
    fxckpt.import_checkpoint(torch_file(state, place), place / "store")
    fxckpt.load(place / "store", model=again)
    assert differences(again.state_dict(), model.state_dict()) == []


def test_extra_state_of_modules_comes_along(place):
    class Counting(nn.Linear):
        seen = 0

        def get_extra_state(self) -> dict[str, int]:
            return {"seen": self.seen}

        def set_extra_state(self, state: dict[str, int]) -> None:
            self.seen = state["seen"]

    model, again = nn.Sequential(Counting(2, 2)), nn.Sequential(Counting(2, 2))
    model[0].seen = 5
    fxckpt.import_checkpoint(torch_file(model.state_dict(), place), place / "store")
    fxckpt.load(place / "store", model=again)
    assert again[0].seen == 5


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_what_wrappers_put_in_front_of_names_is_taken_off(prefix, place):
    model, again = mlp(), mlp()
    state = {prefix + name: value for name, value in model.state_dict().items()}
    fxckpt.import_checkpoint(torch_file(state, place), place / "store")
    fxckpt.load(place / "store", model=again)
    assert differences(again.state_dict(), model.state_dict()) == []


@pytest.mark.parametrize("format", ["torch", "hf", "dcp"])
def test_numbers_are_made_of_the_type_that_is_asked_for_and_of_no_other(format, place):
    half, whole = Odd().bfloat16(), Odd()
    half.turn.data = whole.turn.data.clone()
    source = FORMATS[format](half.state_dict(), place)
    fxckpt.import_checkpoint(source, place / "as it is")
    fxckpt.import_checkpoint(source, place / "store", dtype="float32")
    again = Odd()
    again.small.data = again.small.data.float()
    with pytest.raises(fxckpt.LayoutMismatch, match=r"a\.weight: checkpoint BF16\[3, 3\], live F32"):
        fxckpt.load(place / "as it is", model=again)
    fxckpt.load(place / "store", model=again)
    kinds = {name: value.dtype for name, value in again.state_dict().items()}
    assert differences(again.state_dict(), {name: value.to(kinds[name]) for name, value in half.state_dict().items()}) == []
    assert (kinds["count"], kinds["turn"], kinds["small"]) == (torch.int64, torch.complex64, torch.float32)
    with pytest.raises(fxckpt.SetupError, match="expected one of float16"):
        fxckpt.import_checkpoint(source, place / "x", dtype="int8")


def test_a_tensor_that_several_ranks_wrote_is_put_together(place):
    whole = torch.arange(12.0).reshape(4, 3)
    first, second = (with_dcp({"w": part.clone()}, place / f"{at}") for at, part in enumerate(whole.split(2)))
    found, other = (pickle.loads((path / ".metadata").read_bytes()) for path in (first, second))
    info = other.storage_data[MetadataIndex("w", (0, 0))]
    (second / info.relative_path).rename(first / "__1_0.distcp")
    info.relative_path = "__1_0.distcp"
    found.storage_data[MetadataIndex("w", (2, 0))] = info
    chunks = [ChunkStorageMetadata(torch.Size((at, 0)), torch.Size((2, 3))) for at in (0, 2)]
    found.state_dict_metadata["w"].size, found.state_dict_metadata["w"].chunks = torch.Size((4, 3)), chunks
    (first / ".metadata").write_bytes(pickle.dumps(found))
    fxckpt.import_checkpoint(first, place / "store")
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(4, 3))
    fxckpt.load(place / "store", model=model)
    assert torch.equal(model.w.data, whole)


# ---- into a training ----


def batch(seed: int) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, opt: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)  # for dropout
        opt.zero_grad()
        model(batch(seed)).square().sum().backward()
        opt.step()


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    """Decay for matrices only: the numbers of the parameters are in another order than the model's."""
    params = list(model.parameters())
    decay, rest = [p for p in params if p.dim() > 1], [p for p in params if p.dim() <= 1]
    return torch.optim.AdamW([{"params": rest, "weight_decay": 0.0}, {"params": decay}], lr=0.1)


def by_names(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.named_parameters(), lr=0.1)


def run_from(store: Path, make: Callable, **options: object) -> tuple[nn.Module, torch.optim.Optimizer, fxckpt.Restored]:
    """A run that begins with what is in the store."""
    model = mlp()
    opt = make(model)
    opt = fxckpt.compile_step(opt, store, model=model, every=1, update="native", **options)
    return model, opt, fxckpt.load(optimizer=opt)


@pytest.mark.parametrize("make", [two_groups, by_names, lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)])
@pytest.mark.parametrize("how", ["torch", "dcp"])
def test_training_goes_on_from_an_import_with_the_bits_that_torch_has(make, how, place):
    torch.manual_seed(0)
    reference = mlp()
    opt = make(reference)
    train(reference, opt, range(3))
    saved = {"model": copy.deepcopy(reference.state_dict()), "optimizer": copy.deepcopy(opt.state_dict())}
    source = torch_file(saved, place) if how == "torch" else with_dcp(saved, place / "dcp")
    train(reference, opt, range(3, 6))
    done = fxckpt.import_checkpoint(source, place / "store")
    model, ours, found = run_from(place / "store", make)
    assert (done.optimizers, dict(done.left_out), found.step, found.imported) == (1, {}, 0, str(source))
    train(model, ours, range(3, 6))
    ours.ckpt.shutdown()
    assert differences(model.state_dict(), reference.state_dict()) == []
    state, expected = ours.state_dict()["state"], opt.state_dict()["state"]
    assert all(torch.equal(state[i][key], expected[i][key]) for i in expected for key in expected[i])


def test_weights_alone_leave_optimizer_scheduler_and_generators_as_the_script_made_them_and_say_so(place, caplog):
    fxckpt.import_checkpoint(safetensors_file(mlp().state_dict(), place), place / "store")
    model = mlp()
    opt = torch.optim.AdamW(model.parameters(), lr=0.25)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)
    opt = fxckpt.compile_step(opt, place / "store", model=model, update="native", extra={"plan": scheduler})
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    with caplog.at_level(logging.INFO, "fxckpt"):
        found = fxckpt.load(optimizer=opt)
    assert torch.equal(torch.rand(3), expected) and opt.param_groups[0]["lr"] == 0.25
    assert found.step == 0 and found.missing == ("extra/plan",)
    said = next(m for m in caplog.messages if "began from import" in m)
    assert all(word in said for word in ("random generators", "optimizers", "extra/plan", "x.safetensors"))
    opt.ckpt.shutdown()


def test_state_of_another_class_of_optimizer_is_refused_by_name(place):
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, opt, range(1))
    fxckpt.import_checkpoint(torch_file({"model": model.state_dict(), "optimizer": opt.state_dict()}, place), place / "store")
    with pytest.raises(fxckpt.LayoutMismatch, match="dampening, momentum, nesterov, which AdamW has not"):
        run_from(place / "store", by_names)


def test_state_that_belongs_to_parameters_in_another_order_is_refused_by_shape(place):
    model = mlp()
    opt = torch.optim.AdamW(list(model.parameters())[::-1])
    train(model, opt, range(1))
    fxckpt.import_checkpoint(torch_file({"model": model.state_dict(), "optimizer": opt.state_dict()}, place), place / "store")
    with pytest.raises(fxckpt.LayoutMismatch, match=r"0\.weight: the import's exp_avg at this place is F32\[4\]"):
        run_from(place / "store", lambda model: torch.optim.AdamW(model.parameters()))


def test_what_is_not_taken_is_named_with_the_reason(place, capsys):
    model = mlp()
    opt = by_names(model)
    train(model, opt, range(1))
    state = opt.state_dict()
    state["param_groups"][0]["param_names"] = [f"old.{name}" for name in state["param_groups"][0]["param_names"]]
    saved = {"model": {**model.state_dict(), "note": "hi"}, "optimizer": state, "step": 9, "lr_scheduler": {"last_epoch": 1}}
    assert main(["import", str(torch_file(saved, place)), str(place / "store")]) == 0
    shown = capsys.readouterr().out
    assert "not taken: note: of type str" in shown and "not taken: lr_scheduler: of type dict" in shown
    assert "not taken: optimizer: it has state of 'old.0.weight', which the model that was imported has not" in shown
    record = Reader(place / "store" / "step-000000000").record
    assert set(about.imported(record)["left_out"]) == {"note", "lr_scheduler", "optimizer"}
    assert about.imported(record)["step"] == 9 and record.optimizers == []


@pytest.mark.parametrize("group", [{"lr": 0.1}, {"params": None}, {"params": "01"}])
def test_an_optimizer_whose_groups_list_no_parameters_is_not_taken(group, place):
    done = fxckpt.import_checkpoint(with_groups([{"params": []}, group], place), place / "store")
    assert done.left_out == {"optimizer": "optimizer[0] has a parameter group that lists no parameters"}


def test_a_store_says_for_good_that_it_began_from_an_import(place, capsys):
    source = folder(mlp().state_dict(), place, "safetensors", 1)
    fxckpt.import_checkpoint(source, place / "store")
    for _ in range(2):
        model, opt, found = run_from(place / "store", by_names, keep=1)
        assert found.imported == str(source)
        train(model, opt, range(3))
        opt.ckpt.shutdown()
    assert [each.step for each in fxckpt.checkpoints(place / "store")] == [6]
    for command in ("ls", "inspect", "verify"):
        assert main([command, str(place / "store")]) == 0
        assert f"from an import of {source} (Hugging Face)" in capsys.readouterr().out
    assert about.config(Reader(fxckpt.latest(place / "store").path).record) == '{"model_type": "odd"}'


# ---- nothing is run ----


class Evil:
    """Would make a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def evil_folder(place: Path, mark: Path) -> Path:
    (place / "hf").mkdir()
    torch.save({"w": torch.ones(2), "x": Evil(mark)}, place / "hf" / "pytorch_model.bin")
    return place / "hf"


def evil_metadata(place: Path, mark: Path) -> Path:
    path = with_dcp({"w": torch.ones(2)}, place / "dcp")
    (path / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    return path


def evil_file(place: Path, mark: Path, zipped: bool) -> Path:
    torch.save({"model": {"w": torch.ones(2)}, "x": Evil(mark)}, place / "x.pt", _use_new_zipfile_serialization=zipped)
    return place / "x.pt"


EVIL: dict[str, Callable[[Path, Path], Path]] = {
    "torch": lambda place, mark: evil_file(place, mark, True), "old torch": lambda place, mark: evil_file(place, mark, False),
    "hf": evil_folder, "dcp metadata": evil_metadata,
}  # fmt: skip


@pytest.mark.parametrize("source", EVIL)
def test_a_pickle_that_would_run_something_is_refused_and_not_run(source, place):
    path = EVIL[source](place, place / "mark")
    with pytest.raises((fxckpt.SetupError, fxckpt.Corrupt), match="mkdir"):
        fxckpt.import_checkpoint(path, place / "store")
    assert not (place / "mark").exists() and not (place / "store").exists()


def test_a_value_of_dcp_that_would_run_something_is_left_out_and_not_run(place):
    path = with_dcp({"model": {"w": torch.ones(2)}, "x": Evil(place / "mark")}, place / "dcp")
    done = fxckpt.import_checkpoint(path, place / "store")
    assert "is not unpickled" in done.left_out["x"] and not (place / "mark").exists()


def test_metadata_that_leads_out_of_its_directory_is_refused(place):
    path = with_dcp({"w": torch.ones(2)}, place / "dcp")
    found = pickle.loads((path / ".metadata").read_bytes())
    for each in found.storage_data.values():
        each.relative_path = "../" + each.relative_path
    (path / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(fxckpt.Corrupt, match=r"'\.\./.*not a file of this directory"):
        fxckpt.import_checkpoint(path, place / "store")


# ---- what cannot be imported ----


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-100])
    return path


def wrong_index(place: Path, change: Callable[[dict], object]) -> Path:
    path = folder(mlp().state_dict(), place, "safetensors", 2) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    return path.parent


def lacking_shard(place: Path) -> Path:
    path = with_dcp({"w": torch.ones(2)}, place / "dcp")
    next(path.glob("*.distcp")).unlink()
    return path


def metadata_without(attribute: str, place: Path) -> Path:
    path = with_dcp({"w": torch.ones(2)}, place / "dcp")
    found = pickle.loads((path / ".metadata").read_bytes())
    for each in found.state_dict_metadata.values():
        delattr(each, attribute)
    (path / ".metadata").write_bytes(pickle.dumps(found))
    return path


def with_groups(groups: object, place: Path) -> Path:
    return torch_file({"model": mlp().state_dict(), "optimizer": {"state": {}, "param_groups": groups}}, place)


BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing there": (lambda place: place / "no", "nothing at"),
    "a text": (lambda place: (place / "x.py").write_text("print(1)  # hi") and place / "x.py", "neither a file of"),
    "an empty folder": (lambda place: (place / "e").mkdir() or place / "e", "no weights in it"),
    "no state dict": (lambda place: torch_file([1, 2], place), "no state dict"),
    "no tensors": (lambda place: torch_file({"lr": 1}, place), "no tensor is in it"),
    "a cut torch file": (lambda place: cut(torch_file(mlp().state_dict(), place)), "torch.load cannot read it"),
    "a cut safetensors file": (lambda place: cut(safetensors_file(mlp().state_dict(), place)), "the tensors end at"),
    "a sparse tensor": (lambda place: torch_file({"w": torch.eye(2).to_sparse()}, place), "only dense tensors"),
    "a shard that is gone": (lambda place: wrong_index(place, lambda m: m.update({"0.bias": "z.safetensors"})), "is not there"),
    "a shard outside": (lambda place: wrong_index(place, lambda m: m.update({"0.bias": "../z"})), "not a file of this folder"),
    "a tensor that is gone": (lambda place: wrong_index(place, lambda m: m.update(z=m["0.bias"])), "no such tensor"),
    "a shard of dcp that is gone": (lacking_shard, "cannot be read"),
    "tensors of no type": (lambda place: metadata_without("properties", place), "does not hold what its format says"),
    "groups of another kind": (lambda place: with_groups([[1, 2, 3]], place), "does not hold what its format says"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_imported_is_said_and_no_checkpoint_is_made(what, place):
    make, said = BROKEN[what]
    with pytest.raises((fxckpt.SetupError, fxckpt.Corrupt), match=said):
        fxckpt.import_checkpoint(make(place), place / "store")
    assert fxckpt.checkpoints(place / "store") == []


def test_an_import_is_the_first_of_its_store_and_no_store_is_a_source(place):
    source = torch_file(mlp().state_dict(), place)
    trainer = start(place / "store")
    trainer.save(1)
    trainer.close()
    with pytest.raises(fxckpt.SetupError, match="has checkpoints already"):
        fxckpt.import_checkpoint(source, place / "store")
    with pytest.raises(fxckpt.SetupError, match="is a store of fxckpt"):
        fxckpt.import_checkpoint(place / "store", place / "other")
    assert [each.step for each in fxckpt.checkpoints(place / "store")] == [1]


def test_a_full_disk_is_said_before_anything_is_written(place, monkeypatch):
    source = torch_file(mlp().state_dict(), place)
    monkeypatch.setattr(writing, "SPARE", 1 << 60)
    with pytest.raises(fxckpt.NoSpace, match="the import takes"):
        fxckpt.import_checkpoint(source, place / "store")
    assert not (place / "store").exists()


def test_an_import_that_was_interrupted_leaves_no_checkpoint_and_can_be_made_again(place, monkeypatch):
    source = torch_file(mlp().state_dict(), place)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fxckpt.import_checkpoint(source, place / "store")
    assert fxckpt.checkpoints(place / "store") == []
    fxckpt.import_checkpoint(source, place / "store")
    assert [each.step for each in fxckpt.checkpoints(place / "store")] == [0]


def test_an_export_of_every_format_comes_back_by_an_import(place, capsys):
    reference = mlp()
    opt = by_names(reference)
    opt = fxckpt.compile_step(opt, place / "first", model=reference, every=1, update="native")
    train(reference, opt, range(2))
    opt.ckpt.shutdown()
    for format in ("torch", "safetensors", "dcp"):
        words = [] if format == "safetensors" else ["--optimizer"]
        assert main(["export", str(place / "first"), str(place / format), "--format", format, *words]) == 0
        assert main(["import", str(place / format), str(place / f"from {format}"), "--json"]) == 0
        model, again, _ = run_from(place / f"from {format}", by_names)
        assert differences(model.state_dict(), reference.state_dict()) == []
        if words:
            assert all(torch.equal(again.state[p]["exp_avg"], opt.state[q]["exp_avg"])
                       for p, q in zip(model.parameters(), reference.parameters()))  # fmt: skip
        again.ckpt.shutdown()
    shutil.rmtree(place / "dcp")
