"""A power cut, simulated: which states can a disk be in when the power goes between two recorded calls?

``Disk`` replays a log of ``fxckpt.engine.io`` and keeps, for each file and directory, what is durable and what was done
since its last sync. Nothing unsynced can be relied on: of the pending operations on a file (writes, each torn at 512
bytes if need be, and truncations) and of those on a directory (names set and removed) any subset may have reached the
disk, independently of every other file and directory. A rename inside a directory is one operation. That is harsher
than any journalling file system, and is what POSIX promises. ``Rule`` says which of the states are tried.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote

import instruments

from fxckpt.errors import Corrupt
from fxckpt.store.journaled import journaled
from fxckpt.store.names import RECORDS, step_of
from fxckpt.store.reader import Candidate, Reader
from fxckpt.store.record import Record

SECTOR = 512

Content = dict[str, "bytes | Content | Link"]
"""A directory of a crash state: names to the bytes of files, to directories, or to links."""


@dataclass(frozen=True)
class Link:
    """A symbolic link. Nobody writes through it."""

    target: str


@dataclass(eq=False)
class File:
    """``pending``: (offset, data), or (size, None) for a truncation."""

    durable: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)


@dataclass(eq=False)
class Directory:
    """``pending``: maps of names to what they lead to from then on, None if removed."""

    durable: dict[str, Node] = field(default_factory=dict)
    now: dict[str, Node] = field(default_factory=dict)
    pending: list[dict[str, Node | None]] = field(default_factory=list)

    def change(self, names: dict[str, Node | None]) -> None:
        """Do one operation, to be made durable later."""
        self.pending.append(names)
        apply_names(self.now, names)


Node = File | Directory | Link


def apply_names(entries: dict[str, Node], names: dict[str, Node | None]) -> None:
    """One operation on a directory."""
    for name, node in names.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


def apply_writes(content: bytes, writes: Iterable[tuple[int, bytes | None]]) -> bytes:
    """Writes and truncations on a file, in order."""
    writes = list(writes)
    if not writes:
        return content
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

    def replay(self, call: instruments.Call) -> None:
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

    def _open(self, call: instruments.Call) -> None:
        if call.created:
            self._make(call.path, File())
        elif call.flags & os.O_TRUNC and (file := self.node(call.path)):
            file.pending.append((0, None))

    def _mkdir(self, call: instruments.Call) -> None:
        self._make(call.path, Directory())

    def _symlink(self, call: instruments.Call) -> None:
        self._make(call.path, Link(call.target))

    def _pwrite(self, call: instruments.Call) -> None:
        if file := self.node(call.path):
            file.pending.append((call.offset, call.data))

    def _ftruncate(self, call: instruments.Call) -> None:
        if file := self.node(call.path):
            file.pending.append((call.length, None))

    def _fallocate(self, call: instruments.Call) -> None:
        file = self.node(call.path)
        if file and len(apply_writes(file.durable, file.pending)) < call.length:
            file.pending.append((call.length, None))

    def _rename(self, call: instruments.Call) -> None:
        old, new = self._find(call.path), self._find(call.target)
        node = old[0].now[old[1]]
        if old[0] is new[0]:
            old[0].change({old[1]: None, new[1]: node})
        else:
            old[0].change({old[1]: None})
            new[0].change({new[1]: node})

    def _exchange(self, call: instruments.Call) -> None:
        one, other = self._find(call.path), self._find(call.target)
        assert one[0] is other[0], "names are exchanged in one directory"
        one[0].change({one[1]: other[0].now[other[1]], other[1]: one[0].now[one[1]]})

    def _unlink(self, call: instruments.Call) -> None:
        if found := self._find(call.path):
            found[0].change({found[1]: None})

    _rmdir = _unlink

    def _fsync(self, call: instruments.Call) -> None:
        node = self.node(call.path)
        if isinstance(node, File):
            node.durable, node.pending = apply_writes(node.durable, node.pending), []
        elif node is not None:
            node.durable, node.pending = dict(node.now), []

    _fdatasync = _fsync

    def states(self, rng: random.Random, rule: Rule) -> Iterator[Content]:
        """Legal states after a power cut now, by the sampling ``rule``."""
        names = [(node, i) for node in self.nodes if isinstance(node, Directory) for i in range(len(node.pending))]
        files = [node for node in self.nodes if isinstance(node, File) and node.pending]
        of_names, of_files = list(subsets(names, rule, rng)), list(subsets(files, rule, rng))
        pairs = list(itertools.product(range(len(of_names)), range(len(of_files))))
        if len(pairs) > rule.states:
            pairs = pairs[:1] + pairs[-1:] + rng.sample(pairs[1:-1], rule.states - 2)
        for at_name, at_file in pairs:
            kept = set(of_files[at_file])
            yield self._state(chosen_names(of_names[at_name]), lambda file, kept=kept: file.pending if file in kept else [])
        if not files:
            return
        torn = [lambda at: at == 0, lambda at: at > 0, lambda at: at // SECTOR % 2 == 0]
        torn += [lambda at: rng.random() < 0.5] * rule.samples
        for keeps in torn:
            some = [each for each in names if rng.random() < 0.5] if keeps is torn[-1] else names
            yield self._state(chosen_names(some), lambda file, keeps=keeps: list(tear(file.pending, keeps)))

    def now(self) -> Content:
        """What a process sees: everything that was done."""

        def build(node: Node) -> bytes | Content | Link:
            if isinstance(node, File):
                return apply_writes(node.durable, node.pending)
            return node if isinstance(node, Link) else {name: build(each) for name, each in node.now.items()}

        return build(self.root)

    def _state(self, kept_names: dict[Directory, list], kept: Callable[[File], list]) -> Content:
        """The state in which these of the pending operations are on the disk."""

        def build(node: Node) -> bytes | Content | Link:
            if isinstance(node, File):
                return apply_writes(node.durable, kept(node))
            if isinstance(node, Link):
                return node
            entries = dict(node.durable)
            for names in kept_names.get(node, ()):
                apply_names(entries, names)
            return {name: build(each) for name, each in entries.items()}

        return build(self.root)


@dataclass(frozen=True)
class Rule:
    """Which of the states are tried; the sampling rule that docs/format.md states.

    Of the pending operations on names, and of the files with pending writes: every subset, if there are at most
    ``exhaustive`` of them, else none, all, each alone, all but each, and ``samples`` random ones; every pair of the two,
    or ``states`` random pairs if there are more. And torn writes: the first sector of each only, all but the first,
    every second one, and ``samples`` times each sector by the toss of a coin, the last time with random names.
    """

    exhaustive: int
    samples: int
    states: int


QUICK, SHORT, FULL = Rule(2, 1, 8), Rule(4, 2, 40), Rule(8, 12, 1500)


def subsets(units: list, rule: Rule, rng: random.Random) -> Iterator[list]:
    """Subsets of what is pending, in order; nothing first, all last."""
    if len(units) <= rule.exhaustive:
        for n in range(len(units) + 1):
            yield from map(list, itertools.combinations(units, n))
        return
    yield []
    for unit in units:
        yield [unit]
        yield [other for other in units if other is not unit]
    for _ in range(rule.samples):
        yield [unit for unit in units if rng.random() < 0.5]
    yield list(units)


def chosen_names(units: list[tuple[Directory, int]]) -> dict[Directory, list]:
    """The operations on each directory, in order."""
    chosen: dict[Directory, list] = {}
    for directory, i in units:
        chosen.setdefault(directory, []).append(directory.pending[i])
    return chosen


def tear(pending: list[tuple[int, bytes | None]], keeps: Callable[[int], bool]) -> Iterator[tuple[int, bytes | None]]:
    """The pending operations on a file with only those sectors of each write that ``keeps(offset in the write)`` wants."""
    for offset, data in pending:
        if data is None:
            yield offset, None
            continue
        for at in range(0, len(data), SECTOR):
            if keeps(at):
                yield offset + at, data[at : at + SECTOR]


def write_out(content: Content, path: Path) -> None:
    """A crash state as real files."""
    path.mkdir(parents=True)
    for name, inner in content.items():
        if isinstance(inner, dict):
            write_out(inner, path / name)
        elif isinstance(inner, Link):
            (path / name).symlink_to(inner.target)
        else:
            (path / name).write_bytes(inner)


@dataclass
class Told:
    """What was promised up to some call: (generation, name) of each commit that had returned; ``ruined``, by the names of their
    directories, the generations of those that somebody ruined since, which are promised no more; and how many unnamed ones must
    be ``left``: as many as were, one more with each new one, ``keep`` at most."""

    keep: int = 1
    acknowledged: list[tuple[int, str | None]] = field(default_factory=list)
    ruined: dict[str, int] = field(default_factory=dict)
    left: int = 0

    def hear(self, call: instruments.Call) -> None:
        """Note what a call says, if it says something (``Trainer.acknowledge``, ``ruin``)."""
        if match := re.search(r"/acks/ruined-(\d+)-([^/]+)$", call.path):
            self.ruined[unquote(match[2])] = int(match[1])
            self.left -= step_of(match[2]) is not None
        elif match := re.search(r"/acks/(\d+)(?:-([^~]+))?(?:~.*)?$", call.path):
            self._acknowledge(int(match[1]), match[2])

    def _acknowledge(self, generation: int, name: str | None) -> None:
        known = (generation, name) in self.acknowledged or generation in self.ruined.values()
        self.acknowledged.append((generation, name))
        if name is None and not known:
            self.left = min(self.left + 1, self.keep)

    def promised(self) -> list[tuple[int, str | None]]:
        """What has to be there, or newer ones."""
        return [each for each in self.acknowledged if each[0] not in self.ruined.values()]


class Judge:
    """Whether crash states keep the store's promises. ``store`` is its directory relative to the base; ``states`` counts."""

    def __init__(self, store: str, scratch: Path, keep: int):
        self.way, self.scratch, self.keep = store.split("/"), scratch, keep
        self._verdicts: dict[tuple, Record | Corrupt] = {}
        self.states = 0

    def verdict(self, checkpoint: Content) -> Record | Corrupt:
        """The record of a checkpoint directory that verifies, or what is wrong with it."""
        key = tuple(sorted(checkpoint.items()))
        if key not in self._verdicts:
            path = self.scratch / f"{len(self._verdicts)}"
            write_out(checkpoint, path)
            try:
                reader = Reader(path)
                reader.verify()
                self._verdicts[key] = reader.record
            except Corrupt as error:
                self._verdicts[key] = error
            shutil.rmtree(path)
        return self._verdicts[key]

    def store(self, state: Content) -> Content:
        """The store's directory in a state; empty if a crash left none."""
        for step in self.way:
            state = state.get(step, {})
        return state

    def violation(self, state: Content, told: Told) -> str | None:
        """What promise a state breaks, given what was told by then; None if none."""
        self.states += 1
        store = self.store(state)
        within = store.get("named", {})
        named = {f"named/{name}": inner for name, inner in within.items()} if isinstance(within, dict) else {}
        steps = {name: inner for name, inner in store.items() if (step_of(name), step_of(name, RECORDS)) != (None, None)}
        good: dict[str, Record] = {}
        for name, inner in {**steps, **named}.items():
            if not isinstance(inner, dict) or name.endswith((".bad", ".partial")):
                continue
            verdict = self.verdict(inner)
            if isinstance(verdict, Corrupt) and name in told.ruined:
                continue
            if isinstance(verdict, Corrupt):
                return f"{name} does not verify: {verdict}"
            good[name] = verdict
        return self._missing(loadable(good), told)

    def _missing(self, good: dict[str, int], told: Told) -> str | None:
        """What was acknowledged and cannot be loaded any more; ``good``: generations."""
        acknowledged = told.promised()
        for generation, name in acknowledged:
            if name is not None and good.get(f"named/{name}", 0) < generation:
                return f"the named save {name!r} is lost"
        newest = max((generation for generation, _ in acknowledged), default=0)
        if max(good.values(), default=0) < newest:
            return f"generation {newest} was acknowledged, the newest is {max(good.values(), default=None)}"
        steps = [name for name in good if not name.startswith(("named/", "journal-"))]
        if len(steps) < told.left:
            return f"{len(steps)} checkpoints are left, and {told.left} were"
        return None


def loadable(good: dict[str, Record]) -> dict[str, int]:
    """The generations of checkpoints, and of those records of a journal that have a checkpoint and all records before them."""
    found = [Candidate(Path(name), record) for name, record in good.items()]
    rows = journaled([e for e in found if e.record.journal is None], [e for e in found if e.record.journal is not None])
    reached = {str(each.path) for row in rows for each in row.records}
    return {name: record.generation for name, record in good.items() if record.journal is None or name in reached}


@dataclass(frozen=True)
class Violation:
    """A promise broken by a power cut behind the first ``calls`` calls of a log."""

    calls: int
    last: str
    what: str


def explore(
    log: list[instruments.Call],
    base: str,
    judge: Judge,
    rule: Rule,
    *,
    seed: int = 0,
    skip: int = 0,
    visit: Callable[[Content, Told], None] = lambda state, told: None,
) -> Violation | None:
    """The first broken promise over all prefixes of ``log`` of at least ``skip`` calls and the legal states after each.

    ``visit`` sees every state, with what was told by then.
    """
    disk, rng, told = Disk(base), random.Random(seed), Told(judge.keep)
    for count, call in enumerate([None, *log]):
        if call is not None:
            disk.replay(call)
            told.hear(call)
        if count < skip:
            continue
        for state in disk.states(rng, rule):
            what = judge.violation(state, told)
            if what:
                return Violation(count, f"{call.op} {call.path} {call.target}" if call else "", what)
            visit(state, told)
    return None


# ---- logs with an edge missing ----


@dataclass(frozen=True)
class Edge:
    """``sync`` must have returned before ``before`` begins; both are asked about (call, the name changed last)."""

    sync: Callable[[instruments.Call, str], bool]
    before: Callable[[instruments.Call, str], bool]


def with_last(log: list[instruments.Call]) -> Iterator[tuple[instruments.Call, str]]:
    """Each call with the last change of a name up to it, as "op name"."""
    last = ""
    for call in log:
        if call.op in ("rename", "exchange", "mkdir", "unlink") and "/acks/" not in call.path:
            last = f"{call.op} {os.path.basename(call.target or call.path)}"
        yield call, last


def without(log: list[instruments.Call], edge: Edge) -> list[instruments.Call]:
    """The sync is never made."""
    return [call for call, last in with_last(log) if not edge.sync(call, last)]


def late(log: list[instruments.Call], edge: Edge) -> list[instruments.Call]:
    """The sync is made right behind what it should have come before."""
    out: list[instruments.Call] = []
    held: list[instruments.Call] = []
    for call, last in with_last(log):
        if edge.sync(call, last):
            held.append(call)
            continue
        out.append(call)
        if call.op == "rename":  # what was held is of a directory that has another name now
            held = [moved(each, call.path, call.target) for each in held]
        if held and edge.before(call, last):
            out += held
            held = []
    return out + held


def moved(call: instruments.Call, old: str, new: str) -> instruments.Call:
    """The call on a path below ``old`` as it is when that was renamed to ``new``."""
    inside = call.path == old or call.path.startswith(old + "/")
    return replace(call, path=new + call.path[len(old) :]) if inside else call
