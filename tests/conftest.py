"""Fixtures of the end-to-end tests, and the end of whatever a test left behind."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys

import instruments  # before any test can load the engine that has none
import pytest
import torch  # noqa: F401  sets up its loggers

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell ignores it for what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Inductor tries each set of vector instructions in every process: it compiles a program, and loads it in a process of its own.
# That takes six seconds of the processor where the cache is empty. What the processor says that it has, it has.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

# pytest gives its handlers to each logger that does not propagate. With one, torch writes down every symbol that it traces, with
# the stack that led to it: a quarter of the time of all tracing.
logging.getLogger("torch.__trace").propagate = True


def pytest_collection_finish():
    """What is there by now stays: workers that are forked need not look through it for garbage, which copies its pages."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def inductor_cache(tmp_path_factory):
    """One cache of compiled code for the session, for all of its workers and every script they start."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "inductor-cache"
    path.mkdir(exist_ok=True)
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(path)
    yield path
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
    if before is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


@pytest.fixture(scope="session")
def _fork_server(inductor_cache, tmp_path_factory):
    from fork_server import ForkServer

    with contextlib.closing(ForkServer.anew(inductor_cache, tmp_path_factory.mktemp("fork_server"))) as made:
        yield made


@pytest.fixture
def fork_server(_fork_server):
    """Starts scripts in processes of their own, quickly; see fork_server.ForkServer."""
    yield _fork_server
    _fork_server.end_runs()


@pytest.fixture
def root(tmp_path):
    """Where a store will be: in memory where possible, since durable writes are slow on a busy disk."""
    from storing import fast_directory

    with fast_directory(tmp_path) as directory:
        yield directory / "checkpoints"


@pytest.fixture
def one_thread():
    """Small models are no faster with more, and on a busy machine much slower."""
    from intraop import intraop_threads

    with intraop_threads(1):
        yield


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """Stop runs that a test started, and take back faults and delays."""
    yield
    instruments.calm()
    runs = getattr(sys.modules.get("fxckpt.run.run"), "live_runs", ())
    left = list(runs)
    for run in left:
        run.closing.drop("the test is over")
        run.saver.tally.unreported = None
        run.shutdown(timeout=30)
        runs.discard(run)
    if left:
        del run, left
        gc.collect()
        gc.freeze()  # the next collection need not look at all that torch has imported: 0.3 s each


@pytest.fixture
def counted(record_property):
    """``counted(what, n)``: how much a test tried, added up over all tests and printed at the end."""
    return lambda what, n: record_property(f"counted: {what}", n)


def pytest_terminal_summary(terminalreporter):
    """Print what ``counted`` was told, in workers too."""
    sums: dict[str, int] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) != "call":
                continue
            for what, n in report.user_properties:
                if what.startswith("counted: "):
                    sums[what] = sums.get(what, 0) + n
    if sums:
        terminalreporter.section("counted")
    for what, n in sums.items():
        terminalreporter.write_line(f"{n:>12,} {what.removeprefix('counted: ')}")
