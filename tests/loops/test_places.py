"""Each loader of a script is found again in another process by the place at which an epoch asks for it, without any run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from loader_runs import Plain, stored
from torch.utils.data import DataLoader

from fxckpt.errors import SetupError
from fxckpt.run.loaders import Loaders


def rows(n: int = 24, size: int = 4, seed: int | None = None) -> DataLoader:
    """Shuffled from a generator of its own, if there is a seed."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(Plain(n), size, shuffle=seed is not None, generator=generator)


class Script:
    """What ``fxckpt.batches`` does in one process of a script."""

    def __init__(self, restored: list[tuple[int, Any]] = ()):
        self.loaders = Loaders([(place, stored(state)) for place, state in restored])

    def ask(self, loader: Any, of_epoch: bool = True, turn: int | None = None) -> Iterator[Any]:
        source, _, _ = self.loaders.ask(loader, turn)
        generator = (batch.flatten().tolist() for batch in source.begin())
        self.loaders.begun(source, generator, of_epoch)
        return generator

    def killed(self) -> Script:
        """Another process, from here."""
        return Script(self.loaders.state_dict())

    def places(self) -> list[int]:
        """Those whose loaders are known."""
        return sorted(place for place, _ in self.loaders.state_dict())


def test_a_loader_that_is_asked_for_in_each_epoch_keeps_its_place_whoever_holds_its_last_pass():
    script, loader, other = Script(), rows(), rows(30)
    for _ in range(3):
        one = script.ask(loader)
        two = script.ask(other)
        next(one), next(two)
        assert script.places() == [0, 1]
        script.loaders.end_epoch()


def test_a_pass_that_a_turn_asked_for_goes_on_in_the_next_epoch_beside_a_loader_that_is_made_anew():
    script = Script()
    data, other = script.ask(rows()), script.ask(rows(30), of_epoch=False)
    assert next(data) and next(other)[0] == 0.0
    script.loaders.end_epoch()
    data = script.ask(rows())
    assert next(other)[0] == 4.0 and next(data)[0] == 0.0
    assert script.places() == [0, 0, 1]


def test_only_the_pass_that_was_under_way_must_find_a_loader_like_its_own():
    script, kept = Script(), []  # loaders that somebody keeps
    for size in (4, 6):
        kept.append(rows(size=size))
        data = script.ask(kept[-1])
        next(data)
        if size == 4:
            script.loaders.end_epoch()
    with pytest.raises(SetupError, match="batch size: 6 then, 8 now"):
        script.killed().ask(rows(size=8))
    again = script.killed()
    assert next(again.ask(rows(size=6)))[0] == 6.0
    again.loaders.end_epoch()
    again.loaders.begin_epoch()
    assert next(again.ask(rows(size=8)))[0] == 0.0
    once_more = again.killed()
    assert next(once_more.ask(rows(size=8)))[0] == 8.0


@pytest.mark.parametrize("within", [False, True])
def test_a_loader_that_each_epoch_makes_begins_with_its_own_generator_and_one_that_stays_goes_on(within):
    script = Script()
    staying = rows(seed=1)
    whole = list(script.ask(staying)) if not within else list(script.ask(rows(seed=1)))
    script.loaders.end_epoch()
    again, staying = script.killed(), rows(seed=1)
    again.loaders.begin_epoch()
    assert (list(again.ask(rows(seed=1) if within else staying)) == whole) is within


@pytest.mark.parametrize(("turns", "others", "said"), [((0, 1), 24, 1), ((0, 0), 24, 0), ((None, 1), 24, 0), ((0, 1), 30, 0)])
def test_loaders_that_are_alike_and_were_asked_for_in_different_turns_are_said(turns, others, said, caplog):
    script = Script()
    passes = [script.ask(rows(n), of_epoch=False, turn=turn) for n, turn in zip((24, others), turns)]
    for each in passes:
        next(each)
    script = script.killed().killed()
    again = [script.ask(rows(n), of_epoch=False, turn=7) for n in (24, others)]
    assert [next(each)[0] for each in again] == [4.0, 4.0]
    assert caplog.text.count("2 loaders are alike (kind: DataLoader, data set: Plain") == said
    passes = [script.killed().ask(rows(24), of_epoch=False, turn=9)]  # as they were first asked for
    assert caplog.text.count("2 loaders are alike") == 2 * said


def test_what_is_restored_and_never_asked_for_is_not_carried_along_for_ever():
    script = Script()
    for life in range(40):
        script = script.killed()
        script.loaders.begin_epoch()
        next(script.ask(rows(size=1 + life % 7)))
        script.loaders.end_epoch()
        list(script.ask(rows(n=30 + life)))
        script.loaders.end_epoch()
    assert len(script.loaders.state_dict()) < 20
