"""What a conversion asks of the model it starts from, whatever that is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from clex_convert.layout import Layout
from clex_convert.rope_metadata import RopeMetadata
from clex_convert.source_rope import SourceRope
from clex_convert.weights import OdeWeights
from clex_local.model_file.tables import Tables


class Source(Protocol):
    """A model folder or a GGUF file."""

    @property
    def path(self) -> Path:
        """The folder or file that was given."""
        ...

    @property
    def rope(self) -> SourceRope:
        """What the model says of its rotary embedding."""
        ...

    @property
    def gguf_architecture(self) -> str:
        """Name of the model's architecture in GGUF."""
        ...

    @property
    def default_outtype(self) -> str:
        """Type of the result where none is asked for."""
        ...

    @property
    def layout_types(self) -> Sequence[str]:
        """The types that `layout` makes; the others are made from one of these by llama.cpp's quantizer."""
        ...

    @property
    def precision(self) -> str:
        """That of `layout_types` which loses nothing."""
        ...

    @property
    def quantized(self) -> bool:
        """Whether the model was quantized already."""
        ...

    def files(self) -> list[Path]:
        """The files that the model consists of."""
        ...

    def own_tables(self) -> Tables | None:
        """The tables that the model has already."""
        ...

    def ode_weights(self) -> OdeWeights | None:
        """The matrices of the model's CLEX layer."""
        ...

    def check_window(self, context: int) -> None:
        """Refuses a sliding window that a context of so many tokens would show."""
        ...

    def not_finite(self) -> str | None:
        """Name of a tensor that holds NaN or infinity, where `Layout.write` would not have refused it."""
        ...

    def layout(self, metadata: RopeMetadata, outtype: str) -> AbstractContextManager[Layout]:
        """The model as a GGUF file.

        Args:
            metadata: what the file says of its rotary embedding.
            outtype: one of `layout_types`.
        """
        ...
