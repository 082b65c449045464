"""Runs of one marked script: plain, with fxckpt, and killed at random until it is left alone; each tells how it ended."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fork_server import ForkServer
from killing_itself import kills
from marked_script import without_fxckpt
from process_runs import ProcessRun

_FUTURE = "from __future__ import annotations\n"
_BEGIN = f"{_FUTURE}import killing_itself\nkilling_itself.begin()\n"


@dataclass(frozen=True)
class Ending:
    """What a run that came to its end printed there, how many backwards it made itself, how many checkpoints were committed and
    how many given up; of one that was compiled (``compiled_loops.py``) the updates inside backwards, and why others were not."""

    lines: tuple[str, ...]
    backwards: int
    committed: int = field(default=0, compare=False)
    dropped: int = field(default=0, compare=False)
    armed: int = field(default=0, compare=False)
    why: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def of(cls, run: ProcessRun) -> Ending:
        lines = run.wait().splitlines()
        assert run.returncode == 0, run.output
        told = [int(n) for line in lines if line.startswith(("BACKWARDS ", "CHECKPOINTS ")) for n in line.split()[1:]]
        armed = sum(int(line.split()[1]) for line in lines if line.startswith("ARMED "))
        why = tuple(line.removeprefix("WHY ") for line in lines if line.startswith("WHY "))
        return cls(tuple(line for line in lines if line.startswith(("END ", "DIGEST "))), *told, armed=armed, why=why)


class Loop:
    """A marked script and the folder it runs in. ``begins``: further lines in front of it; ``variables``: of its environment."""

    def __init__(self, server: ForkServer, text: str, folder: Path, begins: str = "", **variables: str):
        self._server, self._folder, self._variables = server, folder, variables
        self._script, self._plain = folder / "loop.py", folder / "plain.py"
        self._script.write_text(_BEGIN + begins + text.replace(_FUTURE, ""))
        self._plain.write_text(without_fxckpt(self._script.read_text()))

    def plain(self) -> Ending:
        """Without fxckpt."""
        return Ending.of(self._server.start(self._plain, self._folder / "plain"))

    def whole(self) -> Ending:
        """With it, uninterrupted; nothing is said to be in no checkpoint, since all is."""
        run = self._server.start(self._script, self._folder / "whole", **self._variables)
        ending = Ending.of(run)
        assert "in no checkpoint" not in run.output
        return ending

    def kill(self, folder: Path, at: str) -> Path:
        """Run it in a folder until it is killed there (``killing_itself.py`` says when)."""
        run = self._server.start(self._script, folder, KILL_AT=at, **self._variables)
        run.wait()
        assert run.returncode == -signal.SIGKILL, run.output
        return folder

    def killed(self, times: int, backwards: int, seed: int) -> Ending:
        """Killed so many times within ``backwards``, which an uninterrupted run makes, and run to its end then."""
        chance, folder = random.Random(seed), self._folder / f"killed-{seed}"
        for at in kills(chance, times, backwards):
            self.kill(folder, at)
        ending = Ending.of(self._server.start(self._script, folder, **self._variables))
        assert ending.backwards < backwards, f"seed {seed}: nothing was restored"
        return ending

    def killed_anew(self, rounds: int, times: int, backwards: int) -> Iterator[tuple[int, Ending]]:
        """``killed`` with so many random seeds, which are given with the endings."""
        for seed in random.SystemRandom().sample(range(2**32), rounds):
            yield seed, self.killed(times, backwards, seed)
