"""What it costs to bring the cached keys to another table, against prefilling their tokens again."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import click
import numpy as np

from benchmarks.context import KV_TYPES, Context, Model

NEIGHBOURS = 4  # decodes before and after the crossing one, which say what a decode costs without it


def crossing(context: Context, depth: int, token: int) -> tuple[float, float]:
    """Decode the token that crosses the boundary at depth; how much longer it took than its neighbours, in seconds.

    The cache holds at least depth - NEIGHBOURS - 1 tokens. The second number is what the library itself counted.
    """
    context.truncate(depth - NEIGHBOURS - 1)
    # One decode more than is counted: the first brings back the keys that an earlier crossing has changed.
    before = [context.decode([token], depth - NEIGHBOURS - 1 + i) for i in range(NEIGHBOURS + 1)][1:]
    runs, cells, seconds = context.rerotations
    crossed = context.decode([token], depth)
    runs_after, cells_after, seconds_after = context.rerotations
    if (runs_after - runs, cells_after - cells) != (1, depth):
        raise click.ClickException(f"the decode at {depth} re-rotated {cells_after - cells} keys, not {depth}")
    after = [context.decode([token], depth + 1 + i) for i in range(NEIGHBOURS)]
    return crossed - median(before + after), seconds_after - seconds


@click.command()
@click.argument("path", metavar="MODEL", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--depth", "depths", type=click.IntRange(min=16), multiple=True,
    help="Tokens cached at the crossing: one of the lengths that a table covers. Repeatable.  "
    "[default: what the first table covers]",
)  # fmt: skip
@click.option(
    "--kv-type", "kv_types", type=click.Choice(list(KV_TYPES)), multiple=True, default=list(KV_TYPES),
    show_default=True, help="Type of the cache; flash attention is on for q8_0, which needs it. Repeatable.",
)  # fmt: skip
@click.option("--repetitions", type=click.IntRange(min=1), default=3, show_default=True, help="Prefills per line.")
@click.option("--crossings", type=click.IntRange(min=1), default=3, show_default=True, help="After each prefill.")
@click.option("--batch", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="[default: the physical cores]")
@click.option("--gpu-layers", type=int, default=0, show_default=True, help="Layers computed on a GPU; -1: all.")
def main(
    path: Path,
    depths: tuple[int, ...],
    kv_types: tuple[str, ...],
    repetitions: int,
    crossings: int,
    batch: int,
    threads: int | None,
    gpu_layers: int,
) -> None:
    """Measure a model with tables: prefill up to a boundary, cross it, and so on alternately.

    Printed are medians: the prefill; the decode that crosses less its neighbours that do not; the time that the
    library counts for the re-rotation itself; and the prefill divided by the second (in brackets by the worst of all
    crossings).
    """
    model = Model(path, gpu_layers)
    if len(model.factors) < 2:
        raise click.ClickException(f"{path}: has no tables to switch between; make them with clex-convert")
    covered = [int(factor * model.original_context) for factor in model.factors[:-1]]
    if wrong := [depth for depth in depths if depth not in covered]:
        raise click.ClickException(f"no table ends at {wrong[0]} tokens, only at {', '.join(map(str, covered))}")
    random = np.random.default_rng(0)
    click.echo("| cached tokens | cache | prefill, s | crossing, ms | re-rotation, ms | prefill / crossing |")
    click.echo("| ---: | --- | ---: | ---: | ---: | ---: |")
    for depth in depths or covered[:1]:
        tokens = random.integers(0, model.n_vocab, depth, np.int32)
        for kv_type in kv_types:
            with Context(
                model, depth + 256, kv_type=kv_type, flash_attn=kv_type == "q8_0", n_batch=batch, threads=threads
            ) as context:
                context.prefill(tokens[:batch])  # touches the weights and the buffers
                prefills, costs = [], []
                for _ in range(repetitions):
                    context.clear()
                    prefills.append(context.prefill(tokens))
                    costs += [crossing(context, depth, int(tokens[0])) for _ in range(crossings)]
            whole, counted = (sorted(column) for column in zip(*costs, strict=True))
            prefill, cost = median(prefills), median(whole)
            click.echo(
                f"| {depth:,} | {kv_type} | {prefill:.1f} | {cost * 1e3:.1f} | {median(counted) * 1e3:.1f} "
                f"| {prefill / cost:.0f} ({min(prefills) / whole[-1]:.0f}) |"
            )
    model.close()


if __name__ == "__main__":
    main()
