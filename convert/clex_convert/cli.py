"""The command ``clex-convert``."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from clex_convert.convert import ConversionResult, convert
from clex_convert.method_tables import converter_version
from clex_convert.options import ConvertOptions
from clex_convert.sizes import Size, sizes
from clex_local.commands.command import SETTINGS, Command, Lines, say
from clex_local.commands.command_options import options_from
from clex_local.sizes import readable_size


@click.command("clex-convert", cls=Command, context_settings=SETTINGS)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUT.gguf", type=click.Path(path_type=Path), required=False)
@options_from(ConvertOptions)
@click.option("--dry-run", is_flag=True, help="Show the size of each type, or of `outtype`, and write nothing.")
@click.version_option(converter_version(), package_name="clex-local")
def main(source: Path, output: Path | None, dry_run: bool, options: ConvertOptions) -> None:
    """Convert SOURCE to OUT.gguf with the frequency tables that let it read past its original context.

    SOURCE is a Hugging Face model folder, with a CLEX layer or without; or an existing GGUF file, to which tables are
    added (of a split one any part); or a model of the Hugging Face hub, as org/name, org/name@revision or
    org/name/file.gguf.
    """
    if output is None and not dry_run:
        raise click.UsageError("Missing argument 'OUT.gguf'.")
    if options.verbose:
        log = logging.StreamHandler()
        log.setFormatter(Lines("%(message)s"))
        logging.basicConfig(handlers=[log])
    try:
        with _stoppable():
            if output is None or dry_run:
                _show_sizes(sizes(source, **vars(options)))
            else:
                with _bars(output, options) as watched:
                    result = convert(source, output, **vars(watched))
                _show(result)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written") from None


@contextlib.contextmanager
def _bars(output: Path, options: ConvertOptions) -> Iterator[ConvertOptions]:
    """The options with progress bars on a terminal."""
    errors = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
        disable=options.verbose or not errors.is_terminal,
    )
    tasks: dict[str, Any] = {}

    def progress(phase: str, part: float) -> None:
        bars.start()  # not before, because downloads have bars of their own
        if phase not in tasks:
            tasks[phase] = bars.add_task(phase, total=1.0)
        bars.update(tasks[phase], completed=part)

    def expected(size: int) -> None:
        if errors.is_terminal:
            say(f"{output} will have {readable_size(size)}", err=True)

    try:
        yield replace(options, progress=progress, expected=expected)
    finally:
        bars.stop()


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Lets a request to end the process clean up first, as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = [signal.signal(number, stop) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _show(result: ConversionResult) -> None:
    tables = result.tables
    table = Table(box=None, pad_edge=False, show_edge=False)
    for column in ("bucket", "factor", "tokens up to"):
        table.add_column(column, justify="right")
    rows = list(enumerate(zip(tables.scaling_factors, tables.context_lengths, strict=True)))
    for index, (factor, length) in rows if len(rows) <= 12 else rows[:6]:
        table.add_row(str(index + 1), f"{factor:g}", str(length))
    if len(rows) > 12:
        table.add_row("...", "...", "...")
        index, (factor, length) = rows[-1]
        table.add_row(str(index + 1), f"{factor:g}", str(length))
    Console(highlight=False).print(table)
    method = tables.method if result.baked is None else f"{tables.method} baked for {result.baked} tokens"
    say(f"{result.path}: {result.outtype}, method {method}, {readable_size(result.size)}, {result.seconds:.1f} s")
    say(f"SHA-256 {result.sha256}")
    if result.divergence is not None:
        found = result.divergence
        say(
            f"check: mean KL divergence {found.kl:.4f} from the unquantized model; the likeliest next token is the "
            f"same for {found.agreement:.1%} of {found.tokens} tokens"
        )
    for note in result.notes:
        say(f"note: {note}")


def _show_sizes(found: list[Size]) -> None:
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("type")
    table.add_column("bytes", justify="right")
    table.add_column("", justify="right")
    table.add_column("")
    for size in found:
        numbers = ("-", "") if size.size is None else (str(size.size), readable_size(size.size))
        table.add_row(size.outtype, *numbers, size.note)
    Console(highlight=False, soft_wrap=True).print(table)
