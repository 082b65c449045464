"""A power cut, simulated: which states can a disk be in when the power goes between two recorded calls?

``Disk`` replays a log of ``fxckpt.engine.io`` and keeps, for each file and directory, what is durable and what was done
since its last sync. Nothing unsynced can be relied on: of the pending operations on a file (writes, each torn at 512
bytes if need be, and truncations) and of those on a directory (names set and removed) any subset may have reached the
disk, independently of every other file and directory. A rename inside a directory is one operation. That is harsher
than any journalling file system, and is what POSIX promises.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fxckpt.engine import io
from fxckpt.errors import Corrupt
from fxckpt.store.reader import Reader

SECTOR = 512

Content = dict[str, "bytes | Content"]
"""A directory of a crash state: names to the bytes of files, or to directories."""


@dataclass(eq=False)
class File:
    """``pending``: (offset, data), or (size, None) for a truncation."""

    durable: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)


@dataclass(eq=False)
class Directory:
    """``pending``: maps of names to what they lead to from then on, None if removed."""

    durable: dict[str, File | Directory] = field(default_factory=dict)
    now: dict[str, File | Directory] = field(default_factory=dict)
    pending: list[dict[str, File | Directory | None]] = field(default_factory=list)

    def change(self, names: dict[str, File | Directory | None]) -> None:
        """Do one operation, to be made durable later."""
        self.pending.append(names)
        apply_names(self.now, names)


Node = File | Directory


def apply_names(entries: dict[str, Node], names: dict[str, Node | None]) -> None:
    """One operation on a directory."""
    for name, node in names.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


def apply_writes(content: bytes, writes: Iterable[tuple[int, bytes | None]]) -> bytes:
    """Writes and truncations on a file, in order."""
    raw = bytearray(content)
    for offset, data in writes:
        if data is None:
            raw[offset:] = bytes(max(offset - len(raw), 0))
        else:
            raw.extend(bytes(max(offset + len(data) - len(raw), 0)))
            raw[offset : offset + len(data)] = data
    return bytes(raw)


class Disk:
    """What is below ``base``, a directory that was empty and durable when the recording began."""

    def __init__(self, base: str):
        self.base, self.root = os.path.realpath(base), Directory()
        self.nodes: list[Node] = [self.root]

    def _find(self, path: str) -> tuple[Directory, str] | None:
        """The directory that has the path's last name, and that name; None for what is not below ``base``."""
        if not path.startswith(self.base + "/") or path.endswith(" (deleted)"):
            return None
        *way, name = path[len(self.base) + 1 :].split("/")
        at: Node = self.root
        for step in way:
            at = at.now[step]
        return at, name

    def node(self, path: str) -> Node | None:
        """What the path leads to now."""
        if path == self.base:
            return self.root
        found = self._find(path)
        return found and found[0].now.get(found[1])

    def replay(self, call: io.Call) -> None:
        """One call that was carried out."""
        if call.result < 0:
            return
        do = getattr(self, "_" + call.op)
        do(call)

    def _make(self, path: str, node: Node) -> None:
        found = self._find(path)
        if found:
            found[0].change({found[1]: node})
            self.nodes.append(node)

    def _open(self, call: io.Call) -> None:
        if call.created:
            self._make(call.path, File())
        elif call.flags & os.O_TRUNC and (file := self.node(call.path)):
            file.pending.append((0, None))

    def _mkdir(self, call: io.Call) -> None:
        self._make(call.path, Directory())

    def _pwrite(self, call: io.Call) -> None:
        if file := self.node(call.path):
            file.pending.append((call.offset, call.data))

    def _ftruncate(self, call: io.Call) -> None:
        if file := self.node(call.path):
            file.pending.append((call.length, None))

    def _rename(self, call: io.Call) -> None:
        old, new = self._find(call.path), self._find(call.target)
        node = old[0].now[old[1]]
        if old[0] is new[0]:
            old[0].change({old[1]: None, new[1]: node})
        else:
            old[0].change({old[1]: None})
            new[0].change({new[1]: node})

    def _unlink(self, call: io.Call) -> None:
        if found := self._find(call.path):
            found[0].change({found[1]: None})

    _rmdir = _unlink

    def _fsync(self, call: io.Call) -> None:
        node = self.node(call.path)
        if isinstance(node, File):
            node.durable, node.pending = apply_writes(node.durable, node.pending), []
        elif node is not None:
            node.durable, node.pending = dict(node.now), []

    _fdatasync = _fsync

    def states(self, rng: random.Random, samples: int) -> Iterator[Content]:
        """Legal states after a power cut now: nothing unsynced kept, all of it, all of one file or directory only,
        all but that of one, and ``samples`` random subsets of single operations with torn writes."""
        units = [node for node in self.nodes if node.pending]
        yield self._state(lambda node: [])
        if not units:
            return
        yield self._state(lambda node: node.pending)
        if len(units) > 1:
            for unit in units:
                yield self._state(lambda node, unit=unit: node.pending if node is unit else [])
                yield self._state(lambda node, unit=unit: [] if node is unit else node.pending)
        for _ in range(samples):
            chosen = {id(unit): list(some_of(unit.pending, rng)) for unit in units}
            yield self._state(lambda node, chosen=chosen: chosen.get(id(node), []))

    def _state(self, kept: Callable[[Node], list]) -> Content:
        """The state in which of each node's pending operations those that ``kept`` says are on the disk."""

        def build(directory: Directory) -> Content:
            entries = dict(directory.durable)
            for names in kept(directory):
                apply_names(entries, names)
            return {name: build(node) if isinstance(node, Directory) else apply_writes(node.durable, kept(node))
                    for name, node in entries.items()}

        return build(self.root)


def some_of(pending: list, rng: random.Random) -> Iterator:
    """A random subset in order; writes may be torn."""
    share = rng.random()
    for operation in pending:
        if rng.random() > share:
            continue
        if isinstance(operation, dict) or operation[1] is None or rng.random() < 0.5:
            yield operation
            continue
        offset, data = operation
        for at in range(0, len(data), SECTOR):
            if rng.random() < 0.5:
                yield offset + at, data[at : at + SECTOR]


def write_out(content: Content, path: Path) -> None:
    """A crash state as real files."""
    path.mkdir(parents=True)
    for name, inner in content.items():
        if isinstance(inner, dict):
            write_out(inner, path / name)
        else:
            (path / name).write_bytes(inner)


class Judge:
    """Whether crash states keep the store's promises. ``store`` is its directory relative to the base.

    With ``partials`` they are judged too, beyond what is promised: a record never lies, not even in a ``.partial``
    (where a file may be missing).
    """

    def __init__(self, store: str, scratch: Path, keep: int, partials: bool = True):
        self.way, self.scratch, self.keep, self.partials = store.split("/"), scratch, keep, partials
        self._verdicts: dict[bytes, int | Corrupt] = {}

    def verdict(self, checkpoint: Content) -> int | Corrupt:
        """The generation of a checkpoint directory that verifies, or what is wrong with it."""
        digest = hashlib.blake2b()
        for name, data in sorted(checkpoint.items()):
            digest.update(f"{name} {len(data)} ".encode() + data)
        key = digest.digest()
        if key not in self._verdicts:
            path = self.scratch / f"{len(self._verdicts)}"
            write_out(checkpoint, path)
            try:
                reader = Reader(path)
                reader.verify()
                self._verdicts[key] = reader.record.generation
            except Corrupt as error:
                self._verdicts[key] = error
        return self._verdicts[key]

    def store(self, state: Content) -> Content:
        """The store's directory in a state; empty if a crash left none."""
        for step in self.way:
            state = state.get(step, {})
        return state

    def violation(self, state: Content, acknowledged: list[tuple[int, str | None]]) -> str | None:
        """What promise a state breaks, given the (generation, name) of each commit that had returned; None if none."""
        store = self.store(state)
        named = {f"named/{name}": inner for name, inner in store.get("named", {}).items()}
        good: dict[str, int] = {}
        for name, inner in {**store, **named}.items():
            if not isinstance(inner, dict) or name == "named" or name.endswith(".bad"):
                continue
            partial = name.endswith(".partial")
            if partial and not (self.partials and "commit.json" in inner):
                continue
            verdict = self.verdict(inner)
            if isinstance(verdict, Corrupt) and not (partial and verdict.reason == "the file is missing"):
                return f"{name} does not verify: {verdict}"
            if not partial:
                good[name] = verdict
        return self._missing(good, acknowledged)

    def _missing(self, good: dict[str, int], acknowledged: list[tuple[int, str | None]]) -> str | None:
        """What was acknowledged and cannot be loaded any more."""
        for generation, name in acknowledged:
            if name is not None and good.get(f"named/{name}") != generation:
                return f"the named save {name!r} is lost"
        newest = max((generation for generation, _ in acknowledged), default=0)
        if max(good.values(), default=0) < newest:
            return f"generation {newest} was acknowledged, the newest is {max(good.values(), default=None)}"
        unnamed = [generation for generation, name in acknowledged if name is None]
        steps = [name for name in good if not name.startswith("named/")]
        if len(steps) < min(self.keep, len(unnamed)):
            return f"{len(steps)} checkpoints are left of the {self.keep} to keep"
        return None


@dataclass(frozen=True)
class Violation:
    """A promise broken by a power cut behind the first ``calls`` calls of a log."""

    calls: int
    last: str
    what: str


def explore(log: list[io.Call], base: str, judge: Judge, *, samples: int, seed: int = 0,
            visit: Callable[[Content, list], None] = lambda state, acknowledged: None) -> Violation | None:
    """The first broken promise over all prefixes of ``log`` and the legal states after each, or None.

    ``visit`` sees every state, with what was acknowledged by then (``Trainer.acknowledge``).
    """
    disk, rng, acknowledged = Disk(base), random.Random(seed), []
    for count, call in enumerate([None, *log]):
        if call is not None:
            disk.replay(call)
            if match := re.search(r"/acks/(\d+)(?:-(.+))?$", call.path):
                acknowledged.append((int(match[1]), match[2]))
        for state in disk.states(rng, samples):
            what = judge.violation(state, acknowledged)
            if what:
                return Violation(count, f"{call.op} {call.path} {call.target}" if call else "", what)
            visit(state, acknowledged)
    return None
