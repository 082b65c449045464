"""The fake driver refuses what a real one refuses: each rule that the engine is tested against is broken here once."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
from standin import FakeDriver, library

from fxckpt.engine import Engine
from fxckpt.errors import SetupError

__all__ = ["library"]  # a fixture

INVALID_VALUE, INVALID_CONTEXT, NO_CAPTURE, ISOLATION, CAPTURED_EVENT = 1, 201, 900, 905, 907
BLOCKING, NO_TIMING, RELAXED = 1, 2, 2
VERSIONS = {
    "DeviceGetAttribute": 2000, "DevicePrimaryCtxRetain": 7000, "DevicePrimaryCtxRelease": 11000, "CtxPushCurrent": 4000,
    "CtxPopCurrent": 4000, "StreamCreate": 2000, "StreamDestroy": 4000, "StreamSynchronize": 2000, "StreamWaitEvent": 3020,
    "StreamIsCapturing": 10000, "EventCreate": 2000, "EventDestroy": 4000, "EventRecord": 2000, "EventSynchronize": 2000,
    "MemcpyDtoHAsync": 3020, "MemHostRegister": 6050, "MemHostUnregister": 4000, "ThreadExchangeStreamCaptureMode": 10010,
    "MemcpyBatchAsync": 12080,
}  # fmt: skip


class Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = [(name, ctypes.c_int) for name in ("order", "from_type", "from_id", "to_type", "to_id", "flags")]


class Driver:
    """The fake's entry points, called as a program would; context 1 is current, and a page is pinned."""

    def __init__(self, fake: FakeDriver):
        self.fake = fake
        self.page = ctypes.create_string_buffer(8192)
        self.pinned = -(-ctypes.addressof(self.page) // 4096) * 4096
        fake.library.fake_alloc.restype = ctypes.c_void_p
        fake.library.fake_alloc.argtypes = [ctypes.c_size_t, ctypes.c_void_p]

    def call(self, name: str, *arguments: object) -> int:
        function = ctypes.c_void_p()
        found = self.fake.library.cuGetProcAddress_v2(
            b"cu" + name.encode(), ctypes.byref(function), VERSIONS[name], ctypes.c_uint64(1), ctypes.byref(ctypes.c_int())
        )
        assert found == 0 and function.value
        return ctypes.CFUNCTYPE(ctypes.c_int)(function.value)(*arguments)

    def make(self, name: str, *arguments: object) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        assert self.call(name, ctypes.byref(made), *arguments) == 0
        return made

    def mode(self, mode: int) -> None:
        assert self.call("ThreadExchangeStreamCaptureMode", ctypes.byref(ctypes.c_int(mode))) == 0

    def two_allocations(self) -> int:
        """Two of 64 bytes that touch; the address of the first."""
        first, second = (self.fake.library.fake_alloc(64, ctypes.byref(ctypes.c_void_p())) for _ in range(2))
        assert second == first + 64
        return first

    def copy(self, source: int, nbytes: int, stream: ctypes.c_void_p) -> int:
        return self.call(
            "MemcpyDtoHAsync", ctypes.c_void_p(self.pinned), ctypes.c_uint64(source), ctypes.c_size_t(nbytes), stream
        )

    def batch(self, source: int, nbytes: int, stream: ctypes.c_void_p, **fields: int) -> int:
        to, start, n = ctypes.c_uint64(self.pinned), ctypes.c_uint64(source), ctypes.c_size_t(nbytes)
        attributes = Attributes(**{"order": 1, **fields})
        sizes = [ctypes.byref(ctypes.c_size_t(0)), ctypes.c_size_t(1), ctypes.byref(ctypes.c_size_t(0))]
        pointers = [ctypes.byref(each) for each in (to, start, n)]
        return self.call("MemcpyBatchAsync", *pointers, ctypes.c_size_t(1), ctypes.byref(attributes), *sizes, stream)


@pytest.fixture
def driver(library) -> Iterator[Driver]:
    made = Driver(library)
    context = made.make("DevicePrimaryCtxRetain", 0)
    assert made.call("CtxPushCurrent", context) == 0
    assert made.call("MemHostRegister", ctypes.c_void_p(made.pinned), ctypes.c_size_t(4096), 1) == 0
    assert library.violations() == ""
    yield made
    library.library.fake_synchronize()
    library.fail(0)
    library.violations()
    assert made.call("MemHostUnregister", ctypes.c_void_p(made.pinned)) == 0
    made.call("CtxPopCurrent", ctypes.byref(ctypes.c_void_p()))
    made.call("DevicePrimaryCtxRelease", 0)
    library.library.fake_free_all()


def test_a_copy_reads_one_allocation_also_where_two_touch(driver):
    first, stream = driver.two_allocations(), driver.make("StreamCreate", 1)
    assert driver.copy(first, 64, stream) == driver.batch(first + 64, 64, stream) == 0
    assert driver.copy(first, 128, stream) == driver.batch(first + 32, 64, stream) == INVALID_VALUE
    assert driver.fake.violations() == ""


def test_a_batch_to_a_host_address_that_is_none_of_the_devices_ends_the_context(driver):
    first, stream, value = driver.two_allocations(), driver.make("StreamCreate", 1), ctypes.c_int()
    driver.fake.library.fake_host_pointers(0, 0)
    assert driver.call("DeviceGetAttribute", ctypes.byref(value), 91, 0) == 0 and value.value == 0
    assert driver.copy(first, 64, stream) == 0
    assert driver.batch(first, 64, stream) == 0 and "none of the device's" in driver.fake.violations()
    assert driver.call("StreamSynchronize", stream) == driver.copy(first, 64, stream) == 700
    driver.fake.library.fake_host_pointers(0, 1)


UNSAFE = {
    "DevicePrimaryCtxRetain": lambda d, event, stream: (ctypes.byref(ctypes.c_void_p()), 0),
    "DevicePrimaryCtxRelease": lambda d, event, stream: (0,),
    "StreamCreate": lambda d, event, stream: (ctypes.byref(ctypes.c_void_p()), 1),
    "StreamDestroy": lambda d, event, stream: (stream,),
    "StreamSynchronize": lambda d, event, stream: (stream,),
    "EventCreate": lambda d, event, stream: (ctypes.byref(ctypes.c_void_p()), 3),
    "EventDestroy": lambda d, event, stream: (event,),
    "EventSynchronize": lambda d, event, stream: (event,),
    "MemHostRegister": lambda d, event, stream: (ctypes.c_void_p(d.pinned + 4096), ctypes.c_size_t(1), 1),
    "MemHostUnregister": lambda d, event, stream: (ctypes.c_void_p(d.pinned),),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_a_capture_elsewhere_forbids_the_call_unless_the_thread_is_relaxed(driver, name):
    event, stream = driver.make("EventCreate", BLOCKING | NO_TIMING), driver.make("StreamCreate", 1)
    with driver.fake.capture():
        assert driver.call(name, *UNSAFE[name](driver, event, stream)) == NO_CAPTURE
        assert f"cu{name} breaks a capture" in driver.fake.violations()
        driver.mode(RELAXED)
        assert driver.call(name, *UNSAFE[name](driver, event, stream)) == 0 and driver.fake.violations() == ""
        driver.mode(0)
    if name == "DevicePrimaryCtxRelease":
        driver.make("DevicePrimaryCtxRetain", 0)
    if name == "DevicePrimaryCtxRetain":
        driver.call("DevicePrimaryCtxRelease", 0)
    if name == "MemHostRegister":
        driver.call("MemHostUnregister", ctypes.c_void_p(driver.pinned + 4096))
    if name == "MemHostUnregister":
        driver.call("MemHostRegister", ctypes.c_void_p(driver.pinned), ctypes.c_size_t(4096), 1)


@pytest.mark.parametrize("name", [name for name in UNSAFE if not name.startswith("Device")] + ["EventRecord", "StreamWaitEvent"])
def test_a_call_needs_the_context_of_its_device(driver, name):
    event, stream = driver.make("EventCreate", BLOCKING | NO_TIMING), driver.make("StreamCreate", 1)
    arguments = UNSAFE[name](driver, event, stream) if name in UNSAFE else (event, stream)
    if name == "StreamWaitEvent":
        arguments = (stream, event, 0)
    context, other = ctypes.c_void_p(), driver.make("DevicePrimaryCtxRetain", 1)
    driver.call("CtxPopCurrent", ctypes.byref(context))
    assert driver.call(name, *arguments) == INVALID_CONTEXT and "without a context" in driver.fake.violations()
    if name not in ("StreamCreate", "EventCreate", "MemHostRegister"):
        driver.call("CtxPushCurrent", other)
        assert driver.call(name, *arguments) == INVALID_CONTEXT and "another device" in driver.fake.violations()
        driver.call("CtxPopCurrent", ctypes.byref(other))
    driver.call("CtxPushCurrent", context)
    driver.call("DevicePrimaryCtxRelease", 1)


def test_a_graphs_work_and_other_work_do_not_mix(driver):
    stream, captured = driver.make("StreamCreate", 1), driver.make("StreamCreate", 1)
    inside, outside = (driver.make("EventCreate", BLOCKING | NO_TIMING) for _ in range(2))
    driver.fake.library.fake_capture_stream(captured, 1)
    status = ctypes.c_int()
    assert driver.call("StreamIsCapturing", captured, ctypes.byref(status)) == 0 and status.value == 1
    assert driver.call("EventRecord", inside, captured) == driver.call("EventRecord", outside, stream) == 0
    assert driver.call("StreamWaitEvent", stream, inside, 0) == ISOLATION and "drawn into a graph" in driver.fake.violations()
    assert driver.call("StreamWaitEvent", captured, outside, 0) == ISOLATION and "outside of it" in driver.fake.violations()
    assert driver.call("EventSynchronize", inside) == CAPTURED_EVENT
    assert driver.copy(driver.two_allocations(), 64, captured) == 0 and "part of a graph" in driver.fake.violations()
    driver.fake.library.fake_capture_stream(captured, 0)


@pytest.mark.parametrize(
    "name, flags, what",
    [
        ("StreamCreate", 2, INVALID_VALUE),
        ("EventCreate", 8, INVALID_VALUE),
        ("EventCreate", 4, INVALID_VALUE),  # between processes: without times only
        ("StreamCreate", 0, "waits for the default stream"),
        ("EventCreate", 1, "takes times"),
    ],
)
def test_flags_are_known_and_those_that_cost_nothing(driver, name, flags, what):
    result = driver.call(name, ctypes.byref(ctypes.c_void_p()), flags)
    assert result == what if isinstance(what, int) else (result == 0 and what in driver.fake.violations())


@pytest.mark.parametrize(
    "fields, what",
    [
        ({"order": 0}, INVALID_VALUE),
        ({"order": 7}, INVALID_VALUE),
        ({"flags": 6}, INVALID_VALUE),
        ({"order": 3}, "out of the stream's order"),
        ({"from_type": 1}, "a hint"),
        ({"to_id": 1}, "a hint"),
    ],
)
def test_a_batchs_attributes_are_right_in_each_field(driver, fields, what):
    result = driver.batch(driver.two_allocations(), 64, driver.make("StreamCreate", 1), **fields)
    assert result == what if isinstance(what, int) else (result == 0 and what in driver.fake.violations())


def test_no_batch_goes_into_a_default_stream(driver):
    first = driver.two_allocations()
    assert [driver.batch(first, 64, ctypes.c_void_p(handle)) for handle in (0, 1, 2)] == [INVALID_VALUE] * 3


def test_a_host_wait_that_spins_is_noticed(driver):
    event = driver.make("EventCreate", NO_TIMING)
    assert driver.call("EventSynchronize", event) == 0 and "spins" in driver.fake.violations()


def test_memory_is_pinned_for_every_context_and_unpinned_with_no_copy_under_way(driver):
    stream, more = driver.make("StreamCreate", 1), ctypes.c_void_p(driver.pinned + 4096)
    assert driver.call("MemHostRegister", more, ctypes.c_size_t(1), 0) == 0 and "one context only" in driver.fake.violations()
    assert driver.call("MemHostUnregister", more) == 0
    driver.fake.hold(True)
    assert driver.copy(driver.two_allocations(), 64, stream) == 0
    driver.call("MemHostUnregister", ctypes.c_void_p(driver.pinned))
    assert "unpinned under a copy" in driver.fake.violations()
    driver.fake.hold(False)
    driver.call("MemHostRegister", ctypes.c_void_p(driver.pinned), ctypes.c_size_t(4096), 1)


def test_a_wait_of_torchs_runtime_is_what_it_is(driver):
    context = ctypes.c_void_p()
    driver.call("CtxPopCurrent", ctypes.byref(context))
    driver.fake.library.fake_runtime_wait()
    assert "makes a context on device 0" in driver.fake.violations()
    driver.call("CtxPushCurrent", context)
    with driver.fake.capture():
        driver.fake.library.fake_runtime_wait()
    assert "breaks a capture" in driver.fake.violations()


@pytest.mark.parametrize("name", ["cuEventRecord", "cuMemcpyBatchAsync"])
def test_an_entry_point_that_is_not_found_although_the_search_succeeds(library, monkeypatch, name):
    """The engine names what it cannot do without, and does without what it can."""
    monkeypatch.setenv("FAKE_CUDA_NULL", name)
    engine = Engine(threads=1, chunk_bytes=4096, staging_bytes=8 * 4096)
    if name == "cuMemcpyBatchAsync":
        engine.open_device(0, library.path)
    else:
        with pytest.raises(SetupError, match=name):
            engine.open_device(0, library.path)
    engine.close()
