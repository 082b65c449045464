"""Writes the tables of README.md and docs/benchmarks.md, and their plot, from the results in benchmarks/results.

A place for a table is between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; the names are those of ``TABLES``.

    python benchmarks/tables.py            write what has changed; the plot, too, if matplotlib is installed
    python benchmarks/tables.py --check    say what would change, with exit status 1
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import render

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/benchmarks.md")
PLOT = "docs/benchmarks.svg"
PLACE = re.compile(r"(<!-- table: ([^>]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


@cache
def results(name: str) -> render.Numbers:
    """A file of results."""
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def models_readme() -> str:
    """For the first page: overhead for all, the rest for the largest, and where fxckpt loses. Figures of a machine that did other
    work beside are in docs/benchmarks.md alone, which says so; those of one step stand here as long as there are no others."""
    numbers = results("models")
    if numbers["note"] or numbers["quick"]:
        return f"Here a GPT of 30M parameters: those of larger models are not of a quiet machine yet.\n\n{one_step()}"
    largest = max(numbers["models"].values(), key=lambda model: model["parameters"])
    loses = "**Where fxckpt loses**, with the best of those that do better:"
    where = f"Machine: {render.conditions(numbers)}."
    return "\n\n".join([where, render.overhead(numbers), render.costs(largest), loses, render.losses(numbers)])


def models_about() -> str:
    """What was measured, and where."""
    numbers = results("models")
    missing = sorted({text for model in numbers["models"].values() for text in render.absent(model)})
    said = [f"Models: {render.models_of(numbers)}.", f"Machine: {render.conditions(numbers)}.", *missing]
    return "\n\n".join(said)


def models_docs() -> str:
    """Everything, a table of cadences and one of ways for each model."""
    models = results("models")["models"].values()
    return "\n\n".join(part for model in models for part in (render.by_cadence(model), render.by_way(model)))


def one_step() -> str:
    """overhead.py's three runs."""
    names = {"overhead": "", "overhead-with-peers": ", in a second run", "overhead-async-peers": ", in a third run"}
    return render.one_step([(results(name), remark) for name, remark in names.items()])


TABLES: dict[str, Callable[[], str]] = {
    "models, short": models_readme,
    "models, machine": models_about,
    "models, every step": lambda: render.overhead(results("models")),
    "models, all": models_docs,
    "models, losses": lambda: render.losses(results("models")),
    "one step": one_step,
    "write and restore": lambda: render.write_and_restore(results("io")),
    "optimizers": lambda: render.optimizers(results("optimizer_step")),
    "ranks": lambda: render.ranks(results("ranks")),
    "resharding": lambda: render.resharding(results("resharding")),
    "resharding_between": lambda: render.resharding_between(results("resharding")),
    "records": lambda: render.records(results("records")),
    "journal": lambda: render.journal(results("journal")),
    "cost model": lambda: render.cost_model(results("costs")),
    "in backward": lambda: render.in_backward(results("memory")),
    "in backward, machine": lambda: render.in_backward_about(results("memory")),
}


def filled(text: str) -> str:
    """A page with all its tables as the results have them. Raises KeyError for a name that is not in ``TABLES``."""
    return PLACE.sub(lambda found: found[1] + TABLES[found[2]]() + "\n" + found[3], text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    check, changed = parser.parse_args().check, False
    for page in PAGES:
        before = (ROOT / page).read_text()
        if (after := filled(before)) != before:
            changed = True
            print(f"{page}: {'differs from the results' if check else 'written'}")
            if not check:
                (ROOT / page).write_text(after)
    if not check:
        try:
            from plot import draw
        except ImportError as error:
            print(f"{PLOT} stays as it is: {error}. pip install 'fxckpt[plot]'")
        else:
            draw(results("models"), ROOT / PLOT)
    return int(check and changed)


if __name__ == "__main__":
    sys.exit(main())
