"""Lines of notes and errors, broken between words where a window would break them inside of one."""

from __future__ import annotations

import os
import re
import textwrap
from typing import TextIO

_COLUMN = re.compile(r" *\S+(?: \S+)*?  +(?=\S)(?:\S+  +(?=\S))?")  # what stands in front of the text in a table


def window_width(stream: TextIO | None) -> int | None:
    """Columns of the window that a stream is shown in; None where it is no terminal, or does not say.

    Not ``COLUMNS``, which may be that of another window, or of this one before it changed.
    """
    try:
        return (stream and stream.isatty() and os.get_terminal_size(stream.fileno()).columns) or None
    except (OSError, ValueError):  # closed, or no file at all
        return None


def wrapped(text: str, width: int) -> str:
    """Lines broken between words, those of a table under their text; longer words, such as paths, stay whole."""
    lines = []
    for line in text.split("\n"):
        column = _COLUMN.match(line)
        hang = column.end() if column and column.end() <= width // 2 else 2 if column else 0
        lines += textwrap.wrap(
            line, max(width, 1), subsequent_indent=" " * hang, break_long_words=False, break_on_hyphens=False,
            replace_whitespace=False, expand_tabs=False,
        ) or [""]  # fmt: skip
    return "\n".join(lines)
