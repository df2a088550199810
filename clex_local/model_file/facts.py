"""What a model file says that decides how it can be run, read before it is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass

from clex_local.errors import ClexError
from clex_local.model_file.baked import baked_in
from clex_local.model_file.extension import Extension, extension, extension_advice
from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.keys import ModelKeys
from clex_local.model_file.model_shape import ModelShape
from clex_local.model_file.split_files import model_files
from clex_local.model_file.table_support import why_no_tables
from clex_local.model_file.tables import Tables, named_tables


@dataclass(frozen=True)
class ModelFacts:
    """What a file says that decides how its model can be run.

    Attributes:
        path: the file.
        tables: its ``clex.*`` tables or those that it is extended by, or None.
        trained: tokens that it says the model was trained for, 0 where it does not say.
        baked: whether its frequencies are one table that was baked in, for ``trained`` tokens.
        shape: what decides the memory; None for a kind of cache that the estimate does not cover.
        can_have_tables: whether clex-convert can add tables to it.
        pools: whether it makes one embedding of a text by itself.
        extension: what it is extended by.
    """

    path: str | os.PathLike[str]
    tables: Tables | None
    trained: int
    baked: bool
    shape: ModelShape | None
    can_have_tables: bool
    pools: bool = False
    extension: Extension | None = None

    @classmethod
    def read(cls, path: str | os.PathLike[str], extend: str | float | None = None) -> ModelFacts:
        """Read it.

        Args:
            path: the file.
            extend: the tables that it is to have, see `clex_local.model_file.extension`.

        Raises:
            GGUFError: the file is missing, not GGUF, or damaged.
            TablesError: its tables break a rule of the metadata.
            ExtensionError: it cannot be extended.
        """
        with GGUFFile(path) as file:
            keys = ModelKeys(file)
            tables = named_tables(file, path)
            made = extension(path, extend) if extend else None
            return cls(
                path,
                tables=made.tables if made else tables,
                trained=keys.trained_context,
                baked=baked_in(file) is not None,
                shape=ModelShape.from_metadata(file),
                can_have_tables=not why_no_tables(keys),
                pools=keys.has("pooling_type"),
                extension=made,
            )

    @property
    def maximum(self) -> int:
        """Tokens that the model covers, 0 where the file does not say."""
        return self.tables.max_context_length if self.tables else self.trained

    @property
    def has_classifier(self) -> bool:
        """Whether it can rank; read where that is asked, from all parts of a split model.

        Raises:
            GGUFError: a part is damaged.
        """
        for path in model_files(self.path):
            with GGUFFile(path) as file:
                if any(tensor.name.startswith("cls") for tensor in file.tensors):
                    return True
        return False

    def check_context(self, ctx: int | None) -> None:
        """Refuse a context that the model does not cover.

        Raises:
            ClexError: it does not, or is no language model.
        """
        path, maximum = self.path, self.maximum
        if not maximum:
            raise ClexError(f"{path}: not a language model (it has no context length)")
        if not ctx or ctx <= maximum:
            return
        if self.tables:
            reach = f"{self.tables.original_context_length:,} at t = 1, t up to {self.tables.scaling_factors[-1]:g}"
            raise ClexError(f"{path} covers {maximum:,} tokens ({reach}), not the {ctx:,} asked for")
        if self.baked:
            raise ClexError(
                f"{path} is baked for {maximum:,} tokens, not the {ctx:,} asked for; "
                "convert the model that it was made of"
            )
        advice = ""
        if self.can_have_tables:
            advice = f"; {extension_advice(maximum, ctx)}"
        raise ClexError(
            f"{path} was trained for {maximum:,} tokens and has no tables to cover the {ctx:,} asked for{advice}"
        )
