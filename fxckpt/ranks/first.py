"""Rank 0's store where all ranks write into one directory: it alone gives checkpoints their names, and gives older ones up."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fxckpt.errors import Diverged, NoSpace, RanksDisagree
from fxckpt.ranks.alike import check_alike, links
from fxckpt.ranks.rendezvous import Rendezvous, Unlike, given_up
from fxckpt.ranks.replicas import Suspects, differences, looks, unlike
from fxckpt.ranks.taken import Taken
from fxckpt.ranks.words import Committed, Done, GivenUp, Key, Word
from fxckpt.store import names
from fxckpt.store.about import DIVERGED
from fxckpt.store.checks import Malformed
from fxckpt.store.dtypes import Tensor
from fxckpt.store.files import space, write_bytes
from fxckpt.store.layout import FileLayout
from fxckpt.store.parts import layers_of
from fxckpt.store.record import Record
from fxckpt.store.slot import Slot
from fxckpt.store.slots import Store

log: logging.Logger = logging.getLogger("fxckpt")


class FirstStore(Store):
    """Before a commit it waits for the parts of all others, moves their files into the slot, and writes a record that vouches for
    all of them. What they say in short it compares, and reads from the disk what differs, or is new. ``options`` are those of
    ``Store``."""

    def __init__(self, directory: str | os.PathLike[str], rendezvous: Rendezvous, *, on_divergence: str = "warn", **options: Any):
        super().__init__(directory, **options)
        self._raises, self._suspects = on_divergence == "raise", Suspects(rendezvous.world)
        self._are_replicas = False  # no difference was seen in a checkpoint of this process
        self._placed: dict[bool, tuple[tuple[str, ...], bytes | None]] = {}  # of full ones, and of records of the journal: what
        # each rank said last of where its tensors lie, and the index made of that
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

    def commit(self, slot: Slot, record: Record, state_tensors: Mapping[str, Tensor]) -> Path:
        """``Store.commit``, with the parts of all ranks. Raises RanksDisagree if what they did differs."""
        with slot.reporting():
            taken = self._take(slot, record)
            differ = [taken.record(rank) for rank, brief in enumerate(taken.briefs) if brief.alike != taken.briefs[0].alike]
            if any(links(each) != links(record) for each in differ):
                self._unlike.add(slot)
                raise Unlike(f"step {record.step} is not the same record of the journal on all ranks, or not one on all of them")
            check_alike(record, differ)
            index = self._index(taken)
            record = self._compared(record, taken)
            files = record.files if index is None else (*record.files, write_bytes(slot.held(), names.INDEX, index))
        first = dataclasses.replace(record, rank=0, world_size=self._others.world, parts=taken.parts, files=files)
        path = super().commit(slot, first, state_tensors)
        self._tell(slot, Committed(slot.generation, os.path.relpath(path, self.root)))
        return path

    def _take(self, slot: Slot, record: Record) -> Taken:
        """What all ranks say of this checkpoint, with all files in the slot."""
        done = {rank: word for rank, word in self._heard.pop(slot).items() if isinstance(word, Done)}
        assert len(done) == len(self._ranks)
        taken = Taken(slot.held(), record, done)
        with self._folder.within(names.RANKS) as ranks:
            slot.beside = taken.move_from(ranks)
        return taken

    def _index(self, taken: Taken) -> bytes | None:
        """Of a full checkpoint the index of the model's files. Where tensors lie otherwise than in the one before, it is made
        anew, and all parts are seen to be all of them. Raises RanksDisagree."""
        record, placed = taken.record(0), tuple(brief.placed for brief in taken.briefs)
        is_full = record.journal is None
        before, index = self._placed.get(is_full, ((), None))
        if placed != before:
            records = taken.records()
            _check_whole(records)
            index = index_of(records) if is_full else None
            self._placed[is_full] = placed, index
        return index

    def _compared(self, record: Record, taken: Taken) -> Record:
        """The record, with where replicas differ. Raises Diverged if that is asked for, RanksDisagree if they never
        were the same."""
        if not self._are_replicas and (other := unlike(taken.records())):
            raise RanksDisagree(
                f"the first checkpoint, of step {record.step}, is given up: ranks have other values in {', '.join(other[:8])}, "
                "of which one rank would write its own for all. Make what each has for itself a DTensor on a mesh over these "
                'ranks, or a buffer; if it is to be written all the same: on_divergence="off"'
            )
        looked = looks(taken.briefs, taken.record)
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


def _check_whole(records: Sequence[Record]) -> None:
    """Raise RanksDisagree unless their boxes put each tensor together, once: a mesh may leave out ranks that have it, too."""
    try:
        layers_of(records)
    except Malformed as error:
        raise RanksDisagree(
            f"the checkpoint of step {records[0].step} is given up: {error}. All ranks must be on the mesh that a DTensor lies "
            "on, or on the one that it was cut out of (init_device_mesh over all of them)"
        ) from error
