"""``fxckpt watch`` and ``plot``, ``export --format hf``, and what the command line does when it is told little."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from digests import differences
from small_training import Training
from storing import a_record, start

import fxckpt
from fxckpt.cli import main, watch
from fxckpt.errors import Corrupt
from fxckpt.store import lock


@pytest.fixture
def store(root):
    """Steps 1 to 3."""
    trainer = start(root, keep=5)
    for step in (1, 2, 3):
        trainer.save(step, loss=10.0 - step)
    trainer.close()
    return root


# ---- watch ----


def seen(monkeypatch, root: Path, every: int | str, now: float, writer: int | None = 4711) -> watch.View:
    """The view of a run at the time ``now``: a step a second, step 20 at 1000, a tenth of the time stall, 1 MB/s."""
    rows = [[step, 980.0 + step, 980.0 + step, 982.0 + step, 2_000_000, 1, step / 10, {}] for step in range(10, 20)]
    record = a_record(20, state={"history": {"every": every, "pid": 4711, "rows": rows}})
    object.__setattr__(record, "time", 1000.0)
    monkeypatch.setattr(watch, "_newest", lambda _: watch.Newest(str(root / "step-000000020"), record, 1002.0, record))
    monkeypatch.setattr(lock, "holder", lambda _: writer)
    monkeypatch.setattr(watch.time, "time", lambda: now)
    return watch.look(str(root))


def test_the_view_is_reckoned_from_the_record_and_the_clock(monkeypatch, store):
    view = seen(monkeypatch, store, 8, 1003.0)
    assert (view.step, view.writer, view.every, view.next_step) == (20, 4711, 8, 24)
    assert (view.step_seconds, view.behind_seconds, view.behind_steps, view.next_seconds) == (1.0, 3.0, 3.0, 1.0)
    assert (view.write_seconds, view.bytes_per_second) == (2.0, 1_000_000) and view.stall_share == pytest.approx(0.1)
    assert seen(monkeypatch, store, "auto", 1003.0).next_seconds == 57.0
    over = seen(monkeypatch, store, 8, 1003.0, writer=None)
    assert (over.behind_seconds, over.next_step, over.writing) == (None, None, False)


def test_a_table_says_it_in_words(monkeypatch, store):
    shown = "\n".join(watch.table(seen(monkeypatch, store, 8, 1003.0)))
    expected = [
        "WRITER      process 4711 writes, every=8", "STEP        20 is durable", "BEHIND      about 3 steps, 3 s",
        "STALL       10.00% of the time", "NEXT        step 24, in about 1 s", "1 MB/s, 2 s from step to disk",
    ]  # fmt: skip
    assert [line for line in expected if line not in shown] == []


def test_a_live_run_is_watched_from_its_own_files_alone(root, capsys):
    training = Training(root, keep=1)
    assert main(["watch", str(root), "--once"]) == 0 and "no checkpoint yet" in capsys.readouterr().out
    for _ in range(4):
        training.train()
        training.opt.ckpt.flush()
    view = watch.look(str(root))
    assert (view.step, view.writer, view.every, view.next_step) == (4, os.getpid(), 1, 5)
    assert view.step_seconds > 0 and view.bytes_per_second > 0 and view.stall_share >= 0 and view.fits > 0
    training.train().end()
    assert main(["watch", str(root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["writer"], found["writing"]) == (5, None, False)


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_table_is_drawn_over_the_last_one_until_it_is_interrupted(store, monkeypatch):
    looks = iter([None, KeyboardInterrupt])

    def sleep(_: float) -> None:
        if (error := next(looks)) is not None:
            raise error

    monkeypatch.setattr(watch.time, "sleep", sleep)
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    assert main(["watch", str(store)]) == 0
    first, second = screen.getvalue().split("\x1b[", 1)
    assert second.startswith(f"{first.count(chr(10))}F\x1b[J") and second.count("STEP  ") == 1


def test_a_name_with_control_codes_is_shown_without_them(tmp_path, capsys, root):
    trainer = start(root)
    trainer.save(1, **{"\x1b[2Jloss": 1.0})
    trainer.close()
    assert main(["watch", str(root), "--once"]) == 0
    shown = capsys.readouterr().out
    assert "\\x1b[2Jloss=1" in shown and "\x1b" not in shown


# ---- plot ----


def words(path: Path) -> str:
    """The text in a picture."""
    return " ".join(ElementTree.parse(path).getroot().itertext())


def test_a_plot_has_steps_stall_bytes_and_each_metric_of_all_lives(root, tmp_path, capsys):
    for _ in range(2):
        training = Training(root, keep=1)
        fxckpt.load(optimizer=training.opt)
        for _ in range(3):
            training.train()
            training.opt.ckpt.note(**{"loss": 1.0, "$x^": 2.0, "\x1b[2J": 3.0})
            training.opt.ckpt.flush()  # a record knows those that are durable when its step closes
        training.end()
    assert main(["plot", str(root), "-o", str(tmp_path / "run.svg"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["step"] for each in found["checkpoints"]] == [1, 2, 3, 4, 5, 6]
    shown = words(tmp_path / "run.svg")
    assert all(each in shown for each in ("step", "stall, %", "written, GB", "loss", "$x^", "\\x1b[2J", "step 6"))


def test_a_plot_without_matplotlib_says_how_to_get_it(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.dates", None)
    assert main(["plot", str(store), "-o", str(tmp_path / "run.svg")]) == 2
    assert 'pip install "fxckpt[plot]"' in capsys.readouterr().err and list(tmp_path.glob("*.svg")) == []


def test_a_plot_of_an_unknown_kind_says_which_there_are(store, tmp_path, capsys):
    assert main(["plot", str(store), "-o", str(tmp_path / "run.doc")]) == 2
    assert "svg" in capsys.readouterr().err


# ---- export --format hf ----


@pytest.fixture(scope="module")
def transformers():
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def gpt2(transformers) -> torch.nn.Module:
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=32, n_positions=16, bos_token_id=1, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config)


def bert(transformers) -> torch.nn.Module:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, vocab_size=32, max_position_embeddings=16))


def trained(model: torch.nn.Module, root: Path) -> torch.nn.Module:
    """One step, checkpointed."""
    model.train()
    opt = fxckpt.compile_step(torch.optim.SGD(model.parameters(), lr=0.1), root, model=model, every=1, update="native")
    ids = torch.arange(8).reshape(2, 4) + 3
    model(input_ids=ids, labels=ids).loss.backward()
    opt.step()
    opt.ckpt.shutdown()
    return model


@pytest.mark.parametrize("make", [gpt2, bert])
@pytest.mark.parametrize("shard", ["5GB", "4kB"])
def test_an_exported_folder_opens_with_from_pretrained(make, shard, transformers, root, tmp_path, capsys):
    model = trained(make(transformers), root)
    out = tmp_path / "hf"
    assert main(["export", str(root), str(out), "--format", "hf", "--shard", shard]) == 0
    assert (out / "model.safetensors").exists() == (shard == "5GB") == (not (out / "model.safetensors.index.json").exists())
    again, info = type(model).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert differences(again.state_dict(), model.state_dict()) == []
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    auto = transformers.AutoConfig.from_pretrained(out)
    assert auto.architectures == [type(model).__name__] and auto.vocab_size == 32


def test_a_pretrained_folder_is_imported_trained_and_exported_again(transformers, root, tmp_path, capsys):
    model = gpt2(transformers)
    model.save_pretrained(tmp_path / "own")
    assert main(["import", str(tmp_path / "own"), str(root)]) == 0
    again = gpt2(transformers)
    assert fxckpt.load(root, model=again).imported == str(tmp_path / "own")
    assert differences(again.state_dict(), model.state_dict()) == []
    assert main(["export", str(root), str(tmp_path / "hf"), "--format", "hf"]) == 0
    third = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    assert differences(third.state_dict(), model.state_dict()) == []


def test_a_configuration_that_nobody_knows_is_asked_for_and_then_copied_with_the_tokenizer(root, tmp_path, capsys):
    Training(root).train().end()
    assert main(["export", str(root), str(tmp_path / "hf"), "--format", "hf"]) == 2
    assert "--config FOLDER" in capsys.readouterr().err and not (tmp_path / "hf").exists()
    given = tmp_path / "given"
    given.mkdir()
    assert main(["export", str(root), str(tmp_path / "hf"), "--format", "hf", "--config", str(given)]) == 2
    for name in ("config.json", "tokenizer.json", "merges.txt", "model.safetensors.index.json", "model.safetensors", "README.md"):
        (given / name).write_text("{}")
    assert main(["export", str(root), str(tmp_path / "hf"), "--format", "hf", "--config", str(given)]) == 0
    assert {each.name for each in (tmp_path / "hf").iterdir()} == {
        "config.json", "tokenizer.json", "merges.txt", "model.safetensors"
    }  # fmt: skip
    assert main(["export", str(root), str(tmp_path / "x"), "--format", "torch", "--config", str(given)]) == 2


# ---- told little ----


def test_without_a_command_the_help_is_shown_and_the_version_when_asked_for(capsys):
    assert main([]) == 0 and "COMMAND" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"fxckpt {fxckpt.__version__}\n"


def test_ls_of_one_checkpoint_lists_that_one(store, capsys):
    one = store / "step-000000002"
    assert main(["ls", str(one), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert (row["step"], row["path"]) == (2, "step-000000002")
    (one / "commit.json").write_bytes(b"{}")
    assert main(["ls", str(one)]) == 3 and "damaged: step-000000002" in capsys.readouterr().out


def test_diff_compares_the_newest_two_or_one_with_the_newest(store, capsys):
    for given, expected in (([], (2, 3)), (["1"], (1, 3)), (["2", "1"], (2, 1))):
        assert main(["diff", str(store), *given, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert tuple(int(found[side][-1]) for side in "ab") == expected


def test_diff_of_one_checkpoint_says_that_two_are_needed(root, capsys):
    trainer = start(root)
    trainer.save(1)
    trainer.close()
    assert main(["diff", str(root)]) == 4 and "has 1 checkpoint: two are compared" in capsys.readouterr().err


def test_a_damaged_chunk_is_named_once_with_its_layers_counted():
    error = Corrupt("f", "chunk 0 is bad", layer=", ".join(f"h.{i}" for i in range(25)), offset=0)
    assert str(error) == "f, 25 layers (h.0, h.1, h.2, …), offset 0: chunk 0 is bad" and error.layer.count("h.") == 25
    assert str(Corrupt("f", "bad", layer="a, b")) == "f, layer 'a, b': bad"


def test_home_and_variables_are_expanded_in_every_path(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(store.parent))
    monkeypatch.setenv("SOMEWHERE", str(tmp_path))
    assert main(["export", "~/checkpoints", "$SOMEWHERE/out", "--format", "safetensors"]) == 0
    assert main(["import", "${SOMEWHERE}/out", "$SOMEWHERE/again"]) == 0
    assert [each.step for each in fxckpt.checkpoints("$SOMEWHERE/again")] == [0]
    monkeypatch.delenv("NOWHERE", raising=False)
    assert main(["import", "$NOWHERE/out", str(tmp_path / "x")]) == 2 and "is not set" in capsys.readouterr().err
    assert main(["export", str(store), "s3://bucket/out", "--format", "safetensors"]) == 2
    assert "is a URL" in capsys.readouterr().err
