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
    pattern = re.compile(rf"(<!-- {re.escape(marker)} -->\n).*?(<!-- end -->)", re.DOTALL)
    text, count = pattern.subn(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", document.read_text(encoding="utf-8"))
    if count != 1:
        raise click.ClickException(f"{document.name}: {count} places for the table {marker!r}, there should be one")
    document.write_text(text, encoding="utf-8")
