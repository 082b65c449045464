"""One run's replicas: what this rank sends to another one, keeps of others, and gets back when a load needs it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fxckpt.errors import Corrupt, NoCheckpoint
from fxckpt.ranks.choice import COMPLETE, Key
from fxckpt.ranks.replication.hosts import address_of, keeper_of
from fxckpt.ranks.replication.keeper import Keeper
from fxckpt.ranks.replication.sender import Done, Sender, Tally
from fxckpt.ranks.replication.transfer import take
from fxckpt.ranks.replication.wire import Line, Lost, connected
from fxckpt.store import names
from fxckpt.store.about import known_as
from fxckpt.store.reader import Candidate, candidates, read_record
from fxckpt.store.replica_folder import ReplicaFolder


class Replication:
    """Of one rank, over the store in ``root``. ``keep``: replicas that stay of each rank. ``hosts``: of all ranks."""

    def __init__(self, root: str, keep: int, rank: int, hosts: Sequence[str]):
        self.rank: int = rank
        self.hosts: Sequence[str] = hosts
        self._root, self._enough = root, max(keep, COMPLETE)
        self._folder = ReplicaFolder(root, keep)
        self._keeper = Keeper(self._folder, self._find, len(set(hosts)) == 1)
        self._sender = Sender(keeper_of(rank, hosts), self._connect, lambda key: self._find(rank, key))
        self._ports: Sequence[int] = ()
        self._secret = b""
        self._life = ""
        self._complete: set[Key] = set()  # of this life

    @property
    def port(self) -> int:
        """Where this rank listens."""
        return self._keeper.port

    @property
    def tally(self) -> Tally:
        """What became of what was sent."""
        return self._sender.tally

    def start(self, secret: bytes, ports: Sequence[int]) -> None:
        """All ranks listen, at these ports."""
        self._secret, self._ports = secret, ports
        self._keeper.start(secret)
        self._sender.start()

    def close(self) -> None:
        """Send and answer no more. What was under way is no replica."""
        self._sender.close()
        self._keeper.close()

    # ---- while the ranks train ----

    def begins(self, life: str) -> None:
        """All ranks have agreed on what to load."""
        self._life, self._complete = life, set()

    def send(self, key: Key, held: Sequence[Key], done: Done) -> None:
        """Have this rank's checkpoint sent, unless a newer one comes first."""
        self._sender.send(key, held, done)

    def complete(self, key: Key) -> None:
        """Every rank's replica of this is durable. Once there are as many of this life as are kept, what lies here of ranks
        that send theirs elsewhere, this one's own included, is of no use any more."""
        if key[2] == self._life and len(self._complete) < self._enough:
            self._complete.add(key)
            if len(self._complete) == self._enough:
                self._folder.forget(self._life)

    # ---- at a load ----

    def here(self) -> list[tuple[int, Candidate]]:
        """(rank, checkpoint) of all that lie on this disk, the store's own included. Named saves are not given to others."""
        own = [(each.record.rank, each) for each in candidates(self._root) if isinstance(each, Candidate)]
        return [*((rank, each) for rank, each in own if each.record.name is None or rank == self.rank), *self._folder.listed()]

    def replica(self, key: Key) -> Candidate | None:
        """This rank's own checkpoint among the replicas on this disk."""
        return next((each for _, each in self._folder.listed(self.rank, key[0]) if known_as(each.record) == key), None)

    def fetch(self, other: int, key: Key) -> Candidate:
        """Get this rank's checkpoint from the disk of another one, to lie among the replicas here. Raises ``Lost``, ``Refused``,
        and why it cannot be kept here: ``Corrupt``, ``StoreError``, ``OSError``."""
        with self._connect(other) as line:
            line.say({"op": "get", "rank": self.rank, "key": key})
            line.hear()
            rank, entry = take(line, self._folder)
        path = os.path.join(self._root, names.REPLICAS, names.replicas_name(rank), entry)
        found = Candidate(Path(path), read_record(path))
        if rank != self.rank or known_as(found.record) != key:
            raise Lost(f"it gave step {found.record.step} of rank {rank}")
        return found

    def _connect(self, other: int) -> Line:
        """To that rank, which has proved itself."""
        line = connected(address_of(self.hosts[other], self.hosts[self.rank]), self._ports[other])
        try:
            line.prove(self._secret)
        except BaseException:
            line.close()
            raise
        return line

    def _find(self, rank: int, key: Key) -> str | None:
        """Where this disk has a rank's checkpoint."""
        for path in names.committed(self._root):
            if names.step_of(os.path.basename(path)) == key[0]:
                with suppress(Corrupt, NoCheckpoint):
                    record = read_record(path)
                    if record.rank == rank and record.parts is None and known_as(record) == key:
                        return path
        return next((str(each.path) for _, each in self._folder.listed(rank, key[0]) if known_as(each.record) == key), None)
