"""Sees when a torchtitan trainer fetches a batch: the loader stays the object that it is, and its iterators tell first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from fxckpt.compat.instance_subclass import instance_subclass


def watch(loader: Any, about_to_fetch: Callable[[], None]) -> None:
    """From now on have ``about_to_fetch`` called before each batch, once the iterator that it comes from was made."""
    plain = type(loader)

    def __iter__(self: Any) -> Iterator[Any]:
        return _batches(plain.__iter__(self), self._fxckpt_about_to_fetch)

    loader._fxckpt_about_to_fetch = about_to_fetch
    loader.__class__ = instance_subclass(plain, {"__iter__": __iter__})


def let_go(loader: Any) -> None:
    """The loader is as it was; an iterator that is under way goes on."""
    loader.__class__ = vars(type(loader))["_fxckpt_base"]
    loader._fxckpt_about_to_fetch = _nothing


def _batches(rest: Iterator[Any], about_to_fetch: Callable[[], None]) -> Iterator[Any]:
    while True:
        about_to_fetch()
        try:
            batch = next(rest)
        except StopIteration:
            return
        yield batch


def _nothing() -> None:
    """Nobody listens."""
