"""The C engine as Python sees it. Importing this package does not load the extension: that is loaded at first use.

engine.py      Engine: threads and buffers; begins checkpoints, fences layers
plan.py        Plan, Sources: where tensors lie in files, and in memory
checkpoint.py  Checkpoint: one pass over a plan; copies tensors out of live memory and writes them
fetch.py       Fetch: one value of a CUDA device on its way to the host
reading.py     read_verified: reads them back, checked; crc32c, and of what was checksummed in parts
sums.py        tables of checksums, and their text
ring.py        the memory that a trainer shares with its monitor
io.py          the table of file operations
patient_lock.py  locks that Ctrl-C cannot leave taken
_lib.py        the extension: finds it, waits for it in slices, makes its failures exceptions
cdef.h         what is declared to cffi; csrc/engine.h is the manual
build.py       how the extension is built
"""

from fxckpt.engine import io
from fxckpt.engine._lib import SLICE, Patience, Streams
from fxckpt.engine.checkpoint import Checkpoint
from fxckpt.engine.engine import Engine, EngineStatistics
from fxckpt.engine.fetch import Fetch
from fxckpt.engine.patient_lock import Latch, PatientLock, is_owned
from fxckpt.engine.plan import Plan, Sources
from fxckpt.engine.reading import crc32c, crc32c_joined, read_verified

__all__ = [
    "SLICE", "Checkpoint", "Engine", "EngineStatistics", "Fetch", "Latch", "Patience", "PatientLock", "Plan", "Sources",
    "Streams", "crc32c", "crc32c_joined", "io", "is_owned", "read_verified",
]  # fmt: skip
