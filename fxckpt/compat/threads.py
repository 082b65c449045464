"""How many threads the kernels of the calling thread use, and which modes it has.

Feature tests: ``tests/project/test_torch_private.py``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import os
from collections.abc import Callable, Iterator

import torch


def modes_active() -> bool:
    """Does a mode of this thread see operators (a FLOP counter, a device context)? Other threads do not have it.

    The depths of the two stacks are private; the public way to push a mode has no public way to ask.
    """
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack())


@functools.cache
def _thread_counts() -> tuple[Callable[[int], None], Callable[[int], int] | None] | None:
    """What sets how many threads kernels of the calling thread use: OpenMP's function, and MKL's, which gives back the value
    before it. None where ATen runs on something else.

    ``torch.set_num_threads`` does not do: it also changes what threads that start later get.
    """
    path = glob.glob(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.*"))
    library = ctypes.CDLL(path[0]) if path else None
    openmp, mkl = (getattr(library, name, None) for name in ("omp_set_num_threads", "MKL_Set_Num_Threads_Local"))
    if openmp is None or "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    openmp.argtypes, openmp.restype = [ctypes.c_int], None
    if not torch.backends.mkl.is_available():
        return openmp, None
    if mkl is None:
        return None
    mkl.argtypes, mkl.restype = [ctypes.c_int], ctypes.c_int
    return openmp, mkl


def can_use_one_core() -> bool:
    """Does :func:`one_core` work with this build of torch?"""
    return _thread_counts() is not None


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Kernels that this thread runs inside use no other thread. Other threads keep what they have.

    A thread that opens a parallel region gets a team of its own; more threads than cores then make OpenMP sleep at
    every barrier of the process (libgomp throttles its spinning), which takes 20 times as long.
    """
    before, counts = torch.get_num_threads(), _thread_counts()
    assert counts is not None, "ask can_use_one_core first"
    openmp, mkl = counts
    openmp(1)
    mkl_before = mkl(1) if mkl is not None else 0
    try:
        yield
    finally:
        openmp(before)
        if mkl is not None:
            mkl(mkl_before)
