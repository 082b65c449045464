"""What a step is made by: the same step made elsewhere may have other bits, and whoever makes it again says so or does not."""

from __future__ import annotations

import functools
import os
import platform
import zlib
from collections.abc import Iterable, Sequence

import torch

from fxckpt.compat.cuda import Devices
from fxckpt.compat.spread import local
from fxckpt.graph.update.trace import BY_SHAPE
from fxckpt.optim.stepper import Stepper

_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "MKL_CBWR", "OMP_DYNAMIC")
"""By these somebody chooses other kernels, or how many threads one uses."""


def adds_up(optimizers: Iterable[str]) -> bool:
    """Does one of these classes of ``torch.optim`` make sums over a tensor, whose bits are those of an order?"""
    return not BY_SHAPE.isdisjoint(optimizers)


def machine(sums: bool, device: str | None = None) -> str:
    """What decides how a kernel treats an element, on the ``device`` of this name or in host memory. With ``sums`` also in which
    order it adds them up: libraries choose kernels by all that a processor can do, and by settings."""
    if device is not None:
        return f"torch {torch.__version__}, CUDA {torch.version.cuda}, {device}"
    here = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    if not sums:
        return here
    precision, onednn = torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled
    said = [f"float32 matmul precision {precision}"] if precision != "highest" else []
    said += [] if onednn else ["without oneDNN"]
    said += [f"{name}={value}" for name in _VARIABLES if (value := os.environ.get(name)) is not None]
    return ", ".join([here, processor(), *said])


@functools.cache
def processor() -> str:
    """Its name, and a checksum of what it can do."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line.partition(":") for line in file]
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    found = {name.strip(): value.strip() for name, _, value in reversed(lines)}  # those of the first one
    wanted = ("vendor_id", "cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant", "CPU revision")
    named = " ".join(found[name] for name in ("model name", *wanted) if name in found)
    return f"{named} {zlib.crc32(found.get('flags', found.get('Features', '')).encode()):08x}"


class Where:
    """Where the parameters of these optimizers lie, and what that is called; asked anew when they are bound anew."""

    def __init__(self, steppers: Sequence[Stepper], devices: Devices):
        self._steppers, self._devices = steppers, devices
        self._bound: tuple[int, ...] = ()
        self._places: frozenset[int | None] = frozenset()
        self._name: str | None = None

    def given(self) -> frozenset[int | None]:
        """The devices, by their numbers, as the optimizers have them; None: host memory."""
        groups = (group for stepper in self._steppers for group in stepper.opt.param_groups)
        return frozenset(self._devices.of(local(param)) for group in groups for param in group["params"])

    def now(self) -> frozenset[int | None]:
        """The same of those that are bound."""
        bound = tuple(stepper.bindings.number for stepper in self._steppers)
        if bound != self._bound:
            self._bound, self._places = bound, self.given()
            [one] = self._places if len(self._places) == 1 else [None]
            self._name = None if one is None else self._devices.name(one)
        return self._places

    def device(self) -> str | None:
        """The name of the one device that all of them lie on; None for host memory."""
        self.now()
        return self._name
