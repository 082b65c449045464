"""What each rank says of its part in short: enough for rank 0 to see that nothing differs between ranks, and nothing is new.

Problem: a part's record has each of its tensors and the checksums of all its bytes, and of hundreds of ranks rank 0 would read
all of them for seconds, at each checkpoint. So each rank says digests of what is compared, and rank 0 reads a record only where
one is another than it should be. What is equal in short is equal; what differs, and where, the records say.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fxckpt.engine.sums import Sums
from fxckpt.ranks.alike import links, training
from fxckpt.store import names
from fxckpt.store.about import CHECKED
from fxckpt.store.checks import Check, is_count, is_str, map_of, members
from fxckpt.store.record import Record

OWN, OTHERS = "own", "others"
"""In what a record says of replicas: how its files are laid out, and checksums of what its rank has in another one's files."""

_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Brief:
    """Of the part of one rank. ``files``: its files, with their bytes. ``alike``: a digest of what must be the same on all ranks.
    ``placed``: one of which of its tensors lies in which file, or which box of it. ``own``: of its files that others look at,
    how each is laid out and a digest of its checksums; ``others``: the same of what it has in place of another rank's."""

    files: Mapping[str, int]
    alike: str
    placed: str
    own: Mapping[str, list[str]]
    others: Mapping[str, list[str]]

    @classmethod
    def of(cls, record: Record) -> Brief:
        """What a rank says of its record."""
        crcs = {file.name: file.crc32c for file in record.files}
        own = {name: [geometry, _of_sums(crcs[name])] for name, geometry in checked(record, OWN).items() if name in crcs}
        others = {name: [geometry, _digest(base64.b64decode(sums))] for name, (geometry, sums) in checked(record, OTHERS).items()}
        alike = _digest(_json([links(record), training(record)]))
        return cls({file.name: file.nbytes for file in record.files}, alike, _digest(_json(_placed(record))), own, others)

    @classmethod
    def from_json(cls, value: Any) -> Brief:
        """What ``dataclasses.asdict`` made of one. Raises Malformed."""
        return cls(**members(value, _BRIEF, "what is said of a part"))

    def is_of(self, rank: int, world: int) -> bool:
        """Are its files those that this rank writes? Rank 0 moves them to where all others' are."""
        return all(names.of_rank(names.written_as(file), rank, world) == file for file in self.files)


def checked(record: Record, name: str) -> Mapping[str, Any]:
    """What a record says of this."""
    found: Mapping[str, Any] = record.state.get(CHECKED, {}).get(name, {})
    return found


def _placed(record: Record) -> list[list[Any]]:
    """All that the index of the model's files is made of, and by which boxes are seen to be all of a tensor. In which layer a
    tensor is listed may change from one checkpoint to the next."""
    tensors = sorted(record.tensors(), key=lambda each: (each.file, each.key))
    return [[each.file, each.key, each.nbytes, each.dtype, each.shape, each.whole, each.offset] for each in tensors]


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _of_sums(sums: Sums) -> str:
    return _digest(sums.tobytes())


def _digest(raw: bytes) -> str:
    return hashlib.blake2b(raw, digest_size=_DIGEST_BYTES).hexdigest()


def _is_digest(value: Any) -> bool:
    return is_str(value) and re.fullmatch(f"[0-9a-f]{{{2 * _DIGEST_BYTES}}}", value) is not None


def _is_print(value: Any) -> bool:
    return type(value) is list and len(value) == 2 and is_str(value[0]) and _is_digest(value[1])


_BRIEF: dict[str, Check] = {"files": map_of(is_count), "alike": _is_digest, "placed": _is_digest,
                            "own": map_of(_is_print), "others": map_of(_is_print)}  # fmt: skip
