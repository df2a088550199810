"""Perplexity of long windows of a text, by position: does a model still read past its original context?"""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import repeat
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from benchmarks.context import KV_TYPES, Context, Model
from benchmarks.text import emma


def negative_log_likelihoods(
    context: Context, tokens: npt.NDArray[np.int32], batches: Iterable[int] | None = None
) -> npt.NDArray[np.float64]:
    """Those of tokens[1:], each given all before it, of one prompt of all the tokens: [n - 1].

    The prompt is computed in batches of the given sizes, or of the context's. The logits of one batch at a time are
    kept, not those of the window (24,576 x 49,152 floats are 4.8 GB).
    """
    context.clear()
    context.declare(len(tokens))
    parts, start = [], 0
    for size in batches or repeat(context.n_batch):
        batch = tokens[start : start + size]
        if not len(batch):
            break
        context.decode(batch, start, all_logits=True)
        targets = tokens[start + 1 : start + 1 + len(batch)]
        logits = context.logits(len(batch))[: len(targets)]
        peak = logits.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(logits - peak).sum(axis=1, dtype=np.float64)) + peak[:, 0]
        parts.append(log_sum - logits[np.arange(len(targets)), targets])
        start += size
    return np.concatenate(parts)


def row(cells: Iterable[str]) -> str:
    """One row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text to read.  [default: Emma, fetched as a Debian package]",
)
@click.option(
    "--window", "windows", type=click.IntRange(min=2), multiple=True, default=[24576], show_default=True,
    help="Tokens of a window. Repeatable.",
)  # fmt: skip
@click.option("--windows", "count", type=click.IntRange(min=1), default=1, show_default=True, help="Windows to read.")
@click.option("--skip", type=click.IntRange(min=0), default=0, help="Tokens of the text to leave out at its beginning.")
@click.option("--ctx", type=click.IntRange(min=2), help="Tokens the context holds.  [default: those of the window]")
@click.option(
    "--by", type=click.IntRange(min=1), default=8192, show_default=True, help="Tokens of a range of positions."
)
@click.option("--kv-type", type=click.Choice(list(KV_TYPES)), default="f16", show_default=True)
@click.option("--flash-attn", is_flag=True, help="Flash attention.")
@click.option("--batch", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="[default: the physical cores]")
@click.option("--gpu-layers", type=int, default=0, show_default=True, help="Layers computed on a GPU; -1: all.")
def main(
    models: tuple[Path, ...],
    text: Path | None,
    windows: tuple[int, ...],
    count: int,
    skip: int,
    ctx: int | None,
    by: int,
    kv_type: str,
    flash_attn: bool,
    batch: int,
    threads: int | None,
    gpu_layers: int,
) -> None:
    """Read windows of a text with each model and print the perplexity, in all and by position in the window.

    A window is one prompt: the length of all of it is declared first, so a model with tables uses one table.
    """
    content = (text or emma()).read_text(encoding="utf-8")
    for window in windows:
        bounds = [(start, min(start + by, window)) for start in range(0, window, by)]
        click.echo(row(["model", "window", "t", "all", *(f"{a:,} to {b:,}" for a, b in bounds), "s"]))
        click.echo(row(["---"] * (len(bounds) + 5)))
        for path in models:
            model = Model(path, gpu_layers)
            tokens = model.tokenize(content)[skip:]
            bos = np.array(model.bos, np.int32)
            step = window - len(bos)
            if len(tokens) < count * step:
                raise click.ClickException(f"the text has {len(tokens):,} tokens, {count} x {step:,} are needed")
            likelihoods = np.empty((count, window - 1))
            start = time.monotonic()
            with Context(
                model, ctx or window, kv_type=kv_type, flash_attn=flash_attn, n_batch=batch, threads=threads
            ) as context:
                for k in range(count):
                    likelihoods[k] = negative_log_likelihoods(
                        context, np.concatenate([bos, tokens[k * step : (k + 1) * step]])
                    )
                factor = context.factor
            model.close()
            # Nothing predicts the first token, so that of position p is number p - 1.
            parts = [likelihoods, *(likelihoods[:, max(a - 1, 0) : b - 1] for a, b in bounds)]
            name = "no tables" if factor is None else f"{factor:g}"
            click.echo(
                row(
                    [
                        path.name,
                        f"{count} x {window:,}",
                        name,
                        *(f"{np.exp(part.mean()):.2f}" for part in parts),
                        f"{time.monotonic() - start:.0f}",
                    ]
                )
            )


if __name__ == "__main__":
    main()
