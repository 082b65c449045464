"""A layer on a device is digested by bytes that the copy engine brings, as it was when its step had updated it."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace

import pytest
import torch
from standin import StandIn, library

from fxckpt.engine import Engine, Sources, crc32c, crc32c_joined
from fxckpt.errors import Cancelled
from fxckpt.journal.digests import Digester, digest, watched_tensors
from fxckpt.saving.plan import EngineLayer, Entry, source_items

__all__ = ["library"]  # a fixture


class Digests:
    """An engine with a device, and a layout of two layers behind their counts: one of three parameters, and one of one."""

    def __init__(self, library, sizes=(5, 7, 300)):
        library.late(0)
        self.fake, self.device = library, StandIn(library)
        self.engine = Engine(chunk_bytes=64 << 10, staging_bytes=512 << 10)
        self.engine.open_device(0, library.path)
        g = torch.Generator().manual_seed(1)
        params = [torch.randn(n, n, generator=g) for n in sizes]
        counts = [torch.tensor(3.0), torch.tensor(4.0)]
        self.layout = SimpleNamespace(
            share=None,
            layers=[
                EngineLayer("counts", "counts", [Entry(1, f"step/{i}", t, str(i)) for i, t in enumerate(counts)]),
                EngineLayer("a", "update", [Entry(0, str(i), t, str(i)) for i, t in enumerate(params)]),
                EngineLayer("b", "update", [Entry(0, "b", torch.randn(3, 3, generator=g), "b")]),
            ],
        )
        self.params, self.counts = params, counts
        self.digester = Digester(self.engine, self.sources)

    def sources(self, tensors):
        return Sources(source_items(tensors), [self.device.of(t) for t in tensors])

    def streams(self):
        return self.device.streams([0])

    def begin(self, number=1):
        return self.digester.begin(self.layout, number, self.streams())

    def digest(self, number=1):
        return digest(watched_tensors(self.layout, number))


@pytest.fixture
def digests(library):
    made = Digests(library)
    yield made
    library.hold(False)
    made.engine.close()
    assert library.violations() == ""


def test_a_checksum_of_two_parts_is_made_of_those_of_either():
    for first, second in ((0, 0), (1, 0), (0, 9), (5, 4096), (70001, 3), (100, 1 << 20)):
        a, b = os.urandom(first), os.urandom(second)
        assert crc32c_joined(crc32c(a), crc32c(b), second) == crc32c(a + b)


@pytest.mark.parametrize("sizes", [(1,), (5, 7, 300), (32,), (128, 128), (127, 129, 200)], ids=str)
def test_it_is_the_digest_of_the_same_bytes_in_host_memory(library, sizes):
    """Also where it goes over several chunks, and where a tensor is not in row-major order."""
    digests = Digests(library, sizes)
    digests.layout.layers[1].entries.append(Entry(0, "t", torch.randn(6, 9).t(), "t"))
    for number in (2, 1, 1, 2):
        found = digests.begin(number)
        assert found.copied(60) and found.result() == digests.digest(number)
        digests.params[0].add_(1)
    digests.engine.close()


def test_it_is_of_the_instant_at_which_it_was_begun_however_late_the_copy(digests):
    expected = digests.digest()
    digests.fake.hold(True)
    found = digests.begin()
    assert not found.copied(0.05)
    digests.counts[0].add_(1)  # the next step's first work
    assert not digests.engine.fence(1, 0.05)  # without a stream the host waits
    assert digests.engine.fence(2, 60) and digests.engine.fence(0, 60)
    digests.fake.hold(False)
    assert digests.engine.fence(1, 60)
    found.let_go()
    digests.params[0].add_(1)
    assert found.copied(60) and found.result() == expected


def test_a_layer_that_somebody_changed_meanwhile_has_no_digest(digests):
    digests.fake.hold(True)
    found = digests.begin()
    digests.params[2].add_(1)
    digests.fake.hold(False)
    assert found.copied(60) and found.result() is None
    digests.fake.hold(True)
    found = digests.begin()
    digests.params[2].add_(1)
    found.let_go()
    digests.fake.hold(False)
    assert found.copied(60) and found.result() is None


def test_it_is_given_up_when_nothing_reads_the_layer_any_more(digests):
    digests.fake.hold(True)
    found = digests.begin()
    assert digests.engine.fence(1, 60, {0: digests.fake.stream(0, host=False)})  # the copies were issued
    given_up = threading.Thread(target=found.cancel)
    given_up.start()
    given_up.join(0.1)
    assert given_up.is_alive()
    digests.fake.hold(False)
    given_up.join()
    with pytest.raises(Cancelled):
        found.copied(60)
    found.release()
