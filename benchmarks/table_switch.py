"""What it costs to bring the cached keys to another table, against prefilling their tokens again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click
import numpy as np

from benchmarks.context import Context, Model
from benchmarks.markdown import row
from clex_local.commands.command import SETTINGS, Command
from clex_local.commands.command_options import options_from
from clex_local.commands.options import option
from clex_local.model_file.kv_types import KV_TYPES

NEIGHBOURS = 4  # decodes before and after the crossing one, which say what a decode costs without it


def crossing(context: Context, depth: int, token: int) -> tuple[float, float]:
    """Decode the token that crosses the boundary at depth; how much longer it took than its neighbours, in seconds.

    The cache holds at least depth - NEIGHBOURS - 1 tokens. The second number is what the library itself counted.
    """
    context.forget(depth - NEIGHBOURS - 1)
    # One decode more than is counted: the first brings back the keys that an earlier crossing has changed.
    before = [context.timed([token], depth - NEIGHBOURS - 1 + i) for i in range(NEIGHBOURS + 1)][1:]
    runs, cells, seconds = context.rerotations
    crossed = context.timed([token], depth)
    runs_after, cells_after, seconds_after = context.rerotations
    if (runs_after - runs, cells_after - cells) != (1, depth):
        raise click.ClickException(f"the decode at {depth} re-rotated {cells_after - cells} keys, not {depth}")
    after = [context.timed([token], depth + 1 + i) for i in range(NEIGHBOURS)]
    return crossed - median(before + after), seconds_after - seconds


@dataclass(frozen=True, kw_only=True)
class SwitchOptions:
    """What is measured, and how often."""

    depth: Sequence[int] = option(
        (),
        "Tokens cached at the crossing: one of the lengths that a table covers. Repeatable.",
        default_text="what the first table covers",
        minimum=16,
    )
    kv_type: Sequence[str] = option(
        tuple(KV_TYPES),
        "Type of the cache; flash attention is on for q8_0, which needs it. Repeatable.",
        choices=tuple(KV_TYPES),
    )
    repetitions: int = option(3, "Prefills per line.", minimum=1)
    crossings: int = option(3, "After each prefill.", minimum=1)
    batch: int = option(512, "Prompt tokens computed at once.", minimum=1)
    threads: int | None = option(None, "Threads to compute with.", default_text="the physical cores", minimum=1)
    n_gpu_layers: int = option(0, "Layers computed on a GPU; -1: all.")


def measure(model: Model, depth: int, kv_type: str, options: SwitchOptions) -> list[str]:
    """The cells of a row: prefills up to a depth, and crossings after each."""
    tokens = np.random.default_rng(0).integers(0, model.n_vocab, depth, np.int32)
    flash_attn = kv_type == "q8_0"
    with Context(
        model, depth + 256, kv_type=kv_type, flash_attn=flash_attn, n_batch=options.batch, threads=options.threads
    ) as context:
        context.prefill(tokens[: options.batch])  # touches the weights and the buffers
        prefills, costs = [], []
        for _ in range(options.repetitions):
            context.clear()
            prefills.append(context.prefill(tokens))
            costs += [crossing(context, depth, int(tokens[0])) for _ in range(options.crossings)]
    whole, counted = (sorted(column) for column in zip(*costs, strict=True))
    prefill, cost = median(prefills), median(whole)
    return [
        f"{depth:,}",
        kv_type,
        f"{prefill:.1f}",
        f"{cost * 1e3:.1f}",
        f"{median(counted) * 1e3:.1f}",
        f"{prefill / cost:.0f} ({min(prefills) / whole[-1]:.0f})",
    ]


@click.command("table_switch", cls=Command, context_settings=SETTINGS)
@click.argument("path", metavar="MODEL", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@options_from(SwitchOptions)
def main(path: Path, options: SwitchOptions) -> None:
    """Measure a model with tables: prefill up to a boundary, cross it, and so on alternately.

    Printed are medians: the prefill; the decode that crosses less its neighbours that do not; the time that the
    library counts for the re-rotation itself; and the prefill divided by the second (in brackets by the worst of all
    crossings).
    """
    model = Model(path, options.n_gpu_layers)
    if len(model.factors) < 2:
        raise click.ClickException(f"{path}: has no tables to switch between; make them with clex-convert")
    covered = [int(factor * model.original_context) for factor in model.factors[:-1]]
    if wrong := [depth for depth in options.depth if depth not in covered]:
        raise click.ClickException(f"no table ends at {wrong[0]} tokens, only at {', '.join(map(str, covered))}")
    columns = ["cached tokens", "cache", "prefill, s", "crossing, ms", "re-rotation, ms", "prefill / crossing"]
    click.echo(row(columns))
    click.echo(row(["---:", "---", *["---:"] * 4]))
    for depth in options.depth or covered[:1]:
        for kv_type in options.kv_type:
            click.echo(row(measure(model, depth, kv_type, options)))
    model.close()


if __name__ == "__main__":
    main()
