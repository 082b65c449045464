"""With three ranks sums of gradients depend on DDP's buckets, which a process makes anew: a run goes on with those it had."""

from __future__ import annotations

import pytest
from rank_server import Ranks


@pytest.fixture(scope="module")
def found(rank_server, tmp_path_factory) -> Ranks:
    """What each of three ranks said."""
    ranks = rank_server.live({"script": "three_ranks", "world": 3, "cwd": str(tmp_path_factory.mktemp("three"))})
    assert not [each["error"] for each in ranks if "error" in each]
    return ranks


@pytest.mark.parametrize("way", ["one store", "a store each"])
def test_three_ranks_of_ddp_go_on_to_the_same_bits(found, way):
    assert [each["same"][way] for each in found] == [True] * 3, found


def test_where_buckets_cannot_be_made_as_they_were_it_is_said(found):
    """Hooks on parameters would be called for gradients that are none. What it costs is seen here, too: other bits."""
    assert [each["same"]["with hooks"] for each in found] == [False] * 3, found
    assert all("hooks on parameters kept fxckpt from making them as they were" in "".join(each["logged"]) for each in found)
