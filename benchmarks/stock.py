"""Speed with tables, without, and of stock llama.cpp: several processes that take turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click

from benchmarks.markdown import row
from benchmarks.sides import STOCK, Server, Side, stock_library
from benchmarks.turns import in_turns, speedup
from clex_local.commands.command import SETTINGS, Command
from clex_local.commands.command_options import options_from
from clex_local.commands.options import option


@dataclass(frozen=True, kw_only=True)
class StockOptions:
    """What is compared, and how long."""

    tables: Path | None = option(None, "The same model with tables.")
    stock: Path = option(
        STOCK, "Folder of the stock libraries; `make stock` builds them.", default_text="build/stock/bin"
    )
    amx: bool = option(False, "Compare with AMX and without instead: the patched library twice.")
    depth: Sequence[int] = option((0, 4096), "Tokens cached before. Repeatable.", minimum=0)
    prompt: int = option(512, "Tokens prefilled at once.", minimum=1)
    tokens: int = option(16, "Tokens decoded in a turn.", minimum=1)
    rounds: int = option(20, "Turns of each side.", minimum=2)
    kv_type: str = option("f16", "Type of the key and value cache.", choices=("f16", "f32", "q8_0"))
    flash_attn: bool = option(False, "Flash attention.")
    threads: int | None = option(None, "Threads to compute with.", default_text="the physical cores", minimum=1)
    n_gpu_layers: int = option(0, "Layers on the GPU; -1: all.")
    cpu_time: bool = option(False, "Count CPU time on one thread, which a busy machine disturbs less.")


def rows(model: str, options: StockOptions) -> list[tuple[str, str, dict[str, str]]]:
    """The sides: their names, model files and environments."""
    if options.amx:
        if "amx_tile" not in Path("/proc/cpuinfo").read_text():
            raise click.ClickException("this CPU has no AMX")
        off = {"GGML_AMX_DISABLE": "1"}
        return [("AMX off", model, off), ("AMX off, again", model, off), ("AMX", model, {})]
    library = stock_library(options.stock)
    found = [("stock", model, library), ("stock, again", model, library), ("patched, no tables", model, {})]
    if options.tables is None:
        return found
    if not options.tables.is_file():
        raise click.ClickException(f"{options.tables}: no such file")
    return [*found, ("patched, tables", str(options.tables), {})]


def compare(sides: list[Side], rounds: int, method: str, depth: int, count: int) -> list[str]:
    """Let the sides take turns; the reference's speed, and the others' as a ratio to it, with quartiles."""
    for side in sides:
        side.ask("fill", depth)
    asked = {side.name: partial(side.ask, method, depth, count) for side in sides}
    seconds = in_turns(asked, rounds, warm_up=1)
    reference, *others = seconds.values()
    return [f"{count / median(reference):.1f}", *(speedup(reference, times).text(3) for times in others)]


@click.command("stock", cls=Command, context_settings=SETTINGS)
@click.argument("model", type=click.Path(exists=True, dir_okay=False))
@options_from(StockOptions)
def main(model: str, options: StockOptions) -> None:
    """Measure prefill and decode of MODEL, which has no tables, with the stock library and the patched one.

    Each side is a process of its own, and they take turns, so that what else the machine does meets all alike. Printed
    are the speed of the first side and the others' as ratios to it (above 1: faster): the median over the rounds, and
    the quartiles. The first side takes part twice: the ratio of the two is what noise does.
    """
    n_ctx = max(options.depth) + max(options.prompt, options.tokens + 1)
    context: dict[str, Any] = {
        "kv_type": options.kv_type,
        "flash_attn": options.flash_attn,
        "threads": options.threads,
    }
    if options.cpu_time:
        context |= {"threads": 1, "clock": time.process_time}
    sides = [
        Side.start(name, environment, Server, path, n_ctx, options.n_gpu_layers, context)
        for name, path, environment in rows(model, options)
    ]
    click.echo(row(["", f"{sides[0].name}, tok/s", *(side.name for side in sides[1:])]))
    click.echo(row(["---", *["---:"] * len(sides)]))
    for depth in sorted(options.depth):
        for method, count in (("prefill", options.prompt), ("decode", options.tokens)):
            click.echo(row([f"{method} {count:,} at {depth:,}", *compare(sides, options.rounds, method, depth, count)]))
    for side in sides:
        side.stop()


if __name__ == "__main__":
    main()
