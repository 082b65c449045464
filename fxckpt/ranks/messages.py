"""What is asked of torch.distributed's stores, and what they raise as an error of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from fxckpt.errors import RanksDisagree


class Messages(Protocol):
    """The calls of ``torch.distributed.Store`` that are used. None of them waits for another rank: a wait inside the store could
    not be ended by Ctrl-C."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...
    def compare_set(self, key: str, expected: str, value: str, /) -> bytes: ...
    def clone(self) -> Messages: ...


@contextmanager
def named() -> Iterator[None]:
    """Around calls of the store: it may be gone."""
    try:
        yield
    except RuntimeError as error:  # all that torch.distributed's stores raise
        raise RanksDisagree(
            f"the process group's store, which lives in the launcher or in rank 0, cannot be reached: {error}. Restart the whole "
            "job."
        ) from error
