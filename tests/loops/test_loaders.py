"""A loader stopped anywhere goes on with the bits of the uninterrupted run, and that run has plain PyTorch's.

In short a loader of each kind has workers in one way; ``FXCKPT_LOOPS`` (``make loops``) has them in every way.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_runs import (
    BETWEEN,
    Anneals,
    Batches,
    Counting,
    CountsPasses,
    Crops,
    EpochSampler,
    GlobalSampler,
    Lazy,
    OwnGeneratorSampler,
    Pairs,
    Plain,
    Resumable,
    ResumableOnce,
    ShufflingSampler,
    StatefulSampler,
    Still,
    Stream,
    Turns,
    generators,
    gone_on,
    plain,
    resumed,
    seed,
    stored,
    worker_init,
)
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from fxckpt.compat import loaders as compat
from fxckpt.data import source_of
from fxckpt.data.workers import Carried
from fxckpt.errors import SetupError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # more workers than cores; fork

FULL = int(os.environ.get("FXCKPT_LOOPS", "1")) > 1

HOW = {
    "no workers": {},
    "2 workers": {"num_workers": 2},
    "3 workers": {"num_workers": 3},
    "2 persistent": {"num_workers": 2, "persistent_workers": True},
}

CASES: dict[str, Callable[..., Any]] = {
    "shuffled": lambda **how: DataLoader(Crops(), 4, shuffle=True, **how),
    "in order, drop_last": lambda **how: DataLoader(Crops(), 4, drop_last=True, **how),
    "no batches": lambda **how: DataLoader(Crops(9), batch_size=None, shuffle=True, **how),
    "generator": lambda **how: DataLoader(Crops(), 4, shuffle=True, generator=torch.Generator().manual_seed(5), **how),
    "weighted": lambda **how: DataLoader(Crops(), 4, sampler=WeightedRandomSampler(torch.arange(1.0, 23), 30), **how),
    "subset": lambda **how: DataLoader(Crops(), 4, sampler=SubsetRandomSampler(range(17)), **how),
    "replacement": lambda **how: DataLoader(Crops(), 4, sampler=RandomSampler(range(22), True, 50), **how),
    "more than once": lambda **how: DataLoader(
        Crops(), 4, sampler=RandomSampler(range(22), num_samples=50, generator=torch.Generator().manual_seed(5)), **how
    ),
    "batch sampler": lambda **how: DataLoader(Crops(), batch_sampler=Batches(22), **how),
    "counts its passes": lambda **how: DataLoader(Crops(), 4, sampler=EpochSampler(22), **how),
    "shuffles in place": lambda **how: DataLoader(Crops(), 4, sampler=ShufflingSampler(22), **how),
    "own generator": lambda **how: DataLoader(Crops(), 4, sampler=OwnGeneratorSampler(22), **how),
    "sampler's state": lambda **how: DataLoader(Crops(), 4, sampler=StatefulSampler(22), **how),
    "many at once": lambda **how: DataLoader(Pairs(), 4, shuffle=True, **how),
    "lazy generator": lambda **how: DataLoader(Lazy(), 4, shuffle=True, **how),
    "data set's state": lambda **how: DataLoader(Counting(), 4, shuffle=True, **how),
    "data set that anneals": lambda **how: DataLoader(Anneals(), 4, shuffle=True, **how),
    "part of one": lambda **how: DataLoader(Subset(Anneals(), range(3, 20)), 4, shuffle=True, **how),
    "counts passes": lambda **how: DataLoader(CountsPasses(), 2, **how),
    "stream": lambda **how: DataLoader(Stream(), 2, **how),
    "resumable stream": lambda **how: DataLoader(Resumable(), 2, **how),
    "resumable stream, no batches": lambda **how: DataLoader(Resumable(9), batch_size=None, **how),
    "resumable once, drop_last": lambda **how: DataLoader(ResumableOnce(31), 3, drop_last=True, **how),
}


def stops_for(name: str, count: int) -> set[int]:
    """Stops at random, the same ones every time: three (one where workers are started anew), and one between two passes."""
    rng = random.Random(name)
    return {*rng.sample(range(1, count), 3 if name.endswith("no workers") else 1), BETWEEN * rng.randrange(1, 3)}


UNEVEN = ["shuffled", "resumable once, drop_last"]  # with three, too


def ways(cases: list[str]) -> list[tuple[str, str]]:
    """Each without workers and with two, which are persistent or not: in short they take turns."""
    both = ["2 workers", "2 persistent"]
    return [(case, how) for at, case in enumerate(cases) for how in ["no workers", *(both if FULL else [both[at % 2]])]]


@pytest.mark.parametrize(("case", "how"), [*ways([*CASES]), *((case, "3 workers") for case in UNEVEN)])
def test_a_pass_that_was_stopped_has_the_bits_of_plain_pytorch(case, how):
    def make():
        return CASES[case](**HOW[how])

    whole = plain(make)
    for stops in (set(), stops_for(case + how, len(whole) - 3))[how != "no workers" :]:
        assert resumed(make, stops) == whole, stops


LEFT = [(case, how) for case in ("shuffled", "stream") for how in HOW if how != "2 workers"]
LEFT += [("resumable stream", "2 workers"), ("resumable once, drop_last", "3 workers")]


@pytest.mark.parametrize(("case", "how"), LEFT)
def test_a_pass_that_the_loop_left_is_over(case, how):
    def make():
        return CASES[case](**HOW[how])

    whole = plain(make, leave_at=2)
    for stops in ({2, 4}, {3, BETWEEN, BETWEEN * 2}, set(), {1}, {BETWEEN})[: None if how == "no workers" else 2]:
        assert resumed(make, stops, leave_at=2) == whole, stops


@pytest.mark.parametrize("how", ["no workers", "2 persistent"])
@pytest.mark.parametrize("case", ["resumable stream", "resumable once, drop_last"])
def test_a_data_set_that_may_go_on_where_the_loop_left_it_is_refused_there_and_exact_elsewhere(case, how):
    def make():
        return CASES[case](**HOW[how])

    whole = plain(make, leave_at=2)
    assert resumed(make, {1, 6}, leave_at=2) == whole
    with pytest.raises(SetupError, match=r"the loop left a pass of Resumable\w* before its end"):
        resumed(make, {BETWEEN}, leave_at=2)


@pytest.mark.parametrize("how", ["no workers", "2 workers"])
def test_a_distributed_samplers_epoch_is_the_loops_own(how):
    def make():
        return DataLoader(Crops(), 4, sampler=DistributedSampler(range(22), 2, 1), **HOW[how])

    def set_epoch(loader, epoch):
        loader.sampler.set_epoch(epoch)

    whole = plain(make, set_epoch=set_epoch)
    for stops in ({1}, {4, BETWEEN}, {2, 8, BETWEEN * 2}):
        assert resumed(make, stops, set_epoch=set_epoch) == whole, stops


@pytest.mark.parametrize("context", ["forkserver", "spawn"] if FULL else ["forkserver"])
def test_workers_started_without_a_fork_go_on_too(context):
    multiprocessing.set_forkserver_preload(["fxckpt.data"])  # else each of them imports torch

    def make():
        how = {"multiprocessing_context": context, "worker_init_fn": worker_init, "prefetch_factor": 3, "timeout": 60}
        return DataLoader(Crops(), 4, shuffle=True, num_workers=2, **how)

    assert resumed(make, {3}, epochs=1) == plain(make, epochs=1)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_options_go_on_anywhere_without_workers(data):
    n, size, drop = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5)), data.draw(st.booleans())
    kind = data.draw(st.sampled_from(["order", "shuffle", "replacement", "own", "epoch", "lists"]))
    own = data.draw(st.booleans())
    leave = data.draw(st.integers(0, 3))

    def make():
        generator = torch.Generator().manual_seed(5) if own else None
        sampler = {
            "replacement": RandomSampler(range(n), True, 2 * n, generator), "own": OwnGeneratorSampler(n),
            "epoch": EpochSampler(n), "lists": ShufflingSampler(n),
        }.get(kind)  # fmt: skip
        return DataLoader(Crops(n), size, shuffle=kind == "shuffle", sampler=sampler, drop_last=drop, generator=generator)

    stops = set(data.draw(st.lists(st.integers(-2, 12), max_size=4)))
    assert resumed(make, stops, epochs=2, leave_at=leave) == plain(make, epochs=2, leave_at=leave)


@pytest.mark.parametrize("how", HOW)
def test_each_sample_is_seen_once_an_epoch_and_none_is_read_twice(how):
    seed(1)
    source = source_of(DataLoader(Crops(40), 4, shuffle=True, **HOW[how]))
    items = source.begin()
    head = [int(row[0]) for _ in range(4) for row in next(items)]
    rest = gone_on(source, lambda: DataLoader(Crops(40), 4, shuffle=True, **HOW[how]))
    tail = [int(row[0]) for batch in rest.begin() for row in batch]
    assert sorted(head + tail) == list(range(40))
    assert rest.loader.dataset.read.tolist() == [int(i in tail) for i in range(40)]


@pytest.mark.parametrize("how", HOW)
def test_going_on_leaves_the_global_generators_as_they_are(how):
    seed(1)
    source = source_of(DataLoader(Crops(), 4, shuffle=True, **HOW[how]))
    next(source.begin())
    new = gone_on(source, lambda: DataLoader(Crops(), 4, shuffle=True, **HOW[how]))
    before = generators()
    items = new.begin()
    for a, b in zip(before, generators()):
        assert str(a) == str(b)
    del items


def test_a_pass_that_was_exhausted_gives_nothing_more_and_the_next_one_is_whole():
    source = source_of(DataLoader(Crops(), 4))
    assert len(list(source.begin())) == len(source) == 6 and source.exhausted
    new = gone_on(source, lambda: DataLoader(Crops(), 4))
    assert new.exhausted and list(new.begin()) == [] and new.position == 6
    new.finish()
    assert not new.exhausted and len(list(new.begin())) == 6


def test_an_epoch_that_the_loop_set_before_the_state_was_loaded_stays():
    def make(epoch):
        loader = DataLoader(Crops(), 4, sampler=DistributedSampler(range(22), 2, 1))
        loader.sampler.set_epoch(epoch)
        return loader

    source = source_of(make(2))
    list(source.begin())
    source.finish()
    assert gone_on(source, lambda: make(3)).loader.sampler.epoch == 3


def test_persistent_workers_whose_shard_has_ended_go_on_into_the_next_pass():
    def make():
        return DataLoader(Resumable(22), 2, num_workers=2, persistent_workers=True)  # eleven and eight samples

    whole = plain(make, 2)
    for stop in range(len(whole) // 2 - 4, len(whole) // 2 + 2):
        assert resumed(make, {stop}, 2) == whole, stop


def test_a_state_that_was_loaded_is_the_state_until_the_pass_goes_on():
    source = source_of(DataLoader(Crops(), 4, num_workers=2))
    items = source.begin()
    next(items)
    state = stored(source.state_dict())
    new = gone_on(source, lambda: DataLoader(Crops(), 4, num_workers=2))
    assert str(new.state_dict()) == str(state)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_end_when_the_loop_lets_go_of_them(persistent):
    gc.collect()
    gc.disable()
    try:
        source = source_of(DataLoader(Crops(), 4, num_workers=2, persistent_workers=persistent))
        items = source.begin()
        next(items)
        made = [weakref.ref(each) for each in gc.get_objects() if type(each) is compat.WorkersIterator]
        del items
        if persistent:
            del source
        assert len(made) == 1 and made[0]() is None
    finally:
        gc.enable()


def test_workers_send_only_what_changed():
    source = source_of(DataLoader(Plain(), 4, num_workers=2))
    items = source.begin()
    next(items)
    assert source.state_dict()["workers"]["states"] == [{}, {}]
    source = source_of(DataLoader(Lazy(), 4, num_workers=2))
    items = source.begin()
    next(items)
    assert [list(state) for state in source.state_dict()["workers"]["states"]] == [["own/dataset.rng"], []]


@pytest.mark.parametrize("now", [0, 3])
def test_workers_that_drew_nothing_may_be_of_another_number(now):
    def make(workers=2):
        return DataLoader(Still(), 4, shuffle=True, num_workers=workers)

    assert resumed(make, {3, 8}, remake=lambda: make(now)) == plain(make)


# ---- what cannot be exact ----------------------------------------------------------------------------------------


def state_of(loader: Any, batches: int = 2) -> dict[str, Any]:
    source = source_of(loader)
    items = source.begin()
    for _ in range(batches):
        next(items)
        random.random()
    return stored(source.state_dict())


def test_a_sequence_that_turns_its_order_at_the_end_of_a_pass_goes_on():
    whole = plain(Turns)
    assert resumed(Turns, {2, 12, 20, BETWEEN}) == whole


def test_batches_in_the_order_of_chance_are_refused():
    with pytest.raises(SetupError, match="in_order=True"):
        source_of(DataLoader(Crops(), 4, num_workers=2, in_order=False))


def test_what_differs_from_the_loader_of_the_checkpoint_is_listed():
    state = state_of(DataLoader(Crops(22), 4))
    other = DataLoader(Crops(23), 5, shuffle=True)
    with pytest.raises(SetupError, match=r"length of the data: 22 then, 23 now; batch size: 4 then, 5 now; sampler: Seq.*Random"):
        source_of(other).load_state_dict(state)


@pytest.mark.parametrize(("then", "now"), [(2, 3), (2, 0), (0, 2)])
def test_workers_that_drew_must_be_as_many_as_before(then, now):
    state = state_of(DataLoader(Crops(), 4, num_workers=then))
    with pytest.raises(SetupError, match=f"workers: {then} then, {now} now"):
        source_of(DataLoader(Crops(), 4, num_workers=now)).load_state_dict(state)


def test_another_order_of_the_same_samples_is_noticed():
    state = state_of(DataLoader(Crops(), 4, sampler=np.random.permutation(22).tolist()))
    source = source_of(DataLoader(Crops(), 4, sampler=np.random.permutation(22).tolist()))
    source.load_state_dict(state)
    with pytest.raises(SetupError, match="another order of batches than before"):
        source.begin()


def test_a_sampler_that_draws_where_training_draws_is_refused_by_name():
    with pytest.raises(SetupError, match=r"GlobalSampler draws from global generators \(python\)"):
        state_of(DataLoader(Plain(), 4, sampler=GlobalSampler(22)))
    state_of(DataLoader(Plain(), 4, sampler=OwnGeneratorSampler(22)))


def test_a_sampler_that_begins_to_draw_late_is_refused_when_its_order_is_made_again():
    class Laps(EpochSampler):
        def __len__(self):
            return 300

        def __iter__(self):
            for _ in range(3):
                yield from torch.randperm(100).tolist()

    state = state_of(DataLoader(Plain(100), sampler=Laps(100)), 150)
    source = source_of(DataLoader(Plain(100), sampler=Laps(100)))
    source.load_state_dict(state)
    torch.rand(1)  # training had drawn
    with pytest.raises(SetupError, match=r"the sampler Laps draws from global generators \(torch\)"):
        source.begin()


def test_a_stream_that_draws_where_training_draws_is_refused_by_name():
    class Drawing(Stream):
        def __iter__(self):
            yield from (torch.tensor([random.random()]) for _ in range(self.n))

    with pytest.raises(SetupError, match=r"the data set Drawing draws from global generators \(python\)"):
        state_of(DataLoader(Drawing(), 4))


def test_persistent_workers_that_were_used_elsewhere_are_refused():
    loader = DataLoader(Crops(), 4, num_workers=1, persistent_workers=True)
    next(iter(loader))
    with pytest.raises(SetupError, match="persistent workers have made batches already"):
        source_of(loader).begin()


def test_what_cannot_be_iterated_over_is_refused():
    with pytest.raises(SetupError, match="a int is none"):
        source_of(3)


# ---- other iterables ---------------------------------------------------------------------------------------------


class Own:
    """An iterable with a state."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while self.at < 9:
            self.at += 1
            yield self.at
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Drawing:
    """An iterable without one, which draws from a generator of its own."""

    def __init__(self):
        self.rng = np.random.default_rng(3)

    def __iter__(self):
        return (float(self.rng.random()) for _ in range(9))


@pytest.mark.parametrize("make", [Own, Drawing, lambda: list(range(9)), lambda: zip(range(9), "abcdefghi")])
def test_any_iterable_goes_on(make):
    epochs = 1 if hasattr(make(), "__next__") else 3
    whole = plain(make, epochs)
    for stops in (set(), {1}, {3, 8}, {2, BETWEEN, 10}):
        assert resumed(make, stops, epochs) == whole, stops


def test_what_is_read_again_is_said_once(caplog):
    caplog.set_level(logging.INFO, "fxckpt")
    for make, said in ((Own, []), (lambda: list(range(9)), []), (Drawing, ["reading 4 batches of a Drawing again"])):
        resumed(make, {4}, 1)
        assert [message.split(",")[0] for message in caplog.messages] == said
        caplog.clear()
    resumed(lambda: DataLoader(Stream(), 2), {4}, 1)
    assert [message.split(",")[0] for message in caplog.messages] == ["reading 4 batches of Stream again"]


def test_a_loader_class_that_iterates_otherwise_is_read_again(caplog):
    class Twice(DataLoader):
        def __iter__(self):
            for batch in super().__iter__():
                yield batch
                yield batch

    caplog.set_level(logging.INFO, "fxckpt")

    def make():
        return Twice(Plain(), 4, shuffle=True)

    assert resumed(make, {3}) == plain(make)
    assert "reading 3 batches of a Twice again" in caplog.text


class Endless(DataLoader):
    """Keeps one iterator over all its passes, which has no end."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.iterator = super().__iter__()

    def __iter__(self):
        return (next(self.iterator) for _ in range(5))


def test_a_loader_whose_workers_stay_ahead_over_its_passes_is_refused_with_the_way_out():
    again = RandomSampler(range(22), num_samples=22 * 9)
    with pytest.raises(SetupError, match=r"a Endless keeps one iterator.*persistent_workers=True"):
        source_of(Endless(Plain(), 4, sampler=again, num_workers=1))
    source_of(Endless(Plain(), 4, sampler=again))


# ---- packages ----------------------------------------------------------------------------------------------------


def collate(rows: list[dict[str, Any]]) -> torch.Tensor:
    """A batch of Hugging Face's rows, augmented."""
    return torch.tensor([float(row["x"]) for row in rows]) + torch.rand(1)


def of_package(name: str, how: dict[str, Any]) -> Any:
    """A loader of a package."""
    if name.startswith("torchdata"):
        stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
        generator = torch.Generator().manual_seed(5) if "generator" in name else None
        return stateful(Crops(), 4, shuffle=True, generator=generator, **how)
    if name.startswith("datasets"):
        table = pytest.importorskip("datasets").Dataset.from_dict({"x": list(range(23))})
        if name == "datasets map":
            return DataLoader(table.with_format("torch"), 4, shuffle=True, collate_fn=collate, **how)
        rows = table.to_iterable_dataset(num_shards=3)
        rows = rows.shuffle(seed=3, buffer_size=5) if "buffer" in name else rows
        return DataLoader(rows, 4, collate_fn=collate, **how)
    prepare = pytest.importorskip("accelerate.data_loader")
    if "iterable" in name:
        loader = prepare.prepare_data_loader(DataLoader(Resumable(), 2, **how), dispatch_batches=False)
        return prepare.skip_first_batches(loader, 2) if "skip" in name else loader
    generator = torch.Generator().manual_seed(4) if "generator" in name else None
    options: dict[str, Any] = {"put_on_device": False, "use_seedable_sampler": "seedable" in name}
    if generator is not None:
        options["rng_types"] = ["generator"]
    if "dispatcher" in name:
        options |= {"put_on_device": True, "device": torch.device("cpu"), "dispatch_batches": True}
    loader = prepare.prepare_data_loader(DataLoader(Crops(), 4, shuffle=True, generator=generator, **how), **options)
    return prepare.skip_first_batches(loader, 2) if "skip" in name else loader


PACKAGES = [
    "torchdata", "torchdata generator", "datasets map", "datasets iterable", "datasets buffer", "accelerate",
    "accelerate generator", "accelerate seedable", "accelerate dispatcher", "accelerate skip", "accelerate iterable",
    "accelerate iterable skip",
]  # fmt: skip


@pytest.mark.parametrize(("name", "how"), ways(PACKAGES))
def test_loaders_of_packages_have_the_packages_own_bits_and_go_on(name, how):
    def make():
        return of_package(name, HOW[how])

    whole = plain(make)
    assert resumed(make, set()) == whole
    stops = stops_for(name + how, len(whole) - 3)
    assert resumed(make, stops) == whole, stops


def test_loaders_of_packages_that_took_a_state_already_are_refused():
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    loader = stateful(Crops(), 4)
    loader.load_state_dict(stateful(Crops(), 4).state_dict())
    with pytest.raises(SetupError, match="a state was loaded into the StatefulDataLoader itself"):
        source_of(loader).begin()
    prepare = pytest.importorskip("accelerate.data_loader")
    prepared = prepare.prepare_data_loader(DataLoader(Crops(), 4), use_stateful_dataloader=True, put_on_device=False)
    with pytest.raises(SetupError, match="use_stateful_dataloader=True"):
        source_of(prepared)


# ---- what is torch's own -----------------------------------------------------------------------------------------


def test_a_batch_is_pinned_inside_what_carries_it(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self + 1)
    carried = torch.utils.data._utils.pin_memory.pin_memory(Carried({"x": torch.zeros(1)}, 3, {"a": 1}), "cuda")
    assert (carried.batch["x"].item(), carried.worker, carried.state) == (1.0, 3, {"a": 1})


def test_the_users_loader_is_not_changed_by_a_pass():
    loader = DataLoader(Crops(), 4, num_workers=2, persistent_workers=True)
    before = dict(vars(loader))
    list(source_of(loader).begin())
    assert vars(loader) == before and loader.collate_fn is default_collate
