"""A training script whose lines that fxckpt changed are marked: how many they are, and the script without fxckpt.

A line that ends in ``# fxckpt`` was added; one that ends in ``# fxckpt, was: …`` stands in the place of the line it names.
"""

from __future__ import annotations

import re

_MARK = re.compile(r"(?P<indent> *).*  # fxckpt(?:, was: (?P<was>.+))?")


def changed_lines(script: str) -> int:
    """How many lines of it fxckpt added or replaced."""
    return sum(_MARK.fullmatch(line) is not None for line in script.splitlines())


def without_fxckpt(script: str) -> str:
    """The plain script."""
    plain = []
    for line in script.splitlines():
        mark = _MARK.fullmatch(line)
        if mark is None:
            plain.append(line)
        elif mark["was"]:
            plain.append(mark["indent"] + mark["was"])
    return "\n".join(plain) + "\n"
