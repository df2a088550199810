"""The keys of a GGUF file that begin with the name of its architecture, such as ``llama.context_length``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from clex_local.model_file.gguf_file import GGUFFile

Metadata = Mapping[str, Any] | GGUFFile
DEFAULT_BASE = 10000.0  # of RoPE, llama.cpp's, where the key is absent
_MAX_COUNT = 2**31  # tokens, layers ...: llama.cpp's numbers have 32 bits


class ModelKeys:
    """What the metadata of a model says under the name of its architecture, which no name here has.

    Attributes:
        metadata: of the model.
        architecture: ``general.architecture``; empty where there is none.
    """

    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata
        name = metadata.get("general.architecture")
        self.architecture: str = name if isinstance(name, str) else ""

    def key(self, name: str) -> str:
        """A key as the file has it."""
        return f"{self.architecture}.{name}"

    def names(self, *beginnings: str) -> list[str]:
        """Names of the keys there are that begin in one of these ways, in the file's order."""
        prefix = self.key("")
        names = (key.removeprefix(prefix) for key in self.metadata.keys() if key.startswith(prefix))  # noqa: SIM118
        return [name for name in names if name.startswith(beginnings)]

    def get(self, name: str, default: Any = None) -> Any:
        """Value of a key, whatever it is."""
        return self.metadata.get(self.key(name), default)

    def number(self, name: str, default: float | None = None) -> float | None:
        """Value of a key that must be a number: the default if it is absent, None if it is none or not finite."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            return None
        return int(value) if isinstance(value, Integral) else float(value)

    def count(self, name: str, default: int | None = None) -> int | None:
        """Value of a key that must count something: the default if it is absent, None if it cannot be a count."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, Integral) or not 0 < int(value) < _MAX_COUNT:
            return None
        return int(value)

    def has(self, name: str) -> bool:
        """Whether a key is there with a value, or values, other than zero, false and nothing."""
        value = self.get(name)
        return len(value) > 0 if hasattr(value, "__len__") else bool(value)

    def array_size(self, key: str) -> int:
        """Elements of an array under a whole key, without reading it."""
        if isinstance(self.metadata, GGUFFile):
            return self.metadata.array_size(key)
        value: Any = self.metadata.get(key)
        return len(value) if is_list(value) else 0

    @property
    def trained_context(self) -> int:
        """Tokens the model was trained for, 0 where its metadata does not say."""
        return self.count("context_length") or 0

    @property
    def original_context(self) -> int:
        """Tokens that RoPE scaling starts from, 0 where the metadata does not say."""
        return self.count("rope.scaling.original_context_length") or 0

    @property
    def rope_dimension(self) -> int | None:
        """Rotary dimension of the heads, found as llama.cpp finds it; None if the metadata does not say."""
        for name in ("rope.dimension_count", "attention.key_length"):
            value = self.get(name)
            if isinstance(value, Integral) and not isinstance(value, bool):
                return int(value)
        width, heads = self.count("embedding_length"), self.count("attention.head_count")
        return width // heads if width and heads else None

    @property
    def rope_base(self) -> float | None:
        """RoPE base; None if the metadata's is no number."""
        return self.number("rope.freq_base", DEFAULT_BASE)


def is_list(value: Any) -> bool:
    """Whether a metadata value is an array, whatever the reader made of it."""
    return hasattr(value, "__len__") and not isinstance(value, (str, bytes))
