"""Draw how a training run went: its steps and commits over time, what training waited, the bytes written and the metrics noted.

It is drawn from what the newest record (or WHICH) says of the checkpoints and the steps of the journal before it, of which it
keeps up to 64, whether they are still there or not. Needs matplotlib: pip install "fxckpt[plot]".
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from datetime import datetime, timezone
from itertools import pairwise
from typing import Any

from fxckpt.cli import common
from fxckpt.errors import SetupError
from fxckpt.store import about
from fxckpt.terminal import one_line

HELP = "draw a run's steps, commits, stall, bytes and metrics over time"

METRICS = 4  # panels for metrics at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_store(parser)
    parser.add_argument("which", nargs="?", metavar="WHICH", help=common.WHICH)
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="the picture: .svg, .png or .pdf; it is replaced")


def run(args: argparse.Namespace) -> int:
    reader = common.open_checkpoint(args.dir, args.which)
    past = about.history(reader.record)
    draw(past, f"{args.dir}, step {reader.record.step:,}", args.out)
    if args.json:
        rows = [{**vars(each), "metrics": dict(each.metrics)} for each in past]
        common.print_json({"out": os.path.abspath(args.out), "from": str(reader.path), "checkpoints": rows})
    else:
        fulls = sum(not each.journal for each in past)
        records = f" and {len(past) - fulls} records of the journal" if fulls < len(past) else ""
        common.say(f"{fulls} checkpoints{records}, up to step {reader.record.step}, in {args.out}")
    return common.OK


def draw(past: list[about.Passed], title: str, out: str) -> None:
    """The picture. Raises SetupError without matplotlib, or for a kind of file that it does not write."""
    try:
        from matplotlib import rc_context
        from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SetupError(
            f'fxckpt plot draws with matplotlib, which cannot be imported ({error}): pip install "fxckpt[plot]"'
        ) from error
    metrics = sorted({name for each in past for name in each.metrics})
    panels: list[Callable[[Any], None]] = [lambda axes: _steps(axes, past), lambda axes: _stall(axes, past)]
    panels += [lambda axes: _bytes(axes, past), *(_metric(past, name) for name in metrics[:METRICS])]
    figure = Figure(figsize=(9, 1.2 + 1.9 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels):
        panel(axes)
        axes.grid(alpha=0.3)
        for start in (each for each in past[:-1] if each.committed is None):
            axes.axvline(_clock(start.time), color="0.6", linestyle=":", linewidth=1)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(AutoDateLocator(tz=timezone.utc), tz=timezone.utc))
    more = f" ({len(metrics) - METRICS} more metrics are not shown)" if len(metrics) > METRICS else ""
    figure.suptitle(one_line(title) + more, fontsize=10, parse_math=False)
    try:
        with rc_context({"svg.fonttype": "none"}):  # text that can be searched
            figure.savefig(out)
    except ValueError as error:
        raise SetupError(f"{out}: {error}") from error


def _clock(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)


def _step(each: about.Passed) -> int:
    return each.step


def _begun(each: about.Passed) -> datetime:
    return _clock(each.begun or each.time)


def _committed(each: about.Passed) -> datetime:
    return _clock(each.committed or each.time)


def _steps(axes: Any, past: list[about.Passed]) -> None:
    """When each step closed, and from when to when its checkpoint was written."""
    axes.plot([_clock(each.time) for each in past], [each.step for each in past], color="tab:blue", linewidth=1, label="step")
    done = [each for each in past if each.committed is not None and each.begun is not None]
    steps, begun, committed = ([get(each) for each in done] for get in (_step, _begun, _committed))
    axes.hlines(steps, begun, committed, color="tab:orange", linewidth=2, label="being written")
    axes.plot(committed, steps, ".", color="tab:green", label="durable")
    if any(each.journal for each in done):
        fulls = [each for each in done if not each.journal]
        full = [_committed(each) for each in fulls], [each.step for each in fulls]
        axes.plot(*full, "o", color="tab:green", markersize=5, label="full checkpoint")
    axes.set_ylabel("step")
    axes.legend(fontsize=7, loc="upper left")


def _share(a: about.Passed, b: about.Passed) -> float:
    """Of the time between both, in percent; nothing is drawn where a process began, or where the last is not known yet."""
    if a.committed is None or b.committed is None or b.committed <= a.committed:
        return math.nan
    return 100 * (b.stall - a.stall) / (b.committed - a.committed)


def _stall(axes: Any, past: list[about.Passed]) -> None:
    """The share of the time that training waited, between two commits of one process."""
    shares = [_share(a, b) for a, b in pairwise(past)]
    axes.plot([_clock(each.time) for each in past[1:]], shares, ".-", color="tab:red", linewidth=1)
    axes.set_ylabel("stall, %")
    axes.set_ylim(bottom=0)


def _bytes(axes: Any, past: list[about.Passed]) -> None:
    """What was written in all."""
    axes.plot([_clock(each.time) for each in past], [each.written / 1e9 for each in past], ".-", color="tab:purple", linewidth=1)
    axes.set_ylabel("written, GB")
    axes.set_ylim(bottom=0)


def _metric(past: list[about.Passed], name: str) -> Callable[[Any], None]:
    """One that was noted."""

    def panel(axes: Any) -> None:
        noted = [each for each in past if name in each.metrics]
        axes.plot(
            [_clock(each.time) for each in noted], [each.metrics[name] for each in noted], ".-", color="tab:gray", linewidth=1
        )
        axes.set_ylabel(one_line(name), parse_math=False)

    return panel
