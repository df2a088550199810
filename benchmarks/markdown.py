"""What the benchmarks print, and put into documents: tables in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import click


def row(cells: Iterable[str]) -> str:
    """One row of a table."""
    return "| " + " | ".join(cells) + " |"


def put_table(document: Path, marker: str, table: str) -> None:
    """Replace what stands between the comment with the marker and the next <!-- end -->.

    Raises:
        click.ClickException: the document has no such place, or several.
    """
    text = document.read_text(encoding="utf-8")
    place = _place(document, text, marker)
    document.write_text(f"{text[: place.start(1)]}\n{table}\n\n{text[place.end(1) :]}", encoding="utf-8")


def table_in(document: Path, marker: str) -> list[list[str]]:
    """The cells of the table that stands there, of the heading and of each row.

    Raises:
        click.ClickException: the document has no such place, or several.
    """
    lines = _place(document, document.read_text(encoding="utf-8"), marker)[1].split("\n")
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line.startswith("|")]
    return [cells for cells in rows if not all(re.fullmatch(r":?-+:?", cell) for cell in cells)]


def _place(document: Path, text: str, marker: str) -> re.Match[str]:
    found = list(re.finditer(rf"<!-- {re.escape(marker)} -->\n(.*?)<!-- end -->", text, re.DOTALL))
    if len(found) != 1:
        raise click.ClickException(
            f"{document.name}: {len(found)} places for the table {marker!r}, there should be one"
        )
    return found[0]
