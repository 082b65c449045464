"""Rank 0's store where all ranks write into one directory: it alone gives checkpoints their names, and gives older ones up."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fxckpt.engine import io
from fxckpt.errors import Corrupt, Diverged, NoSpace, RanksDisagree
from fxckpt.ranks.rendezvous import Rendezvous, Unlike, given_up
from fxckpt.ranks.replicas import Suspects, differences, looks, unlike
from fxckpt.ranks.words import Committed, Done, GivenUp, Key, Word
from fxckpt.store import names
from fxckpt.store.about import ALIKE, DIVERGED
from fxckpt.store.checks import MAX_BYTES, Malformed
from fxckpt.store.dtypes import Tensor
from fxckpt.store.files import space, write_bytes
from fxckpt.store.layout import FileLayout
from fxckpt.store.parts import layers_of, read_part
from fxckpt.store.record import Part, Record
from fxckpt.store.slot import Slot
from fxckpt.store.slots import Store

log: logging.Logger = logging.getLogger("fxckpt")


class FirstStore(Store):
    """Before a commit it waits for the parts of all others, moves their files into the slot, and writes a record that vouches for
    all of them. What it needs of them it reads from the disk; what they say is where. ``options`` are those of ``Store``."""

    def __init__(self, directory: str | os.PathLike[str], rendezvous: Rendezvous, *, on_divergence: str = "warn", **options: Any):
        super().__init__(directory, **options)
        self._raises, self._suspects = on_divergence == "raise", Suspects(rendezvous.world)
        self._are_replicas = False  # no difference was seen in a checkpoint of this process
        self._whole = ""  # what of a record was seen to be put together from all parts
        self.part = (0, rendezvous.world)
        self._others, self._ranks = rendezvous, range(1, rendezvous.world)
        self._keys: dict[Slot, Key] = {}
        self._heard: dict[Slot, dict[int, Word]] = {}  # of each checkpoint, what other ranks have said
        self._unlike: set[Slot] = set()  # what ranks took for another record of the journal, or for none
        self._over: dict[Slot, Word] = {}  # what became of those that the others are not told of yet

    def reserve(self, files: Mapping[str, int], journal: bool = False) -> None:
        """``Store.reserve``; of what the other ranks write it only looks whether there is room: as much as this one, each."""
        super().reserve(files, journal)
        pool, kind = (self._records, "records of the journal") if journal else (self._pool, "checkpoints")
        needed = len(self._ranks) * (pool.limit + pool.max_async) * sum(files.values())
        lacking = needed - sum(_blocks(self.root, files, journal))
        if lacking > (free := space(self.root)[0]):
            raise NoSpace(
                f"{len(self._ranks)} more ranks, each with its part of {pool.limit} {kind} and of {pool.max_async} on the "
                f"way, need {lacking:,} bytes more in {self.root}, which has {free:,} bytes free. Make room, lower keep or "
                "max_async, or name a directory on another disk"
            )

    def renew(self, life: str) -> None:
        """All ranks have agreed on what to load."""
        self._others.renew(life)
        self._suspects = Suspects(self._others.world)

    def begin(self, slot: Slot, checkpoint: int, files: Sequence[FileLayout], step: int = 0) -> None:
        super().begin(slot, checkpoint, files, step)
        self._keys[slot] = self._others.begins(step, slot.name)

    def not_begun(self, step: int, name: str | None, why: str) -> Callable[[], None]:
        return self._others.missed(step, name, why)

    def missing(self, slot: Slot, timeout: float) -> Sequence[int]:
        """The ranks whose parts are not durable yet, after ``timeout`` seconds. Raises Cancelled or RanksDisagree if one gave it
        up."""
        found = self._heard.setdefault(slot, {})
        found |= self._others.heard(self._keys[slot], [rank for rank in self._ranks if rank not in found], timeout)
        for rank, word in found.items():
            if isinstance(word, GivenUp):
                raise given_up(rank, word)
        return [rank for rank in self._ranks if rank not in found]

    def commit(self, slot: Slot, record: Record, state_tensors: Mapping[str, Tensor], parts: Sequence[Record] = ()) -> Path:
        """``Store.commit``, with the parts of all ranks. Raises RanksDisagree if what they did differs."""
        with slot.reporting():
            found = [self._take(slot, rank, word) for rank, word in sorted(self._heard.pop(slot).items())]
            parts = [each for _, each in found]
            if any(_links(each) != _links(record) for each in parts):
                self._unlike.add(slot)
                raise Unlike(f"step {record.step} is not the same record of the journal on all ranks, or not one on all of them")
            _check_alike(record, parts)
            if (alike := record.state[ALIKE]) != self._whole:  # it says how each tensor is laid out
                _check_whole([record, *parts])
                self._whole = alike
            record = self._compared(record, parts)
            first = dataclasses.replace(record, rank=0, world_size=self._others.world, parts=tuple(part for part, _ in found))
            index = index_of([record, *parts]) if record.journal is None else None
            files = record.files if index is None else (*record.files, write_bytes(slot.held(), names.INDEX, index))
        path = super().commit(slot, dataclasses.replace(first, files=files), state_tensors, parts)
        self._tell(slot, Committed(slot.generation, os.path.relpath(path, self.root)))
        return path

    def _compared(self, record: Record, parts: Sequence[Record]) -> Record:
        """The record, with where replicas differ. Raises Diverged if that is asked for, RanksDisagree if they never
        were the same."""
        if not self._are_replicas and (other := unlike([record, *parts])):
            raise RanksDisagree(
                f"the first checkpoint, of step {record.step}, is given up: ranks have other values in {', '.join(other[:8])}, "
                "of which one rank would write its own for all. Make what each has for itself a DTensor on a mesh over these "
                'ranks, or a buffer; if it is to be written all the same: on_divergence="off"'
            )
        looked = looks([record, *parts])
        known = self._suspects.note(looked)
        if not (found := differences(looked)):
            self._are_replicas = True
            return record
        if not (self._are_replicas or self._raises):
            raise RanksDisagree(
                f"the first checkpoint, of step {record.step}, is given up: the ranks are no replicas "
                f"({'; '.join(map(str, found))}), and what they wrote together would be a mixture. Train one model, in "
                "DistributedDataParallel, or give each rank a directory of its own. If it is to be written all the same: "
                'on_divergence="off"'
            )
        what = f"replicas differ at step {record.step}: {'; '.join(map(str, found))}; {known}"
        if self._raises:
            raise Diverged(what)
        log.error("fxckpt: %s. The checkpoint has what each wrote", what)
        said = [[each.writer, each.reader, list(each.layers), list(each.tensors)] for each in found]
        return dataclasses.replace(record, state={**record.state, DIVERGED: said})

    def _take(self, slot: Slot, rank: int, word: Word) -> tuple[Part, Record]:
        """Move the files of a rank's part into the slot; those of the checkpoint that was in it before go back to the rank, which
        writes into them again."""
        assert isinstance(word, Done)
        with (
            self._folder.within(names.RANKS) as ranks,
            ranks.within(names.rank_name(rank)) as own,
            own.within(word.entry) as given,
        ):
            name = names.of_rank(names.PART, rank, self._others.world)
            part = Part(name, word.sha256)
            with given.opened(name, os.O_RDONLY) as fd:
                if (nbytes := os.fstat(fd).st_size) > MAX_BYTES:
                    raise Corrupt(given.at(name), f"it has {nbytes} bytes, more than any record")
                record = read_part(part, io.pread(fd, nbytes, 0), given.at(name))
            for file in [name, *(each.name for each in record.files)]:
                if slot.held().find(file) is not None:
                    slot.held().rename(file, file + names.SPARE, given)
                given.rename(file, file, slot.held())
        return part, record

    def close(self) -> None:
        super().close()
        self._others.leave()

    def abandon(self, slot: Slot, *, bad: bool, why: str = "") -> None:
        super().abandon(slot, bad=bad, why=why)
        self._heard.pop(slot, None)
        self._tell(slot, GivenUp(why, slot in self._unlike))
        self._unlike.discard(slot)

    def _tell(self, slot: Slot, word: Word) -> None:
        """All others, in the order in which checkpoints began: who hears of a later one takes it that this one was given up, and
        writes into its files again. If they cannot be told, they wait in vain, and give it up."""
        if slot not in self._keys:  # it was got ready, and nothing began in it
            return
        self._over[slot] = word
        while (oldest := next(iter(self._keys), None)) in self._over:
            try:
                self._others.say(self._keys.pop(oldest), self._over.pop(oldest))
            except RanksDisagree as error:
                log.error("fxckpt: the other ranks cannot be told what became of a checkpoint: %s", error)


def _blocks(root: str, but: Collection[str], journal: bool) -> Iterator[int]:
    """Bytes of each file of checkpoints, or of records of the ``journal``, that is not called so; a run's output may lie beside,
    and is not counted."""
    for top in filter(names.is_given, os.listdir(root)):
        for path, _, found in os.walk(os.path.join(root, top)):
            for name in found if names.is_of_journal(os.path.basename(path)) == journal else ():
                if name not in but:
                    with suppress(OSError):
                        yield os.lstat(os.path.join(path, name)).st_blocks * 512


def index_of(records: Sequence[Record]) -> bytes | None:
    """Which file has which of the model's tensors, as Hugging Face's readers of several files want it: of what each rank has for
    itself, rank 0's. None where a tensor lies in several files, which that cannot say."""
    tensors = [each for record in records for each in record.tensors(names.MODEL) if names.written_as(each.file) == names.MODEL]
    if any(each.whole is not None for each in tensors):
        return None
    places = {each.key: each.file for each in sorted(tensors, key=lambda each: each.key)}
    return (json.dumps({"metadata": {"total_size": sum(each.nbytes for each in tensors)}, "weight_map": places}) + "\n").encode()


def _links(record: Record) -> object:
    """What must be the same on all ranks for it to be one record of the journal, made of the same tensors; None of a full
    checkpoint."""
    if (journal := record.journal) is None:
        return None
    return journal.base, journal.after, journal.number, journal.order, record.state[ALIKE]


def _check_alike(first: Record, others: Sequence[Record]) -> None:
    """Raise RanksDisagree unless all ranks took this checkpoint of the same training: tensors of the same names and shapes, the
    same settings of the optimizers, as many steps."""
    mine = _training(first)
    for other in others:
        if (where := _first_difference(mine, _training(other))) is not None:
            raise RanksDisagree(
                f"the checkpoint of step {first.step} is given up: rank {other.rank} has other {where}. Ranks that write one "
                "store together must train one model in one way; give each rank a directory of its own if they do not"
            )


def _check_whole(records: Sequence[Record]) -> None:
    """Raise RanksDisagree unless their boxes put each tensor together, once: a mesh may leave out ranks that have it, too."""
    try:
        layers_of(records)
    except Malformed as error:
        raise RanksDisagree(
            f"the checkpoint of step {records[0].step} is given up: {error}. All ranks must be on the mesh that a DTensor lies "
            "on, or on the one that it was cut out of (init_device_mesh over all of them)"
        ) from error


def _training(record: Record) -> dict[str, Any]:
    """What must be equal, by what it is called in a message."""
    optimizers = [
        {**{key: each[key] for key in ("class", "groups")}, "state": {name: of["keys"] for name, of in each["state"].items()}}
        for each in record.optimizers
    ]
    counts = {"step": record.step, "iteration": record.iteration, "updates": record.updates}
    found = {"counts": counts, "optimizers": optimizers, "tensors": record.state[ALIKE]}
    return found if record.journal is None else {**found, "settings": record.journal.groups, "update": record.journal.update}


def _first_difference(mine: Any, its: Any, path: str = "") -> str | None:
    """The first place where two such values are not the same, and what is there; None: they are the same."""
    if isinstance(mine, dict) and isinstance(its, dict):
        if mine.keys() != its.keys():
            return f"{path} than rank 0: {_short(sorted(mine.keys() ^ its.keys()))} on one of them"
        pairs: Iterable[tuple[Any, Any, Any]] = ((key, mine[key], its[key]) for key in mine)
    elif isinstance(mine, list) and isinstance(its, list) and len(mine) == len(its):
        pairs = zip(range(len(mine)), mine, its)
    elif json.dumps(mine) == json.dumps(its):
        return None
    else:
        return f"{path} than rank 0 ({_short(its)} where rank 0 has {_short(mine)})"
    return next((found for key, a, b in pairs if (found := _first_difference(a, b, f"{path}.{key}".lstrip(".")))), None)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:200] + "..."
