"""Loaders as people make them, and runs over them: plain, and stopped and gone on with in what stands for a new process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from fxckpt.data import Source, source_of
from fxckpt.store.typed_json import decode_state, encode_state

BETWEEN = -1  # a stop behind the n-th pass is BETWEEN * n


class Crops(Dataset):
    """Samples with augmentation from every kind of generator, its own too; counts what is read, in whatever process."""

    def __init__(self, n: int = 22):
        self.n, self.read = n, torch.zeros(n, dtype=torch.int64).share_memory_()
        self.rng, self.own = np.random.default_rng(3), {"python": random.Random(4)}

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> torch.Tensor:
        self.read[i] += 1
        drawn = torch.rand(1) + random.random() + float(np.random.rand()) + self.rng.random() + self.own["python"].random()
        return torch.cat([torch.tensor([float(i)]), drawn])


class Plain(Crops):
    """Nothing is drawn."""

    def __getitem__(self, i: int) -> torch.Tensor:
        self.read[i] += 1
        return torch.tensor([float(i)])


class Still(Plain):
    """Nothing is drawn, and nothing in it changes."""

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.tensor([float(i)])


class Pairs(Crops):
    """Reads many at once."""

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [self[i] + torch.rand(1) for i in indices]


class Lazy(Crops):
    """Makes its generator at the first sample."""

    def __init__(self, n: int = 22):
        super().__init__(n)
        self.rng = None

    def __getitem__(self, i: int) -> torch.Tensor:
        info = get_worker_info()
        self.rng = self.rng or np.random.default_rng(0 if info is None else info.id)
        return torch.tensor([i, self.rng.random()])


class Counting(Plain):
    """A map-style data set with a state."""

    def __init__(self, n: int = 22):
        super().__init__(n)
        self.count = 0

    def __getitem__(self, i: int) -> torch.Tensor:
        self.count += 1
        return torch.tensor([float(i), float(self.count)])

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class Turns:
    """A sequence that is no data set, and turns its order at the end of each pass."""

    def __init__(self, n: int = 9):
        self.order = np.arange(n)

    def __len__(self):
        return len(self.order)

    def __getitem__(self, at: int):
        if at >= len(self.order):
            self.order[:] = np.roll(self.order, 2)
            raise IndexError
        return torch.tensor([self.order[at]])


class CountsPasses(IterableDataset):
    """Shuffled by the number of its pass, which it counts when it is iterated; each worker takes its share."""

    def __init__(self, n: int = 23):
        self.n, self.epoch = n, 0

    def __iter__(self):
        self.epoch += 1
        info = get_worker_info()
        order = np.random.RandomState(self.epoch).permutation(self.n)
        yield from (torch.tensor([i, self.epoch]) for i in order[info.id if info else 0 :: info.num_workers if info else 1])


class Anneals(Dataset):
    """Its samples depend on how many it has made, and an order inside of it is turned as it goes."""

    def __init__(self, n: int = 22):
        self.n, self.made, self.order, self.turned = n, 0, np.arange(n), torch.zeros(n)

    def __len__(self):
        return self.n

    def __getitem__(self, i: int):
        self.made += 1
        self.order[:] = np.roll(self.order, i)
        self.turned[i] += 1
        return torch.tensor([i, self.made, self.order[0], float(self.turned.sum() * self.turned[0])])


class Stream(IterableDataset):
    """Iterable, without a state; draws from a generator of its own, and in workers from the global one too. Shards are uneven."""

    def __init__(self, n: int = 23):
        self.n, self.rng = n, np.random.default_rng(2)

    def shard(self) -> list[int]:
        info = get_worker_info()
        at, of = (0, 1) if info is None else (info.id, info.num_workers)
        mine = list(range(at, self.n, of))
        return mine[: len(mine) - 3 * at]

    def __iter__(self) -> Iterator[torch.Tensor]:
        for i in self.shard():
            yield torch.tensor([i, self.rng.random() + (torch.rand(1).item() if get_worker_info() else 0)])


class Resumable(Stream):
    """Iterable, with a state that goes back to the beginning at the end of a pass; draws from global generators."""

    def __init__(self, n: int = 23):
        super().__init__(n)
        self.at = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        mine = self.shard()
        while self.at < len(mine):
            self.at += 1
            yield torch.tensor([mine[self.at - 1], torch.rand(1).item() + random.random()])
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class ResumableOnce(Resumable):
    """As one writes it for torchdata: a state is where the next pass begins, once."""

    start = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        mine, start, self.start = self.shard(), self.start, 0
        for at in range(start, len(mine)):
            self.at = at + 1
            yield torch.tensor([mine[at], torch.rand(1).item() + random.random()])

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = self.at = state["at"]


class EpochSampler(Sampler):
    """Counts its passes, and draws its order at once."""

    def __init__(self, n: int):
        self.n, self.epoch = n, 0

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(torch.randperm(self.n, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class ShufflingSampler(EpochSampler):
    """Shuffles the order of the pass before, in place."""

    def __init__(self, n: int):
        self.order = list(range(n))

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        random.shuffle(self.order)
        return iter(self.order)


class OwnGeneratorSampler(EpochSampler):
    """Draws as it goes, from a generator of its own."""

    def __init__(self, n: int):
        self.n, self.rng = n, random.Random(4)

    def __iter__(self) -> Iterator[int]:
        return (self.rng.randrange(self.n) for _ in range(self.n))


class GlobalSampler(EpochSampler):
    """Draws as it goes, from the global generator that training uses too."""

    def __iter__(self) -> Iterator[int]:
        return (random.randrange(self.n) for _ in range(self.n))


class StatefulSampler(EpochSampler):
    """Has a state of its own."""

    def __init__(self, n: int):
        self.n, self.passes = n, [0]

    def __iter__(self) -> Iterator[int]:
        self.passes[0] += 1
        yield from torch.randperm(self.n, generator=torch.Generator().manual_seed(self.passes[0])).tolist()

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passes = list(state["passes"])


class Batches:
    """A batch sampler of batches of three and four."""

    def __init__(self, n: int):
        self.n = n

    def __iter__(self) -> Iterator[list[int]]:
        order, at = torch.randperm(self.n).tolist(), 0
        while at < self.n:
            yield order[at : at + 3 + at % 2]
            at += 3 + at % 2


def worker_init(worker: int) -> None:
    """Seeds one generator otherwise."""
    np.random.seed(worker + 100)


# ---- runs --------------------------------------------------------------------------------------------------------


def seed(value: int) -> None:
    """All global generators."""
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


def generators() -> tuple[Any, ...]:
    """Their states."""
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def put(states: tuple[Any, ...]) -> None:
    """What ``fxckpt.load`` does about them."""
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])


def draws() -> float:
    """Training draws too: dropout, say."""
    return torch.rand(1).item() + random.random() + float(np.random.rand())


def record(epoch: int, batch: Any) -> tuple[int, Any, float]:
    """A batch as training saw it."""
    return epoch, batch.tolist() if isinstance(batch, torch.Tensor) else batch, draws()


def stored(state: dict[str, Any]) -> dict[str, Any]:
    """The state as it comes back from a store."""
    tensors: dict[str, Any] = {}
    return decode_state(encode_state(state, tensors), tensors)


def plain(make: Callable[[], Any], epochs: int = 3, leave_at: int = 0, set_epoch: Callable = lambda loader, epoch: None) -> list:
    """The run without fxckpt. ``leave_at``: batches after which every other pass is left."""
    seed(1)
    loader, seen = make(), []
    for epoch in range(epochs):
        set_epoch(loader, epoch)
        for at, batch in enumerate(loader, 1):
            seen.append(record(epoch, batch))
            if at == leave_at and epoch % 2 == 0:
                break
        seen.append(draws())  # validation
    return seen


def resumed(
    make: Callable[[], Any],
    stops: set[int],
    epochs: int = 3,
    leave_at: int = 0,
    set_epoch: Callable = lambda loader, epoch: None,
    remake: Callable[[], Any] | None = None,
) -> list:
    """The run through a source: stopped behind the batches ``stops``, counted over all passes, and behind passes ``BETWEEN * n``,
    and each time gone on with by a new source over a new loader (``remake()``)."""
    seed(1)
    source, seen, left = source_of(make()), [], set(stops)
    epoch = handed = 0
    while epoch < epochs:
        set_epoch(source.loader, epoch)
        items: Any = source.begin()
        while not (leave_at and epoch % 2 == 0 and source.position >= leave_at):
            if handed in left:
                break
            batch = next(items, None)
            if batch is None:
                break
            handed += 1
            seen.append(record(epoch, batch))
        items = None
        if handed in left and not source.exhausted:
            left.remove(handed)
            source = gone_on(source, remake or make)
            continue
        seen.append(draws())
        source.finish()
        epoch += 1
        if BETWEEN * epoch in stops:
            source = gone_on(source, remake or make)
    return seen


def gone_on(source: Source, make: Callable[[], Any]) -> Source:
    """As in a new process."""
    state, now = stored(source.state_dict()), generators()
    seed(1000 + source.position)
    new = source_of(make())
    new.load_state_dict(state)
    put(now)
    assert new.position == source.position
    return new
