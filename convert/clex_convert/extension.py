"""What a GGUF file would say with tables, for the runtime that runs it without another file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clex_convert.errors import ConvertError
from clex_convert.gguf_source import GGUFSource
from clex_convert.model_tables import model_metadata, model_tables
from clex_convert.options import ConvertOptions
from clex_convert.scaling import Scaling
from clex_local.model_file.tables import Tables


def extended_keys(path: Path, factor: int, method: str | None) -> tuple[Tables, dict[str, Any], tuple[str, ...]]:
    """The tables of a file, its new keys, and those that go: those of `convert` with `max_factor`.

    Args:
        path: the file, or of a split model the first part.
        factor: times its original context.
        method: None for `favoured_method`.

    Raises:
        ConvertError: it has tables, or none can be made.
        GGUFError: it is missing, not GGUF, or damaged.
    """
    with GGUFSource(path) as model:
        if (own := model.own_tables()) is not None:
            raise ConvertError(
                f"{path}: has tables already, up to {own.max_context_length:,} tokens; leave `extend` out, or make "
                "others with `clex-convert MODEL OUT.gguf --method`"
            )
        options = ConvertOptions(max_factor=factor, method=method or favoured_method(model.rope.scaling))
        tables = model_tables(model, options)
        removed, keys = model.changed_keys(model_metadata(tables, model, options))
    return tables, keys, tuple(removed)


def favoured_method(scaling: Scaling) -> str | None:
    """The method for a model by its own scaling; None where `convert` chooses the same by itself.

    A scaling that is one table for every length is no answer to how to go beyond it: YaRN goes on as YaRN, and the
    others from where they are by NTK-aware scaling, which reads better than the linear one (docs/evaluation.md).
    """
    if not scaling.fixed:
        return None
    return "yarn" if scaling.kind == "yarn" else "ntk"
