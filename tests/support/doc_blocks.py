"""The blocks of code in the documents, with the marks that say where and when a block is run.

A mark is a comment of HTML in the line before a block, with the reason; readers of the page do not see it:

    <!-- skip: why no test runs it -->      never run; that its commands exist is still looked up
    <!-- full: why it takes long -->        run with FXCKPT_DOCS=full (make docs)

Any other block is run. What is no code (output alone, a drawing, a format) has the language ``text``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from repository import ROOT

RUN = ("python", "diff", "sh", "console")
FULL = os.environ.get("FXCKPT_DOCS") == "full"

_BLOCK = re.compile(r"(?:^<!-- (?P<mark>.*?) -->\n+)?^```(?P<language>.*)\n(?P<text>(?:.*\n)*?)^```$", re.MULTILINE)
_MARK = re.compile(r"(skip|full): \w.{9,}")
_CODE_BY_INDENT = re.compile(r"(?:\A|\n)\n {4}(?! *[-*] )\S")


@dataclass(frozen=True)
class Block:
    """One block of a page: where it stands, in which language, and how it is marked."""

    page: str
    line: int
    language: str
    text: str
    mark: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_run(self) -> bool:
        """Whether a test runs it now."""
        return self.language in RUN and not self.mark.startswith("skip" if FULL else ("skip", "full"))

    def faults(self) -> list[str]:
        """What a reviewer should know: another language, a mark without a reason, commands in what is said to be none."""
        found = []
        if self.language not in (*RUN, "text"):
            found.append(f"is in {self.language or 'no language'}: one of {', '.join(RUN)} is run, and text is not")
        if self.mark and not _MARK.fullmatch(self.mark):
            found.append(f"has the mark {self.mark!r}, which is neither 'skip: reason' nor 'full: reason'")
        if self.language == "text" and re.search(r"^\$ |^(fxckpt|python|pip|make) \w", self.text, re.MULTILINE):
            found.append("is said to be text, and has commands")
        return [f"{self.name} {each}" for each in found]


def pages() -> list[str]:
    """Every document, by its path in the repository."""
    return [str(path.relative_to(ROOT)) for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])]


def blocks(page: str) -> Iterator[Block]:
    """The blocks of one page, in order."""
    text = (ROOT / page).read_text()
    for found in _BLOCK.finditer(text):
        line = text[: found.start("language")].count("\n") + 1
        yield Block(page, line, found["language"], found["text"], found["mark"] or "")


def indented_code(page: str) -> list[str]:
    """Code that is a block by its indentation, which has no language and no mark."""
    prose = _BLOCK.sub("", (ROOT / page).read_text())
    return [f"{page}: {found[0].strip()}…" for found in _CODE_BY_INDENT.finditer(prose)]


def commands(block: Block) -> list[str]:
    """The lines of a block that a shell gets."""
    lines = block.text.splitlines()
    if block.language == "console":
        return [line[2:] for line in lines if line.startswith("$ ")]
    return lines if block.language == "sh" else []


def inline_commands(page: str) -> list[str]:
    """Commands in running text, between backquotes."""
    prose = _BLOCK.sub("", (ROOT / page).read_text())
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))
    return [span for span in spans if re.match(r"([A-Z_]+=\S* )*(fxckpt|python|pip|make|sh) [\w.\-]", span)]


def old_and_new(diff: str) -> tuple[str, str]:
    """Both sides of a diff, as scripts."""
    sides = []
    for sign in "-+":
        lines = [" " + line[1:] if line[:1] in (" ", sign) else "" for line in diff.splitlines() if line[:1] in ("", " ", sign)]
        indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
        sides.append("\n".join(line[indent:] for line in lines) + "\n")
    return sides[0], sides[1]
