"""What must be the same on all ranks that write one checkpoint together, and what is said where it is not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from fxckpt.errors import RanksDisagree
from fxckpt.store.about import ALIKE
from fxckpt.store.record import Record


def links(record: Record) -> object:
    """What must be the same on all ranks for it to be one record of the journal, made of the same tensors; None of a full
    checkpoint."""
    if (journal := record.journal) is None:
        return None
    return journal.base, journal.after, journal.number, journal.order, record.state[ALIKE]


def training(record: Record) -> dict[str, Any]:
    """What must be equal, by what it is called in a message."""
    optimizers = [
        {**{key: each[key] for key in ("class", "groups")}, "state": {name: of["keys"] for name, of in each["state"].items()}}
        for each in record.optimizers
    ]
    counts = {"step": record.step, "iteration": record.iteration, "updates": record.updates}
    found = {"counts": counts, "optimizers": optimizers, "tensors": record.state[ALIKE]}
    return found if record.journal is None else {**found, "settings": record.journal.groups, "update": record.journal.update}


def check_alike(first: Record, others: Sequence[Record]) -> None:
    """Raise RanksDisagree unless all ranks took this checkpoint of the same training: tensors of the same names and shapes, the
    same settings of the optimizers, as many steps."""
    mine = training(first)
    for other in others:
        if (where := _first_difference(mine, training(other))) is not None:
            raise RanksDisagree(
                f"the checkpoint of step {first.step} is given up: rank {other.rank} has other {where}. Ranks that write one "
                "store together must train one model in one way; give each rank a directory of its own if they do not"
            )


def _first_difference(mine: Any, its: Any, path: str = "") -> str | None:
    """The first place where two such values are not the same, and what is there; None: they are the same."""
    if isinstance(mine, dict) and isinstance(its, dict):
        if mine.keys() != its.keys():
            return f"{path} than rank 0: {_short(sorted(mine.keys() ^ its.keys()))} on one of them"
        pairs: Iterable[tuple[Any, Any, Any]] = ((key, mine[key], its[key]) for key in mine)
    elif isinstance(mine, list) and isinstance(its, list) and len(mine) == len(its):
        pairs = zip(range(len(mine)), mine, its)
    elif json.dumps(mine) == json.dumps(its):
        return None
    else:
        return f"{path} than rank 0 ({_short(its)} where rank 0 has {_short(mine)})"
    return next((found for key, a, b in pairs if (found := _first_difference(a, b, f"{path}.{key}".lstrip(".")))), None)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:200] + "..."
