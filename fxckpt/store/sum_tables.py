"""The checksums in the text of a record: put in and taken out as tables, without an object of Python's for each.

A record of 2 GiB has half a million of them: as a list they would keep every thread of the trainer waiting for 60 ms whenever one
is written, and for 200 ms whenever one is read. All else in a record goes through Python's JSON.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fxckpt.engine.sums import Sums, from_text, to_text

_FILES = b',"files":['
_TABLE = b'"crc32c":['
_FILE = re.compile(rb'\{"name":"[^"\\]*","nbytes":[0-9]+,"chunk_bytes":[0-9]+,"crc32c":\[')


def put_in(text: bytes, tables: Sequence[Sums]) -> bytes:
    """The text of a record whose files have no checksums, with a table for each, in their order."""
    at, begin = text.index(_FILES), 0
    parts: list[bytes | memoryview] = []
    for table in tables:
        at = text.index(_TABLE, at) + len(_TABLE)
        parts += [memoryview(text)[begin:at], to_text(table)]
        begin = at
    return b"".join([*parts, memoryview(text)[begin:]])


def taken_out(raw: bytes) -> tuple[bytes, list[Sums]]:
    """The reverse. Of a record that is written in another way than ours, as JSON may be, nothing is taken out; nor of one that
    has more of other things: what is left is a copy, and it may be as large as a record can be."""
    begin = at = raw.find(_FILES) + len(_FILES)
    if at < len(_FILES) or raw.count(b"{", 0, at) > 1 or raw.find(b"[", 0, at - 1) >= 0:
        return raw, []  # no such member of the record itself
    parts: list[bytes | memoryview] = [memoryview(raw)[:begin]]
    tables: list[Sums] = []
    while (file := _FILE.match(raw, at)) is not None:
        close = raw.find(b"]", file.end())
        table = from_text(memoryview(raw)[file.end() : close]) if close >= 0 else None
        if table is None or raw[close : close + 2] != b"]}":
            break
        parts += [memoryview(raw)[begin : file.end()]]
        tables.append(table)
        begin, at = close, close + 3
        if raw[at - 1 : at] == b"]":
            left = sum(map(len, parts)) + len(raw) - begin
            return (raw, []) if 2 * left > len(raw) else (b"".join([*parts, memoryview(raw)[begin:]]), tables)
        if raw[at - 1 : at] != b",":
            break
    return raw, []


def values_in(tables: Sequence[Sums]) -> int:
    """So many more values has a text with them, by the count of ``structure_of``."""
    return sum(max(len(table) - 1, 0) for table in tables)
