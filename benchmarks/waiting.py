"""Decode speed by how threads wait for each other: alone, and beside processes that keep every core busy."""

from __future__ import annotations

import os
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import click

from benchmarks.context import default_threads
from benchmarks.stock import STOCK, Side


def burn() -> None:
    """Keep one core busy."""
    while True:
        pass


def speeds(sides: list[Side], rounds: int, tokens: int) -> dict[str, list[float]]:
    """Tokens per second of each side in each round; the sides take turns."""
    found: dict[str, list[float]] = {side.name: [] for side in sides}
    for turn in range(rounds + 1):
        for side in sides[:: -1 if turn % 2 else 1]:
            found[side.name].append(tokens / side.ask("decode", 64, tokens))
    return {name: values[1:] for name, values in found.items()}  # the first round warms up


@click.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--stock", type=click.Path(path_type=Path), default=STOCK, show_default="build/stock/bin",
    help="Folder of the stock libraries (`make stock`).",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(min=2), help="[default: the physical cores]")
@click.option("--tokens", type=click.IntRange(min=1), default=16, show_default=True, help="Tokens decoded in a turn.")
@click.option("--rounds", type=click.IntRange(min=2), default=20, show_default=True, help="Turns alone.")
@click.option("--busy-rounds", type=click.IntRange(min=2), default=5, show_default=True, help="Turns beside others.")
def main(model: str, stock: Path, threads: int | None, tokens: int, rounds: int, busy_rounds: int) -> None:
    """Measure decode of MODEL with the patched library and the stock one, alone and with one busy process per core.

    Printed are tokens per second (medians), and as a ratio to one thread alone.
    """
    if not stock.is_dir():
        raise click.ClickException(f"{stock}: no such folder; run `make stock` first")
    threads = threads or default_threads()
    plain = {"LLAMA_CPP_LIB_PATH": str(stock.resolve())}
    rows = [
        ("patched, 1 thread", 1, {}),
        (f"patched, {threads} threads", threads, {}),
        # What OpenMP does of its own accord; clex-local leaves a variable alone that is set.
        (f"stock, {threads} threads", threads, {**plain, "GOMP_SPINCOUNT": "300000"}),
        (f"stock, {threads} threads, passive", threads, {**plain, "OMP_WAIT_POLICY": "passive"}),
    ]
    sides = [Side.start(name, env, model, 64 + tokens + 1, 0, {"threads": count}) for name, count, env in rows]
    alone = speeds(sides, rounds, tokens)
    spawn = get_context("spawn")
    others = [spawn.Process(target=burn, daemon=True) for _ in range(os.cpu_count() or 1)]
    for other in others:
        other.start()
    busy = speeds(sides, busy_rounds, tokens)
    for other in others:
        other.kill()
    for side in sides:
        side.stop()
    single = median(alone[sides[0].name])
    click.echo("| | alone, tok/s | to 1 thread alone | beside busy processes, tok/s | to 1 thread alone |")
    click.echo("| --- | ---: | ---: | ---: | ---: |")
    for side in sides:
        cells = [f"{speed:.1f} | {speed / single:.3f}" for speed in (median(alone[side.name]), median(busy[side.name]))]
        click.echo(f"| {side.name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
