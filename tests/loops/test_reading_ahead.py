"""What reads ahead around ``fxckpt.batches`` is told before a kill could lose what it read; what reads no further is not."""

from __future__ import annotations

import logging
import queue
import threading

import pytest
import torch
from torch import nn

import fxckpt

pytestmark = pytest.mark.usefixtures("one_thread")

AHEAD = "a second batch was asked for before anything was trained on the first"


def ahead(batches):
    """Hand each out when the next one is here, as a prefetcher does."""
    before = None
    for each in batches:
        if before is not None:
            yield before
        before = each
    yield before


def one_by_one(batches):
    """As a progress bar does."""
    yield from batches


def behind_a_thread(batches, room, wait=False):
    """A thread reads on as far as there is room, and ends with the pass; ``wait`` until it has."""
    found = queue.Queue(room)

    def read():
        for each in batches:
            found.put(each)
        found.put(None)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    if wait:
        thread.join()
    return iter(found.get, None)


def train(store, wrapped, turn=None, passes=2) -> int:
    """Over eight batches a pass; ``turn(i, model, opt, batch)`` instead of a step for each. Returns how many steps were made."""
    model = nn.Linear(4, 4)
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    fxckpt.compile_step(opt, store, model=model, every=1, update="native")
    data = [torch.randn(3, 4) for _ in range(8)]
    try:
        for _ in fxckpt.epochs(passes, optimizer=opt):
            for i, batch in enumerate(wrapped(fxckpt.batches(data, optimizer=opt))):
                (turn or step)(i, model, opt, batch)
    finally:
        opt.ckpt.shutdown()
    return opt.ckpt.statistics()["steps"]


def step(i, model, opt, batch):
    model(batch).square().mean().backward()
    opt.step()
    opt.zero_grad()


def every_other(i, model, opt, batch):
    """Gradients of two batches for a step."""
    model(batch).square().mean().backward()
    if i % 2:
        opt.step()
        opt.zero_grad()


def test_a_prefetcher_around_batches_is_named_once_behind_the_first_step(tmp_path, caplog):
    seen = []

    def turn(i, model, opt, batch):
        seen.append(AHEAD in caplog.text)
        step(i, model, opt, batch)

    train(tmp_path, ahead, turn)
    assert caplog.text.count(AHEAD) == 1 and "fxckpt.batches(Prefetcher(loader))" in caplog.text
    assert seen[:2] == [False, True]


@pytest.mark.parametrize("wrapped", [iter, one_by_one])
@pytest.mark.parametrize("turn", [step, every_other])
def test_who_uses_a_batch_before_the_next_is_not_named(wrapped, turn, tmp_path, caplog):
    train(tmp_path, wrapped, turn)
    assert AHEAD not in caplog.text


def test_a_pass_in_which_nothing_is_trained_is_not_named(tmp_path, caplog):
    train(tmp_path, iter, lambda *_: None)
    assert AHEAD not in caplog.text


def test_a_thread_that_reads_ahead_is_refused_at_the_first_step(tmp_path):
    with pytest.raises(fxckpt.SetupError, match="in another thread than the one that asks"):
        train(tmp_path, lambda batches: behind_a_thread(batches, room=2))


def test_a_thread_that_is_through_with_its_pass_is_not_in_the_way_of_a_plain_loop(tmp_path):
    assert train(tmp_path, lambda batches: behind_a_thread(batches, room=20, wait=True), passes=1) == 8


def test_loop_and_step_in_one_thread_of_their_own_are_fine(tmp_path, caplog):
    errors = []

    def run():
        try:
            train(tmp_path, iter)
        except BaseException as error:
            errors.append(error)

    with caplog.at_level(logging.WARNING, logger="fxckpt"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert errors == [] and AHEAD not in caplog.text
