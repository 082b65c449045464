"""Compile an update's body with Inductor: one kernel for every shape, length and depth.

Inductor is asked for the C++ of one flat tensor of unknown length, since an elementwise update does not see shapes. A loop of
ours takes a whole list of them, cuts them into blocks that stay in a core's cache and deals those out evenly to OpenMP's threads:
a step costs one call from Python. Scalars come in by address; a Python float would be baked in.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fxckpt.compat.inductor import cache_folder, compiler_settings, inductor_kernel, load_cpp
from fxckpt.graph import passes
from fxckpt.graph.update.hoist import Program
from fxckpt.graph.update.tensor_scalars import tensor_scalars_pass
from fxckpt.graph.update.trace import NotTraceable

log: logging.Logger = logging.getLogger("fxckpt")

BLOCK = 16384
"""Elements of one piece of work. AdamW in single precision touches 256 KiB for it, half of a usual second-level cache."""


def scalar_dtype(dtype: torch.dtype) -> torch.dtype:
    """What eager kernels convert a Python scalar to: double for double, else single (their accumulation type)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_DRIVER = """
// members: how many; rows: {width} addresses of each; lengths: elements of each; scalars: their addresses.
extern "C" void update_all(int64_t members, void* const* rows, const int64_t* lengths, void* const* scalars)
{{
    int64_t total = 0;
    for (int64_t m = 0; m < members; m++) total += (lengths[m] + {block} - 1) / {block};
    #pragma omp parallel
    {{
        int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        int64_t next = total * thread / threads, end = total * (thread + 1) / threads, first = 0;
        for (int64_t m = 0; m < members && next < end; m++) {{
            int64_t blocks = (lengths[m] + {block} - 1) / {block};
            void* const* row = rows + m * {width};
            for (; next < end && next < first + blocks; next++) {{
                int64_t at = (next - first) * {block};
                int64_t n = lengths[m] - at < {block} ? lengths[m] - at : {block};
                kernel({arguments});
            }}
            first += blocks;
        }}
    }}
}}
"""

Update = Callable[[int, int, int, int], None]
"""``update_all`` of the driver: the number of members and three addresses."""

_compiled: dict[Any, Update | NotTraceable] = {}


def compile_body(program: Program) -> Update:
    """Inductor's code for ``program``, compiled once in a process and cached on disk by its source. Raises NotTraceable when a
    scalar reaches an operator that has no tensor form, or Inductor makes more than one kernel."""
    key = program.key
    if key not in _compiled:
        try:
            _compiled[key] = _compile(program)
        except NotTraceable as reason:
            _compiled[key] = reason.anew()
    found = _compiled[key]
    if isinstance(found, NotTraceable):
        raise found.anew()
    return found


def _compile(program: Program) -> Update:
    began = time.perf_counter()
    library = _library(program)
    name, took = program.signature.optimizer.__name__, time.perf_counter() - began
    log.debug("compiled the update of %s for %s in %.1f s", name, program.signature.dtype, took)
    function = library.update_all
    function.argtypes, function.restype = [ctypes.c_int64] + [ctypes.c_void_p] * 3, None
    return function


def _library(program: Program) -> ctypes.CDLL:
    """The code of this program, from the cache of an earlier process if it is there: by all that it depends on, the processor
    included. Inductor's own cache would first compile and run something for each kind of vector unit: most of a second."""
    told = (torch.__version__, program.body.code, program.scalars, program.dtypes, program.signature.dtype, BLOCK, _DRIVER)
    name = hashlib.sha256(repr((*told, compiler_settings())).encode()).hexdigest()
    path = Path(cache_folder(), "fxckpt", f"{name}.so")
    with contextlib.suppress(OSError):  # not there, or not whole
        return ctypes.CDLL(str(path))
    library = load_cpp(_generate(program))
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}")
    with open(library._name, "rb") as source, open(new, "wb") as copy:
        shutil.copyfileobj(source, copy)
        copy.flush()
        os.fsync(copy.fileno())  # after a power cut it is whole or not there
    new.replace(path)
    return library


def _generate(program: Program) -> str:
    """Ask Inductor for the kernel and put the driver around it. Raises NotTraceable."""
    if program.signature.shape is not None:
        raise NotTraceable("its elements are not all treated alike")
    if program.signature.dtype.is_complex:
        raise NotTraceable("Inductor has no complex kernels")
    chosen: passes.Chosen = {tensor_scalars_pass: {"scalars": program.scalars}}
    body = passes.run(program.body, chosen, given=("operators",), wanted=("tensor scalars",))

    def update(*flat: torch.Tensor) -> Any:  # make_fx takes functions
        return body.forward(*flat)

    length = 1027  # not a multiple of a vector, and no number that could stand for something else
    columns = [torch.zeros(length, dtype=dtype) for dtype in program.dtypes]
    scalars = [torch.zeros((), dtype=scalar_dtype(program.signature.dtype)) for _ in range(program.scalars)]
    try:
        types, source, call = inductor_kernel(update, [*columns, *scalars])
    except ValueError as reason:
        raise NotTraceable(str(reason)) from None
    return driver(types, source, call, columns, scalars)


def driver(
    types: Sequence[str], source: str, call: Sequence[Any], columns: Sequence[torch.Tensor], scalars: Sequence[torch.Tensor]
) -> str:
    """The kernel with the loop around it. ``call`` says what each argument was when it ran on ``columns`` and ``scalars``. Raises
    NotTraceable for an argument that is neither of those nor the length: a temporary of Inductor's."""
    places = {t.data_ptr(): f"row[{i}]" for i, t in enumerate(columns)}
    fixed = {t.data_ptr(): f"scalars[{i}]" for i, t in enumerate(scalars)}
    arguments = []
    for kind, value in zip(types, call):
        if not isinstance(value, torch.Tensor):
            if value != columns[0].numel():
                raise NotTraceable(f"its kernel takes the number {value}")
            arguments.append("n")
        elif value.data_ptr() in places:
            arguments.append(f"({kind}){places[value.data_ptr()]} + at")
        elif value.data_ptr() in fixed:
            arguments.append(f"({kind}){fixed[value.data_ptr()]}")
        else:
            raise NotTraceable("its kernel needs a temporary tensor")
    # Inductor's report of integer divisions by zero goes through one global; threads would race for it, and there are none.
    kernel = re.sub(r"^.*inductor_cpu_\w*integer_div_error.*\n", "", source, flags=re.MULTILINE)
    return kernel + _DRIVER.format(block=BLOCK, width=len(columns), arguments=", ".join(arguments))


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Do two tensors of one shape lie in memory in the same order? The strides of dimensions of size 1 mean nothing: a 1x1
    convolution's gradient has others than its weight, and so has a momentum cloned from it."""
    return all(x == y for size, x, y in zip(a.shape, a.stride(), b.stride()) if size != 1)


def is_dense(tensor: torch.Tensor) -> bool:
    """Do its elements fill a stretch of memory without gaps or overlaps, in whatever order of dimensions?"""
    return tensor.is_contiguous() or same_layout(tensor, torch.empty_like(tensor, device="meta"))


def same_order(gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A gradient whose elements lie in memory as its parameter's do; copied only when they do not."""
    if gradient.dtype is like.dtype:
        if gradient.is_contiguous() and like.is_contiguous():
            return gradient
        if same_layout(gradient, like):
            return gradient
    return torch.empty_like(like).copy_(gradient)
