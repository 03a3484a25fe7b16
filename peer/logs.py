"""What others wrote stays text in the log: no line of theirs begins one, nor moves a cursor.

Names and reasons come from other peers, and any peer of the network may join. So whatever is not
printable (line ends, terminal escapes, marks that turn the writing direction) is written as Python
would write it in a string.
"""

from __future__ import annotations

import logging


def clean(text: str) -> str:
    """The text on one line, of printable characters only."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class _Clean(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = clean(record.getMessage()), ()
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:  # lines of a traceback are its own
            record.exc_text = "\n".join(clean(line) for line in record.exc_text.split("\n"))
        return True


def harmless(handler: logging.Handler) -> None:
    """Make a handler write every record with `clean` text."""
    handler.addFilter(_Clean())
