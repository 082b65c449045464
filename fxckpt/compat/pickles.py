"""Pickles that nobody has vouched for: what reads them takes no memory because a few bytes say that more is to come.

Which code of pickle and torch does that: ``pickle.Unpickler``, written in C, makes room for 2³² remembered objects because five
bytes name the last of them; and each reader asks the file for as many bytes as a text says that it has, which Python's files make
room for first. The unpickler in Python (``pickle._Unpickler``, which is where it has been since Python 3.0) keeps a dict of what
it remembers.
"""

from __future__ import annotations

import io
import pickle
from typing import Any, ClassVar

LONGEST = 16 << 20
"""Bytes of one text in a pickle, at most. The bytes of tensors are no part of it."""


class BoundedFile(io.BufferedReader):
    """A file that gives no more than so much at a time."""

    def __init__(self, path: str):
        super().__init__(io.FileIO(path))

    def read(self, size: int | None = -1, /) -> bytes:
        """Raises UnpicklingError for a larger piece."""
        if size is None or not 0 <= size <= LONGEST:
            raise pickle.UnpicklingError(f"it says that a piece of {size} bytes is to come")
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        """What is longer than a piece may be is cut, and so no line."""
        return super().readline(LONGEST)


class BoundedUnpickler(pickle._Unpickler):  # type: ignore[misc, name-defined]
    """Changes nothing but the objects that it makes; which classes it may name, those who derive from it say."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def load_build(self) -> None:
        """Set an object's attributes; not those of a class, which others have, too."""
        made = self.stack[-2]  # type: ignore[attr-defined]
        if isinstance(made, type):
            raise pickle.UnpicklingError(f"it would change the class {made.__name__}")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build
    del dispatch[pickle.BYTEARRAY8[0]]  # takes memory before it reads
