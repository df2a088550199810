"""The command ``clex-train``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from clex_local.errors import ClexError
from clex_train.positions import POSITIONS


def _rope_scaling(context, option, text):
    return None if text is None else json.loads(text)


@click.command("clex-train", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--text", multiple=True, type=click.Path(path_type=Path), metavar="FILE", help="Text file. Repeatable.")
@click.option("--dataset", metavar="PATH", help="Dataset.")
@click.option("--streaming", is_flag=True)
@click.option("--length", type=click.IntRange(min=2), required=True, metavar="N")
@click.option("--original-context", type=click.IntRange(min=1), metavar="N")
@click.option("--param-factor", type=click.IntRange(min=1), default=1)
@click.option("--act", type=click.Choice(["tanh", "silu"]), default="tanh")
@click.option("--time-dt", type=float, default=0.01)
@click.option("--log-scale", is_flag=True)
@click.option("--rope-scaling", callback=_rope_scaling, metavar="JSON")
@click.option("--ode-learning-rate", type=float)
@click.option("--no-clex", is_flag=True)
@click.option("--from-scratch", is_flag=True)
@click.option("--positions", type=click.Choice(POSITIONS), default="random")
@click.option("--max-factor", type=click.IntRange(min=1), default=16)
@click.option("--factors-per-batch", type=click.IntRange(min=1), default=1)
@click.option("--attention", type=click.Choice(["sdpa", "eager"]), default="sdpa")
@click.option("--learning-rate", type=float, default=2e-5)
@click.option("--schedule", type=click.Choice(["cosine", "linear", "constant_with_warmup"]), default="cosine")
@click.option("--warmup-ratio", type=float, default=0.03)
@click.option("--weight-decay", type=float, default=0.0)
@click.option("--batch-size", type=click.IntRange(min=1), default=1)
@click.option("--gradient-accumulation", type=click.IntRange(min=1), default=1)
@click.option("--max-steps", type=click.IntRange(min=1))
@click.option("--epochs", type=float, default=1.0)
@click.option("--seed", type=int, default=0)
@click.option("--bf16/--no-bf16", default=None)
@click.option("--gradient-checkpointing", is_flag=True)
@click.option("--save-steps", type=click.IntRange(min=1))
@click.option("--resume", is_flag=True)
@click.option("--log-steps", type=click.IntRange(min=1), default=10)
def main(model: Path, output: Path, **options: Any) -> None:
    """Train MODEL on text and save it as the Hugging Face folder OUT."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from clex_train.train import train

        result = train(model, output, **options, report=click.echo)
    except ClexError as error:
        click.echo(f"clex-train: error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo("clex-train: error: interrupted", err=True)
        sys.exit(130)
    click.echo(f"{result.path}: {result.steps} steps, loss {result.loss:.4f}, {result.seconds:.1f} s")


if __name__ == "__main__":
    main()
