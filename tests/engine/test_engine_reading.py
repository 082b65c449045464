"""Checksums, verified reading, and the table of file operations with its instruments."""

from __future__ import annotations

import errno
import os
import random
import threading
from pathlib import Path

import instruments
import numpy as np
import pytest
from engine_model import KB, PATIENCE, begin_all, crcs_of, engines, make_model, wait_for
from memory import peak_growth
from waiting import until

from fxckpt import errors
from fxckpt.engine import crc32c, io, read_verified


@pytest.fixture
def make_engine():
    with engines() as make:
        yield make


@pytest.fixture(autouse=True)
def quiet_disk():
    yield
    instruments.calm()


# ---- checksums and reading ----


def crc_reference(data: bytes, crc: int = 0) -> int:
    """CRC-32C bit by bit."""
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_checksum_of_every_length_and_alignment():
    """272, 8208 and 349520 bytes are the stretches of the interleaved loop, three at a time."""
    data = bytes(np.random.default_rng(5).integers(0, 256, 1_200_000, dtype=np.uint8))
    turns = [3 * 272, 6 * 272, 3 * 8208, 3 * 349_520]
    stretches = [turn + more for turn in turns for more in (-1, 0, 8, 17, 26_000)]
    assert crc32c(b"123456789") == instruments.crc32c_portable(b"123456789") == 0xE3069283
    for length in (*range(70), *stretches):
        for skew in (0, 1, 7):
            part = data[skew : skew + length]
            assert crc32c(part) == instruments.crc32c_portable(part), (length, skew)
        if length < 2000:
            expected = crc_reference(data[:length], 77)
            assert crc32c(data[:length], 77) == instruments.crc32c_portable(data[:length], 77) == expected, length
    assert crc32c(data[1000:], crc32c(data[:1000])) == crc32c(data)


def make_file(path: Path, nbytes: int = 50_000, chunk: int = 8 * KB) -> tuple[bytes, dict]:
    """A file with its record: the arguments of read_verified."""
    data = bytes(np.random.default_rng(nbytes).integers(0, 256, nbytes, dtype=np.uint8))
    path.write_bytes(data)
    return data, {"nbytes": nbytes, "chunk_bytes": chunk, "crcs": crcs_of(data, chunk)}


@pytest.mark.parametrize("nbytes", [0, 1, 8 * KB, 49_152, 50_000])
@pytest.mark.parametrize("threads", [1, 3])
def test_reading_fills_targets_of_any_shape(tmp_path, nbytes, threads):
    data, record = make_file(tmp_path / "file", nbytes)
    flat = np.zeros(max(nbytes - 1, 0), np.uint8)
    pairs = np.zeros((2, nbytes // 2), np.uint8).T  # row by row, into memory that lies column by column
    targets = [
        (min(1, nbytes), flat.nbytes, flat.ctypes.data, None, None),
        (0, pairs.nbytes, pairs.ctypes.data, pairs.shape, pairs.strides),
        (0, 0, 0, (0, 3), (3, 1)),
    ]
    read_verified(tmp_path / "file", **record, targets=targets, threads=threads)
    assert flat.tobytes() == data[1:] and pairs.tobytes() == data[: pairs.nbytes]


def check_flip(path, data, record, at, dice, target):
    """A bit that is flipped in this byte of the file is found in its chunk, of which nothing comes to ``target``."""
    flipped = bytearray(data)
    flipped[at] ^= 1 << dice.randrange(8)
    path.write_bytes(flipped)
    target[:] = 0
    with pytest.raises(errors.Corrupt) as failure:
        read_verified(path, **record, targets=[(0, len(data), target.ctypes.data, None, None)])
    size = record["chunk_bytes"]
    begin = at // size * size
    assert failure.value.offset == begin and failure.value.path == str(path)
    assert not target[begin : begin + size].any()


def test_any_flipped_bit_is_found_and_nothing_of_its_chunk_delivered(tmp_path):
    path, dice = tmp_path / "file", random.Random(1)
    data, record = make_file(path)
    target = np.zeros(len(data), np.uint8)
    for at in [0, 8191, 8192, 49_999, *(dice.randrange(len(data)) for _ in range(40))]:
        check_flip(path, data, record, at, dice, target)


def test_wrong_size_missing_file_and_wrong_record_are_corruption(tmp_path):
    path = tmp_path / "file"
    data, record = make_file(path)
    for broken in (data[:-1], data + b"x", b""):
        path.write_bytes(broken)
        with pytest.raises(errors.Corrupt, match="bytes"):
            read_verified(path, **record, targets=[])
    path.write_bytes(data)
    with pytest.raises(errors.Corrupt, match="checksums"):
        read_verified(path, **record | {"crcs": record["crcs"][:-1]}, targets=[])
    path.unlink()
    with pytest.raises(errors.Corrupt, match="missing"):
        read_verified(path, **record, targets=[])


def test_of_small_chunks_several_are_read_together_and_each_has_its_own_checksum(tmp_path):
    path, dice = tmp_path / "file", random.Random(2)
    data, record = make_file(path, 5_000_001, 16 * KB)
    target = np.zeros(len(data), np.uint8)
    targets = [(0, len(data), target.ctypes.data, None, None)]
    read_verified(path, **record, targets=targets)
    assert target.tobytes() == data
    for at in [0, 16383, 16384, 5_000_000, *(dice.randrange(len(data)) for _ in range(8))]:
        check_flip(path, data, record, at, dice, target)


def test_only_ranges_of_chunks_that_are_named_are_read(tmp_path):
    path = tmp_path / "file"
    data, record = make_file(path, 100_000, 4 * KB)
    ruined = bytearray(data)
    wanted = [range(3, 5), range(7, 7), range(9, 10), range(20, 25)]
    for chunk in set(range(25)) - {chunk for each in wanted for chunk in each}:
        ruined[chunk * 4096] ^= 1
    path.write_bytes(ruined)
    target, said = np.zeros(len(data), np.uint8), []
    read_verified(path, **record, targets=[(0, len(data), target.ctypes.data, None, None)], only=wanted, progress=said.append)
    for each in wanted:
        assert target[each.start * 4096 : each.stop * 4096].tobytes() == data[each.start * 4096 : each.stop * 4096]
    assert target.any() and not target[: 3 * 4096].any() and sum(said) == 7 * 4096 + 100_000 - 24 * 4096
    read_verified(path, **record, targets=[], only=[])
    with pytest.raises(errors.Corrupt):
        read_verified(path, **record, targets=[], only=[*wanted, range(8, 9)])


PIECE = 64 << 20  # in csrc/io/read.c


@pytest.fixture
def large(root):
    """A file of one chunk of more than two pieces, with its record."""
    root.mkdir()
    nbytes = 2 * PIECE + 3 * 4096 + 5
    data = np.random.default_rng(1).integers(0, 256, nbytes, dtype=np.uint8)
    data.tofile(root / "file")
    return root / "file", data, {"nbytes": nbytes, "chunk_bytes": 1 << 30, "crcs": [crc32c(data)]}


def test_a_chunk_that_is_larger_than_a_buffer_fills_its_targets_once_it_is_verified(large):
    path, data, record = large
    whole, ends, middle = np.zeros(data.size, np.uint8), np.zeros(7, np.uint8), np.zeros(100, np.uint8)
    targets = [(0, whole.size, whole.ctypes.data, None, None), (data.size - 7, 7, ends.ctypes.data, None, None),
               (PIECE - 50, 100, middle.ctypes.data, None, None)]  # fmt: skip
    read_verified(path, **record, targets=targets)
    assert (whole == data).all() and (ends == data[-7:]).all() and (middle == data[PIECE - 50 : PIECE + 50]).all()
    middle[:] = 0
    for at in (0, PIECE, data.size - 1):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([data[at] ^ 1]))
        with pytest.raises(errors.Corrupt, match="chunk 0 has CRC-32C"):
            read_verified(path, **record, targets=targets[2:])
        assert not middle.any()


def test_what_changes_while_a_large_chunk_is_read_again_is_not_delivered(large):
    path, data, record = large
    target = np.zeros(100, np.uint8)
    done = instruments.calls("pread") + 3  # the three pieces, and the third once more
    instruments.delay("pread", 300_000)

    def flip() -> None:
        until(lambda: instruments.calls("pread") > done - 1)
        with path.open("r+b") as file:
            file.seek(data.size - 50)
            file.write(bytes([data[-50] ^ 1]))

    somebody = threading.Thread(target=flip)
    somebody.start()
    with pytest.raises(errors.Corrupt, match="chunk 0 has CRC-32C"):
        read_verified(path, **record, targets=[(data.size - 100, 100, target.ctypes.data, None, None)])
    somebody.join()
    assert not target.any()


def test_the_memory_for_reading_does_not_hang_on_the_size_of_a_chunk(root):
    """A record may name any, and a sparse file costs nobody anything."""
    root.mkdir()
    with (root / "file").open("wb") as file:
        file.truncate(1 << 40)
    record = {"nbytes": 1 << 40, "chunk_bytes": 1 << 30, "crcs": [1] * 1024}
    with peak_growth() as grown, pytest.raises(errors.Corrupt, match="chunk"):
        read_verified(root / "file", **record, targets=[])
    assert grown() < 200 << 20


def test_reading_survives_faults_or_says_which(tmp_path):
    path = tmp_path / "file"
    _, record = make_file(path)
    for op, error in (("open", errno.EINVAL), ("pread", errno.EINVAL), ("pread", errno.EINTR), ("pread", 0)):
        instruments.fail(1, error, op)
        read_verified(path, **record, targets=[])
    instruments.fail(2, errno.EIO, "pread")
    with pytest.raises(OSError) as failure:
        read_verified(path, **record, targets=[])
    assert failure.value.errno == errno.EIO and failure.value.filename == str(path)


# ---- the table of file operations ----


def test_operations_raise_with_name_and_offset(tmp_path):
    with pytest.raises(FileNotFoundError) as failure:
        io.open(tmp_path / "no/file", os.O_RDONLY)
    assert failure.value.filename == str(tmp_path / "no/file")
    fd = io.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    instruments.fail(1, errno.ENOSPC, "pwrite")
    with pytest.raises(OSError) as failure:
        io.pwrite(fd, b"abc", 100)
    assert (failure.value.errno, failure.value.filename, failure.value.offset) == (errno.ENOSPC, str(tmp_path / "file"), 100)
    io.close(fd)
    for operation in (io.unlink, io.rmdir, io.fsync_dir, io.read_file):
        with pytest.raises(FileNotFoundError):
            operation(tmp_path / "none")


@pytest.mark.parametrize("operation, run", [
    ("open", lambda fd, path: io.open(path, os.O_RDONLY)),
    ("close", lambda fd, path: io.close(os.dup(fd))),
    ("pwrite", lambda fd, path: io.pwrite(fd, b"abc", 7)),
    ("pread", lambda fd, path: io.pread(fd, 3, 7)),
    ("ftruncate", lambda fd, path: io.ftruncate(fd, 10)),
    ("fallocate", lambda fd, path: io.fallocate(fd, 10)),
    ("fdatasync", lambda fd, path: io.fdatasync(fd)),
    ("fsync", lambda fd, path: io.fsync_dir(path.parent)),
    ("rename", lambda fd, path: io.rename(path, path)),
    ("unlink", lambda fd, path: io.unlink(path)),
    ("mkdir", lambda fd, path: io.mkdir(path)),
    ("rmdir", lambda fd, path: io.rmdir(path)),
])  # fmt: skip
def test_a_failed_call_says_which_it_was_on_which_file_and_where(tmp_path, operation, run):
    path = tmp_path / "file"
    fd = io.open(path, os.O_RDWR | os.O_CREAT)
    instruments.fail(1, errno.EDQUOT, operation)
    with pytest.raises(OSError) as failure:
        run(fd, path)
    assert io.operation_of(failure.value) == operation
    assert failure.value.filename == str(tmp_path if operation == "fsync" else path)
    assert failure.value.offset == (7 if operation in ("pwrite", "pread") else None)
    io.close(fd)


def test_one_can_ask_which_call_a_thread_is_in(tmp_path):
    fd = io.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    instruments.delay("fsync", 60_000_000)
    thread = threading.Thread(target=io.fsync, args=(fd,))
    thread.start()
    wait_for(lambda: io.running(thread.ident) == "fsync")
    assert io.running(threading.get_ident()) is None
    instruments.delay("fsync", 0)
    thread.join()
    assert io.running(thread.ident) is None
    io.close(fd)


def test_log_replays_to_the_same_files(tmp_path, make_engine):
    """What is recorded is all that was done, in order: also from two writer threads, across renames."""
    engine, model = make_engine(), make_model(n_files=2)
    instruments.record(tmp_path / "log")
    io.mkdir(tmp_path / "a")
    checkpoint = begin_all(engine, model, tmp_path / "a")
    assert checkpoint.durable(PATIENCE)
    fd = io.open(tmp_path / "a/more", os.O_RDWR | os.O_CREAT)
    io.rename(tmp_path / "a", tmp_path / "b")
    io.pwrite(fd, b"after the rename", 3)
    instruments.fail(1, errno.EIO, "fsync")
    with pytest.raises(OSError):
        io.fsync(fd)
    io.close(fd)
    io.fsync_dir(tmp_path / "b")
    instruments.stop_recording()
    calls, files = instruments.read_log(tmp_path / "log"), {}
    assert [call.order for call in calls] == list(range(len(calls)))
    for call in calls:
        if call.op == "open" and call.created:
            files[call.path] = bytearray()
        elif call.op == "ftruncate":
            files[call.path] = files[call.path][: call.length].ljust(call.length, b"\0")
        elif call.op == "pwrite":
            size = max(len(files[call.path]), call.offset + call.result)
            files[call.path] = files[call.path].ljust(size, b"\0")
            files[call.path][call.offset : call.offset + call.result] = call.data
        elif call.op == "rename":
            files = {path.replace(call.path, call.target): data for path, data in files.items()}
    assert files == {str(path): path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert [call.result for call in calls if call.op == "fsync"] == [-errno.EIO, 0]
    synced = {call.path for call in calls if call.op == "fdatasync"}
    assert synced == {str(tmp_path / "a" / name) for name in model.names}


def test_every_write_is_before_the_sync_of_its_file(tmp_path, make_engine):
    engine, model = make_engine(threads=3), make_model(n_files=3)
    instruments.record(tmp_path / "log")
    assert begin_all(engine, model, tmp_path / "a").durable(PATIENCE)
    instruments.stop_recording()
    calls = instruments.read_log(tmp_path / "log")
    for name in model.names:
        of_file = [call.op for call in calls if call.path == str(tmp_path / "a" / name)]
        assert of_file[-1] == "fdatasync" and of_file.count("fdatasync") == 1 and "pwrite" in of_file
