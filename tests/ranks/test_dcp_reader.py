"""A store is read by ``torch.distributed.checkpoint`` onto any layout, each byte verified."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from boxed import grid, write_boxed
from joint_ranks import Job, plain
from small_training import Training
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import fxckpt
from fxckpt.dcp import StoreReader
from fxckpt.errors import NoCheckpoint
from fxckpt.store import names
from fxckpt.store import reader as readers

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def trained(root):
    run = Training(root, make=plain).train(3)
    run.opt.ckpt.save(name="third")
    run.train(1).end()
    return run


def test_a_state_dict_is_read_with_and_without_its_name(trained, root):
    wanted = {key: torch.zeros_like(value) for key, value in trained.model.state_dict().items()}
    state = {"model": wanted, "0.weight": torch.zeros_like(wanted["0.weight"])}
    dcp.load(state, storage_reader=StoreReader(root), no_dist=True)
    assert all(torch.equal(wanted[key], value) for key, value in trained.model.state_dict().items())
    assert torch.equal(state["0.weight"], wanted["0.weight"])


@pytest.mark.parametrize("flat", [False, True])
def test_an_optimizer_is_read_as_torch_names_its_state(flat, trained, root):
    model = plain()
    opt = torch.optim.AdamW(model.parameters(), lr=1.0)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    opt.step()
    of_model, of_optimizer = get_state_dict(model, opt, options=options)
    state = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(state, storage_reader=StoreReader(root), no_dist=True)
    set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options)
    for mine, its in zip(model.parameters(), trained.model.parameters()):
        assert torch.equal(mine, its)
        assert all(torch.equal(opt.state[mine][key], value) for key, value in trained.opt.state[its].items())
    assert opt.param_groups[0]["lr"] != 1.0


def test_a_certain_checkpoint_is_read_or_it_is_said_which_there_are(trained, root):
    state = {"0.weight": torch.zeros(32, 8)}
    dcp.load(state, storage_reader=StoreReader(root, name="third"), no_dist=True)
    assert torch.equal(state["0.weight"], trained.reference[3]["0.weight"])
    dcp.load(state, storage_reader=StoreReader(root, step=4), no_dist=True)
    assert torch.equal(state["0.weight"], trained.reference[4]["0.weight"])
    with pytest.raises(NoCheckpoint, match="there is: 4, third, 3, 2, 1"):
        StoreReader(root, step=9)


@pytest.mark.usefixtures("one_rank")
def test_what_several_ranks_wrote_is_read_into_fsdp_and_tensor_parallel_models(root, monkeypatch):
    job = Job(root, monkeypatch)
    job.begin()
    job.train(2)
    job.end()
    mesh = init_device_mesh("cpu", (1,))
    model = fully_shard(plain(), mesh=mesh)
    state = {"model": model.state_dict(), "2.weight": distribute_tensor(torch.zeros(4, 32), mesh, [Shard(1)])}
    dcp.load(state, storage_reader=StoreReader(root))
    for key, value in job.runs[0].model.state_dict().items():
        assert torch.equal(model.state_dict()[key].full_tensor(), value)
    assert torch.equal(state["2.weight"].full_tensor(), job.runs[0].model[2].weight)


@pytest.mark.parametrize("parts", [(4, 1), (1, 4), (2, 2), (8, 1)])
def test_boxes_of_several_ranks_are_read_from_where_each_lies(parts, tmp_path):
    w = np.arange(35, dtype=np.float32).reshape(7, 5)
    tensors = {(names.MODEL, "w"): w, (names.MODEL, "b"): w[0], (names.MODEL, "n"): np.float32(3).reshape(())}
    boxes = {(names.MODEL, "w"): grid((7, 5), parts)}
    write_boxed(tmp_path / names.step_name(1), tensors, boxes, math.prod(parts))
    state = {"model": {"w": torch.zeros(7, 5), "b": torch.zeros(5)}, "n": torch.zeros(()), "w": torch.zeros(5, 7).t()}
    dcp.load(state, storage_reader=StoreReader(tmp_path), no_dist=True)
    assert (state["model"]["w"].numpy() == w).all() and (state["w"].numpy() == w).all()
    assert (state["model"]["b"].numpy() == w[0]).all() and state["n"] == 3


class Box:
    """A planner that asks for one box of one tensor."""

    def __init__(self, shape):
        self.found = torch.zeros(shape)

    def resolve_tensor(self, item):
        return self.found

    def commit_tensor(self, item, tensor):
        pass


def test_a_box_is_cut_out_of_its_rows_and_no_block_is_read_that_it_does_not_need(root, monkeypatch):
    run = Training(root, make=lambda: torch.nn.Linear(8, 400_000, bias=False), forward=lambda m: lambda x: m(x)[:, :4])
    run.train(1).end()
    read, read_verified, reader = [], readers.read_verified, StoreReader(root)
    monkeypatch.setattr(readers, "read_verified", lambda *a, **how: (read.append(how["only"]), read_verified(*a, **how)))
    item = dcp.ReadItem(
        type=dcp.planner.LoadItemType.TENSOR, dest_index=None, dest_offsets=torch.Size([0, 0]),
        storage_index=dcp.metadata.MetadataIndex("weight"), storage_offsets=torch.Size([1000, 2]), lengths=torch.Size([50, 3]),
    )  # fmt: skip
    box = Box((50, 3))
    reader.read_data(dcp.LoadPlan([item]), box).wait()
    assert torch.equal(box.found, run.model.weight[1000:1050, 2:5])
    begin = readers.Reader(fxckpt.checkpoints(root)[-1].path).record.tensors(names.MODEL)[0].begin + 1000 * 32
    assert read == [[range(begin // 4096, (begin + 50 * 32 - 1) // 4096 + 1)]]


def test_a_flipped_bit_is_an_error_that_names_the_layer(trained, root):
    reader = StoreReader(root)
    file = reader._reader.path / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(dcp.CheckpointException, match=r"Corrupt: .*layer '2, 0'.*CRC-32C"):  # torch wraps what a rank raises
        dcp.load({"0.weight": torch.zeros(32, 8)}, storage_reader=reader, no_dist=True)
