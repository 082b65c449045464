"""Gradients that FSDP2 holds back until a backward reduces them come back in the middle of an accumulation, or are refused."""

from __future__ import annotations

from typing import Any

import pytest
from rank_server import Ranks

import fxckpt
from fxckpt.store.reader import Reader

TURNS = 12


@pytest.fixture
def run(rank_server, tmp_path):
    """A life in a folder of the test."""

    def lives(directory: str, turns: int = TURNS, **more: Any) -> Ranks:
        asked = {"script": "accumulating_run", "layout": "fsdp", "world": 2, "loop": "bounded", "dir": directory, "turns": turns}
        return rank_server.live({**asked, "cwd": str(tmp_path), **more})

    return lives


def only(ranks: Ranks, what: str) -> Any:
    """What all ranks of a life say."""
    found = {each[what] for each in ranks}
    assert len(found) == 1, found
    return found.pop()


def early(tmp_path, directory: str) -> dict[str, Any]:
    """What the newest checkpoint has of rank 0's, as it was at the end of its step."""
    return Reader(fxckpt.latest(tmp_path / directory).path).record.state["early"]


@pytest.mark.parametrize("case", [{}, {"mixed": True}, {"layout": "fsdp_tp", "world": 4}], ids=["plain", "mixed", "tp"])
def test_a_run_goes_on_in_the_middle_of_an_accumulation_with_the_same_bits(case, run, tmp_path):
    whole = run("", **case)
    begun = run("d", 6, save=5, **case)
    assert "error" not in begun[0], begun
    assert early(tmp_path, "d")["held_back"], "two of four backwards wait for their sum"
    rest = run("d", **case)
    assert only(rest, "start") == 6
    assert only(rest, "left") == only(whole, "left")


def test_at_a_step_nothing_is_held_back(run, tmp_path):
    whole, begun = run(""), run("d", 8)
    assert "error" not in begun[0], begun
    assert "held_back" not in early(tmp_path, "d")
    rest = run("d")
    assert only(rest, "start") == 8 and only(rest, "left") == only(whole, "left")


def test_in_a_plain_loop_a_step_that_is_closed_between_two_backwards_is_that_of_its_end(run, tmp_path):
    whole, begun = run("", loop="plain"), run("d", 7, loop="plain", flush=5)
    assert "error" not in begun[0], begun
    assert "held_back" not in early(tmp_path, "d"), "the two backwards behind the step are made again"
    rest = run("d", loop="plain")
    assert only(rest, "start") == 4 and only(rest, "left") == only(whole, "left")


def test_batches_whose_gradients_fsdp_holds_back_are_not_taken_for_read_ahead(run):
    begun = run("d", loop="batches")
    assert [each["said"] for each in begun] == [[], []]


def test_on_another_number_of_ranks_they_are_left_out(run):
    begun = run("d", 6, save=5)
    assert "error" not in begun[0], begun
    rest = run("d", 6, world=3)
    assert only(rest, "start") == 6


def test_sums_over_shards_that_are_none_over_replicas_are_refused(run):
    begun = run("d", 6, save=5, layout="hsdp", world=4, hsdp=True)
    assert all("set_requires_all_reduce(False)" in each["error"] and "at optimizer steps only" in each["error"] for each in begun)
    assert "error" not in run("d", 8, layout="hsdp", world=4, hsdp=True)[0]
