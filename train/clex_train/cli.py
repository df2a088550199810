"""The command ``clex-train``."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path

import click

from clex_local.commands.command import SETTINGS, Command, say
from clex_local.commands.command_options import options_from
from clex_local.errors import ClexError
from clex_local.model_file.architectures import families
from clex_train.options import TrainOptions

_PATH = click.Path(path_type=Path)


@click.command(
    "clex-train",
    cls=Command,
    context_settings=SETTINGS,
    epilog=f"A CLEX layer can be added to {families(trained=True)}.",
)
@click.version_option(package_name="clex-local")
@click.argument("model", type=_PATH)
@click.argument("output", metavar="OUT", type=_PATH)
@options_from(TrainOptions)
def main(model: Path, output: Path, options: TrainOptions) -> None:
    """Train MODEL with a CLEX layer to read far beyond its original context, and save it in the folder OUT.

    MODEL is a Hugging Face folder, with a CLEX layer or without. OUT is one as well, which clex-convert and the code of
    CLEX's authors read. Runs under torchrun, too.
    """
    # Before transformers and datasets are imported; their own lines and bars are of no use here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")
    try:
        from transformers.utils import logging

        from clex_train.train import train
    except ImportError as error:
        raise ClexError(
            f"training needs the Python package {(error.name or str(error)).partition('.')[0]}: "
            "pip install 'clex-local[train]'"
        ) from None
    logging.disable_progress_bar()
    try:
        result = train(model, output, **vars(replace(options, report=say)))
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(str(interrupt) or "nothing was saved") from None
    if int(os.environ.get("RANK", "0")) == 0:
        say(f"{result.path}: {result.steps} steps, loss {result.loss:.4f}, {result.seconds:.1f} s")


if __name__ == "__main__":
    main()
