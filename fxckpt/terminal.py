"""What a terminal may be shown: names in a store can come from anybody, and could hold its control codes."""

from __future__ import annotations

import logging


def one_line(text: str) -> str:
    """The text with all that cannot be printed escaped: control codes, line ends, what turns the direction of writing."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode() for each in text)


def plain(text: str) -> str:
    """The same, with its line ends as they are."""
    return text if text.isprintable() else "\n".join(map(one_line, text.split("\n")))


def _escape(record: logging.LogRecord) -> bool:
    """A filter of the package's logger: whatever a message is made of, it is plain text."""
    message = record.getMessage()
    if (shown := plain(message)) != message:
        record.msg, record.args = shown, ()
    return True


logging.getLogger("fxckpt").addFilter(_escape)
