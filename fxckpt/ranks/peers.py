"""Talks to the other ranks while they train, on a thread of its own, so that all keep a step that all have."""

from __future__ import annotations

import dataclasses
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from fxckpt.errors import FxckptError
from fxckpt.ranks.choice import Key, key_of
from fxckpt.ranks.common import Decision, Holder, Promise, Sent, aim_next, decide
from fxckpt.ranks.messages import Messages

log: logging.Logger = logging.getLogger("fxckpt")

BUSY, IDLE = 0.01, 0.5
"""Seconds between two looks at the store: while a promise waits for its answer or was made in the last second, and else."""

Hold = Callable[[Collection[int]], Collection[int]]
"""Asks a store to keep these generations, and returns those that it has."""


class Replicates(Protocol):
    """Sends this rank's checkpoints to another rank; see ``replication``."""

    def send(self, key: Key, held: Sequence[Key], done: Callable[[Key, bool], None], /) -> None: ...
    def complete(self, key: Key, /) -> None: ...


class Peers:
    """One rank of one life of a job. ``committed`` is called by the thread that commits, and waits for nothing; the thread of
    this object sends and hears. If the process group's store dies, what is held stays held, and training and checkpoints go on.

    ``prefix``: of its messages, the same on all ranks and in no other life. ``hold``: asks this rank's store. ``window``: how
    many of the newest checkpoints are promised. ``loaded``: with what all began, and its generation here; None for that: it is
    no checkpoint of the store, and stays by itself. ``replicas``: where common steps are sent, if anywhere; ``safe``: of which
    steps every rank has one, likewise, oldest first."""

    def __init__(
        self,
        store: Messages,
        rank: int,
        world: int,
        prefix: str,
        hold: Hold,
        window: int,
        loaded: tuple[Key, int | None] | None,
        replicas: Replicates | None = None,
        safe: Mapping[Key, int | None] | None = None,
    ):
        self.rank: int = rank
        self.world: int = world
        self._store, self._prefix, self._hold, self._window = store, prefix, hold, window
        self._holder = Holder(rank, None if loaded is None else loaded[0], list(safe or ()))
        self._decision = Decision(self._holder.common, (-1,) * world, self._holder.aim)
        before = {**(safe or {}), **({} if loaded is None else dict([loaded]))}
        self._generations: dict[Key, int] = {key: at for key, at in before.items() if at is not None}  # oldest first
        self._replicas = replicas
        self._sent: Sent | None = None
        self._busy_until = 0.0
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fxckpt-ranks", daemon=True)
        hold(list(self._generations.values()))  # before anything is committed that it could be given up for

    @property
    def common(self) -> Key | None:
        """The newest checkpoint that all ranks are known to have."""
        return self._holder.common

    def start(self) -> None:
        """Begin to talk."""
        self._thread.start()

    def committed(self, key: Key, generation: int) -> None:
        """This rank has one more."""
        self._events.put(lambda: self._generations.update({key: generation}))

    def stop(self) -> None:
        """Say no more. What is held stays held. A thread that a dead store does not answer is left behind."""
        self._events.put(None)
        if self._thread.is_alive():
            self._thread.join(2.0)

    def _run(self) -> None:
        try:
            self._say()
            while self._note_events():
                try:
                    self._turn()
                except FxckptError as error:  # the monitor is being started again
                    log.debug("the ranks' promises wait: %s", error)
        except RuntimeError as error:  # all that torch.distributed's stores raise
            kept = "" if self.common is None else f", and step {self.common[0]}, the newest that all are known to have, is kept"
            log.warning("fxckpt: rank %d hears nothing of the others any more, as the process group's store is gone (%s). Unless "
                        "the job is ending: checkpoints go on%s", self.rank, str(error).partition("\n")[0], kept)  # fmt: skip

    def _note_events(self) -> bool:
        """Wait for the next turn, and note what was committed or sent; False at the end."""
        busy = self._holder.waits or time.monotonic() < self._busy_until
        try:
            event = self._events.get(timeout=BUSY if busy else IDLE)
        except queue.Empty:
            return True
        if event is not None:
            event()
            self._busy_until = time.monotonic() + 1.0
        return event is not None

    def _turn(self) -> None:
        """Hear, promise, and at rank 0 decide."""
        if self.rank == 0:
            self._decide()
        elif self._store.check([f"{self._prefix}/common"]):
            self._hear(Decision.from_json(json.loads(self._store.get(f"{self._prefix}/common"))))
        if not self._holder.waits:
            self._promise()

    def _hear(self, decision: Decision) -> None:
        """Let go of what need not be held any more, and send the step that all send."""
        before = self._holder.aim
        self._holder.hear(decision)
        self._hold_on(())
        if self._replicas is not None:
            now = self._holder.aim
            if now.complete != before.complete:
                self._replicas.complete(now.complete[-1])
            if now.target is not None and now.target != before.target:
                self._replicas.send(now.target, now.keys, lambda key, good: self._events.put(lambda: self._note_sent(key, good)))

    def _note_sent(self, key: Key, good: bool) -> None:
        """Tell rank 0 that this rank is done with a target."""
        self._sent = key, good
        self._say()

    def _promise(self) -> None:
        """The newest checkpoints, if they are others than those that were promised last."""
        wanted = list(self._generations)[-self._window :]
        if tuple(wanted) == self._holder.promise.keys:
            return
        there = self._hold_on(wanted)
        found = [key for key in wanted if self._generations[key] in there]
        if tuple(found) != self._holder.promise.keys:
            self._holder.make(found)
            self._say()
        held = self._holder.held()
        self._generations = {key: at for key, at in self._generations.items() if key in held or key in wanted}

    def _hold_on(self, more: Collection[Key]) -> Collection[int]:
        """Have the store keep what is held, and these; returns the generations that it has."""
        held = self._holder.held()
        return self._hold([at for key, at in self._generations.items() if key in held or key in more])

    def _say(self) -> None:
        """This rank's promise, and what it has sent."""
        self._store.set(f"{self._prefix}/held/{self.rank}", json.dumps([*self._holder.promise.to_json(), self._sent]))

    def _decide(self) -> None:
        """Rank 0: what all promise, once each has said something."""
        keys = [f"{self._prefix}/held/{rank}" for rank in range(self.world)]
        if not self._store.check(keys):
            return
        said = [json.loads(each) for each in self._store.multi_get(keys)]
        found = decide(self._decision, [Promise.from_json(promise) for *promise, _ in said])
        if self._replicas is not None:
            sent = [None if each is None else (key_of(each[0]), bool(each[1])) for *_, each in said]
            found = dataclasses.replace(found, aim=aim_next(found.aim, found.common, sent))
        if found != self._decision:
            self._decision = found
            self._store.set(f"{self._prefix}/common", json.dumps(found.to_json()))
            self._hear(found)
