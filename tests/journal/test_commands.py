"""What the commands say and do with a journal."""

from __future__ import annotations

import json

import pytest
import torch
from digests import stored
from journal_lives import Life, journalled, net

import fxckpt
from fxckpt.cli import main
from fxckpt.store.reader import Reader, candidates, records


@pytest.fixture
def trained(root, one_thread):
    return Life(root).train(11).end()


def asked(capsys, *words) -> dict:
    """What a command says as JSON, when it ends well."""
    status = main([*map(str, words), "--json"])
    out = json.loads(capsys.readouterr().out)
    assert status == 0, out
    return out


def test_ls_lists_records_as_steps_with_their_base(root, trained, capsys):
    rows = asked(capsys, "ls", root)["checkpoints"]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows) and rows[-1]["step"] == 11
    steps = {row["generation"]: row["step"] for row in rows}
    for row in rows:
        if row["journal"] is not None:
            assert steps[row["journal"]["base"]] + row["journal"]["number"] == row["step"]
    assert [row["step"] for row in rows if row["journal"]] == journalled(root)


def test_inspect_says_what_a_record_builds_on(root, trained, capsys):
    found = asked(capsys, "inspect", root, 11)
    assert found["journal"]["number"] >= 1 and found["parent"] == found["journal"]["base"]
    assert {layer["kind"] for layer in found["layers"]} == {"gradients", "buffers"}


def test_verify_makes_steps_again_and_finds_what_differs(root, trained, capsys):
    found = asked(capsys, "verify", root, "--replay")["checkpoints"]
    assert {each["verdict"] for each in found} == {"good"} and sum("made again" in (e["detail"] or "") for e in found) >= 1
    path = next(each.path for each in records(root) if each.record.step == 10)
    record = Reader(path).record
    vars(record.journal)["digests"] = {name: crc ^ 1 for name, crc in record.journal.digests.items()}
    (path / "commit.json").write_bytes(record.to_bytes())
    assert main(["verify", str(root)]) == 0
    assert main(["verify", str(root), "--replay"]) == 3
    assert "is not what training had" in capsys.readouterr().out


def test_export_and_diff_make_the_step_again(root, trained, capsys, tmp_path):
    asked(capsys, "export", root, tmp_path / "model.pt", "--format", "torch", "--optimizer")
    found = torch.load(tmp_path / "model.pt", weights_only=False)
    assert found["step"] == 11
    assert all(torch.equal(found["model"][name], t) for name, t in trained.model.state_dict().items())
    opt = torch.optim.AdamW(net().parameters(), lr=1e-2)
    opt.load_state_dict(found["optimizer"])
    mine, theirs = opt.state_dict()["state"], trained.opt.state_dict()["state"]
    assert all(torch.equal(mine[i][key], theirs[i][key]) for i in theirs for key in theirs[i])
    rows = asked(capsys, "diff", root, 10, 11)["rows"]
    assert any(row["parameters"]["changed"] for row in rows)
    assert asked(capsys, "diff", root, 11, 11)["rows"][0]["parameters"]["changed"] == 0


def test_a_step_that_is_written_out_whole_is_a_checkpoint_like_any_other(root, trained, tmp_path):
    from fxckpt.loading.whole import journaled_step, write_whole
    from fxckpt.store.journaled import journaled

    path = next(str(each.path) for each in records(root) if each.record.step == 11)
    made = write_whole(journaled_step(journaled(candidates(root), records(root)), path), str(tmp_path))
    Reader(made).verify()
    assert stored(tmp_path / "step-000000011").keys() == stored(next(e.path for e in candidates(root))).keys()
    model = net()
    assert fxckpt.load(tmp_path, model=model).step == 11
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), trained.model.state_dict().values()))


def test_prune_takes_records_with_their_checkpoint(root, trained, capsys):
    removed = asked(capsys, "prune", root, "--keep", 1)["removed"]
    assert removed and all(row["why"] in ("older", "waiting slot", "on a checkpoint that goes") for row in removed)
    [base] = [each.record for each in candidates(root)]
    assert {each.record.journal.base for each in records(root)} == {base.generation}
    assert Life(root).end().restored.step == 11
