"""A model of csrc/: chunks, pieces, staging, fences and writer threads, with every interleaving tried.

One transition is what the engine does in one hold of its lock, or one end of a copy, write or sync outside of it. Waits are
on the two conditions, and only a wake ends them (the engine's waits also time out; here a lost wake-up shows as a
deadlock). Names are those of csrc/core/internal.h; ``World`` holds the same fields. The writer that posts to a monitor and
devices have their own tests.

``explore`` visits every state that can be reached and returns what is wrong with the first bad one, if there is one:

* memory of a layer changes while a thread copies from it;
* a checkpoint is durable, and a chunk on the disk holds a piece of another step or of none;
* nobody can go on, and not all is over; at the end a staging buffer or an unsettled checkpoint is left;
* a thread works on a checkpoint that was settled (and may have been freed); a buffer is given back twice.

``without`` names a line of the engine to leave out, to see that the model would notice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

ACTIVE, DURABLE, FAILED, CANCELLED = "ACTIVE", "DURABLE", "FAILED", "CANCELLED"
IDLE, TAKEN, DONE = "IDLE", "TAKEN", "DONE"
UNSYNCED, SYNC_TAKEN, SYNCED = "UNSYNCED", "SYNC_TAKEN", "SYNCED"


class Broken(Exception):
    """An invariant does not hold; the message says which."""


@dataclass(frozen=True)
class Setting:
    """``chunks``: the layers that overlap each chunk, one piece each. ``late`` layers are not updated, and emitted only
    behind the updates of the next step. ``bare``: steps without a checkpoint at the end. ``faults``, ``cancels``: how many
    may happen; what was cancelled is not emitted any further."""

    chunks: tuple[tuple[int, ...], ...] = ((0, 1), (1,))
    layers: int = 2
    steps: int = 2
    writers: int = 2
    staging: int = 1
    faults: int = 0
    cancels: int = 0
    late: tuple[int, ...] = ()
    bare: int = 1
    without: str = ""

    def pieces(self) -> list[tuple[int, int]]:
        """(layer, chunk) of each."""
        return [(layer, chunk) for chunk, layers in enumerate(self.chunks) for layer in layers]


class Checkpoint:
    """``struct fx_checkpoint``, of one file."""

    __slots__ = ("chunks_left", "copied", "disk", "emitted", "helpers", "layers_left", "open", "pieces", "ready", "settled",
                 "staged", "state", "sync", "taken", "working")  # fmt: skip

    def __init__(self, setting: Setting):
        n = len(setting.chunks)
        self.state, self.settled, self.open, self.working, self.sync = ACTIVE, False, True, 0, UNSYNCED
        self.emitted = (False,) * setting.layers
        self.pieces, self.copied = (IDLE,) * len(setting.pieces()), (0,) * len(setting.pieces())
        self.layers_left, self.helpers = tuple(map(len, setting.chunks)), (0,) * n
        self.taken, self.staged, self.disk = (False,) * n, (False,) * n, (None,) * n
        self.ready: tuple[int, ...] = tuple(c for c in range(n) if not setting.chunks[c])
        self.chunks_left = n

    def key(self) -> tuple:
        return tuple(getattr(self, name) for name in self.__slots__)


def put(values: tuple, at: int, value) -> tuple:
    return (*values[:at], value, *values[at + 1 :])


class World:
    """All of a state. ``trainer``: (how far in the program, what it is doing); ``writers``: what each is doing."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.memory, self.trainer = (0,) * setting.layers, (0, ("run",))
        self.writers: tuple[tuple, ...] = (("idle",),) * setting.writers
        self.used, self.faults, self.cancels = 0, setting.faults, setting.cancels
        self.checkpoints: list[Checkpoint] = []

    def key(self) -> tuple:
        return (self.memory, self.trainer, tuple(sorted(self.writers)), self.used, self.faults, self.cancels,
                tuple(ck.key() for ck in self.checkpoints))  # fmt: skip

    def copy(self) -> World:
        other = object.__new__(World)
        other.__dict__.update(self.__dict__)
        other.checkpoints = []
        for ck in self.checkpoints:
            twin = object.__new__(Checkpoint)
            for name in Checkpoint.__slots__:
                setattr(twin, name, getattr(ck, name))
            other.checkpoints.append(twin)
        return other

    # ---- conditions ----

    def wake(self) -> None:
        at, doing = self.trainer
        self.trainer = (at, ("run",) if doing == ("wait",) else doing)

    def wake_writers(self) -> None:
        self.writers = tuple(("idle",) if doing == ("wait",) else doing for doing in self.writers)

    # ---- staging.c ----

    def has_room(self) -> bool:
        return self.used < self.setting.staging

    def give(self, ck: Checkpoint, chunk: int) -> None:
        if not ck.staged[chunk]:
            raise Broken("a staging buffer is given back twice")
        ck.staged = put(ck.staged, chunk, False)
        self.used -= 1

    # ---- progress.c ----

    def finish_piece(self, ck: Checkpoint, piece: int) -> None:
        layer, _ = self.setting.pieces()[piece]
        ck.pieces, ck.copied = put(ck.pieces, piece, DONE), put(ck.copied, piece, self.memory[layer])

    def give_up(self, ck: Checkpoint, state: str) -> None:
        if ck.state != ACTIVE:
            return
        ck.state, ck.ready = state, ()
        for piece, (layer, _) in enumerate(self.setting.pieces()):
            if ck.pieces[piece] == IDLE and ck.emitted[layer]:
                ck.pieces = put(ck.pieces, piece, DONE)
        for chunk in range(len(self.setting.chunks)):
            used = ck.helpers[chunk] or ck.taken[chunk]
            if ck.staged[chunk] and (not used or self.setting.without == "who uses it gives it back"):
                self.give(ck, chunk)
        self.wake()
        if self.setting.without != "writers are woken to close the files":
            self.wake_writers()

    def check_durable(self, ck: Checkpoint) -> None:
        if ck.state == ACTIVE and ck.sync == SYNCED and all(ck.emitted):
            ck.state = DURABLE
            self.wake()

    def settle(self, ck: Checkpoint) -> None:
        busy = ck.working and self.setting.without != "who works on it keeps it"
        if ck.settled or ck.state == ACTIVE or busy or TAKEN in ck.pieces or ck.open:
            return
        ck.settled = True
        self.wake()

    # ---- fence.c ----

    def look(self, layer: int) -> tuple[bool, tuple[int, int] | None, int | None]:
        """(done, (checkpoint, piece) to help with, checkpoint that is starved)."""
        done, starved = True, None
        for i, ck in enumerate(self.checkpoints):
            for piece, (of, chunk) in enumerate(self.setting.pieces()):
                if ck.settled or of != layer or not ck.emitted[layer] or ck.pieces[piece] == DONE:
                    continue
                if ck.pieces[piece] == TAKEN and self.setting.without == "a fence waits for who copies":
                    continue
                done = False
                if ck.pieces[piece] != IDLE:
                    continue
                if ck.staged[chunk] or self.has_room():
                    return False, (i, piece), starved
                if ck.layers_left[chunk]:
                    starved = i
        return done, None, starved

    def room_will_come(self) -> bool:
        if self.setting.without == "a fence ends who is starved":
            return True
        return any(
            ck.staged[c] and (ck.helpers[c] or not ck.layers_left[c])
            for ck in self.checkpoints
            if not ck.settled
            for c in range(len(self.setting.chunks))
        )

    def fence(self, layer: int) -> None:
        """One look, and what follows from it."""
        at, _ = self.trainer
        done, help_with, starved = self.look(layer)
        if done:
            self.trainer = (at + 1, ("run",))
        elif help_with is not None:
            ck, chunk = self.checkpoints[help_with[0]], self.setting.pieces()[help_with[1]][1]
            if not ck.staged[chunk]:
                ck.staged, self.used = put(ck.staged, chunk, True), self.used + 1
            ck.helpers = put(ck.helpers, chunk, ck.helpers[chunk] + 1)
            ck.pieces = put(ck.pieces, help_with[1], TAKEN)
            self.trainer = (at, ("copy", *help_with))
        elif starved is not None and not self.room_will_come():
            self.give_up(self.checkpoints[starved], FAILED)
            self.settle(self.checkpoints[starved])
        else:
            self.trainer = (at, ("wait",))

    def helped(self, i: int, piece: int) -> None:
        ck, chunk = self.checkpoints[i], self.setting.pieces()[piece][1]
        self.trainer = (self.trainer[0], ("run",))
        self.finish_piece(ck, piece)
        ck.helpers = put(ck.helpers, chunk, ck.helpers[chunk] - 1)
        if ck.state != ACTIVE and not ck.helpers[chunk]:
            self.give(ck, chunk)
        elif not ck.helpers[chunk] and not ck.layers_left[chunk] and self.setting.without != "who helped wakes the writers":
            self.wake_writers()
        self.settle(ck)

    # ---- checkpoint.c ----

    def emit(self, ck: Checkpoint, layer: int) -> None:
        ck.emitted = put(ck.emitted, layer, True)
        if ck.state == ACTIVE:
            for of, chunk in self.setting.pieces():
                if of == layer:
                    ck.layers_left = put(ck.layers_left, chunk, ck.layers_left[chunk] - 1)
                    if not ck.layers_left[chunk]:
                        ck.ready = (*ck.ready, chunk)
        self.check_durable(ck)
        self.settle(ck)
        self.wake_writers()

    def update(self, layer: int) -> None:
        for ck in self.checkpoints:
            for piece, (of, _) in enumerate(self.setting.pieces()):
                if of == layer and ck.pieces[piece] == TAKEN:
                    raise Broken("memory changes while a thread copies from it")
        self.memory = put(self.memory, layer, self.memory[layer] + 1)

    # ---- writer.c ----

    def take_job(self, w: int) -> None:
        for i, ck in enumerate(self.checkpoints):
            if ck.settled:
                continue
            job = self.job_of(ck)
            if job is not None:
                ck.working += 1
                self.writers = put(self.writers, w, (job[0], i, *job[1:]))
                return
        self.writers = put(self.writers, w, ("wait",))

    def job_of(self, ck: Checkpoint) -> tuple | None:
        if ck.state != ACTIVE:
            return ("close",) if not ck.working and ck.open else None
        if not ck.chunks_left and ck.sync == UNSYNCED:
            ck.sync = SYNC_TAKEN
            return ("sync",)
        for chunk in ck.ready:
            if ck.helpers[chunk] and self.setting.without != "writers pass over a chunk that is helped":
                continue
            ck.ready, ck.taken = tuple(c for c in ck.ready if c != chunk), put(ck.taken, chunk, True)
            mine = tuple(p for p, (_, c) in enumerate(self.setting.pieces()) if c == chunk and ck.pieces[p] == IDLE)
            for piece in mine:
                ck.pieces = put(ck.pieces, piece, TAKEN)
            return "fill", chunk, mine
        return None

    def job_done(self, w: int, well: bool) -> None:
        """The end of what a writer does outside of the lock, and the hold of the lock that follows."""
        what, i, *rest = self.writers[w]
        ck = self.checkpoints[i]
        if ck.settled:
            raise Broken("a thread works on a checkpoint that was settled")
        if what == "fill":
            chunk, mine = rest
            for piece in mine:
                self.finish_piece(ck, piece)
            self.wake()
            here = tuple(
                ck.copied[p] if ck.pieces[p] == DONE else None for p, (_, c) in enumerate(self.setting.pieces()) if c == chunk
            )
            self.writers = put(self.writers, w, ("write", i, chunk, here, ck.state == ACTIVE))
            return
        if what == "write":
            chunk, here, _ = rest
            if ck.staged[chunk]:
                self.give(ck, chunk)
            if not well:
                self.give_up(ck, FAILED)
            elif ck.state == ACTIVE:
                ck.disk, ck.chunks_left = put(ck.disk, chunk, here), ck.chunks_left - 1
            self.wake()
        elif what in ("sync", "close"):  # the descriptor leaves the table, under the lock, before it is closed
            ck.open = False
            self.writers = put(self.writers, w, ("closing", i, what, well))
            return
        elif rest[0] == "sync":
            ck.sync = SYNCED
            if rest[1] and well:
                self.check_durable(ck)
            else:
                self.give_up(ck, FAILED)
        ck.working -= 1
        self.writers = put(self.writers, w, ("idle",))
        self.settle(ck)


def program(setting: Setting) -> list[tuple]:
    """What the training thread does."""
    steps: list[tuple] = []
    updated = [layer for layer in range(setting.layers) if layer not in setting.late]
    for step in range(setting.steps + setting.bare):
        if step < setting.steps:
            steps.append(("begin",))
        for layer in updated:
            steps += [("fence", layer), ("update", layer)]
            steps += [("emit", step, layer)] if step < setting.steps else []
        steps += [("emit", step - 1, layer) for layer in setting.late if 0 < step <= setting.steps]
    return [*steps, ("end",)]


def successors(world: World, steps: list[tuple]) -> Iterator[World]:
    """Every state that one more transition leads to."""
    at, doing = world.trainer
    if at < len(steps) and doing != ("wait",):
        yield advance(world.copy(), steps[at], doing)
    seen = set()
    for w, doing in enumerate(world.writers):
        if doing == ("wait",) or doing in seen:
            continue
        seen.add(doing)
        if doing == ("idle",):
            after = world.copy()
            after.take_job(w)
            yield after
            continue
        after = world.copy()
        after.job_done(w, True)
        yield after
        if world.faults and doing[0] in ("write", "sync") and doing[-1] is not False:
            after = world.copy()
            after.faults -= 1
            after.job_done(w, False)
            yield after
    for i, ck in enumerate(world.checkpoints):
        if world.cancels and ck.state == ACTIVE:
            after = world.copy()
            after.cancels -= 1
            after.give_up(after.checkpoints[i], CANCELLED)
            after.settle(after.checkpoints[i])
            yield after


def advance(world: World, step: tuple, doing: tuple) -> World:
    """The training thread goes on."""
    at = world.trainer[0]
    if doing[0] == "copy":
        world.helped(*doing[1:])
    elif step[0] == "fence":
        world.fence(step[1])
    elif step[0] == "end":
        over = all(ck.settled for ck in world.checkpoints)
        world.trainer = (at + 1, ("run",)) if over else (at, ("wait",))
    else:
        world.trainer = (at + 1, ("run",))
        if step[0] == "begin":
            world.checkpoints.append(Checkpoint(world.setting))
            world.wake_writers()
        elif step[0] == "update":
            world.update(step[1])
        elif world.checkpoints[step[1]].state != CANCELLED:
            world.emit(world.checkpoints[step[1]], step[2])
    return world


def check(world: World, n_steps: int, stuck: bool) -> None:
    """Raises Broken."""
    for step, ck in enumerate(world.checkpoints):
        if ck.state != DURABLE:
            continue
        for chunk, layers in enumerate(world.setting.chunks):
            if ck.disk[chunk] != tuple(0 if layer in world.setting.late else step + 1 for layer in layers):
                raise Broken(f"checkpoint {step + 1} is durable, and its chunk {chunk} holds {ck.disk[chunk]}")
    if not stuck:
        return
    if world.trainer[0] < n_steps or any(doing not in (("wait",), ("idle",)) for doing in world.writers):
        raise Broken(f"nobody can go on: trainer {world.trainer}, writers {world.writers}")
    if world.used or any(
        world.checkpoints[i].staged[c] for i in range(len(world.checkpoints)) for c in range(len(world.setting.chunks))
    ):
        raise Broken("a staging buffer is left at the end")


def explore(setting: Setting) -> tuple[int, set[tuple[str, ...]], str | None]:
    """States visited, the ends of the checkpoints in all final states, and what is broken."""
    steps = program(setting)
    start = World(setting)
    seen, todo, ends = {start.key()}, [start], set()
    while todo:
        world = todo.pop()
        stuck = True
        try:
            for after in successors(world, steps):
                stuck = False
                if (key := after.key()) not in seen:
                    seen.add(key)
                    todo.append(after)
            check(world, len(steps), stuck)
        except Broken as broken:
            return len(seen), ends, str(broken)
        if stuck:
            ends.add(tuple(ck.state for ck in world.checkpoints))
    return len(seen), ends, None
