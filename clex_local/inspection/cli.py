"""``clex-inspect``: show what is in a model file."""

from __future__ import annotations

if __name__ == "__main__":  # before the rest is imported, for Ctrl-C there
    from clex_local import start

    start.clex_inspect()

import json
import sys
from pathlib import Path

import click
from rich.console import Console

from clex_local.commands.command import SETTINGS, Command
from clex_local.inspection.inspection import KV_SHOWN, inspect
from clex_local.inspection.report import show
from clex_local.model_file.kv_types import KV_TYPES


@click.command("clex-inspect", cls=Command, context_settings=SETTINGS)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--ctx",
    metavar="N",
    type=click.IntRange(1, 2**31 - 1),
    multiple=True,
    show_default="the original context and its doublings",
    help="Context in tokens to show the memory of. Repeatable.",
)
@click.option(
    "--kv-type",
    "kv_types",
    metavar="TYPE",
    type=click.Choice(list(KV_TYPES)),
    multiple=True,
    default=KV_SHOWN,
    help=f"Type of the key and value cache to show it for: {', '.join(KV_TYPES)}. Repeatable.",
)
@click.option(
    "--plot",
    "picture",
    metavar="OUT",
    type=click.Path(path_type=Path),
    help="Draw the inverse frequencies of every bucket into OUT.png or OUT.svg; several files side by side.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each FILE, a line each.")
@click.version_option(package_name="clex-local")
def main(
    files: tuple[Path, ...], ctx: tuple[int, ...], kv_types: tuple[str, ...], picture: Path | None, as_json: bool
) -> None:
    """Show what is in a GGUF FILE: model, memory that a context needs, tables and what they cover.

    Only the header is read.
    """
    found = [inspect(path, ctx=ctx, kv_types=kv_types) for path in files]
    if picture is not None:
        from clex_local.inspection.plot import plot

        plot(found, picture)
    # A pipe takes lines of any length.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    for number, inspection in enumerate(found):
        if as_json:
            click.echo(json.dumps(inspection.to_json(), allow_nan=False))
            continue
        with console.capture() as text:
            show(inspection, console)
        lines = "".join(f"{line.rstrip()}\n" for line in text.get().splitlines())
        click.echo("\n" * (number > 0) + lines, nl=False)
