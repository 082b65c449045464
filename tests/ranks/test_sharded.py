"""Ranks that hold parts of parameters (FSDP2, tensor parallelism, both) store their parts together, and go on in any layout.

``FXCKPT_LIVES`` says how many lives the campaign has (``make ranks``: 100), in which every layout is killed, and layout and
number of ranks change between lives.
"""

from __future__ import annotations

import itertools
import os
import random
from typing import Any

import pytest
from rank_server import Ranks

from fxckpt.store import names
from fxckpt.store.reader import candidates

LIVES = int(os.environ.get("FXCKPT_LIVES", "3"))
CAMPAIGN = LIVES > 3
SEED = int(os.environ.get("FXCKPT_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)

LAYOUTS = {"fsdp": (2, "fused"), "tp": (2, "sgd"), "hsdp": (4, "foreach"), "fsdp_tp": (4, "fused")}
"""Ranks, and an optimizer that torch steps in this layout: its fused kernels take no DTensors beside plain tensors."""

SHORT = ("fsdp",)


@pytest.fixture
def run(rank_server, tmp_path):
    """Lives one after the other, in a folder of the test."""

    def lives(*asked: dict[str, Any], fail: bool = False) -> list[Ranks]:
        found = [rank_server.live({"script": "sharded_run", **each, "cwd": str(tmp_path)}) for each in asked]
        errors = {each["error"] for ranks in found for each in ranks if each is not None and "error" in each}
        assert bool(errors) == fail, errors
        return found

    return lives


def life(layout: str, directory: str, steps: int, world: int | None = None, **more: Any) -> dict[str, Any]:
    ranks, optimizer = LAYOUTS.get(layout, (1, "fused"))
    return {"layout": layout, "dir": directory, "steps": steps, "world": world or ranks, "optimizer": optimizer,
            "update": "native", **more}  # fmt: skip


def killed(draw: random.Random, world: int, steps: int) -> list[Any]:
    """Which ranks are killed, and when."""
    return [draw.sample(range(world), draw.randint(1, world)), draw.randint(1, steps), draw.random() * 0.02]


def only(ranks: Ranks, what: str) -> Any:
    """What all ranks of a life say."""
    found = {each[what] for each in ranks}
    assert len(found) == 1, found
    return found.pop()


@pytest.mark.parametrize("update", ["native", None] if CAMPAIGN else ["native"])
@pytest.mark.parametrize("layout", LAYOUTS if CAMPAIGN else SHORT)
def test_killed_ranks_end_with_the_bits_of_ranks_that_nobody_kills(layout, update, run):
    draw, steps, (world, _) = random.Random(f"{SEED}{layout}"), 3 * LIVES, LAYOUTS[layout]
    kills = [life(layout, "killed", steps, update=update, kill=killed(draw, world, steps)) for _ in range(LIVES - 2)]
    whole, last = (life(layout, where, steps, update=update) for where in ("whole", "killed"))
    plain, watched, *_, last = run(life(layout, "", steps, load=False), whole, *kills, last)
    only(last, "start")
    assert only(last, "left") == only(watched, "left"), f"seed {SEED}"
    if update == "native":
        assert only(watched, "left") == only(plain, "left")
        assert [each["losses"] for each in watched] == [each["losses"] for each in plain]


def test_each_layout_goes_on_from_each_other(run):
    """Each has what the one before it left, to the bit, and goes on with it."""
    order = [("fsdp", 2), ("fsdp", 4), ("single", 1), ("tp", 2), ("fsdp_tp", 4), ("ddp", 2), ("hsdp", 4), ("fsdp", 3)]
    if CAMPAIGN:  # a way that takes each pair once
        order = [each for a in range(len(order)) for b in range(a + 1, len(order)) for each in (order[a], order[b])] + order[:1]
    found = run(*(life(layout, "a", at + 1, world, optimizer="sgd") for at, (layout, world) in enumerate(order)))
    for before, after in itertools.pairwise(found):
        assert only(after, "loaded") == only(before, "left")


def test_a_load_in_any_layout_reads_what_its_ranks_need_and_little_more(run):
    """Of files and of records, all ranks together."""
    order = [("fsdp", 4), ("fsdp", 4), ("fsdp_tp", 4), ("tp", 2), ("fsdp", 3), ("single", 1), ("tp", 2), ("hsdp", 4), ("ddp", 2)]
    found = run(*(life(layout, "a", at + 1, world, optimizer="sgd", width=501) for at, (layout, world) in enumerate(order)))
    ratios = [sum(each["read"] for each in ranks) / sum(each["needed"] for each in ranks) for ranks in found]
    for before, after in itertools.pairwise(found):
        assert only(after, "loaded") == only(before, "left")
    assert ratios[0] == 0 and all(0.3 < each <= 1.1 for each in ratios[1:]), ratios


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "float64"])
def test_parts_of_types_that_are_stored_in_pairs_go_on_on_any_number_of_ranks(dtype, rank_server, tmp_path):
    before = ""
    for steps, world in ((2, 2), (4, 2), (6, 3), (8, 2)):
        asked = {"script": "pairs_run", "dtype": dtype, "dir": "a", "steps": steps, "world": world, "cwd": str(tmp_path)}
        ranks = rank_server.live(asked)
        assert [each.get("error") for each in ranks] == [None] * world
        assert only(ranks, "start") == steps - 2 and (not before or only(ranks, "loaded") == before)
        before = only(ranks, "left")


@pytest.mark.parametrize("kind", [names.OPTIMIZER, names.PART])
@pytest.mark.parametrize("layout", ["fsdp", "tp"])
def test_a_flipped_bit_in_one_part_takes_all_ranks_back_to_the_step_before(layout, kind, run, tmp_path):
    run(life("fsdp", "a", 2, optimizer="sgd"))
    file = tmp_path / "a" / "step-000000002" / names.of_rank(kind, 1, 2)
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    [ranks] = run(life(layout, "a", 1, optimizer="sgd"))
    assert only(ranks, "start") == 1


@pytest.mark.skipif(not CAMPAIGN, reason="a campaign of its own: make ranks")
def test_lives_in_changing_layouts_lose_no_step_that_was_acknowledged(run, tmp_path):
    draw = random.Random(SEED)
    ways = [("fsdp", 2), ("fsdp", 4), ("fsdp", 3), ("hsdp", 4), ("fsdp_tp", 4), ("tp", 2), ("ddp", 2), ("single", 1)]
    for number in range(LIVES // 4):
        each = [draw.choice(ways) for _ in range(4)]
        steps = 40 * number
        asked = [
            life(layout, "a", steps + 40, world, optimizer="sgd", log="whole", kill=killed(draw, world, steps + 10 * at + 10))
            for at, (layout, world) in enumerate(each)
        ]
        log = tmp_path / "a.log"
        acknowledged = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        *_, last = run(*asked, life("fsdp", "a", steps + 40, optimizer="sgd", log="whole"))
        known: dict[int, set[str]] = {}
        for step, digest, _ in (line.split() for line in log.read_text().splitlines()):
            known.setdefault(int(step), set()).add(digest)
        start = only(last, "start")
        assert start >= max((int(step) for *_, step in acknowledged), default=0), f"seed {SEED}"
        loaded = only(last, "loaded")
        assert loaded in known.get(start, {loaded}), f"seed {SEED}"  # rank 0 may be killed before it says what it had there


@pytest.mark.skipif(not CAMPAIGN, reason="a campaign of its own: make ranks; in short in test_boxes.py")
def test_ranks_that_know_nothing_of_others_who_have_the_same_boxes_are_told(run):
    [ranks] = run(life("halves", "a", 1, 4, optimizer="sgd"), fail=True)
    why = ranks[0]["error"]
    assert "are not all of it, each once. All ranks must be on the mesh that a DTensor lies on" in why


def test_what_each_rank_has_of_its_own_beside_shards_is_not_written_as_if_all_had_it(run):
    [ranks] = run(life("ignored", "a", 1, 2, optimizer="sgd"), fail=True)
    assert "ranks have other values in head.bias" in ranks[0]["error"]


def test_every_box_is_written_once_by_one_of_those_that_hold_it(run, tmp_path):
    run(life("hsdp", "a", 2))
    record = candidates(tmp_path / "a")[0].record
    boxes = [(names.kind_of(each.file), each.key, each.offset) for rank in record.ranks for each in rank.tensors()]
    written = [box for box in boxes if box[:2] != (names.MODEL, "seen")]
    assert len(written) == len(set(written)) > len(record.tensors())
    sizes = [sum(each.nbytes for each in rank.tensors()) for rank in record.ranks]
    assert max(sizes) < 2 * min(sizes), sizes


@pytest.mark.skipif(not CAMPAIGN, reason="a campaign of its own: make ranks; in short in test_ending.py")
def test_a_signal_to_all_ranks_ends_them_behind_one_checkpoint(run):
    begun, at = [], 0
    for spread in (0.0, 0.003, 0.01) * (LIVES // 20):
        run(life("fsdp", "a", 10**6, every=10**6, signal=[at + 5, spread]))
        [last] = run(life("fsdp", "a", 0))
        begun.append(at := only(last, "start"))
        assert at >= 5 and begun == sorted(set(begun))
