"""Results of benchmarks as Markdown: every figure that the README and docs/benchmarks.md name comes from here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Numbers = dict[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, the first column without a title as often as not."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines).replace("|  |", "| |")


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, and the range if there is one."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) < 2 else f"{middle} ({min(values):.{digits}f} – {max(values):.{digits}f})"


def size(count: float) -> str:
    """Bytes, in MB or GB."""
    return (f"{count / 1e9:.2f} GB" if abs(count) >= 1e9 else f"{count / 1e6:.0f} MB").replace("-", "−")


def duration(seconds: float) -> str:
    """In ms, or s from one on."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms" if seconds < 0.01 else f"{seconds * 1e3:.0f} ms"


def machine_line(machine: Numbers) -> str:
    """What the figures were measured on."""
    text = "{cores} cores of {processor}, {memory_gib} GiB, {file_system}, Linux {kernel}, Python {python}, PyTorch {torch}"
    return text.format_map(machine)


# ---- models.json ----


def measured(model: Numbers) -> dict[str, Numbers]:
    """The ways that have rounds."""
    return {key: way for key, way in model["ways"].items() if "every" in way}


def absent(model: Numbers) -> list[str]:
    """What is to be said of the others, and of what failed later."""
    return [f"{way['label']}: {way['failed']}" for way in model["ways"].values() if "failed" in way]


def extra_memory(way: Numbers, every: str) -> float:
    """Peak memory of a process that saves, above that of one that only trains."""
    return way["every"][every]["peak_memory"] - way["every"]["none"]["peak_memory"]


def restores(way: Numbers) -> list[float]:
    """Seconds of each restore."""
    return [kill["seconds"] for kill in way.get("kills", [])]


def restored(way: Numbers) -> str:
    """Seconds to restore."""
    return spread(restores(way)) + " s" if restores(way) else "–"


def lost(row: Numbers) -> str:
    """Steps that a kill costs, on average and at worst."""
    return f"{row['lost']['mean']:.1f} (at most {row['lost']['most']})" if "lost" in row else "–"


def killed(way: Numbers) -> str:
    """What real kills cost."""
    return ", ".join(str(kill["lost"]) for kill in way.get("kills", [])) or "–"


CADENCES = {"1": "every step", "10": "every tenth", "auto": '`"auto"`'}


def models_of(numbers: Numbers) -> str:
    """The names of the models, and what they are trained on."""
    each = [
        f"{model['label']} ({model['parameters'] / 1e6:.0f}M parameters, {size(model['state_bytes'])} of state, "
        f"{model['batch']} a step, which takes {statistics.median(plain_rounds(model)):.1f} s)"
        for model in numbers["models"].values()
    ]
    return "; ".join(each)


def plain_rounds(model: Numbers) -> list[float]:
    """Seconds of steps without checkpoints, of all ways."""
    return [seconds for way in measured(model).values() for seconds in way["every"]["none"]["rounds"]]


def conditions(numbers: Numbers) -> str:
    """Where and how it was measured."""
    note = f"; {numbers['note']}" if numbers["note"] else ""
    rounds = [len(way["every"]["none"]["rounds"]) for model in numbers["models"].values() for way in measured(model).values()]
    often = f"{min(rounds)}" if min(rounds) == max(rounds) else f"{min(rounds)} to {max(rounds)}"
    plural = "round" if often == "1" else "rounds"
    return f"{machine_line(numbers['machine'])}, OpenMP's wait policy {numbers['omp_wait_policy']}{note}; {often} {plural}"


def overhead(numbers: Numbers, every: str = "1") -> str:
    """Step time against none: a row for each way, a column for each model."""
    models = list(numbers["models"].values())
    keys = list(dict.fromkeys(key for model in models for key in measured(model)))
    rows = []
    for key in keys:
        ways = [measured(model).get(key) for model in models]
        cells = [spread(way["every"][every]["ratios"]) if way else "–" for way in ways]
        rows.append([next(way["label"] for way in ways if way), *cells])
    return table([CADENCES[every], *(model["label"] for model in models)], rows)


def costs(model: Numbers) -> str:
    """What else the ways take for one model."""
    rows = [
        [
            way["label"],
            spread(way["every"]["10"]["ratios"]),
            duration(way["every"]["1"]["stall_seconds"]),
            restored(way),
            size(extra_memory(way, "1")),
            size(way["every"]["1"]["held"]),
            f"{way['every']['1']['lost']['mean']:.1f}",
        ]
        for way in measured(model).values()
    ]
    head = [model["label"], "every tenth step", "stall, each", "restore", "memory above none", "disk", "steps lost to a kill"]
    return table(head, rows)


def by_cadence(model: Numbers) -> str:
    """All that depends on how often it is saved: a row for each way and cadence."""
    rows = []
    for way in measured(model).values():
        for every, name in CADENCES.items():
            if (row := way["every"].get(every)) is not None:
                ratio = spread(row["ratios"]) + (" *" if row.get("computed") else "")
                memory, written = size(extra_memory(way, every)), size(row["bytes"])
                rows.append([f"{way['label']}, {name}", ratio, duration(row["stall_seconds"]), memory, written, lost(row)])
    return table(
        [model["label"], "step against none", "stall, each", "memory above none", "written, each", "lost to a kill"], rows
    )


def by_way(model: Numbers) -> str:
    """What a way takes however often it saves, and the kills."""
    rows = [
        [way["label"], way["version"], restored(way), size(way["every"]["1"]["held"]), killed(way), failures(way)]
        for way in measured(model).values()
    ]
    head = [model["label"], "version", "restore", "disk, at every step", "steps lost in each kill", "newest that did not load"]
    return table(head, rows)


def failures(way: Numbers) -> str:
    """How many of the kills left something newer that did not load."""
    kills = way.get("kills", [])
    return f"{sum(bool(kill['errors']) for kill in kills)} of {len(kills)}" if kills else "–"


# ---- where fxckpt loses ----


@dataclass(frozen=True)
class Measure:
    """Something of which less is better."""

    name: str
    of: Callable[[Numbers], float | None]
    text: Callable[[float], str]
    least: float  # a smaller difference is none


MEASURES = (
    Measure("step time at every step", lambda w: w["every"]["1"]["ratio"], lambda v: f"{v:.2f}", 0.01),
    Measure("step time at every tenth", lambda w: w["every"]["10"]["ratio"], lambda v: f"{v:.2f}", 0.01),
    Measure("stall of a save", lambda w: w["every"]["1"]["stall_seconds"], duration, 0.001),
    Measure("restore", lambda w: statistics.median(restores(w)) if restores(w) else None, lambda v: f"{v:.2f} s", 0.05),
    Measure("memory above none", lambda w: extra_memory(w, "1"), size, 10e6),
    Measure("disk", lambda w: w["every"]["1"]["held"], size, 10e6),
    Measure("bytes written a checkpoint", lambda w: w["every"]["1"]["bytes"], size, 5e6),
    Measure("steps lost to a kill at every step", lambda w: w["every"]["1"]["lost"]["mean"], lambda v: f"{v:.1f}", 0.05),
)


def losses(numbers: Numbers) -> str:
    """For each measure in which others are better than fxckpt: the best of them, for each model."""
    lines = []
    for measure in MEASURES:
        found = [text for model in numbers["models"].values() if (text := loss(model, measure))]
        if found:
            lines.append(f"* {measure.name}: {'; '.join(found)}")
    return "\n".join(lines) or "* in nothing that was measured here"


def loss(model: Numbers, measure: Measure) -> str:
    """Who is better than fxckpt for this model, if anyone is."""
    ways = measured(model)
    values = {key: value for key, way in ways.items() if (value := measure.of(way)) is not None}
    mine = values.pop("fxckpt", None)
    if mine is None or not values:
        return ""
    best = min(values, key=lambda key: values[key])
    if values[best] > mine - measure.least:
        return ""
    return f"{model['label']} {measure.text(mine)}, {ways[best]['label']} {measure.text(values[best])}"


# ---- the other files of results ----

OURS = {
    "fxckpt": "fxckpt, `fused=True`",
    "inductor": 'fxckpt, `update="inductor"`',
    "mock": 'fxckpt, `writer="mock"` (writes nothing)',
}


KINDS = ("AdamW", "Adam", "SGD, momentum")


def one_step(runs: Sequence[tuple[Numbers, str]]) -> str:
    """overhead.py's step times against none, of several runs with a remark each."""
    rows = []
    for numbers, remark in runs:
        for key, row in numbers["results"].items():
            if key == "none":
                continue
            ratios = row["ratios"]
            label = OURS.get(key, row["label"]) + remark
            rows.append([label, f"{row['ratio']:.2f}", f"{min(ratios):.2f} – {max(ratios):.2f}"])
    return table(["a checkpoint at every step with", "step time against none", "range"], rows)


def write_and_restore(numbers: Numbers) -> str:
    """io.py's speeds against the best plain loop."""
    found = numbers["results"]
    keys = {
        "fxckpt": ("fxckpt",) * 2,
        "safetensors + fsync": ("safetensors",) * 2,
        "torch.save + fsync": ("torch.save", "torch.load"),
    }
    rows = [
        [label, spread(found[f"write {writer}"]["ratios"]), spread(found[f"read {reader}"]["ratios"])]
        for label, (writer, reader) in keys.items()
    ]
    return table(["", "write", "restore"], rows)


def optimizers(numbers: Numbers) -> str:
    """optimizer_step.py's ratios: AdamW / Adam / SGD in a cell, sizes in columns."""
    names = {"default": "default flags, native", "foreach": "`foreach=True`, native", "fused": "`fused=True`, native"}
    names["inductor"] = '`update="inductor"`'
    sizes = [key.removesuffix(f", {KINDS[0]}") for key in numbers["results"] if key.endswith(f", {KINDS[0]}")]
    return table(["", *sizes], [[name, *(cell(numbers, size, word) for size in sizes)] for word, name in names.items()])


def cell(numbers: Numbers, size: str, word: str) -> str:
    """The ratios of one size and flag."""
    rows = [numbers["results"][f"{size}, {kind}"] for kind in KINDS]
    return " / ".join(f"{each['ratio']:.2f}" for row in rows for each in row if word in each["ours"])


def ranks(numbers: Numbers) -> str:
    """ranks.py's: two ranks, each way beside none; and rank 0's commit where there are many."""
    rows = []
    for way, each in numbers["steps"].items():
        ratio = "1" if way == "none" else f"{each['ratio']:.2f} ({min(each['ratios']):.2f} – {max(each['ratios']):.2f})"
        seconds = statistics.median(each["seconds"])
        rows.append([way, f"{seconds * 1e3:.0f} ms", ratio, f"{each['nbytes'] / 1e6:.0f} MB" if each["nbytes"] else ""])
    head = ["two ranks, every step", "step", "ratio to none", "written for a checkpoint"]
    return f"{table(head, rows)}\n\n{_coordinator(numbers)}\n\n{_records(numbers)}"


def _coordinator(numbers: Numbers, ranks: int = 10_000) -> str:
    """Rank 0's side of a commit, as it was measured, and by that of still more ranks."""
    rows = []
    for way, each in numbers["coordinator"].items():
        world = each["world"]
        times = [each["first"], statistics.median(each["seconds"]), statistics.median(each["ready"])]
        rows.append([f"{world} of {way}", *(f"{time:.2f} s" for time in times)])
        busy = each["busy"][0], statistics.median(each["busy"][1:])
        rows[-1][1] += f", {busy[0]:.2f} s of a processor"
        rows[-1][2] += f" ({min(each['seconds']):.2f} – {max(each['seconds']):.2f}), {busy[1]:.2f} s of a processor"
        rows.append([f"{ranks:,} of {way}, on paper", *(f"{time * ranks / world:.1f} s" for time in (*busy, times[2]))])
        for row, many in zip(rows[-2:], (world, ranks)):
            row += [f"{each['memory'] * many / world / 1e6:.0f} MB", f"{each['message_bytes'] * many / 1e6:.1f} MB"]
    one = next(iter(numbers["coordinator"].values()))
    head = ["ranks", "first commit", "a later one", "then the next slot is ready in", "memory of rank 0 for it", "all messages"]
    listed = (one["record_bytes"] - one["part_bytes"]) / one["world"]  # in rank 0's record, which is as large as theirs otherwise
    note = f" The machine was {numbers['note']}." if numbers["note"] else ""
    what = f"From the last part to the commit, with {one['tensors']} tensors of {one['nbytes'] / 1e9:.0f} GB together.{note}"
    said = " and ".join(f"{each['message_bytes']} ({way})" for way, each in numbers["coordinator"].items())
    what += f" A message has {said} bytes, and `commit.json` {listed:.0f} for each rank; one look at a message takes "
    return f"{what}{one['look'] * 1e6:.0f} µs.\n\n{table(head, rows)}"


def _records(numbers: Numbers, ranks: int = 10_000) -> str:
    """What the records of many ranks take, by what was measured of one; and those of still more."""
    record = numbers["record"]
    worlds = {int(world): each for world, each in record["ranks"].items()}
    (few, a), (many, b) = ((world, each["nbytes"]) for world, each in worlds.items())
    tensors = (b * many - a * few) / (many - few)  # of a record: all else is the checksums, of which all ranks have as many
    paper = {**worlds[many], "nbytes": tensors + (a - tensors) * few / ranks}
    rows = []
    for world, each in {**worlds, ranks: paper}.items():
        seconds, is_paper = statistics.median(each["seconds"]), each is paper
        rows.append([
            f"{world:,}" + (", on paper" if is_paper else ""), f"{each['nbytes'] / 1e3:.0f} kB",
            f"{world * each['nbytes'] / 1e6:,.0f} MB", f"{1e3 * seconds:.0f} ms", f"{world * seconds:.1f} s",
            f"{world * each['memory'] / 1e9:.1f} GB",
            *("" if is_paper else f"{each[name]:.2f} s" for name in ("files", "merged")),
        ])  # fmt: skip
    head = ["ranks", "a record", "all", "one taken apart in", "all in", "all take", "all files read in", "one file of all in"]
    what = f"Ranks with a box of each of {record['tensors']} tensors, {record['nbytes'] / 1e9:.0f} GB together"
    return f"{what}; rank 0 takes all records apart at its first commit, every rank at a load:\n\n{table(head, rows)}"


def resharding(numbers: Numbers) -> str:
    """resharding.py's figures: bytes read over bytes needed, with checksums of a chunk each, of 64 KiB and of ours."""
    worlds, pairs = numbers["worlds"], ((1, 8), (2, 4), (8, 16), (8, 64), (64, 8))
    rows = [
        [
            model,
            label if label == "ours" else f"{label} KiB",
            *(f"{of[label][str(a)][worlds.index(b)]:.2f}" for a, b in pairs),
            f"{max(map(max, of[label].values())):.2f}",
        ]
        for model, of in numbers["models"].items()
        for label in ("4096", "64", "ours")
    ]
    return table(["model", "checksums of", *(f"{a} → {b}" for a, b in pairs), f"at most, up to {worlds[-1]}"], rows)


def resharding_between(numbers: Numbers) -> str:
    """resharding.py's pairs of other layouts, the most of each kind: as it is, each rank alone, and that with a checksum for each
    chunk of 4 MiB."""
    hows = ("ours", "alone", "4096")
    kinds: dict[str, dict[str, list[float]]] = {}
    for model, of in numbers["between"].items():
        for writer, readers in of.items():
            for reader, ratio in readers.items():
                row = kinds.setdefault(f"{_kind(writer)} → {_kind(reader)}", {})
                row[model] = [max(ratio[how], most) for how, most in zip(hows, row.get(model, [0.0] * 3))]
    rows = [[kind, *("{:.2f} ({:.2f}, {:.2f})".format(*of[model]) for model in numbers["between"])] for kind, of in kinds.items()]
    return table(["the most of any pair", *numbers["between"]], rows)


def _kind(layout: str) -> str:
    """A layout without the number of its ranks, but for those of tensor parallelism."""
    if "TP" in layout:
        return f"FSDP2 × TP {layout.rpartition(' ')[2]}"
    return layout if layout == "one process" else layout.partition(" ")[0]


def records(numbers: Numbers) -> str:
    """records.py's: by what is held, a record with a checksum for each chunk and with ours; then the copy."""
    names = {"chunks": "of 4 MiB", "ours": "ours", "lists": "ours, as lists in JSON"}
    rows = [
        [
            held if how == "chunks" else "",
            names[how],
            f"{each['sums']:,}",
            f"{each['nbytes'] / 1e6:.2f} MB",
            *(f"{1e3 * each[what]['seconds']:.1f} ({1e3 * each[what]['longest']:.1f}) ms" for what in ("write", "read")),
        ]
        for held, of in numbers["records"].items()
        for how, each in of.items()
    ]
    head = ["state", "checksums", "number", "record", "written in (longest wait of others)", "read in"]
    speeds = ", ".join(f"{max(of) / 1e9:.1f} GB/s with {kib} KiB" for kib, of in numbers["copy"].items())
    note = f" Machine {numbers['note']}." if numbers["note"] else ""
    return f"{table(head, rows)}\n\nOne thread copies and checksums, at best, {speeds}.{note} {machine_line(numbers['machine'])}."


def journal(numbers: Numbers) -> str:
    """journal.py's figures: steps and bytes of each contestant, then the time to restore by the number of records behind."""
    names = {"full": "a full checkpoint at every step", "journal": "`journal=64`"}
    of = {key: numbers["contestants"][key] for key in names}
    rows = [
        [name, f"{of[key]['ratio']:.2f} ({of[key]['least']:.2f} – {of[key]['most']:.2f})", f"{of[key]['bytes_a_step'] / 1e6:.0f}"]
        for key, name in names.items()
    ]
    first, *_, last = numbers["restored"]
    said = ", ".join(f"{each['seconds']:.1f} s with {each['step'] - 1} records behind the checkpoint" for each in (first, last))
    made = table(["", "a step, against none", "MB written a step"], rows)
    return f"{made}\n\nRestored in {said}, each with the bits that training had. {machine_line(numbers['machine'])}."


def cost_model(numbers: Numbers) -> str:
    """costs.py's constants, and what they predict beside what was measured."""
    found, kinds = numbers["constants"], {"full": "a full checkpoint", "journal": "a record of a journal of 64 steps"}
    python = [
        [
            name,
            *(
                f"{found[f'{kind}, {who}'][what] * 1e3:.2f} ms"
                for who in ("trains", "commits")
                for what in ("checkpoint", "layer")
            ),
        ]
        for kind, name in kinds.items()
    ]
    head = ["", "training thread, each", "and each layer", "committing thread, each", "and each layer"]
    rows = [
        [row["label"], kinds[row["kind"]], f"{row['step_seconds'] * 1e3:.0f} ms", size(row["bytes"]),
         "{:.2f} – {:.2f}".format(*row["predicted"]), spread(row["ratios"])]
        for row in numbers["rows"]
    ]  # fmt: skip
    copy, write = (duration(found[what] * 1e9) for what in ("copy", "write"))
    said = f"A GB takes {copy} of one core to be copied and checksummed and {write} to be written; the disk takes "
    said += f"{found['disk'] / 1e9:.1f} GB/s. {numbers['cores']} cores train. {machine_line(numbers['machine'])}."
    made = table(["", "every step", "a step without", "bytes", "predicted", "measured"], rows)
    return "\n\n".join([said, table(head, python), made])


def in_backward(numbers: Numbers) -> str:
    """memory.py's figures, as far as they are there: after the backward, inside it, and one against the other."""
    ways, memory, times = ("after_backward", "in_backward"), numbers["memory"], numbers["time"]
    off = [100 * each for each in memory["off"]]
    peaks = [spread([each / 1e6 for each in memory["peaks"][way]], 0) for way in ways]
    seconds = [spread([each["cpu"] for each in times["rounds"][way]]) for way in ways]
    rows = [
        ["peak of memory in a step, MB", *peaks, f"{spread(off, 0)} % of the gradients' memory less"],
        ["processor time of a step, s", *seconds, spread(times["against_after"]["ratios"])],
    ]
    for each in numbers.get("stall", {}).values():
        shares = [[100 * share for share in each["shares"][way]] for way in ways]
        rows.append([f"stall, % of a step, {each['label']}", *(spread(found, 1) for found in shares), _ratio(shares)])
    if "compile" in numbers:
        compiles = [numbers["compile"][way] for way in ways]
        rows.append(["processor time of the first step, s", *(spread(found, 0) for found in compiles), _ratio(compiles)])
    return table(["", *(f'`"{way}"`' for way in ways), "against"], rows)


def _ratio(of: Sequence[Sequence[float]]) -> str:
    """The second's median against the first's."""
    first, second = map(statistics.median, of)
    return f"{second / first:.2f}" if first else "–"


def in_backward_about(numbers: Numbers) -> str:
    """Where it was measured, and what the ops of a backward cost where nothing is armed."""
    times, note = numbers["time"], f"; {numbers['note']}" if numbers["note"] else ""
    began = times["began"]["in_backward"]
    same = all(began[key] == times["began"]["after_backward"][key] for key in ("graphs", "breaks", "compiled"))
    said = "as many graphs, breaks and compiles as without" if same else "other graphs than without"
    share, count = 100 * times["ops"]["share"], times["ops"]["ops"]
    missing = "" if "stall" in numbers else " Waits for an uneven disk are not measured yet: that takes a quiet machine."
    return (
        f"Machine: {machine_line(numbers['machine'])}{note}. The GPT has {began['parameters'] / 1e6:.0f}M parameters in "
        f"{began['layers']} layers, {began['armed']} of them armed; {said}. Processor time of a step, armed against not armed on "
        f"the same compiled code: {spread(times['armed']['ratios'])}; the {count:.0f} ops of a backward that is not armed take "
        f"{share:.2f} % of its step.{missing}"
    )
