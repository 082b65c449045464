"""A CUDA device that is not there: the fake driver's library, and a stand-in for what a run asks torch about devices.

Tensors in host memory play device memory. The host runs their "kernels" at once, so the stream that training uses is one
of the fake's host streams: a wait that is put into it waits then and there, a copy reads what is there now. A wait that is
put into any other stream, or into none, lets the host overwrite what the late copy has yet to read.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterable

import pytest
import torch
from c_programs import build_driver
from small_training import Training

from fxckpt.compat import cuda


class FakeDriver:
    """The library's instruments; see the end of ``fake_cuda.c``."""

    def __init__(self, path: str):
        self.path, self.library = path, ctypes.CDLL(path)
        self.library.fake_stream.restype = ctypes.c_void_p
        self.library.fake_calls.restype = ctypes.c_uint64
        self.library.fake_fail.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
        self.library.fake_configure.argtypes = [ctypes.c_uint64, ctypes.c_uint]

    def stream(self, device: int, host: bool = True) -> int:
        return self.library.fake_stream(device, int(host))

    def late(self, microseconds: int, seed: int = 1) -> None:
        """Each copy and each wait takes up to so much longer."""
        self.library.fake_configure(seed, microseconds)

    def fail(self, nth: int, error: int = 700, for_good: bool = False) -> None:
        self.library.fake_fail(nth, error, -1 if for_good else 1)

    def hold(self, hold: bool) -> None:
        """No copy runs while held."""
        self.library.fake_hold(int(hold))

    def violations(self) -> str:
        text = ctypes.create_string_buffer(512)
        return text.value.decode() if not self.library.fake_violations(text, 512) else text.value.decode() or "unnamed"

    def retained(self, device: int) -> int:
        return self.library.fake_retained(device)

    @contextlib.contextmanager
    def capture(self):
        """Another thread captures a graph meanwhile."""
        self.library.fake_capture(1)
        try:
            yield
        finally:
            self.library.fake_capture(0)


def shaped(tensor: torch.Tensor) -> int | None:
    """Everything but the step counts lies on device 0."""
    return None if tensor.dim() == 0 else 0


def spread(tensor: torch.Tensor) -> int | None:
    """Step counts on device 0, vectors on device 1, the rest by its size on one of both or on the host."""
    return tensor.dim() if tensor.dim() < 2 else (0, 1, None)[tensor.shape[0] // 4 % 3]


class StandIn(cuda.Devices):
    """``place`` says where a tensor lies."""

    def __init__(self, driver: FakeDriver, place: Callable[[torch.Tensor], int | None] = shaped):
        self.fake, self.driver, self.place = driver, driver.path, place
        self.training = {device: driver.stream(device) for device in (0, 1)}
        self.is_capturing = False

    def of(self, tensor: torch.Tensor) -> int | None:
        return self.place(tensor)

    def streams(self, ordinals: Iterable[int]) -> dict[int, int]:
        return {ordinal: self.training[ordinal] for ordinal in ordinals}

    def name(self, ordinal: int) -> str:
        return f"stand-in {ordinal}"

    def there(self) -> torch.device | None:
        return torch.device("cpu")  # whose memory plays the device's

    def capturing(self) -> bool:
        return self.is_capturing


def watch_runtime(patch: pytest.MonkeyPatch, driver: FakeDriver) -> None:
    """Stands in for what torch's runtime is asked, by events of torch's: a wait there is what it is in a real one."""

    class Event:
        def __init__(self, **_: object):
            pass

        def record(self, stream: object = None) -> None:
            """Nothing is late on a host stream."""

        def synchronize(self) -> None:
            driver.library.fake_runtime_wait()

    empty = torch.empty

    def unpinned(*sizes: object, pin_memory: bool = False, **options: object) -> torch.Tensor:
        return empty(*sizes, **options)

    patch.setattr(torch.cuda, "Event", Event)
    patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    patch.setattr(torch, "empty", unpinned)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return FakeDriver(build_driver(tmp_path_factory.mktemp("driver")))


@pytest.fixture
def device(library, monkeypatch):
    """A run made now finds its tensors on devices."""
    library.late(300)
    stand_in = StandIn(library)
    monkeypatch.setattr(cuda, "Devices", lambda: stand_in)
    watch_runtime(monkeypatch, library)
    yield stand_in
    library.fail(0)
    library.late(0)


def a_step_while_copies_are_held(training: Training, fake: FakeDriver) -> None:
    """It returns, and only who waits for its checkpoint waits for the device."""
    training.opt.ckpt.flush()
    fake.hold(True)
    waiting = threading.Thread(target=training.opt.ckpt.flush)
    try:
        training.train(1)  # returns
        training.opt.ckpt.end_step()
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
    finally:
        fake.hold(False)
    waiting.join()
