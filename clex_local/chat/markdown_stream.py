"""Shows Markdown at a terminal while it is being written.

No line that was shown is taken back, so that no size of a window and no change of it can mix up lines. What an element
is, is decided as soon as it can be: a word in bold waits for its end, a row of a table for the table's; everything else
is shown at once. What is not Markdown after all is shown as it was written, to the last character.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clex_local.chat.word_wrap import WordWrap, show

_LONGEST = 600  # characters that an element in a line may have; longer ones are text
_CODE = "cyan"
_HEADING = {1: "bold underline", 2: "bold underline"}

_BEGINNING = re.compile(
    r"\s*(#{1,6}|[-*+]|\d{1,9}[.)]?|>[> ]*|`{1,}|~{1,}|[-*_][-*_ ]*)?\s?$"
)  # a line that is undecided
_FENCE = re.compile(r"\s*(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$")
_HEAD = re.compile(r"\s{0,3}(#{1,6})\s+")
_ITEM = re.compile(r"(\s*)([-*+]|\d{1,9}[.)])\s+(?=\S)")
_QUOTE = re.compile(r"\s{0,3}>\s?")
_RULE = re.compile(r"\s{0,3}([-*_])(\s*\1){2,}\s*$")
_DIVIDER = re.compile(r"\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$")

# Elements inside a line, the whole of each, with what is shown of them and how.
_INLINE: list[tuple[re.Pattern[str], str]] = [
    (re.compile(r"(?P<mark>`+)(?!`)(?P<code>.+?)(?<!`)(?P=mark)(?!`)"), _CODE),
    (re.compile(r"\*\*\*(?=\S)(?P<inner>.+?)(?<=[^\s*])\*\*\*"), "bold italic"),
    (re.compile(r"\*\*(?=[^\s*])(?P<inner>.+?)(?<=\S)\*\*(?!\*)"), "bold"),
    (re.compile(r"__(?=[^\s_])(?P<inner>.+?)(?<=\S)__(?!\w)"), "bold"),
    (re.compile(r"\*(?=[^\s*])(?P<inner>[^*\n]+?)(?<=\S)\*(?!\*)"), "italic"),
    (re.compile(r"_(?=[^\s_])(?P<inner>[^_\n]+?)(?<=\S)_(?!\w)"), "italic"),
    (re.compile(r"~~(?=\S)(?P<inner>.+?)(?<=\S)~~"), "strike"),
    (re.compile(r"\[(?P<inner>[^\[\]\n]+)\]\((?P<link>[^()\s]+)\)"), "underline"),
]
_PLAIN = re.compile(r"[^*_`~\[\\]+")
_ESCAPED = r"\`*_{}[]()#+-.!|>~"


class MarkdownStream:
    """Takes an answer in pieces and shows it.

    Args:
        console: where.
        clean: takes characters out of a text that would control the terminal.
    """

    def __init__(self, console: Console, clean: Callable[[str], str] = str) -> None:
        self._console, self._clean = console, clean
        self._wrap = WordWrap(console)
        self._line = ""  # of the line that comes, what is not shown yet
        self._begun = False  # what kind of line it is was decided
        self._style = ""
        self._fence = ""  # that ends the code which comes
        self._rows: list[str] = []  # of a table
        self._before = ""  # the last character that was shown

    def write(self, piece: str) -> None:
        """Take a piece, and show what can be shown."""
        for part in re.findall(r"[^\n]+|\n", self._clean(piece)):
            if part == "\n":
                self._end_line()
            else:
                self._line += part
                self._go_on()

    def end(self) -> None:
        """Show what is left; the answer is over."""
        if self._line or self._begun:
            self._end_line()
        self._show_table()

    def _go_on(self) -> None:
        """Show what can be shown of a line that goes on."""
        if not self._begun:
            text = self._line.lstrip()
            if text.startswith("|") or self._fence or _BEGINNING.match(self._line) or _FENCE.match(self._line):
                return  # code is shown by lines
            self._begin()
        self._show_inline(last=False)

    def _begin(self) -> None:
        """Decide what kind of line it is, and show its mark."""
        self._show_table()
        self._begun, self._style, self._before = True, "", ""
        marks = []
        while quote := _QUOTE.match(self._line):
            marks.append(("▌ ", "dim"))
            self._line = self._line[quote.end() :]
        if head := _HEAD.match(self._line):
            self._style = _HEADING.get(len(head[1]), "bold")
            self._line = self._line[head.end() :]
        elif item := _ITEM.match(self._line):
            marks.append((item[1] + ("• " if item[2] in "-*+" else f"{item[2]} "), "cyan"))
            self._line = self._line[item.end() :]
        for mark, style in marks:
            self._wrap.write(mark, style)
        self._wrap.indent([(mark if mark[0] == "▌" else " " * len(mark), style) for mark, style in marks])

    def _end_line(self) -> None:
        line, self._line = self._line, ""
        if self._fence:
            if line.strip().startswith(self._fence) and not line.strip(self._fence[0] + " "):
                self._fence = ""
            else:
                show(self._console, f"{line}\n", _CODE)
            return
        if not self._begun:
            if line.lstrip().startswith("|"):
                self._rows.append(line)
                return
            self._show_table()
            if fence := _FENCE.match(line):
                self._fence = fence[1]
                if fence[2]:
                    show(self._console, f"{fence[2]}\n", "dim")
                return
            if _RULE.match(line):
                show(self._console, "─" * min(40, self._console.width - 1) + "\n", "dim")
                return
            self._line = line
            self._begin()
            line, self._line = self._line, ""
        self._line = line
        self._show_inline(last=True)
        self._wrap.write("\n")
        self._begun = False

    def _show_inline(self, last: bool) -> None:
        for text, style, length in inline(self._line, self._before, last):
            self._wrap.write(text, f"{self._style} {style}".strip())
            self._before = self._line[length - 1 : length] or self._before
            self._line = self._line[length:]

    def _show_table(self) -> None:
        rows, self._rows = self._rows, []
        if len(rows) < 2 or not _DIVIDER.match(rows[1]):
            for row in rows:
                show(self._console, f"{row}\n")
            return
        cells = [[cell.strip() for cell in _cells(row)] for row in rows]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for index, title in enumerate(cells[0]):
            mark = cells[1][index] if index < len(cells[1]) else ""
            right, left = mark.endswith(":"), mark.startswith(":")
            table.add_column(_styled(title), justify="center" if right and left else "right" if right else "left",
                             overflow="fold")  # fmt: skip
        for row in cells[2:]:
            table.add_row(*map(_styled, (row + [""] * len(cells[0]))[: len(cells[0])]))
        self._console.print(table)


def inline(line: str, before: str, last: bool) -> Iterator[tuple[str, str, int]]:
    """The elements at the beginning of a line, as far as they are decided.

    Args:
        line: what is left of it.
        before: the character in front of it.
        last: nothing more comes.

    Yields:
        What is shown, its style, and of how many characters of the line it was made.
    """
    while line:
        if plain := _PLAIN.match(line):
            length = plain.end()
            yield plain[0], "", length
        elif line[0] == "\\" and len(line) > 1:
            length = 2 if line[1] in _ESCAPED else 1
            yield line[1] if length == 2 else "\\", "", length
        elif found := _element(line, before, last):
            text, style, length = found
            yield text, style, length
        elif not last and len(line) < _LONGEST and _may_begin(line, before):
            return
        else:
            length = _run(line)
            yield line[:length], "", length
        before, line = line[length - 1], line[length:]


def _element(line: str, before: str, last: bool) -> tuple[str, str, int] | None:
    if before.isalnum() and line[0] in "_*~":  # in the middle of a word it is text
        return None
    for pattern, style in _INLINE:
        found = pattern.match(line)
        if found is None or (found.end() == len(line) and not last and line[-1] in "`*_~"):
            continue  # one more mark would make it another element
        groups = found.groupdict()
        if "code" in groups:
            return groups["code"].strip() or groups["code"], style, found.end()
        text = "".join(part for part, _, _ in inline(groups["inner"], "", True))
        link = f" ({groups['link']})" if groups.get("link") not in (None, text) else ""
        return text + link, style, found.end()
    return None


def _may_begin(line: str, before: str) -> bool:
    """Whether an element can begin here, whose end has not come."""
    run = _run(line)
    if run == len(line):
        return True
    if line[0] == "[":
        return re.match(r"\[[^\[\]]*(\](\([^()\s]*)?)?$", line) is not None
    if line[0] == "`":
        return True
    return not before.isalnum() and not line[run].isspace() and (line[0] != "~" or run == 2)


def _run(line: str) -> int:
    """Characters at the beginning that are the same."""
    return len(line) - len(line.lstrip(line[0]))


def _cells(row: str) -> list[str]:
    text = row.strip()
    text = text[1:] if text.startswith("|") else text
    text = text[:-1] if text.endswith("|") and not text.endswith("\\|") else text
    return [cell.replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", text)]


def _styled(text: str) -> Text:
    result = Text()
    for part, style, _ in inline(text, "", True):
        result.append(part, style)
    return result
