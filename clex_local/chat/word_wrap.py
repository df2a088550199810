"""Breaks lines between words while they are written, at the width that the terminal has then."""

from __future__ import annotations

import re

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

_PARTS = re.compile(r"\n|[^\S\n]+|\S+")


def show(console: Console, text: str, style: str = "") -> None:
    """Write a text as it is, where the line goes on behind it."""
    console.print(Text(text, style=style), end="", soft_wrap=True)


class WordWrap:
    """Writes pieces of a text to a terminal.

    A piece is shown at once, also in the middle of a word. Where the word turns out not to fit, what was shown of it is
    taken back from the end of the line and put into the next one.

    Args:
        console: the terminal. One that cannot move its cursor breaks lines by itself.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._wraps = console.is_terminal and not console.is_dumb_terminal
        self._column = 0  # cells in this line
        self._word: list[tuple[str, str]] = []  # of the word at its end, with styles
        self._indent: list[tuple[str, str]] = []

    def indent(self, indent: list[tuple[str, str]]) -> None:
        """Begin lines that go on with these texts and styles, until the line ends."""
        self._indent = indent

    def write(self, text: str, style: str = "") -> None:
        """Write a piece."""
        for part in _PARTS.findall(text) if self._wraps else [text]:
            if not self._wraps:
                show(self._console, part, style)
            elif part == "\n":
                show(self._console, "\n")
                self._column, self._word, self._indent = 0, [], []
            elif part.isspace():
                self._write_space(part, style)
            else:
                # Scripts with wide characters have no spaces, and a line may end after each.
                for piece in re.findall(r"[\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\uff00-\uff60]|[^\u2e80-\ua4cf"
                                        r"\uac00-\ud7a3\uf900-\ufaff\uff00-\uff60]+", part):  # fmt: skip
                    self._write_word(piece, style)

    def _write_space(self, text: str, style: str) -> None:
        self._word = []
        # At the end of a line it is left out: what comes begins the next one.
        if self._column + cell_len(text) < self._room:
            show(self._console, text, style)
        self._column += cell_len(text.expandtabs(8))

    def _write_word(self, text: str, style: str) -> None:
        size = cell_len(text)
        if cell_len(text) == 2 and len(text) == 1:
            self._word = []
        shown = sum(cell_len(part) for part, _ in self._word)
        begin = sum(cell_len(part) for part, _ in self._indent)
        if self._column + size > self._room and self._column - shown > begin:
            if shown:
                self._console.file.write(f"\x1b[{shown}D\x1b[K")
            show(self._console, "\n")
            for part, its_style in [*self._indent, *self._word]:
                show(self._console, part, its_style)
            self._column = begin + shown
        show(self._console, text, style)
        self._column += size
        self._word.append((text, style))
        if self._column > self._room:  # longer than a line: the terminal has broken it
            self._column, self._word = self._column % max(self._console.width, 1), []

    @property
    def _room(self) -> int:
        # In the last column, terminals differ in where the cursor is.
        return self._console.width - 1
