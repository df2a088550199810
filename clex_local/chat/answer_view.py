"""Shows an answer as it comes: as it is, or as Markdown with thoughts in one dim line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Protocol

from rich.cells import set_cell_size
from rich.console import Console
from rich.text import Text

from clex_local.chat.markdown_stream import MarkdownStream
from clex_local.chat.reading_time import readable_time
from clex_local.chat.word_wrap import show
from clex_local.session.thoughts import Thoughts

CONTROLS = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}
# Characters that turn the direction of what follows: what is shown would not be in the order in which it is.
CONTROLS |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)])
_REDRAWN = 0.1  # seconds between two looks of a line that changes


def printable(text: str) -> str:
    """An answer without the characters that control a terminal, where one would see them; a pipe gets all of it.

    They are taken out one by one, so that a sequence of them does nothing however it is cut into pieces.
    """
    return text.translate(CONTROLS) if sys.stdout.isatty() else text


class AnswerView(Protocol):
    """Where an answer is shown."""

    @property
    def thoughts(self) -> str:
        """What the model thought, where that is told from the answer."""
        ...

    def write(self, piece: str) -> None:
        """Show a piece of it."""
        ...

    def end(self) -> None:
        """It is over, or interrupted: end the line."""
        ...


class PlainView:
    """An answer as it is.

    Args:
        write: where it goes.
    """

    thoughts = ""

    def __init__(self, write: Callable[[str], object] | None = None) -> None:
        self._write = write or _to_stdout
        self._last = "\n"

    def write(self, piece: str) -> None:
        """Show a piece of it."""
        self._last = piece[-1:] or self._last
        self._write(piece)

    def end(self) -> None:
        """End the line."""
        if self._last != "\n":
            self._write("\n")


class MarkdownView:
    """An answer as Markdown. What the model thinks is one dim line that changes, and can be shown afterwards.

    Args:
        console: of standard output, a terminal.
        thinking: whether the prompt has begun a thought; asked when the answer begins.
    """

    def __init__(self, console: Console, thinking: Callable[[], bool] = bool) -> None:
        self._console = console
        self._thinking = thinking
        self._parts: Thoughts | None = None
        self._markdown = MarkdownStream(console, lambda text: text.translate(CONTROLS))
        self._began = self._drawn = time.monotonic()
        self._has_line = False

    @property
    def thoughts(self) -> str:
        """What was thought."""
        return self._parts.text.strip() if self._parts else ""

    def write(self, piece: str) -> None:
        """Show a piece of it."""
        self._take(piece, last=False)

    def end(self) -> None:
        """Show what is left, and end the line."""
        self._take("", last=True)
        self._fold()
        self._markdown.end()

    def _take(self, piece: str, last: bool) -> None:
        self._parts = self._parts or Thoughts(self._thinking())
        for thought, text in self._parts.feed(piece, last):
            if thought:
                self._show_thought(self._parts.text)
            else:
                self._fold()
                self._markdown.write(text)

    def _show_thought(self, text: str) -> None:
        now = time.monotonic()
        if self._has_line and now - self._drawn < _REDRAWN:
            return
        words = " ".join(text[-400:].translate(CONTROLS).split())
        room = max(self._console.width - len("thinking … ") - 1, 0)
        while words and Text(words).cell_len > room:
            words = words[max(1, (Text(words).cell_len - room) // 2) :]
        self._redraw(f"thinking … {words}")
        self._drawn = now

    def _fold(self) -> None:
        """Leave a line in place of the thoughts."""
        if self._has_line:
            took = readable_time(time.monotonic() - self._began)
            self._redraw(f"[thought for {took}; /think shows it]")
            self._console.print()
            self._has_line = False

    def _redraw(self, line: str) -> None:
        self._console.file.write("\r\x1b[2K")
        fitting = set_cell_size(line, min(Text(line).cell_len, max(self._console.width - 1, 1)))
        show(self._console, fitting, "dim")
        self._has_line = True


def answer_view(plain: bool, thinking: Callable[[], bool]) -> AnswerView:
    """The view for this standard output: plain where that is wanted, and where it is no terminal."""
    if plain or not sys.stdout.isatty():
        return PlainView()
    return MarkdownView(Console(highlight=False, markup=False, emoji=False), thinking)


def _to_stdout(piece: str) -> None:
    sys.stdout.write(printable(piece))
    sys.stdout.flush()
