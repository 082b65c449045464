"""What the trainer gives the monitor to start with: a process, and memory that both share."""

from __future__ import annotations

import os
import subprocess
import sys

from fxckpt.engine.ring import Ring
from fxckpt.errors import SaveFailed, SetupError
from fxckpt.monitor import limits

PROGRAM = ("-m", "fxckpt.monitor")  # what Python is asked to run
CONFUSING = ("PYTHONINSPECT", "PYTHONSTARTUP", "PYTHONPROFILEIMPORTTIME")  # variables meant for the trainer alone


def make_ring(slots: int, slot_bytes: int) -> Ring:
    """Memory for so many chunks. Raises SetupError if there is not as much."""
    size, left = slots * slot_bytes, limits.memory_available()
    needs = f'writer="monitor" needs {size >> 20} MiB of shared memory'
    advice = "Ask for less with staging_mb, or give the container more memory (the size of /dev/shm does not matter)"
    if size > left:
        raise SetupError(f"{needs}, of which {left >> 20} MiB are free. {advice}")
    try:
        return Ring.make(slots, slot_bytes)
    except SaveFailed as error:
        raise SetupError(f"{needs}: {error}. {advice}") from error


def spawn(fds: list[int]) -> subprocess.Popen[bytes]:
    """The process, in a session of its own: Ctrl-C and the terminal's end are for the trainer."""
    if not sys.executable:
        raise SetupError('writer="monitor" starts a second Python, and sys.executable does not say which')
    env = {key: value for key, value in os.environ.items() if key not in CONFUSING}
    env["PYTHONPATH"] = os.pathsep.join(os.path.abspath(each) for each in sys.path)
    env["OPENBLAS_NUM_THREADS"] = env["OMP_NUM_THREADS"] = "1"
    # From the root directory: "-m" looks for modules in the working directory first, and keeps its file system busy.
    program, null = [sys.executable, *PROGRAM, *map(str, fds)], subprocess.DEVNULL
    return subprocess.Popen(program, pass_fds=fds, env=env, cwd="/", start_new_session=True, stdin=null, stdout=null)
