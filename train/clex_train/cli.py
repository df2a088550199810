"""The command ``clex-train``."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import click

from clex_convert.weights import ACTIVATIONS
from clex_local.command import Command, rope_scaling, say
from clex_local.errors import ClexError
from clex_train.names import ATTENTIONS, POSITIONS

_SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")
_ABOVE_0, _FROM_0 = click.FloatRange(min=0, min_open=True), click.FloatRange(min=0)
_COUNT = click.IntRange(min=1)
_PATH = click.Path(path_type=Path)


@click.command(
    "clex-train", cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="clex-local")
@click.argument("model", type=_PATH)
@click.argument("output", metavar="OUT", type=_PATH)
@click.option("--text", multiple=True, type=_PATH, metavar="FILE", help="UTF-8 text, one document. Repeatable.")
@click.option(
    "--dataset",
    metavar="PATH",
    help="Documents: a folder saved by the library datasets, or what its load_dataset takes; column text.",
)
@click.option("--streaming", is_flag=True, help="Tokenize while training, not once before it. Needs --max-steps.")
@click.option(
    "--length", type=click.IntRange(min=2), metavar="N", help="Tokens of a sequence.  [default: the original context]"
)
@click.option(
    "--original-context",
    type=_COUNT,
    metavar="N",
    help="Tokens covered without scaling.  [default: the model's max_position_embeddings]",
)
@click.option("--max-factor", type=_COUNT, metavar="N", help="Largest scaling factor t.  [default: 16, or the model's]")
@click.option(
    "--param-factor",
    type=_COUNT,
    metavar="P",
    help="The ODE's hidden size is P times the rotary dimension.  [default: 1, or the model's]",
)
@click.option("--act", type=click.Choice(ACTIVATIONS), help="Activation of the ODE.  [default: tanh, or the model's]")
@click.option(
    "--time-dt",
    type=click.FloatRange(min=0, min_open=True, max=1),
    metavar="DT",
    help="Step of the integration in units of t.  [default: 0.01, or the model's]",
)
@click.option(
    "--log-scale/--no-log-scale",
    default=None,
    help="Multiply queries by log(n) / log(original context).  [default: off, or the model's]",
)
@click.option(
    "--positions",
    type=click.Choice(POSITIONS),
    default="random",
    show_default=True,
    help="How a sequence is spread over the positions of one that is t times as long. random: sorted random positions, "
    "as CLEX's authors do it; uniform: evenly spaced; none: not at all; chunked: in four contiguous chunks with random "
    "skips between them, after PoSE, which is not the authors'.",
)
@click.option(
    "--factors-per-batch",
    type=_COUNT,
    default=1,
    show_default=True,
    metavar="N",
    help="Scaling factors that are drawn for a batch, and shared by its sequences.",
)
@click.option("--no-clex", is_flag=True, help="Train the model as it is, without a CLEX layer, for comparison.")
@click.option(
    "--rope-scaling",
    callback=rope_scaling,
    metavar="JSON",
    help="With --no-clex: RoPE scaling of transformers in place of the config's own.",
)
@click.option("--from-scratch", is_flag=True, help="Begin with random weights; MODEL needs a config and a tokenizer.")
@click.option(
    "--learning-rate", type=_FROM_0, default=2e-5, show_default=True, metavar="LR", help="Its peak, of AdamW."
)
@click.option(
    "--ode-learning-rate",
    type=_FROM_0,
    metavar="LR",
    help="That of the CLEX layer; 0 leaves the layer as it is, NTK-aware scaling at first.  [default: --learning-rate]",
)
@click.option(
    "--schedule",
    type=click.Choice(_SCHEDULES),
    default="cosine",
    show_default=True,
    help="Course of the learning rates after the warm-up.",
)
@click.option(
    "--warmup-ratio",
    type=click.FloatRange(min=0, max=1),
    default=0.03,
    show_default=True,
    metavar="R",
    help="Part of the steps in which the learning rates rise.",
)
@click.option(
    "--weight-decay",
    type=_FROM_0,
    default=0.0,
    show_default=True,
    metavar="W",
    help="Of the model's matrices; the CLEX layer has none.",
)
@click.option("--batch-size", type=_COUNT, default=1, show_default=True, metavar="N", help="Sequences of a pass.")
@click.option(
    "--gradient-accumulation", type=_COUNT, default=1, show_default=True, metavar="N", help="Passes of a step."
)
@click.option("--max-steps", type=_COUNT, metavar="N", help="Steps to train.  [default: as --epochs says]")
@click.option(
    "--epochs", type=_ABOVE_0, default=1.0, show_default=True, metavar="X", help="How often the text is read."
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Of all that is random."
)
@click.option(
    "--bf16/--no-bf16",
    default=None,
    help="Compute in bfloat16, the CLEX layer excepted.  [default: with a GPU that can]",
)
@click.option(
    "--attention",
    type=click.Choice(ATTENTIONS),
    default="sdpa",
    show_default=True,
    help="What computes attention: torch's kernel, or plain products, which are faster for short sequences on a CPU.",
)
@click.option("--gradient-checkpointing", is_flag=True, help="Save memory by computing activations twice.")
@click.option("--lora-rank", type=_COUNT, metavar="R", help="Train a LoRA adapter of this rank, and the CLEX layer.")
@click.option("--lora-alpha", type=_ABOVE_0, metavar="A", help="Its alpha.  [default: twice its rank]")
@click.option(
    "--lora-target",
    multiple=True,
    metavar="NAME",
    help="Modules that get it, such as q_proj. Repeatable.  [default: all linear layers but the output]",
)
@click.option("--merge", is_flag=True, help="Save the model with the adapter in it, not the adapter.")
@click.option("--save-steps", type=_COUNT, metavar="N", help="Save a checkpoint every N steps, to OUT.checkpoints.")
@click.option("--resume", is_flag=True, help="Continue an interrupted training from its last checkpoint.")
@click.option("--log-steps", type=_COUNT, default=10, show_default=True, metavar="N", help="Report every N steps.")
@click.option(
    "--trainer-args",
    type=_PATH,
    metavar="FILE",
    help="JSON object of further TrainingArguments of transformers, such as fsdp and deepspeed.",
)
def main(model: Path, output: Path, **options: Any) -> None:
    """Train MODEL with a CLEX layer to read far beyond its original context, and save it in the folder OUT.

    MODEL is a Hugging Face folder (LLaMA, Mistral, Mixtral, GPT-NeoX, Phi, Qwen2, Qwen3), with a CLEX layer or without.
    OUT is one as well, which clex-convert and the code of CLEX's authors read. Runs under torchrun, too.
    """
    # Before transformers and datasets are imported; their own lines and bars are of no use here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")
    try:
        try:
            from transformers.utils import logging

            from clex_train.train import train
        except ImportError as error:
            raise ClexError(
                f"training needs the Python package {(error.name or str(error)).partition('.')[0]}: "
                "pip install 'clex-local[train]'"
            ) from None
        logging.disable_progress_bar()
        result = train(model, output, **options, report=say)
    except ClexError as error:
        say(f"clex-train: error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        say(f"clex-train: error: interrupted; {str(interrupt) or 'nothing was saved'}", err=True)
        sys.exit(130)
    if int(os.environ.get("RANK", "0")) == 0:
        say(f"{result.path}: {result.steps} steps, loss {result.loss:.4f}, {result.seconds:.1f} s")


if __name__ == "__main__":
    main()
