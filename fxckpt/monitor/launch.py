"""What the trainer gives the monitor to start with, a process and memory that both share; and what it cannot survive here."""

from __future__ import annotations

import os
import subprocess
import sys

from fxckpt.engine.ring import Ring
from fxckpt.errors import SaveFailed, SetupError

PROGRAM = ("-m", "fxckpt.monitor")  # what Python is asked to run
CONFUSING = ("PYTHONINSPECT", "PYTHONSTARTUP", "PYTHONPROFILEIMPORTTIME")  # variables meant for the trainer alone
INITS = frozenset({"systemd", "init", "launchd", "runit", "openrc-init", "s6-svscan"})
"""Names of a process 1 that outlives what it started."""


def make_ring(slots: int, slot_bytes: int) -> Ring:
    """Memory for so many chunks. Raises SetupError if there is not as much."""
    size, left = slots * slot_bytes, memory_available()
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


def limits() -> list[str]:
    """One sentence for each thing seen here that would end the monitor together with the trainer."""
    out = [text] if (text := _first_process()) else []
    groups = _read("/proc/self/cgroup")
    if os.environ.get("INVOCATION_ID") and ".service" in groups:
        out.append("systemd ends every process of a service when its main process ends, unless KillMode=process is set")
    if os.environ.get("SLURM_STEP_ID"):
        out.append("slurm ends every process of a step when the step is cancelled or runs out of time")
    own = [line[3:] for line in groups.splitlines() if line.startswith("0::")]
    if any(_read(f"/sys/fs/cgroup{path}/memory.oom.group") == "1" for path in own):
        out.append("memory.oom.group is set: when memory runs out, the kernel ends every process of this cgroup")
    return out


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _first_process() -> str:
    """In a container everything ends with process 1."""
    if os.getpid() == 1:
        return "this process is number 1 of its container: when it ends, the container ends, and the monitor with it"
    first = _read("/proc/1/comm")
    contained = any(map(os.path.exists, ("/.dockerenv", "/run/.containerenv"))) or "container" in os.environ
    if contained and first not in INITS:
        what = f"this container ends when its process 1 ({first or 'unknown'}) ends, and the monitor with it"
        return f"{what}: start the trainer from a process that stays"
    return ""


def memory_available() -> int:
    """Bytes that this process can still have, as the system and its control groups tell: shared memory is taken at once,
    and taking more than there is would not fail but wake the kernel's killer."""
    left = [int(line.split()[1]) * 1024 for line in _read("/proc/meminfo").splitlines() if line.startswith("MemAvailable:")]
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            left += _room("/sys/fs/cgroup", path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            left += _room("/sys/fs/cgroup/memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes")
    return min(left, default=1 << 62)


def _room(root: str, path: str, limit: str, usage: str) -> list[int]:
    """What is left under the limit of a control group and of each one above it, as far as they can be read. What the group
    holds of the page cache counts as used: this errs on the careful side."""
    out = []
    while True:
        most, used = _read(f"{root}{path}/{limit}"), _read(f"{root}{path}/{usage}")
        if most.isdigit() and used.isdigit():
            out.append(max(int(most) - int(used), 0))
        if path in ("", "/"):
            return out
        path = path.rpartition("/")[0]
