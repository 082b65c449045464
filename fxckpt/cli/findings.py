"""A line of a report of ``doctor``."""

from __future__ import annotations

from dataclasses import dataclass

GOOD, NOTE, WRONG = "ok", "note", "wrong"


@dataclass(frozen=True)
class Finding:
    """``verdict`` is "ok", "note" (it works, not as well as it could) or "wrong" (it does not work)."""

    what: str
    verdict: str
    detail: str
