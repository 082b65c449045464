"""Somebody who does to a store, and to the processes that use it, what one should not, and knows which checkpoints that cost.

A checkpoint, or a record of the journal, is ruined when files of its own directory were touched; when those of a slot were while
it was being written, the next checkpoint in it is. What a slot holds while it *waits* is nobody's checkpoint: to touch that ruins
none.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fxckpt.store import names

HARMLESS = frozenset({"file hard link", "file foreign"})
"""What is done beside the files of a checkpoint, or to none of their bytes."""

OUTSIDE = b"this is somebody else's\n" * 4000


def users_of(directory: Path) -> list[int]:
    """Processes that have it or something below it open."""
    return [pid for pid in (int(each.name) for each in Path("/proc").glob("[0-9]*")) if _uses(pid, directory)]


def _uses(pid: int, directory: Path) -> bool:
    return any(each == directory or directory in each.parents for each in _open_in(pid))


def _open_in(pid: int) -> list[Path]:
    """What a process has open."""
    found = []
    with suppress(OSError):  # it ended while we looked
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # it closed that one, and may have others
                found.append(Path(os.readlink(link)))
    return found


def _stopped(pid: int) -> bool:
    """Whether every thread of it stands still, or it is gone."""
    try:
        tasks = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return True
    return all(each.rpartition(")")[2].split()[0] in "TZX" for each in tasks)


class Vandal:
    """Acts on the store ``root``, at random; ``outside`` is a folder that its links lead to, which nobody may change."""

    def __init__(self, root: Path, outside: Path, dice: random.Random):
        self.root, self.outside, self.dice = root, outside, dice
        self.acts: dict[str, int] = {}
        self.journal: list[str] = []
        self._ruined: dict[str, set[int]] = {}  # name -> inodes of its directory, -1: there is none left
        self._doomed: set[int] = set()  # inodes of slots that were touched while they were written
        self._locks: list[int] = []
        outside.mkdir(exist_ok=True)
        (outside / "file").write_bytes(OUTSIDE)
        (outside / "folder").mkdir(exist_ok=True)
        (outside / "folder" / "model.safetensors").write_bytes(OUTSIDE)

    # ---- what is known afterwards ----

    def ruined(self, name: str) -> bool:
        """Whether the checkpoint that is, or was, called so lost something to us."""
        self._look()
        found = self._ruined.get(name, set())
        with suppress(OSError):
            return (self.root / name).lstat().st_ino in found
        return bool(found)

    def ruined_since(self, step: int) -> bool:
        """Whether a checkpoint of that step, or a later one, is or was ruined in this life."""
        self._look()
        return any((names.step_of(name, None) or 0) >= step and self.ruined(name) for name in list(self._ruined))

    def new_life(self) -> None:
        """What is not there any more matters no more."""
        self._ruined = {name: found for name, found in self._ruined.items() if os.path.lexists(self.root / name)}

    def check_outside(self) -> None:
        """Nothing was written, cut or removed through a link of ours, and nothing was added there."""
        found = {str(path.relative_to(self.outside)): path.read_bytes() for path in self.outside.rglob("*") if path.is_file()}
        assert found == {"file": OUTSIDE, "folder/model.safetensors": OUTSIDE}

    def rest(self) -> None:
        """Let go of what is locked."""
        while self._locks:
            os.close(self._locks.pop())

    def _look(self) -> None:
        """A slot that was touched while it was written has become a checkpoint, or was one until it was read back."""
        for entry in os.scandir(self.root) if self.root.exists() else ():
            if entry.inode() not in self._doomed:
                continue
            step = self._step_in(entry.path) if entry.name.endswith(names.BAD) else names.step_of(entry.name, None)
            if step is not None:
                self._doomed.discard(entry.inode())
                kind = names.RECORDS if entry.name.startswith(names.RECORDS) else names.STEPS
                called = names.step_name(step, kind=kind) if entry.name.endswith(names.BAD) else entry.name
                self._ruined.setdefault(called, set()).add(entry.inode())

    def _step_in(self, path: str) -> int | None:
        """The step that the record in a directory says, whether it verifies or not."""
        with suppress(OSError, ValueError, LookupError, TypeError):
            return int(json.loads(Path(path, names.COMMIT).read_bytes())["step"])
        return None

    # ---- acts ----

    def act(self, trainer: int) -> None:
        """Do one thing, to a file, a directory or a process. ``trainer``: a process that may be sent signals."""
        deeds: list[tuple[int, Callable[[], object]]] = [
            (20, self._touch), (2, self._touch_root), (2, self._lock), (2, self._copy), (2, lambda: self._pause(trainer)),
            (1, lambda: self._signal(trainer)),
        ]  # fmt: skip
        deed = self.dice.choices([each for _, each in deeds], [weight for weight, _ in deeds])[0]
        with suppress(OSError):  # it was faster than we, or a link is there already
            deed()

    def _count(self, what: str, where: str = "") -> None:
        self.acts[what] = self.acts.get(what, 0) + 1
        self.journal.append(f"{time.monotonic():.3f} {what} {where}")

    def _signal(self, trainer: int) -> None:
        how = self.dice.choice([signal.SIGINT, signal.SIGTERM])
        os.kill(trainer, how)
        self._count(how.name)

    def _pause(self, trainer: int) -> None:
        with self._still(self.dice.sample(users_of(self.root) or [trainer], 1)):
            time.sleep(self.dice.uniform(0, 0.3))
        self._count("SIGSTOP")

    @contextmanager
    def _still(self, processes: list[int]):
        """With these stopped, all their threads."""
        with ExitStack() as stack:
            for pid in processes:
                if pid == os.getpid():
                    continue
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
                    stack.callback(self._go_on, pid)
            end = time.monotonic() + 10
            while not all(_stopped(pid) for pid in processes if pid != os.getpid()):
                assert time.monotonic() < end, "a process does not stop"
                time.sleep(0.001)
            yield

    def _go_on(self, pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def _lock(self) -> None:
        """Take a lock for reading, of one of the kinds there are, for a while."""
        self.rest()
        fd = os.open(self.root / names.LOCK, os.O_RDONLY)
        self._locks.append(fd)
        with suppress(OSError):
            self.dice.choice([lambda: fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB),
                              lambda: fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)])()  # fmt: skip
            self._count("read lock")

    def _copy(self) -> None:
        """The whole tree, as a backup does."""
        copy = self.root.parent / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        with suppress(shutil.Error, OSError):  # what was removed meanwhile, or is no file
            shutil.copytree(self.root, copy, symlinks=True)
        self._count("copy of the tree")

    def _touch_root(self) -> None:
        """What lies beside checkpoints."""
        name, how = self.dice.choice([names.STORE, names.LOCK]), self.dice.choice(["remove", "link", "cut"])
        path = self.root / name
        path.lstat()
        if name == names.LOCK and how == "link":
            how = "remove"  # whoever puts another file there says that the store is his: the run ends
        if how == "cut":
            os.close(os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW))  # not what a link of ours leads to
        else:
            path.unlink()
            if how == "link":
                path.symlink_to(self.outside / "file")
        self._count(f"{how} of {name}")

    def _touch(self) -> None:
        """Something in a directory of the store, while its processes run or while they stand still."""
        with ExitStack() as stack:
            users: list[int] = []
            if self.dice.random() < 0.5:
                users = users_of(self.root)
                stack.enter_context(self._still(users))
            steps = [each for each in os.listdir(self.root) if names.step_of(each, None) is not None]
            slots = [each for each in os.listdir(self.root) if each.endswith(names.PARTIAL)]
            if chosen := steps if self.dice.random() < 0.2 else slots:
                self._touch_one(self.dice.choice(chosen), bool(users))

    def _touch_one(self, name: str, still: bool) -> None:
        path = self.root / name
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            others = [pid for pid in users_of(path) if pid != os.getpid()]
            inode, held = os.fstat(fd).st_ino, any(path in _open_in(pid) for pid in others)
            whole = self.dice.random() < 0.15
            done = self._replace_directory(name) if whole else self._touch_file(fd)
            if done is None:
                return
            after = Path(os.readlink(f"/proc/self/fd/{fd}")).name  # it may have got another name meanwhile
        finally:
            os.close(fd)
        self._count(done, f"{name} → {after}{', held' if held else ''}{', still' if still else ''}")
        if done in HARMLESS:
            return
        for each in (name, after):
            if names.step_of(each, None) is not None:
                self._ruined.setdefault(each, set()).add(inode)
        if names.step_of(after, None) is None and (held or not still):
            self._doomed.add(inode)

    def _replace_directory(self, name: str) -> str:
        """A whole directory goes, or a link is in its place."""
        gone, how = self.root.parent / "gone", self.dice.choice(["removed", "link", "file"])
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(self.root / name, gone)
        if how == "link":
            (self.root / name).symlink_to(self.outside / "folder")
        elif how == "file":
            (self.root / name).write_bytes(b"")
        if how != "removed" and names.step_of(name, None) is not None:
            self._ruined.setdefault(name, set()).add((self.root / name).lstat().st_ino)
        return f"directory {how}"

    def _touch_file(self, fd: int) -> str | None:
        """One file of a directory: by its descriptor, whatever name that has by now."""
        files = os.listdir(fd)
        if not files:
            return None
        name = self.dice.choice(files)
        how = self.dice.choice(["removed", "cut", "flipped", "replaced", "link", "hard link", "pipe", "directory", "foreign"])
        try:
            if how in ("cut", "flipped"):
                self._write_to(fd, name, how)
            elif how == "hard link":
                os.link(name, f"{name}.mine", src_dir_fd=fd, dst_dir_fd=fd, follow_symlinks=False)
            elif how == "foreign":
                os.close(os.open(f"{self.dice.randrange(10)}.txt", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=fd))
            else:
                self._put_in_place(fd, name, how)
        except OSError:
            return None if how in ("hard link", "foreign") else f"half {how}"
        return f"file {how}"

    def _write_to(self, fd: int, name: str, how: str) -> None:
        file = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=fd)
        try:
            size = os.fstat(file).st_size
            at = self.dice.randrange(max(size, 1))
            if how == "cut":
                os.ftruncate(file, at)
            elif byte := os.pread(file, 1, at):
                os.pwrite(file, bytes([byte[0] ^ 1 << self.dice.randrange(8)]), at)
        finally:
            os.close(file)

    def _put_in_place(self, fd: int, name: str, how: str) -> None:
        """The file is removed, and perhaps something else has its name."""
        os.unlink(name, dir_fd=fd)
        if how == "replaced":
            file = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644, dir_fd=fd)
            os.write(file, OUTSIDE)
            os.close(file)
        elif how == "link":
            os.symlink(self.outside / "file", name, dir_fd=fd)
        elif how == "pipe":
            os.mkfifo(name, dir_fd=fd)
        elif how == "directory":
            os.mkdir(name, dir_fd=fd)
