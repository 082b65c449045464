"""A torchtitan training whose ranks are killed goes on from the newest checkpoint, and ends with the bits of a whole one.

The trainer of ``titan_run.py`` calls its manager in torchtitan's order; ``test_titan_itself.py`` has torchtitan's own.
"""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_server import Ranks
from repository import SUPPORT
from torch import nn
from waiting import committed

from fxckpt.errors import SetupError

STEPS = 5


@pytest.fixture
def run(rank_server, tmp_path):
    """One life of two ranks; what each found and left, None of one that was killed."""

    def life(where: str = "", steps: int = STEPS, **more: Any) -> Ranks:
        asked = {"script": "titan_run", "world": 2, "cwd": str(tmp_path), "dir": where, "steps": steps, **more}
        found = rank_server.live(asked)
        assert not [each["error"] for each in found if each is not None and "error" in each]
        return found

    return life


def plain(run, **more: Any) -> Ranks:
    """A life without us."""
    return run(config={"enable": False}, **more)


def ends(ranks: Ranks) -> list[tuple[str, int]]:
    return [(each["left"], each["seen"]) for each in ranks]


@pytest.mark.parametrize("workers", [0, 1])
def test_killed_ranks_end_with_the_bits_of_a_training_without_checkpoints(workers, run):
    """Parameters, state of both optimizers, rates, and what the trainer has counted. Dropout, data (in the main process) and a
    validation draw at random."""
    undisturbed = plain(run, workers=workers)
    run("killed", workers=workers, kill=[[random.randrange(2)], 4, 0.01])
    last = run("killed", workers=workers)
    assert ends(last) == ends(undisturbed)
    assert len({each["start"] for each in last}) == 1 and last[0]["start"] > 0
    for each, whole in zip(last, undisturbed):
        assert each["losses"] == whole["losses"][each["start"] :]


def test_the_last_step_is_saved_whatever_the_interval_and_a_longer_training_goes_on_from_it(run, tmp_path):
    """Without a validation: what one draws behind the last ``save()`` is in no checkpoint."""
    first = run("a", 3, config={"interval": 2, "enable_first_step_checkpoint": True}, validates=False)
    assert [each["saved"] for each in first] == [[1, 2, 3]] * 2
    assert len(committed(tmp_path / "a" / "checkpoint")) == 3
    longer = run("a", config={"interval": 2}, validates=False)
    assert [each["start"] for each in longer] == [3, 3]
    assert ends(longer) == ends(plain(run, validates=False))


def test_options_of_torchtitan_do_what_they_do_there(run, tmp_path):
    """``keep_latest_k=0`` keeps all, ``load_only`` writes nothing, ``exclude_from_loading``, and a step that is asked for."""
    keeps = {"keep_latest_k": 0}
    run("a", 4, config=keeps)
    before = committed(tmp_path / "a" / "checkpoint")
    assert len(before) == 4
    looked = run("a", 5, config={**keeps, "load_only": True})
    assert [(each["start"], each["saved"]) for each in looked] == [(4, [])] * 2
    assert committed(tmp_path / "a" / "checkpoint") == before
    asked = run("a", 1, config={**keeps, "exclude_from_loading": ["train_state", "dataloader"]}, load_step=2)
    assert [(each["loaded"], each["start"], each["seen"]) for each in asked] == [(True, 0, 8)] * 2


def test_a_model_from_elsewhere_begins_a_training_and_no_later_life(run):
    asked = {"config": {"initial_load_path": "/models/0.5"}, "validates": False}
    begun = run("a", 1, **asked)
    assert [each["loaded"] for each in begun] == [True, True] and begun[0]["losses"] != run("c", 1)[0]["losses"]
    assert ends(run("a", 2, **asked)) == ends(run("b", 2, **asked))


# -- in this process --------------------------------------------------------------------------------------------------------


@pytest.fixture
def manager(monkeypatch, tmp_path):
    """Makes one for a small model of one process; those that are made are closed."""
    monkeypatch.syspath_prepend(str(SUPPORT / "interfaces"))
    from titan_run import Container, Schedulers

    import fxckpt.titan

    made = []

    def make(states: dict[str, Any] | None = None, model_parts: Any = None, dataloader: Any = None, **options: Any) -> Any:
        model = nn.Linear(3, 2)
        optimizers = Container([torch.optim.SGD(model.parameters(), lr=0.1)])
        config = fxckpt.titan.CheckpointManager.Config(**{"enable": True, "interval": 1, "update": "native", **options})
        made.append(
            config.build(
                dataloader=Numbers() if dataloader is None else dataloader, model_parts=model_parts or [model],
                optimizers=optimizers, lr_schedulers=Schedulers(optimizers), states=states or {}, sd_adapter=None,
                base_folder=str(tmp_path),
            )
        )  # fmt: skip
        made[-1].model, made[-1].optimizers = model, optimizers
        return made[-1]

    yield make
    for each in made:
        each.close()


class Numbers:
    """A loader with a place."""

    def __init__(self):
        self.place = 0

    def __iter__(self):
        while True:
            self.place += 1
            yield torch.full((1, 3), float(self.place))

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


class Stage:
    """A trainer of which this rank has one stage."""

    class parallel_dims:
        pp_enabled = True

    def state_dict(self):
        return {"step": 0}

    def load_state_dict(self, state): ...


REFUSED = {
    "pipeline parallelism": {"model_parts": [nn.Linear(3, 2), nn.Linear(3, 2)]},
    "pipeline_parallel_degree to 1": {"states": {"train_state": Stage()}},
    "initial_load_model_only=True": {"initial_load_path": "/models/1", "initial_load_model_only": False},
    "fxckpt export": {"last_save_model_only": True},
    "last_save_in_hf": {"last_save_in_hf": True},
    "create_seed_checkpoint": {"create_seed_checkpoint": True},
    "exclude_from_loading names 'optimizer'": {"exclude_from_loading": ["optimizer"]},
    "choose another one": {"states": {"dataloader": Numbers()}},
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_it_does_not_do_is_refused_by_name(why, manager):
    with pytest.raises(SetupError, match=why):
        manager(**REFUSED[why])


def step(made: Any, batch: torch.Tensor) -> None:
    made.model(batch).sum().backward()
    made.optimizers.step()
    made.optimizers.zero_grad()


def test_a_trainer_that_reads_ahead_of_save_is_refused(manager):
    loader = Numbers()
    made = manager(dataloader=loader)
    made.load()
    batches = iter(loader)
    step(made, next(batches))
    next(batches)
    with pytest.raises(SetupError, match="fetched before"):
        made.save(1)


def test_save_before_any_batch_is_refused(manager):
    with pytest.raises(SetupError, match="before a batch was fetched"):
        manager().save(0, last_step=True)


@pytest.mark.parametrize("fails", [False, True])
def test_closing_finishes_a_complete_step_unless_training_has_failed(fails, manager, tmp_path):
    """Where it fails, other ranks may not have come as far."""
    loader = Numbers()
    made = manager(dataloader=loader)
    made.load()
    step(made, next(iter(loader)))
    assert made.save(1)  # begun
    if fails:
        try:
            raise ValueError
        except ValueError:
            made.close()
    else:
        made.close()
    assert len(committed(tmp_path / "checkpoint")) == 1 - fails
    assert type(loader) is Numbers
    with pytest.raises(SetupError, match="was closed"):
        _ = made.ckpt


def test_a_disabled_manager_does_nothing(manager, tmp_path):
    made = manager(enable=False)
    assert (made.load(), made.save(1)) == (False, False)
    made.maybe_wait_for_staging()
    made.maybe_wait_for_saving()
    assert type(made.optimizers.optimizers[0]) is torch.optim.SGD and not list(tmp_path.iterdir())


def test_without_torchtitan_it_says_what_is_missing(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("torchtitan", "fxckpt.titan"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / "torchtitan").exists()])
    with pytest.raises(ImportError, match="needs torchtitan"):
        importlib.import_module("fxckpt.titan")
