"""A pass over a ``DistributedSampler``'s share goes on with another number of ranks where the ranks before it stopped."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from fxckpt.data import source_of
from fxckpt.errors import SetupError

LENGTH, BATCH = 48, 2


def a_loader(rank, world, workers=0, sampler=DistributedSampler):
    data = TensorDataset(torch.arange(LENGTH))
    order = sampler(data, num_replicas=world, rank=rank, seed=3)
    order.set_epoch(1)
    return DataLoader(data, batch_size=BATCH, sampler=order, num_workers=workers)


def taken(source, batches=None):
    """The samples of so many batches, or of all that are left of the pass."""
    found = []
    for batch, (x,) in enumerate(source.begin(), start=1):
        found += x.tolist()
        if batch == batches:
            break
    return found


def stopped(world, batches, workers=0):
    """The samples that each rank has seen, and the states that they left."""
    sources = [source_of(a_loader(rank, world, workers)) for rank in range(world)]
    passes = [source.begin() for source in sources]
    seen = [x for one in passes for _ in range(batches) for x in next(one)[0].tolist()]
    return seen, [source.state_dict() for source in sources]


@pytest.mark.parametrize("before, after, batches", [(2, 4, 2), (4, 2, 3), (2, 1, 5), (4, 3, 3), (1, 4, 4), (3, 2, 2)])
def test_each_sample_of_the_pass_is_seen_once(before, after, batches, caplog):
    seen, states = stopped(before, batches)
    for rank in range(after):
        source = source_of(a_loader(rank, after))
        source.load_state_dict(states[rank if rank < before else 0])
        seen += taken(source)
        assert (source.loader.sampler.num_replicas, source.loader.sampler.rank) == (after, rank)
    assert sorted(seen) == list(range(LENGTH)), "none twice, and none left out"
    assert f"began with {before} ranks and goes on with {after}" in caplog.text and "seen again" not in caplog.text


def test_what_cannot_be_shared_out_evenly_is_seen_again_and_said(caplog):
    seen, states = stopped(2, 1)
    left = []
    for rank in range(4):
        source = source_of(a_loader(rank, 4))
        source.load_state_dict(states[0])
        left += taken(source)
    assert sorted(left) == list(range(LENGTH)) and len(seen) == 4
    assert "behind the 4 samples that were seen; 4 of them are seen again" in caplog.text


def test_workers_take_their_places_in_the_new_order():
    seen, states = stopped(2, 3, workers=2)
    source = source_of(a_loader(0, 1, workers=2))
    source.load_state_dict(states[0])
    assert sorted(seen + taken(source)) == list(range(LENGTH))


def test_between_two_passes_a_sampler_stays_whose_share_it_is(caplog):
    caplog.set_level(logging.WARNING)
    source = source_of(a_loader(0, 2))
    taken(source)
    source.finish()
    other = source_of(a_loader(1, 3))
    other.load_state_dict(source.state_dict())
    assert (other.loader.sampler.num_replicas, other.loader.sampler.rank) == (3, 1)
    assert len(taken(other)) == LENGTH // 3 and not caplog.records


def test_a_sampler_with_an_order_of_its_own_is_refused():
    class Mine(DistributedSampler):
        def __iter__(self):
            return iter(range(self.rank, LENGTH, self.num_replicas))

    source = source_of(a_loader(0, 2, sampler=Mine))
    next(source.begin())
    other = source_of(a_loader(0, 3, sampler=Mine))
    with pytest.raises(SetupError, match="began with 2 ranks, and there are 3: which samples were seen only its Mine knows"):
        other.load_state_dict(source.state_dict())
