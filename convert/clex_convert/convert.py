"""The conversion: source, tables, output file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from clex_convert.check import Divergence, check_metadata, check_result, check_vocabulary, write_reference
from clex_convert.errors import ConvertError, NotFiniteError
from clex_convert.file_types import UNQUANTIZED
from clex_convert.hub import fetch
from clex_convert.imatrix import ImportanceMatrix, compute_imatrix
from clex_convert.layout import Layout
from clex_convert.model_tables import model_metadata, model_tables
from clex_convert.open_source import open_source
from clex_convert.options import ConvertOptions
from clex_convert.output import Output
from clex_convert.quantize import needs_imatrix, plans, quantize
from clex_convert.recipe import Recipe, recipe_of
from clex_convert.rope_metadata import RopeMetadata
from clex_convert.source import Source
from clex_local.commands.options import takes_options
from clex_local.model_file.tables import Tables


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion made.

    Attributes:
        path: the file.
        tables: its tables; of a baked file those that the one in it comes from.
        baked: context length that one table was baked for; None for a file with all of them.
        outtype: type of its tensors, or ``copy``.
        size: bytes.
        sha256: SHA-256 of the file in hexadecimal digits. The same source and options give the same bytes.
        seconds: time taken.
        notes: what the user should know of it, a sentence each.
        divergence: how far it is from the unquantized model, where ``check="full"`` compared them.
    """

    path: Path
    tables: Tables
    baked: int | None
    outtype: str
    size: int
    sha256: str
    seconds: float
    notes: list[str] = field(default_factory=list)
    divergence: Divergence | None = None


@takes_options(ConvertOptions)
def convert(
    source: str | os.PathLike[str], output: str | os.PathLike[str], options: ConvertOptions
) -> ConversionResult:
    """Converts a model folder or a GGUF file to a GGUF file with tables.

    Settings of the CLEX layer are taken from the arguments, then from the metadata of `clex_weights`, then from the
    adapter's and the source's config, then from the defaults of the authors' code (silu, 0.01, no log scale).

    Args:
        source: Hugging Face model folder, or GGUF file (any part of a split one stands for all of them); or what
            `clex_convert.hub.fetch` downloads, such as ``org/name``.
        output: file to write; it appears complete or not at all.
        {options}

    Raises:
        clex_local.errors.ClexError: anything about the source, the options or the disk that makes it impossible;
            the message is one line. No file is left behind.
    """
    started = time.monotonic()
    output = Path(output)
    with Output(output, overwrite=options.overwrite) as target, open_source(fetch(source), options) as model:
        recipe = recipe_of(model, options)
        _check_outputs(target.path, model, options)
        recipe.check()
        tables = model_tables(model, options)
        metadata = model_metadata(tables, model, options)
        with _finding_not_finite(model):
            made = _make(target, model, metadata, recipe, options)
        size, sha256 = made.path.stat().st_size, target.commit(made.path)
    seconds = time.monotonic() - started
    return ConversionResult(
        output, tables, options.bake, recipe.outtype, size, sha256, seconds, made.notes, made.divergence
    )


@contextmanager
def _finding_not_finite(model: Source) -> Iterator[None]:
    """Where what is computed is not finite, and the reason is in the source, says so instead."""
    try:
        yield
    except NotFiniteError:
        if (name := model.not_finite()) is not None:
            what = f"{name} holds values that are not finite (NaN or infinite); the file is of no use"
            raise NotFiniteError(f"{model.path}: {what}") from None
        raise


def _check_outputs(output: Path, model: Source, options: ConvertOptions) -> None:
    """Refuses to write what is read."""
    _check_apart(output, model, options)
    if options.save_imatrix is not None:
        kept = Path(options.save_imatrix)
        Output(kept, overwrite=options.overwrite)  # only asked whether it could be
        _check_apart(kept, model, options)
        if os.path.realpath(kept) == os.path.realpath(output):
            raise ConvertError(f"{output}: cannot be the importance matrix too; choose another name")


def _check_apart(path: Path, model: Source, options: ConvertOptions) -> None:
    if not path.exists():
        return
    inputs = [
        ("is the source itself", None if model.path.is_dir() else model.path),
        *[
            ("is a part of the source" if file.suffix == ".gguf" else "belongs to the source", file)
            for file in model.files()
        ],
        ("holds the ODE weights", options.clex_weights),
        ("is the importance matrix", options.imatrix),
        ("is the text of the importance matrix", options.imatrix_from),
    ]
    for what, read in inputs:
        if read is not None and os.path.exists(read) and os.path.samefile(read, path):
            raise ConvertError(f"{path}: {what}; choose another name for the output")


@dataclass
class _Result:
    """A complete file under a temporary name, and what is to be said of it."""

    path: Path
    notes: list[str]
    divergence: Divergence | None = None


def _make(target: Output, model: Source, metadata: RopeMetadata, recipe: Recipe, options: ConvertOptions) -> _Result:
    """Writes the model, quantizes it where `recipe` says so, and checks the result."""
    result, reference = _Result(target.temporary(), list(metadata.notes)), None
    if model.quantized and recipe.outtype != "copy":
        result.notes.append("the source was quantized already: quantizing it again costs quality")
    direct = recipe.outtype in model.layout_types
    with model.layout(metadata, recipe.outtype if direct else model.precision) as layout:
        layout.write_header(result.path)
        _check_header(result.path, layout, None if direct else recipe, target, options)
        layout.write(result.path, _progress_of(options, layout.doing))
        result.notes += layout.notes
    if not direct:
        unquantized = result.path
        recipe = _with_imatrix(recipe, unquantized, target, options)
        if options.check == "full" and recipe.outtype not in UNQUANTIZED:
            reference = target.temporary()
            write_reference(unquantized, reference, verbose=options.verbose)
        result.path = target.temporary()
        progress = _progress_of(options, "quantizing")
        result.notes += quantize(unquantized, result.path, recipe, verbose=options.verbose, progress=progress)
        target.discard(unquantized)
    if options.check == "none":
        check_metadata(result.path, metadata)
        return result
    result.divergence = check_result(result.path, metadata, reference=reference, verbose=options.verbose)
    if options.check == "full" and reference is None:
        result.notes.append(f"{recipe.outtype} quantizes nothing, so there is nothing to compare")
    return result


def _progress_of(options: ConvertOptions, phase: str) -> Callable[[float], None]:
    """What is called with the part of a phase that is done."""
    progress = options.progress
    return (lambda part: None) if progress is None else (lambda part: progress(phase, part))


def _check_header(path: Path, layout: Layout, recipe: Recipe | None, target: Output, options: ConvertOptions) -> None:
    """With the header in place: checks what can be checked of the rest before it is written."""
    if layout.new_vocabulary:
        check_vocabulary(path, verbose=options.verbose)
    size = needed = layout.size
    if recipe is not None:
        (plan,) = plans(path, [recipe], verbose=options.verbose)
        if plan.refusal is not None:
            raise ConvertError(f"{path}: llama.cpp could not make {recipe.outtype}: {plan.refusal}")
        if plan.needs_imatrix and recipe.imatrix is None:
            raise needs_imatrix(recipe.outtype, path)
        size = plan.size
        needed += size
    target.check_room(needed)
    if options.expected is not None:
        options.expected(size)


def _with_imatrix(recipe: Recipe, model: Path, target: Output, options: ConvertOptions) -> Recipe:
    """The recipe with its importance matrix, which is computed where it is not there yet."""
    wanted = recipe.imatrix
    if wanted is None or wanted.weights:
        return recipe

    def compute(path: Path) -> ImportanceMatrix:
        return compute_imatrix(
            model,
            wanted.path,
            path,
            chunks=options.imatrix_chunks,
            verbose=options.verbose,
            progress=_progress_of(options, "importance matrix"),
        )

    if options.save_imatrix is None:
        return replace(recipe, imatrix=compute(target.temporary()))
    with Output(Path(options.save_imatrix), overwrite=target.overwrite) as kept:
        path = kept.temporary()
        imatrix = compute(path)
        kept.commit(path)
    return replace(recipe, imatrix=replace(imatrix, path=kept.path))
