"""Decoding several sequences at once: in several buckets against all in one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import llama_cpp
import numpy as np

from benchmarks.context import Context, Model
from benchmarks.markdown import row
from benchmarks.turns import in_turns, quartiles, speedup
from clex_local.commands.command import SETTINGS, Command
from clex_local.commands.command_options import options_from
from clex_local.commands.options import option
from clex_local.model_file.kv_types import KV_TYPES


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """What is decoded, and how often."""

    sequences: int = option(8, "Sequences that are decoded at once.", minimum=2)
    buckets: int = option(4, "Buckets that they are in; against one.", minimum=2)
    depth: int = option(256, "Tokens cached of each sequence.", minimum=1)
    count: int = option(32, "Tokens of each sequence that a measurement decodes.", minimum=1)
    rounds: int = option(9, "Measurements of each side, in turns.", minimum=2)
    kv_type: str = option("f16", "Type of the cache.", choices=tuple(KV_TYPES))
    threads: int | None = option(None, "Threads to compute with.", default_text="the physical cores", minimum=1)
    n_gpu_layers: int = option(0, "Layers computed on a GPU; -1: all.")


def measure(context: Context, options: BatchOptions, lengths: list[int]) -> float:
    """Seconds to decode as many tokens of each sequence, which have the declared lengths and equal caches."""
    for sequence, length in enumerate(lengths):
        context.declare(length, sequence)
    seconds = 0.0
    # The first decode brings the keys to their tables and builds a graph.
    for step in range(options.count + 1):
        position = options.depth + step
        start = time.perf_counter()
        context.decode((step, position, (s,), True) for s in range(options.sequences))
        llama_cpp.llama_synchronize(context.pointer)
        seconds += time.perf_counter() - start if step else 0.0
    for sequence in range(options.sequences):
        context.truncate(options.depth, sequence)
    return seconds


@click.command("shared_batch", cls=Command, context_settings=SETTINGS)
@click.argument("path", metavar="MODEL", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@options_from(BatchOptions)
def main(path: Path, options: BatchOptions) -> None:
    """Measure a model with tables: the same tokens after the same caches, with equal and with different lengths.

    Printed are the speeds in tokens per second, and how many times as fast several buckets are as one: medians, and
    quartiles in brackets, of the quotients of the times in each round.
    """
    model = Model(path, options.n_gpu_layers)
    longest = options.depth + options.count + 1
    covers = [int(factor * model.original_context) for factor in model.factors]
    usable = [tokens for tokens in covers if tokens >= longest][: options.buckets]
    if len(usable) < options.buckets:
        raise click.ClickException(f"{path}: {len(usable)} tables cover {longest} tokens, fewer than {options.buckets}")
    n = options.sequences
    sides = {
        "one bucket": [usable[0]] * n,
        f"{options.buckets} buckets": [usable[i % options.buckets] for i in range(n)],
    }
    tokens = np.random.default_rng(0).integers(0, model.n_vocab, options.depth, np.int32)
    params = {"kv_type": options.kv_type, "flash_attn": True, "n_seq": n, "threads": options.threads}
    with Context(model, n * (longest + 1), **params) as context:
        for sequence in range(n):
            for i in range(0, options.depth, context.n_batch):
                context.decode_sequence(tokens[i : i + context.n_batch], i, first=options.depth, sequence=sequence)
        times = in_turns(
            {k: partial(measure, context, options, v) for k, v in sides.items()}, options.rounds, warm_up=1
        )
    model.close()
    click.echo(row(["", "tokens/s"]))
    click.echo(row(["---", "---:"]))
    for name, seconds in times.items():
        click.echo(row([name, quartiles(n * options.count / s for s in seconds).text(1)]))
    one, several = times.values()
    click.echo(f"several buckets / one: {speedup(one, several).text()}")


if __name__ == "__main__":
    main()
