"""Campaigns of hostile inputs: how they are drawn, and what none of them may cost.

A campaign tries inputs until its share of ``FXCKPT_FUZZ_SECONDS`` is over. No input may take longer than ``HANG``, nor more than
``MEMORY``, and it is counted in two ways. A limit on address space (RLIMIT_AS) says little: torch alone maps gigabytes, and a
control group of its own needs rights that a test does not have. So RLIMIT_DATA, which counts what is private and writable, is set
to what the process has and ``MEMORY``: an input that asks for more gets a ``MemoryError`` and the machine does not suffer. And
the kernel's high-water mark of resident memory (which a process may reset for itself) is read after each input: that sees what
is mapped and shared, too. Both count from what there was before, since hypothesis and torch keep things.
"""

from __future__ import annotations

import copy
import faulthandler
import hashlib
import json
import logging
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from memory import of_process, peak_growth

CAMPAIGNS = 16
SECONDS = float(os.environ.get("FXCKPT_FUZZ_SECONDS", "6")) / CAMPAIGNS
EXAMPLES = 50  # at a time; then the clock is looked at
MEMORY = 512 << 20  # bytes that one input may cost
HANG = 120.0  # seconds after which one input counts as a hang, on a busy machine too


@contextmanager
def bounded() -> Iterator[None]:
    """A bound on memory, and an end to what hangs: for an input alone, as hypothesis and pytest take memory of their own; so does
    what is logged, which pytest keeps."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (of_process("VmData") + MEMORY, hard))
    logging.disable(logging.CRITICAL)
    faulthandler.dump_traceback_later(HANG, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        logging.disable(logging.NOTSET)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def try_one(test: Callable[[Any], None], drawn: Any) -> None:
    """One input. It has ``HANG`` seconds before the process ends with a traceback."""
    with bounded(), peak_growth() as grown:
        test(drawn)
        cost = grown()
    assert cost < MEMORY, f"it cost {cost >> 20} MiB"


def campaign(strategy: st.SearchStrategy, test: Callable[[Any], None], examples: int = EXAMPLES) -> None:
    """Try inputs until the time is over, ``examples`` at least."""
    end, tried = time.monotonic() + SECONDS, 0
    while tried == 0 or time.monotonic() < end:
        options = settings(max_examples=examples, database=None, deadline=None, suppress_health_check=list(HealthCheck),
                           phases=(Phase.generate, Phase.shrink))  # fmt: skip
        options(given(strategy)(lambda drawn: try_one(test, drawn)))()
        tried += examples
    print(f"{tried} inputs in {SECONDS:.0f} s")


TOKENS = [b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\", b"\0", b"null", b"-1", b"1e999", b"NaN", b"9" * 5000, b"[" * 3000,
          b'{"a":' * 3000, b'"\\ud800"', b"\xff", b"18446744073709551616", b"0.0", b"{}", b"true", b" " * 5000]  # fmt: skip

PLACE = st.integers(0, 1 << 16)
BYTES = st.one_of(
    st.tuples(st.just("flip"), PLACE, st.integers(0, 7)),
    st.tuples(st.just("cut"), PLACE, st.integers(1, 300)),
    st.tuples(st.just("end"), PLACE, st.just(0)),
    st.tuples(st.just("put"), PLACE, st.sampled_from(TOKENS) | st.binary(max_size=40)),
    st.tuples(st.just("write"), PLACE, st.sampled_from(TOKENS) | st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("again"), PLACE, st.integers(1, 300)),
)


def mutated(raw: bytes, steps: list) -> bytes:
    """Some bytes changed, cut out, inserted, overwritten or repeated."""
    for kind, place, what in steps:
        at = place % (len(raw) + 1)
        if kind == "flip" and at < len(raw):
            raw = raw[:at] + bytes([raw[at] ^ 1 << what]) + raw[at + 1 :]
        elif kind == "cut":
            raw = raw[:at] + raw[at + what :]
        elif kind == "end":
            raw = raw[:at]
        elif kind == "put":
            raw = raw[:at] + what + raw[at:]
        elif kind == "write":
            raw = raw[:at] + what + raw[at + len(what) :]
        elif kind == "again":
            raw = raw[:at] + raw[at : at + what] + raw[at:]
    return raw


ENDLESS = {"!": "range", "v": ["0x0", "0x7fffffffffff", "0x1"]}

JUNK = st.recursive(
    st.sampled_from([None, True, False, 0, 1, -1, 2**31, 2**53, 2**63 - 1, 2**63, 10**30, 0.0, -0.5, 1e308, "", "!", "a", "..",
                     "/etc/passwd", "model.safetensors", "\ud800", "\0", "x" * 300, "U8", "F32", "C64", "<f4", "O", "torch",
                     "U", "S", "V0", ENDLESS])
    | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["!", "v", "key", "dtype", "shape", "of", "max",
                  "a"]) | st.text(max_size=3), inner, max_size=4)
    | st.fixed_dictionaries({"!": st.sampled_from(["int", "float", "str", "complex", "bytes", "bytearray", "range", "tuple",
                  "deque", "set", "frozenset", "dict", "OrderedDict", "Counter", "defaultdict", "numpy", "numpy.text", "array",
                  "torch", "torch.dtype", "torch.device", "torch.Size"]), "v": inner},
                  optional={"max": inner, "of": inner, "dtype": inner, "shape": inner, "key": inner}),
    max_leaves=8)  # fmt: skip

CHANGES = st.lists(st.tuples(st.integers(0, 1 << 16), st.sampled_from(["set", "drop", "twice"]), JUNK), min_size=1, max_size=3)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths of everything in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(each for key, item in inner for each in places(item, (*path, key)))]


def changed(value: Any, changes: list) -> Any:
    """Some values replaced, left out, or given twice."""
    value = copy.deepcopy(value)
    for place, kind, drawn in changes:
        junk = copy.deepcopy(drawn)  # what is put in may be changed by the next one
        paths = places(value)
        path = paths[place % len(paths)]
        if not path:
            if kind == "set":
                value = junk
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        if kind == "set":
            parent[path[-1]] = junk
        elif kind == "drop":
            del parent[path[-1]]
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
    return value


def sealed(body: Any) -> bytes:
    """A record with its digest made right."""
    text = json.dumps({key: item for key, item in body.items() if key != "sha256"} if isinstance(body, dict) else body,
                      separators=(",", ":")).encode()[1:] + b"\n"  # fmt: skip
    return b'{"sha256":"' + hashlib.sha256(text).hexdigest().encode() + b'",' + text
