"""States of random generators that are read where they lie: the same as those asked for, whatever was drawn."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxckpt.compat.generators import Ends, Glance, completed, looking_at, since
from fxckpt.data.generators import Reader, is_kind, kind_of, packed, read, same, write

DRAWS = {
    "torch": (lambda g: torch.rand(3, generator=g), lambda g: torch.randn(1, generator=g), lambda g: g.manual_seed(7)),
    "numpy": (lambda g: g.rand(5), lambda g: g.randn(), lambda g: g.randint(9), lambda g: g.seed(7)),
    "python": (lambda g: g.random(), lambda g: g.gauss(0, 1), lambda g: g.randbytes(3000), lambda g: g.seed(7)),
    "numpy's new ones": (lambda g: g.random(3), lambda g: g.standard_normal()),
}
MAKE = {
    "torch": lambda: torch.Generator().manual_seed(1),
    "numpy": lambda: np.random.RandomState(1),
    "python": lambda: random.Random(1),
    "numpy's new ones": lambda: np.random.default_rng(1),
}


def equal(a, b):
    """Two packed states, in values and types."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(value, b[name]) for name, value in a.items())
    return type(a) is type(b) and (np.array_equal(a, b) and a.dtype == b.dtype if isinstance(a, np.ndarray) else a == b)


@pytest.mark.parametrize("kind", MAKE)
@settings(deadline=None, max_examples=40)
@given(draws=st.lists(st.integers(0, 3), max_size=12))
def test_a_state_read_where_it_lies_is_the_one_asked_for_and_differs_when_it_moved(kind, draws):
    generator = MAKE[kind]()
    reader, asked = Reader({"it": generator}), read(generator)
    for draw in draws:
        before, asked_before = reader.read()["it"], asked
        DRAWS[kind][draw % len(DRAWS[kind])](generator)
        now, asked = reader.read()["it"], read(generator)
        assert equal(packed(now), packed(asked))
        if isinstance(now, Glance):
            sent = since(before, now)
            assert (completed(before, sent) if isinstance(sent, Ends) else sent) == now
        assert same(before, now) == equal(packed(asked_before), packed(asked))
        other = MAKE[kind]()
        write(other, packed(now))
        assert equal(packed(read(other)), packed(asked))


def test_the_three_kinds_that_people_draw_from_are_read_where_they_lie():
    assert all(looking_at(MAKE[kind]()) is not None for kind in ("torch", "numpy", "python"))
    assert looking_at(MAKE["numpy's new ones"]()) is None


@pytest.mark.parametrize("kind", ["torch", "numpy", "python"])
def test_of_a_few_draws_little_is_sent_until_all_words_are_used(kind):
    generator = MAKE[kind]()
    look = looking_at(generator)
    DRAWS[kind][0](generator)  # makes the first words
    before, sent = look(), []
    for _ in range(700):
        DRAWS[kind][0](generator)
        before, news = (now := look()), since(before, now)
        sent.append(isinstance(news, Ends))
    assert 0 < sent.count(False) < 20


def test_a_class_of_the_users_is_asked():
    class Mine(random.Random):
        def getstate(self):
            return (3, tuple(range(625)), None)

    mine = Mine()
    assert looking_at(mine) is None
    assert packed(Reader({"it": mine}).read()["it"])["words"][5] == 5


def test_numpys_bits_replaced_by_others_are_noticed():
    generator = np.random.RandomState(1)
    reader = Reader({"it": generator})
    other = np.random.RandomState(np.random.PCG64(5))
    generator.__init__(np.random.PCG64(5))
    assert equal(packed(reader.read()["it"]), packed(read(other)))


ENDLESS = range(1 << 47)


@pytest.mark.parametrize("kind, state", [
    ("torch.cpu", ENDLESS),
    ("python", (3, ENDLESS, None)),
    ("python", {"version": 3, "words": ENDLESS, "gauss": None}),
    ("numpy.RandomState", {"bit_generator": "MT19937", "state": {"key": ENDLESS, "pos": "x"}, "has_gauss": 0, "gauss": 0.0}),
    ("numpy.seed", {}),
    ("numpy.PCG64", ENDLESS),
    ("else", {}),
])  # fmt: skip
def test_what_a_record_has_in_place_of_a_generator_is_not_taken_and_nothing_is_called(kind, state):
    before = read(np.random.get_state.__self__)
    assert not is_kind(kind, state)
    assert same(before, read(np.random.get_state.__self__))


@pytest.mark.parametrize("kind", MAKE)
def test_a_packed_state_is_of_its_kind(kind):
    generator = MAKE[kind]()
    assert is_kind(kind_of(generator), packed(read(generator)))
