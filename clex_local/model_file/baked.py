"""What a file says that carries one table as a plain model's frequencies, for programs without tables.

The keys do not begin with ``clex.``, which would promise tables; no reader needs them to run the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from clex_local.model_file.gguf_file import GGUFFile

PREFIX = "clex_baked."
_KINDS = {"method": "string", "original_context_length": "u32", "context_length": "u32"}


@dataclass(frozen=True)
class Baked:
    """The table that a file's frequencies are.

    Attributes:
        method: what made the tables.
        original_context_length: L, tokens that the model covers without scaling.
        context_length: tokens that the table was chosen for.
    """

    method: str
    original_context_length: int
    context_length: int

    def metadata(self) -> dict[str, Any]:
        """The keys of a GGUF file that say so."""
        return {
            f"{PREFIX}method": self.method,
            f"{PREFIX}original_context_length": np.uint32(self.original_context_length),
            f"{PREFIX}context_length": np.uint32(self.context_length),
        }


def baked_in(file: GGUFFile) -> Baked | None:
    """What a file says of it; None for one that says nothing, or nothing of use."""
    values = {name: file.get(PREFIX + name) for name, kind in _KINDS.items() if file.kind(PREFIX + name) == kind}
    if values.keys() != _KINDS.keys() or not values["original_context_length"] or not values["context_length"]:
        return None
    return Baked(**values)
