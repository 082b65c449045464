"""A picture of the last steps for Perfetto or chrome://tracing: copies, writes, fences and commits on tracks of their own.

    with opt.ckpt.trace("trace.json"):        # or FXCKPT_TRACE=trace.json for the whole run
        train(10)

Times are those of the machine's clock (UNIX), as in what ``torch.profiler`` exports; with ``beside=`` the file of such a
profile becomes part of the picture, so that each copy is seen beside the kernels that it overlaps.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any, Protocol

from fxckpt.engine import Engine
from fxckpt.errors import SetupError

log: logging.Logger = logging.getLogger("fxckpt")

StrPath = str | os.PathLike[str]

SPANS = 200_000
"""Spans kept, at most: about 13 MiB. What comes later is counted, and the file says how many there were."""

KINDS = ("copy", "write", "sync", "fence", "copy in a fence", "issue", "copy")
"""By ``enum fx_span_kind`` of csrc/engine.h."""

STEPS, FENCES, COMMITS, ISSUES, WRITERS, DEVICES = 1, 2, 3, 4, 100, 200
"""Numbers of tracks; a writer or device is added to its own."""


class Tracer:
    """Records from now on until :meth:`write`. One at a time for each run."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._offset = time.time_ns() - time.monotonic_ns()
        self._lock = threading.Lock()
        self._spans: list[tuple[str, int, int, int, dict[str, Any]]] = []
        self._checkpoints: dict[int, tuple[int, list[str]]] = {}
        self._dropped = 0
        engine.trace(SPANS)

    def began(self, checkpoint: int, step: int, layers: list[str]) -> None:
        """Names for a checkpoint's spans."""
        with self._lock:
            self._checkpoints[checkpoint] = step, layers

    def add(self, name: str, track: int, begin_ns: int, **arguments: object) -> None:
        """A span of the run itself, from ``begin_ns`` (monotonic) until now."""
        with self._lock:
            if len(self._spans) < SPANS:
                self._spans.append((name, track, begin_ns, time.monotonic_ns(), arguments))
            else:
                self._dropped += 1

    def write(self, path: StrPath, beside: StrPath | None = None) -> None:
        """Stop, and write what was recorded; ``beside``: a Chrome trace of ``torch.profiler`` to be shown with it. Raises
        SetupError if that is no such file, OSError if ``path`` cannot be written."""
        spans, dropped = self._engine.take_spans()
        self._engine.trace(0)
        with self._lock:
            found = [*self._spans, *(self._named(span) for span in spans)]
        # Times are microseconds as doubles: since 1970 they would be exact to a quarter of one, and spans in a row overlap.
        first = min((begin for _, _, begin, _, _ in found), default=0) + self._offset
        empty: dict[str, Any] = {"traceEvents": [], "displayTimeUnit": "ms", "baseTimeNanoseconds": first}
        whole = empty if beside is None else _profile(beside)
        base = whole.get("baseTimeNanoseconds", 0)
        whole["fxckpt"] = {"dropped": dropped + self._dropped}
        pid = os.getpid() + (1 << 24)  # a process of its own beside the profiler's
        for name, track, begin, end, arguments in found:
            event = {"ph": "X", "cat": "fxckpt", "name": name, "pid": pid, "tid": track, "args": arguments}
            whole["traceEvents"].append({**event, "ts": (begin + self._offset - base) / 1e3, "dur": (end - begin) / 1e3})
        whole["traceEvents"] += _track_names(pid, sorted({track for _, track, *_ in found}))
        Path(path).write_text(json.dumps(whole))

    def _named(self, span: tuple[int, ...]) -> tuple[str, int, int, int, dict[str, Any]]:
        """A span of the engine with its track, its layer's name and its step."""
        kind, number, checkpoint, layer, chunk, nbytes, begin, end = span
        step, layers = self._checkpoints.get(checkpoint, (None, []))
        track = (WRITERS + number, WRITERS + number, WRITERS + number, FENCES, FENCES, ISSUES, DEVICES + number)[kind]
        name = layers[layer] if 0 <= layer < len(layers) else ""
        arguments: dict[str, Any] = {"step": step, "layer": name or layer, "chunk": chunk, "bytes": nbytes}
        if kind in (0, 1, 6) and end > begin and nbytes:
            arguments["GB/s"] = round(nbytes / (end - begin), 3)
        label = f"{KINDS[kind]} {name}".strip()
        return label, track, begin, end, {k: v for k, v in arguments.items() if v not in (None, -1)}


def _profile(path: StrPath) -> dict[str, Any]:
    """What torch.profiler exported."""
    try:
        found: dict[str, Any] = json.loads(Path(path).read_text())
        found["traceEvents"].__iter__()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SetupError(f"beside={os.fspath(path)!r} is no Chrome trace of torch.profiler: {error}") from error
    return found


def _track_names(pid: int, tracks: list[int]) -> list[dict[str, Any]]:
    """Metadata that names the tracks and puts them in this order."""
    fixed = {STEPS: "steps", FENCES: "fences (training thread)", COMMITS: "commits", ISSUES: "copies issued"}
    events = [{"ph": "M", "name": "process_name", "pid": pid, "args": {"name": "fxckpt"}}]
    for track in tracks:
        name = fixed.get(track) or (f"writer {track - WRITERS}" if track < DEVICES else f"copies from cuda:{track - DEVICES}")
        events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": track, "args": {"name": name}})
        events.append({"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": track, "args": {"sort_index": track}})
    return events


class Traced(Protocol):
    """What spans come from: ``tracer`` is there while somebody records."""

    tracer: Tracer | None


class Tracing:
    """``opt.ckpt.trace(path)``: a context that records a run while it is open. Without an engine it does nothing."""

    def __init__(self, traced: Traced, engine: Engine | None, path: StrPath, beside: StrPath | None = None):
        self._traced, self._engine, self._path, self._beside = traced, engine, path, beside

    def __enter__(self) -> Tracing:
        if self._engine is None:
            log.warning("fxckpt is off (FXCKPT_DISABLE=1): nothing is traced")
            return self
        if self._traced.tracer is not None:
            raise SetupError("this run is traced already (FXCKPT_TRACE, or another opt.ckpt.trace)")
        self._traced.tracer = Tracer(self._engine)
        return self

    def __exit__(self, *error: object) -> None:
        tracer, self._traced.tracer = self._traced.tracer, None
        if tracer is not None:
            tracer.write(self._path, self._beside)


def from_environment(traced: Traced, engine: Engine | None, number: int) -> Tracing | None:
    """``FXCKPT_TRACE=file.json``: trace the run until it shuts down. A further run in the process gets its number."""
    path = os.environ.get("FXCKPT_TRACE")
    if not path or engine is None:
        return None
    path = path if number == 1 else f"{path.removesuffix('.json')}-{number}.json"
    return Tracing(traced, engine, path).__enter__()
