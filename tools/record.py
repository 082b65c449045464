"""Record a kill and a resume as docs/recording.svg: a terminal in which the lines appear when they did.

python tools/record.py [FILE]

Runs examples/train_diffusion.py in a folder of its own, kills it in the middle, lists what is there, and runs it again. Nothing
in the picture is typed by hand; waits of more than a second (imports, mostly) are shown as one of a second.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "train_diffusion.py"
KILLED_BEHIND = "step 80"

LONGEST, READING = 1.0, 4.0  # seconds: of a wait that is shown, and that the last picture stays
CHAR, LINE, PAD = 7.8, 19, 16  # px: of a character at 13 px monospace, of a line, around all
SCREEN, TEXT, PROMPT, DEATH = "#0f172a", "#e2e8f0", "#4ade80", "#f87171"


@dataclass(frozen=True)
class Shown:
    """A line, in its colour, and the second at which it came."""

    at: float
    text: str
    color: str = TEXT


def record(folder: Path) -> list[Shown]:
    """The session, in a folder."""
    python = [sys.executable, "-u", str(EXAMPLE)]
    shown = _run("$ python train_diffusion.py", python, folder, KILLED_BEHIND)
    shown += _run("$ fxckpt ls ckpt", [sys.executable, "-m", "fxckpt", "ls", "ckpt"], folder)
    return shown + _run("$ python train_diffusion.py", python, folder)


def _run(prompt: str, command: list[str], folder: Path, killed_behind: str | None = None) -> list[Shown]:
    """What a command prints, until its end or until it is killed behind a line. Raises RuntimeError if it fails."""
    shown = [Shown(time.monotonic(), prompt, PROMPT)]
    with subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            shown.append(Shown(time.monotonic(), line.rstrip()))
            if killed_behind is not None and line.startswith(killed_behind):
                process.kill()
                shown.append(Shown(time.monotonic(), "Killed", DEATH))
                break
    if process.wait() != (0 if killed_behind is None else -9):
        raise RuntimeError("\n".join(each.text for each in shown))
    return shown


def picture(shown: list[Shown]) -> str:
    """The SVG. Without animation all lines are visible."""
    width = max(len(each.text) for each in shown) * CHAR + 2 * PAD
    height = len(shown) * LINE + 2 * PAD
    times = _shortened([each.at for each in shown])
    whole = times[-1] + READING
    size = f'width="{width:.0f}" height="{height:.0f}"'
    lines = [
        f'<text x="{PAD}" y="{PAD + 13 + number * LINE}" fill="{each.color}" class="t{number}">{escape(each.text)}</text>'
        for number, each in enumerate(shown)
    ]
    moments = [
        f"@keyframes t{number}{{0%,{at / whole:.3%}{{opacity:0}}{at / whole + 1e-5:.3%},100%{{opacity:1}}}}"
        f".t{number}{{animation:t{number} {whole:.1f}s linear infinite}}"
        for number, at in enumerate(times)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" {size} '
            'font-family="ui-monospace,monospace" font-size="13" xml:space="preserve">',
            "<title>A training that is killed, what it left, and the same command again</title>",
            f"<style>{''.join(moments)}</style>",
            f'<rect {size} rx="8" fill="{SCREEN}"/>',
            *lines,
            "</svg>\n",
        ]
    )


def _shortened(times: list[float]) -> list[float]:
    """Seconds since the first, with long waits cut."""
    found = [0.0]
    for before, at in pairwise(times):
        found.append(found[-1] + min(at - before, LONGEST))
    return found


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "recording.svg"
    with tempfile.TemporaryDirectory() as made:
        out.write_text(picture(record(Path(made))))
    print(out, out.stat().st_size, "bytes")
