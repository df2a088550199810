"""Tables for a file that has none, made when it is opened and kept in memory: no second file of the model's size."""

from __future__ import annotations

import importlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clex_local.errors import ClexError, ModelError
from clex_local.model_file.gguf_header import GGUFHeader
from clex_local.model_file.tables import Tables

OVERLAY = "clex.overlay"  # the override by which llama.cpp is told of the keys
_REMOVED, _MODEL = "clex.overlay.removed", "clex.overlay.model"
_LONGEST = 127  # bytes of an override
_FORM = re.compile(r"(?:([a-z]+):)?(\d{1,18})x?", re.IGNORECASE)
_LARGEST = 65536  # times, as in clex-convert
_CONVERTED = 4  # times, where clex-convert is not told
MEASURED = 16  # times the trained context up to which it was measured what reads well: docs/evaluation.md


class ExtensionError(ModelError):
    """A file that cannot be extended, or a wish that is none; a ValueError too."""


@dataclass(frozen=True)
class Extension:
    """What takes the place of a file's keys, as though clex-convert had made another file of it.

    Attributes:
        tables: that it gets.
        keys: that it gets, those of the tables among them.
        removed: names of keys that it loses.
        path: of the file.
    """

    tables: Tables
    keys: dict[str, Any]
    removed: tuple[str, ...]
    path: Path

    def write(self, path: Path) -> None:
        """Write them for llama.cpp.

        Raises:
            ModelError: it cannot be written, or its name is too long.
        """
        if len(os.fsencode(path)) > _LONGEST:
            raise ModelError(f"{path}: the name of a temporary file is too long for llama.cpp; set TMPDIR to another")
        own = {_REMOVED: "\n".join(self.removed)}
        with suppress(UnicodeDecodeError):  # a draft model beside it, which is rare, would get the keys too
            own[_MODEL] = os.fsencode(os.path.abspath(self.path)).decode()
        with GGUFHeader() as header:
            for key, value in {**self.keys, **own}.items():
                header.set(key, value)
            try:
                path.write_bytes(header.encoded())
            except OSError as error:
                raise ModelError(f"{path}: cannot be written ({error.strerror or error})") from None

    @contextmanager
    def overrides(self) -> Iterator[dict[str, str]]:
        """What llama.cpp is to be told while it loads the file, as ``kv_overrides``."""
        with tempfile.TemporaryDirectory(prefix="clex-") as folder:
            path = Path(folder) / "keys.gguf"
            self.write(path)
            yield {OVERLAY: str(path)}


def extension_text(text: str) -> str:
    """A wish for tables as it is kept: ``4x``, or ``ntk:4x``.

    Raises:
        ValueError: it is none.
    """
    found = _FORM.fullmatch(text.strip())
    if not found or int(found[2]) < 1:
        raise ValueError("must be how many times the context is to be as long, such as 4x, or ntk:4x with a method")
    if int(found[2]) > _LARGEST:
        raise ValueError(
            f"must be {_LARGEST}x at most, and beyond {MEASURED}x it was never measured how well that reads"
        )
    return f"{found[1].lower()}:{int(found[2])}x" if found[1] else f"{int(found[2])}x"


def extension_advice(trained: int, ctx: int) -> str:
    """What to pass for a context that a model without tables was not trained for, in words.

    Args:
        trained: tokens that it was trained for.
        ctx: tokens that are wanted.
    """
    wanted = -(-ctx // trained)
    factor = min(wanted, MEASURED)
    what = "them" if wanted <= MEASURED else f"some for {MEASURED * trained:,} tokens"
    option = f" --max-factor {factor}" if factor > _CONVERTED else ""
    end = "" if wanted <= MEASURED else "; beyond that it was never measured how well a model reads"
    return f"`extend='{factor}x'` makes {what} now, `clex-convert MODEL OUT.gguf{option}` adds them for good{end}"


def extension(path: str | os.PathLike[str], extend: str | float) -> Extension:
    """Make tables for a file.

    Args:
        path: a GGUF file; of a split model the first.
        extend: how many times its context is to be as long, such as ``4x``, with a method before it: ``ntk:4x``.
            Without one it is what clex-convert would take, or, where the file's own scaling is the same at every
            length, what goes with that.

    Raises:
        ExtensionError: the file has tables already, or cannot have any, or `extend` is not understood.
    """
    try:
        method, _, factor = extension_text(f"{extend:g}" if isinstance(extend, (int, float)) else extend).rpartition(
            ":"
        )
    except ValueError as error:
        raise ExtensionError(f"`extend` {error}, not {str(extend)[:40]!r}") from None
    # The converter is downstream's affair everywhere else; nothing here but this wish needs it.
    make = importlib.import_module("clex_convert.extension").extended_keys
    try:
        tables, keys, removed = make(Path(path), int(factor[:-1]), method or None)
        return Extension(tables, keys, removed, Path(path))
    except ExtensionError:
        raise
    except ClexError as error:
        raise ExtensionError(str(error)) from error
