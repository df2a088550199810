"""How a file is to be quantized, as the options have it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clex_convert.errors import ConvertError
from clex_convert.file_types import OUTTYPES, TENSOR_TYPES, UNQUANTIZED
from clex_convert.imatrix import ImportanceMatrix, check_text, read_imatrix
from clex_convert.options import ConvertOptions
from clex_convert.source import Source
from clex_local.errors import one_line


@dataclass(frozen=True)
class Recipe:
    """How a file is to be quantized.

    Attributes:
        outtype: one of `OUTTYPES`, or ``copy``.
        tensor_types: regular expressions, searched in the names of tensors, and the type of those that match; the
            first that matches counts.
        output_tensor_type: type of ``output.weight``.
        token_embedding_type: type of ``token_embd.weight``.
        pure: every matrix gets the type itself, not the mixture of types that goes by its name.
        imatrix: importance matrix.
    """

    outtype: str
    tensor_types: tuple[tuple[str, str], ...] = ()
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    pure: bool = False
    imatrix: ImportanceMatrix | None = None

    @property
    def changes_types(self) -> bool:
        """Whether tensors get other types than `outtype` alone gives them."""
        return bool(self.tensor_types or self.output_tensor_type or self.token_embedding_type or self.pure)

    def check(self) -> None:
        """Checks the options against each other.

        Raises:
            ConvertError: unknown types, an invalid regular expression, or options that would have no effect.
        """
        if self.outtype not in ("copy", *OUTTYPES):
            raise ConvertError(f"the type {self.outtype!r} is unknown; use copy, {', '.join(OUTTYPES)}")
        names = [name for _, name in self.tensor_types]
        names += [name for name in (self.output_tensor_type, self.token_embedding_type) if name is not None]
        for name in names:
            if name not in TENSOR_TYPES:
                raise ConvertError(f"the tensor type {name!r} is unknown; use {', '.join(TENSOR_TYPES)}")
        for pattern, _ in self.tensor_types:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConvertError(f"{pattern!r} is not a regular expression ({one_line(error)})") from None
        if self.outtype in ("copy", *UNQUANTIZED) and (self.changes_types or self.imatrix):
            raise ConvertError(
                f"importance matrices and the types of single tensors go with quantized types, not with {self.outtype}"
            )

    def overrides(self, names: Sequence[str]) -> dict[str, str]:
        """The type that `tensor_types` give each tensor that they name.

        Raises:
            ConvertError: one of them matches none.
        """
        chosen: dict[str, str] = {}
        for pattern, kind in self.tensor_types:
            found = [name for name in names if re.search(pattern, name)]
            if not found:
                raise ConvertError(f"no tensor has a name that {pattern!r} matches; names are such as {names[0]}")
            for name in found:
                chosen.setdefault(name, kind)
        return chosen

    def metadata(self) -> dict[str, str | int]:
        """The keys that the file gets besides its source's, as llama.cpp's llama-quantize writes them."""
        if self.imatrix is None:
            return {}
        keys: dict[str, str | int] = {"quantize.imatrix.entries_count": len(self.imatrix.weights)}
        if self.imatrix.dataset:
            keys["quantize.imatrix.dataset"] = self.imatrix.dataset.encode()[:127].decode("utf-8", "ignore")
        if self.imatrix.chunks:
            keys["quantize.imatrix.chunks_count"] = self.imatrix.chunks
        return keys


def _tensor_types(named: Sequence[str], keep_f16: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """`Recipe.tensor_types` from ``NAME=TYPE`` and from expressions of tensors that stay f16, which go first.

    Raises:
        ConvertError: one that is not ``NAME=TYPE``.
    """
    pairs = [(pattern, "f16") for pattern in keep_f16]
    for text in named:
        pattern, _, kind = text.rpartition("=")
        if not pattern or not kind:
            raise ConvertError(f"a tensor's type must be given as NAME=TYPE, not {text!r}")
        pairs.append((pattern, kind.lower()))
    return tuple(pairs)


def recipe_of(model: Source, options: ConvertOptions) -> Recipe:
    """What the options ask for.

    Raises:
        ConvertError: options that contradict each other or do not go with the model, or an importance matrix or a text
            for one that cannot be read.
    """
    outtype = options.outtype or model.default_outtype
    if outtype == "copy" and "copy" not in model.layout_types:
        raise ConvertError(f"{model.path}: copy keeps the tensors of a GGUF file; choose a type for a model folder")
    return Recipe(
        outtype,
        _tensor_types(options.tensor_type, options.keep_f16),
        options.output_tensor_type,
        options.token_embedding_type,
        options.pure,
        _importance_matrix(options),
    )


def _importance_matrix(options: ConvertOptions) -> ImportanceMatrix | None:
    if options.imatrix is not None and options.imatrix_from is not None:
        raise ConvertError("an importance matrix is read or computed: give `imatrix` or `imatrix_from`, not both")
    if options.imatrix is not None:
        return read_imatrix(Path(options.imatrix))
    if options.imatrix_from is not None:
        check_text(Path(options.imatrix_from))
        return ImportanceMatrix.to_come(Path(options.imatrix_from))
    if options.save_imatrix is not None or options.imatrix_chunks is not None:
        raise ConvertError("`save_imatrix` and `imatrix_chunks` go with `imatrix_from=TEXT`")
    return None
