"""What the files of a conversion weigh, without making them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from clex_convert.errors import called
from clex_convert.file_types import OUTTYPES, UNQUANTIZED
from clex_convert.hub import fetch
from clex_convert.model_tables import model_metadata, model_tables
from clex_convert.open_source import open_source
from clex_convert.options import ConvertOptions
from clex_convert.quantize import plans
from clex_convert.recipe import Recipe, recipe_of
from clex_convert.rope_metadata import RopeMetadata
from clex_convert.source import Source
from clex_local.commands.options import takes_options


@dataclass(frozen=True)
class Size:
    """What a file of one type weighs.

    Attributes:
        outtype: the type.
        size: bytes of the file; None if it cannot be made.
        note: what it needs, or why it cannot be made; may be empty.
    """

    outtype: str
    size: int | None
    note: str = ""


@takes_options(ConvertOptions)
def sizes(source: str | os.PathLike[str], options: ConvertOptions) -> list[Size]:
    """What the file that `convert` makes weighs, to the byte. Nothing is written beside the source.

    Args:
        source: as in `convert`.
        {options}

    Returns:
        Each type that goes with the options, or the one that they name. One that needs an importance matrix has the
        size that it gets with one; if none is among the options, less the keys that name it.

    Raises:
        clex_local.errors.ClexError: as in `convert`.
    """
    with open_source(fetch(source), options) as model:
        recipe = recipe_of(model, options)
        recipes = [replace(recipe, outtype=outtype) for outtype in _outtypes(model, recipe, options)]
        for wanted in recipes:
            wanted.check()
        metadata = model_metadata(model_tables(model, options), model, options)
        found: dict[str, Size] = {}
        for outtype in (wanted.outtype for wanted in recipes if wanted.outtype in model.layout_types):
            with model.layout(metadata, outtype) as layout:
                found[outtype] = Size(outtype, layout.size)
        rest = [wanted for wanted in recipes if wanted.outtype not in found]
        found |= {size.outtype: size for size in _quantized_sizes(model, metadata, rest, options)}
    return [found[wanted.outtype] for wanted in recipes]


def _outtypes(model: Source, recipe: Recipe, options: ConvertOptions) -> list[str]:
    """The types that go with the options."""
    if options.outtype is not None:
        return [options.outtype]
    outtypes = [*(("copy",) if "copy" in model.layout_types else ()), *OUTTYPES]
    if recipe.imatrix or recipe.changes_types:
        outtypes = [outtype for outtype in outtypes if outtype not in ("copy", *UNQUANTIZED)]
    return outtypes


def _quantized_sizes(
    model: Source, metadata: RopeMetadata, recipes: list[Recipe], options: ConvertOptions
) -> Iterator[Size]:
    """What llama.cpp's quantizer will make, by the header of what it starts from."""
    if not recipes:
        return
    with tempfile.TemporaryDirectory() as folder, model.layout(metadata, model.precision) as layout:
        header = Path(folder) / "header.gguf"
        layout.write_header(header)
        with called(header, model.path):
            found = plans(header, recipes, verbose=options.verbose)
    for recipe, plan in zip(recipes, found, strict=True):
        note = plan.refusal or ""
        if plan.needs_imatrix and recipe.imatrix is None:
            note = note or "needs an importance matrix"
        yield Size(recipe.outtype, None if plan.refusal else plan.size, note)
