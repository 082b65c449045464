"""How much memory something takes at its peak, by the kernel's own account of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def of_process(what: str) -> int:
    """Bytes of a line of ``/proc/self/status``: VmRSS, VmHWM (the most that VmRSS was), VmData."""
    return next(int(line.split()[1]) << 10 for line in STATUS.read_text().splitlines() if line.startswith(f"{what}:"))


@contextmanager
def peak_growth() -> Iterator[Callable[[], int]]:
    """A function that says by how many bytes more this process had resident, at most, than at the beginning of the block."""
    CLEAR.write_text("5")  # the high-water mark begins anew
    before = of_process("VmRSS")
    yield lambda: of_process("VmHWM") - before
