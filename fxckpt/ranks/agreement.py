"""One agreement of all ranks: each says something, and each hears what all others said, or an error names who is silent."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fxckpt.errors import RanksDisagree

Key = tuple[int, int, str]
"""What makes two ranks' checkpoints one of the job: step, iteration, and the life that wrote it.
All ranks of a life began together."""

_SLICE = 0.02  # seconds between two looks at the store


class Messages(Protocol):
    """The calls of torch.distributed's ``Store`` that are used."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...


class Agreement:
    """What one rank says and hears in one load. ``limit``: seconds that a rank may show no sign of life."""

    def __init__(self, store: Messages, rank: int, world: int, limit: float):
        self.rank, self.world = rank, world
        self._store, self._limit = store, limit
        with _Named("cannot be reached"):
            self._prefix = f"fxckpt/load/{store.add(f'fxckpt/loads/{rank}', 1)}"  # the nth load of each rank belongs together

    def alive(self) -> None:
        """This rank is still at work: the others wait for it from now on."""
        with _Named("cannot be reached"):
            self._store.add(f"{self._prefix}/alive/{self.rank}", 1)

    def exchange(self, topic: str, value: Any) -> list[Any]:
        """Say ``value`` (JSON), and return what all ranks said, in their order. Raises RanksDisagree if one is silent."""
        with _Named("cannot be reached"):
            self._store.set(f"{self._prefix}/{topic}/{self.rank}", json.dumps(value))
            return [self._hear(topic, rank) for rank in range(self.world)]

    def _hear(self, topic: str, rank: int) -> Any:
        """What that rank says, polled: a wait inside the store could not be ended by Ctrl-C."""
        key, beat = f"{self._prefix}/{topic}/{rank}", f"{self._prefix}/alive/{rank}"
        seen, until = -1, time.monotonic() + self._limit
        while not self._store.check([key]):
            if (beats := self._store.add(beat, 0)) != seen:
                seen, until = beats, time.monotonic() + self._limit
            if time.monotonic() > until:
                raise RanksDisagree(
                    f"rank {rank} of {self.world} said nothing for {self._limit:g} s while rank {self.rank} loaded ({topic}): "
                    "it is dead, hangs, or does not call fxckpt.load(), which all ranks must call equally often. "
                    "Restart the whole job."
                )
            time.sleep(_SLICE)
        return json.loads(self._store.get(key))


class _Named:
    """What the store raises, as an error of ours."""

    def __init__(self, what: str):
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):  # all that torch.distributed's stores raise
            raise RanksDisagree(f"the process group's store {self._what}: {error}. Restart the whole job.") from error


def newest_common(said: Sequence[Sequence[Key]], banned: set[Key]) -> Key | None:
    """The first key in rank 0's order that every rank has and nobody found damaged; None if there is none."""
    others = [set(map(tuple, keys)) for keys in said[1:]]
    first = (key for key in said[0] if key not in banned and all(key in keys for keys in others))
    return next(first, None)


def described(said: Sequence[Mapping[str, Any]]) -> str:
    """What each rank has, a line a rank, for a message."""
    return "".join(f"\n  rank {rank}: {_one(each)}" for rank, each in enumerate(said))


def _one(each: Mapping[str, Any]) -> str:
    """What one rank has."""
    if each["error"]:
        return str(each["error"])
    steps = ", ".join(str(key[0]) for key in each["keys"]) or "none"
    return f"steps {steps} in {each['directory']}" + (f", {each['damaged']} damaged" if each["damaged"] else "")
