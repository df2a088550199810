"""What a command shows: a table, JSON, pictures, and its progress."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from clex_local.errors import ClexError, escaped
from clex_local.figure import PAGE_WIDTH, SHARES, checked_name, curve_style, new_figure

VERSION = 1  # of the JSON


@dataclass(frozen=True)
class Column:
    """A column of a table: the key of its values in the rows, its heading, and how a value is written."""

    key: str
    heading: str
    write: Callable[[Any], str] = str


@dataclass
class Report:
    """What one run found.

    Attributes:
        title: the command, such as ``ppl``.
        columns: of the table.
        rows: one mapping of names to values each; the JSON has all of it, the table what has a column. A value that
            is missing or None is shown as a dash.
        settings: how it was measured.
        notes: what a reader should know, a line each.
    """

    title: str
    columns: list[Column]
    rows: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def print(self) -> None:
        """Write the table to standard output, and the notes below it."""
        table = Table(box=None, pad_edge=False)
        for i, column in enumerate(self.columns):
            justify = "left" if i == 0 else "right"
            table.add_column(column.heading, justify=justify, header_style="dim", no_wrap=True)
        for row in self.rows:
            values = [row.get(column.key) for column in self.columns]
            cells = ["-" if v is None else c.write(v) for c, v in zip(self.columns, values, strict=True)]
            table.add_row(*(Text(escaped(cell)) for cell in cells))
        # Lines of any length: a narrow terminal folds them, and no number is cut.
        console = Console(highlight=False, width=10_000)
        with console.capture() as text:
            console.print(table)
            for note in self.notes:
                console.print(Text(escaped(note, 400), style="dim"))
        click.echo("".join(f"{line.rstrip()}\n" for line in text.get().splitlines()), nl=False)

    def json(self) -> str:
        """All of it as one JSON object; what is not finite becomes null."""
        found = {
            "version": VERSION,
            "command": self.title,
            "settings": self.settings,
            "notes": self.notes,
            "rows": self.rows,
        }
        return json.dumps(_plain(found), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):  # numpy's double is one too
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return value.item() if hasattr(value, "item") else value


def run(
    report: Report, rows: Iterable[dict[str, Any]], *, as_json: bool, plot: Callable[[], None] | None = None
) -> None:
    """Collect the rows of a report and print it; after an error or Ctrl-C what was finished by then.

    Args:
        report: its rows are added to.
        rows: computed one by one.
        as_json: print JSON in place of the table.
        plot: draws the picture of the report, of what was finished too.
    """
    try:
        for row in rows:
            report.rows.append(row)
    except (KeyboardInterrupt, ClexError):
        if report.rows:
            report.notes.append("not finished")
            _show(report, as_json, plot)
        raise
    _show(report, as_json, plot)


def _show(report: Report, as_json: bool, plot: Callable[[], None] | None) -> None:
    if as_json:
        click.echo(report.json())
    else:
        report.print()
    if plot is not None:
        plot()


class Work:
    """A line on a terminal's standard error that says how far the work is."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)
        self._done = 0

    def name(self, text: str) -> None:
        """Say what is computed now."""
        self._progress.update(self._task, description=escaped(text, 60))

    def expect(self, more: int) -> None:
        """Say how much there is still to do."""
        self._progress.update(self._task, total=self._done + more)

    def advance(self, amount: int = 1) -> None:
        """Say that so much more is done."""
        self._done += amount
        self._progress.advance(self._task, amount)


@contextmanager
def working() -> Iterator[Work]:
    """Show the progress of the work inside the block; nothing where standard error is no terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        yield Work(progress)


def plot_curves(
    output: Path,
    title: str,
    x: Sequence[float],
    series: Mapping[str, Sequence[float | None]],
    xlabel: str,
    ylabel: str,
    *,
    errors: Mapping[str, Sequence[float | None]] | None = None,
    marks: Mapping[str, float] | None = None,
    log_x: bool = True,
    log_y: bool = False,
) -> None:
    """Draw curves over context lengths into a PNG or SVG file, the same bytes for the same numbers.

    Args:
        output: a name that ends with .png or .svg; replaced if it exists.
        title: above the picture.
        x: context lengths in tokens, ascending.
        series: by name, one value for each x; None where there is none.
        xlabel: of the horizontal axis.
        ylabel: of the vertical axis.
        errors: standard errors of the values, drawn as bars.
        marks: vertical lines by their label, at an x.
        log_x: a logarithmic horizontal axis.
        log_y: a logarithmic vertical axis.

    Raises:
        ClexError: another ending, matplotlib is missing, or the file cannot be written.
    """
    output = checked_name(output)
    with new_figure(output, 6.4, 4.4 + 0.16 * max(len(series) - 4, 0)) as figure:
        axes = figure.subplots()
        for number, (name, values) in enumerate(series.items()):
            spread = (errors or {}).get(name) or [None] * len(values)
            points = [
                (a, b, 0.0 if c is None else c)
                for a, b, c in zip(x, values, spread, strict=True)
                if b is not None and math.isfinite(b)
            ]
            if points:
                a, b, c = zip(*points, strict=True)
                error = c if any(c) else None
                axes.errorbar(a, b, yerr=error, **curve_style(number), markersize=5, capsize=2, label=_label(name))
        for name, place in (marks or {}).items():
            axes.axvline(place, color="0.6", linestyle="--", linewidth=1, label=_label(name))
        if log_x:
            axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(set(x)), labels=[f"{n:,g}" for n in sorted(set(x))])
        axes.minorticks_off()
        if log_y:
            from matplotlib.ticker import LogFormatter

            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.set_title(_label(title), fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)


def plot_scores(output: Path, title: str, scores: Mapping[str, Mapping[int, Sequence[float]]], xlabel: str) -> None:
    """Draw curves of mean scores over lengths: scores in percent, by the curve's name and the length.

    Raises:
        ClexError: as ``plot_curves``.
    """
    lengths = sorted({length for curve in scores.values() for length in curve})
    series = {name: [fmean(curve[x]) if x in curve else None for x in lengths] for name, curve in scores.items()}
    plot_curves(output, title, lengths, series, xlabel, "score (%)")


def plot_heat_map(
    output: Path,
    titles: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    values: Sequence[Sequence[Sequence[float | None]]],
) -> None:
    """Draw shares of right answers by context length and depth, models side by side, into a PNG or SVG file.

    Args:
        output: a name that ends with .png or .svg; replaced if it exists.
        titles: one for each model.
        lengths: context lengths in tokens.
        depths: where in the context, in percent.
        values: [model][depth][length], from 0 to 1; None where nothing was measured.

    Raises:
        ClexError: another ending, matplotlib is missing, or the file cannot be written.
    """
    output = checked_name(output)
    width, height = max(2.2, 0.62 * len(lengths) + 1.0), 0.34 * len(depths) + 1.3
    columns = min(len(titles), max(1, int((PAGE_WIDTH - 0.8) / width)))
    rows = math.ceil(len(titles) / columns)
    with new_figure(output, width * columns + 0.8, height * rows) as figure:
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        image = None
        for axes, title, cells in zip(grid, titles, values, strict=False):
            shown = [[math.nan if cell is None else cell for cell in row] for row in cells]
            image = axes.imshow(shown, cmap=SHARES, vmin=0, vmax=1, aspect="auto")
            axes.set_xticks(range(len(lengths)), labels=[f"{n:,}" for n in lengths], rotation=45, ha="right")
            axes.set_yticks(range(len(depths)), labels=[f"{depth:g} %" for depth in depths])
            axes.set_title(_label(title), fontsize=9)
            for i, row in enumerate(shown):
                for k, cell in enumerate(row):
                    if math.isfinite(cell):
                        colour = "black" if cell > 0.5 else "white"
                        axes.text(k, i, f"{100 * cell:.0f}", ha="center", va="center", fontsize=8, color=colour)
        for axes in grid[len(titles) :]:
            axes.set_axis_off()
        figure.supxlabel("context length (tokens)", fontsize=9)
        figure.supylabel("depth", fontsize=9)
        if image is not None:
            figure.colorbar(image, ax=grid, label="share of right answers", shrink=0.9, aspect=30)


def _label(text: str) -> str:
    return escaped(text, 60).replace("$", r"\$").lstrip("_")  # matplotlib leaves labels with _ in front out
