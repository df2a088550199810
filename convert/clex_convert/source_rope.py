"""What a source model says of its rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from clex_convert.scaling import Scaling
from clex_convert.weights import OdeSettings
from clex_local.model_file.tables import Tables


@dataclass(frozen=True)
class SourceRope:
    """What a source model says of its rotary embedding.

    Attributes:
        dim: rotary dimension d of a head.
        head_dim: the whole dimension of a head.
        base: RoPE base.
        context: original context length in tokens.
        settings: of its CLEX layer, empty where there is none.
        facts: the same in the source's own words, for the provenance.
        scaling: the one it names.
        windowed: whether layers have a sliding window that llama.cpp computes; they keep their own RoPE.
    """

    dim: int
    head_dim: int
    base: float
    context: int
    settings: OdeSettings
    facts: dict[str, Any]
    scaling: Scaling = field(default_factory=Scaling)
    windowed: bool = False

    def is_scaled_in(self, tables: Tables) -> bool:
        """Whether the first bucket of the tables is what the source's own scaling gives, which may then stay."""
        return self.scaling.is_first_of(tables, self.dim, self.base)
