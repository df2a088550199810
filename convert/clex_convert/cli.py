"""The command ``clex-convert``."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from clex_convert.check import CHECKS
from clex_convert.convert import ConversionResult, convert, sizes
from clex_convert.job import DEFAULT_OUTTYPE, Size
from clex_convert.methods import METHODS, converter_version
from clex_convert.output import megabytes
from clex_convert.quantize import OUTTYPES, TENSOR_TYPES
from clex_convert.weights import ACTIVATIONS
from clex_local.command import Command, Lines, rope_scaling, say
from clex_local.errors import ClexError

_TENSOR_TYPE = click.Choice(TENSOR_TYPES, case_sensitive=False)
_METHODS_HELP = "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items())


def _factors(context: click.Context, option: click.Parameter, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter("must be numbers with commas between them, such as 1,1.5,2,4") from None


@click.command(
    "clex-convert", cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUT.gguf", type=click.Path(path_type=Path), required=False)
@click.option(
    "--outtype",
    type=click.Choice(["copy", *OUTTYPES], case_sensitive=False),
    metavar="TYPE",
    help=f"Type of the tensors: copy, {', '.join(OUTTYPES)}.  [default: {DEFAULT_OUTTYPE} for a folder, copy for a "
    "GGUF file]",
)
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    help=f"How the tables are made. {_METHODS_HELP}.  [default: clex where a CLEX layer is found, the GGUF file's own "
    "where it has tables, what the source's own RoPE scaling asks for where it has one, otherwise yarn (ntk where only "
    "a part of each head is rotated)]",
)
@click.option(
    "--clex-weights",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Safetensors file with ode_up_proj and ode_down_proj: for a GGUF file, or instead of the folder's.",
)
@click.option(
    "--lora",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="LoRA adapter saved by peft, to merge into the folder's weights; a CLEX layer in it is the model's.",
)
@click.option(
    "--original-context",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens covered without scaling.  [default: the model's context length]",
)
@click.option(
    "--factors",
    callback=_factors,
    metavar="T,T,...",
    help="Scaling factor of each table, ascending from 1, such as 1,1.5,2,4,8.  [default: 1, 2, ... up to the largest]",
)
@click.option(
    "--max-factor",
    type=click.IntRange(min=1),
    metavar="N",
    help="Largest scaling factor: the model reaches N times its original context, with a table for each of 1, 2, ... N "
    "(longrope: for 1 and N).  [default: what the CLEX layer was trained for; what the source's own scaling says; 4]",
)
@click.option(
    "--rope-scaling",
    callback=rope_scaling,
    metavar="JSON",
    help="RoPE scaling in place of the source's own, as transformers' configs have it: parameters for yarn, longrope "
    'and ntk, such as \'{"rope_type": "yarn", "factor": 4, "beta_fast": 16}\'.',
)
@click.option(
    "--act",
    type=click.Choice(ACTIVATIONS),
    help="Activation of the CLEX layer.  [default: as its config says, or silu]",
)
@click.option(
    "--time-dt",
    type=float,
    metavar="X",
    help="Step of the integration.  [default: as the layer's config says, or 0.01]",
)
@click.option(
    "--log-scale/--no-log-scale",
    default=None,
    help="Scale attention by log(tokens) / log(original context).  [default: as the config says, or no]",
)
@click.option(
    "--bake",
    type=int,
    metavar="CTX",
    help="Write the table for a context of CTX tokens alone, as a model that unpatched llama.cpp, Ollama and LM Studio "
    "run; shorter prompts use it too.",
)
@click.option(
    "--pre-tokenizer",
    metavar="NAME",
    help="llama.cpp's name of the BPE pre-tokenizer, where it cannot recognise it.",
)
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Importance matrix to quantize with, as llama.cpp's llama-imatrix makes it (GGUF or .dat).",
)
@click.option(
    "--imatrix-from",
    type=click.Path(path_type=Path),
    metavar="TEXT",
    help="Compute an importance matrix from a text file, with the unquantized model.",
)
@click.option(
    "--imatrix-chunks", type=click.IntRange(min=1), metavar="N", help="Read only N times 512 tokens of that text."
)
@click.option(
    "--save-imatrix", type=click.Path(path_type=Path), metavar="FILE", help="Keep the computed importance matrix."
)
@click.option(
    "--tensor-type",
    multiple=True,
    metavar="NAME=TYPE",
    help="Type of the tensors that the regular expression NAME is found in; the first that fits counts. Repeatable. "
    f"TYPE: {', '.join(TENSOR_TYPES)}.",
)
@click.option("--keep-f16", multiple=True, metavar="REGEX", help="As --tensor-type REGEX=f16, and before them.")
@click.option("--output-tensor-type", type=_TENSOR_TYPE, metavar="TYPE", help="Type of output.weight.")
@click.option("--token-embedding-type", type=_TENSOR_TYPE, metavar="TYPE", help="Type of token_embd.weight.")
@click.option("--pure", is_flag=True, help="No mixtures: all matrices get the one type.")
@click.option("--dry-run", is_flag=True, help="Show the size of each type, or of --outtype, and write nothing.")
@click.option(
    "--check",
    type=click.Choice(CHECKS),
    default="basic",
    show_default=True,
    help="How the result is checked. basic: it is opened, its tables are compared, a few tokens are decoded; full: its "
    "predictions are compared with the unquantized model's as well.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing OUT.gguf.")
@click.option("-v", "--verbose", is_flag=True, help="Show llama.cpp's log.")
@click.version_option(converter_version(), package_name="clex-local")
def main(
    source: Path, output: Path | None, dry_run: bool, overwrite: bool, check: str, verbose: bool, **options: Any
) -> None:
    """Convert SOURCE to OUT.gguf with the frequency tables that let it read past its original context.

    SOURCE is a Hugging Face model folder with a CLEX layer, or an existing GGUF file, to which tables are added (of a
    split one any part); or a model of the Hugging Face hub, as org/name, org/name@revision or org/name/file.gguf.
    """
    if output is None and not dry_run:
        raise click.UsageError("Missing argument 'OUT.gguf'.")
    if verbose:
        log = logging.StreamHandler()
        log.setFormatter(Lines("%(message)s"))
        logging.basicConfig(handlers=[log])
    errors = Console(stderr=True)
    try:
        bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TimeRemainingColumn(),
            console=errors,
            transient=True,
            disable=verbose or not errors.is_terminal,
        )
        tasks: dict[str, Any] = {}

        def progress(phase: str, part: float) -> None:
            bars.start()  # not before, because downloads have bars of their own
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=1.0)
            bars.update(tasks[phase], completed=part)

        def expected(size: int) -> None:
            if errors.is_terminal:
                say(f"{output} will have {megabytes(size)}", err=True)

        with _stoppable(), contextlib.ExitStack() as stack:
            stack.callback(bars.stop)
            if output is None or dry_run:
                found = sizes(source, **options, verbose=verbose)
            else:
                result = convert(
                    source,
                    output,
                    **options,
                    overwrite=overwrite,
                    check=check,
                    verbose=verbose,
                    progress=progress,
                    expected=expected,
                )
    except ClexError as error:
        say(f"clex-convert: error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        say("clex-convert: error: interrupted, nothing was written", err=True)
        sys.exit(130)
    if output is None or dry_run:
        _show_sizes(found)
    else:
        _show(result)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Lets a request to end the process clean up first, as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = [signal.signal(number, stop) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _show(result: ConversionResult) -> None:
    tables = result.tables
    table = Table(box=None, pad_edge=False, show_edge=False)
    for column in ("bucket", "factor", "tokens up to"):
        table.add_column(column, justify="right")
    rows = list(enumerate(zip(tables.scaling_factors, tables.context_lengths, strict=True)))
    for index, (factor, length) in rows if len(rows) <= 12 else rows[:6]:
        table.add_row(str(index + 1), f"{factor:g}", str(length))
    if len(rows) > 12:
        table.add_row("...", "...", "...")
        index, (factor, length) = rows[-1]
        table.add_row(str(index + 1), f"{factor:g}", str(length))
    Console(highlight=False).print(table)
    method = tables.method if result.baked is None else f"{tables.method} baked for {result.baked} tokens"
    say(f"{result.path}: {result.outtype}, method {method}, {megabytes(result.size)}, {result.seconds:.1f} s")
    say(f"SHA-256 {result.sha256}")
    if result.divergence is not None:
        found = result.divergence
        say(
            f"check: mean KL divergence {found.kl:.4f} from the unquantized model; the likeliest next token is the "
            f"same for {found.agreement:.1%} of {found.tokens} tokens"
        )
    for note in result.notes:
        say(f"note: {note}")


def _show_sizes(found: list[Size]) -> None:
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("type")
    table.add_column("bytes", justify="right")
    table.add_column("", justify="right")
    table.add_column("")
    for size in found:
        numbers = ("-", "") if size.size is None else (str(size.size), megabytes(size.size))
        table.add_row(size.outtype, *numbers, size.note)
    Console(highlight=False, soft_wrap=True).print(table)
