"""What a GGUF file without tables says of its RoPE, and the tables that the runtime makes of LongRoPE factors."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from clex_local.errors import escaped
from clex_local.model_file import architectures
from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.keys import ModelKeys
from clex_local.model_file.tables import MAX_DIMENSION, Tables, TablesError

_F32 = 0  # ggml_type
_SCALING = ("rope.scaling.", "rope.scale_linear")
_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


@dataclass(frozen=True)
class RopeFacts:
    """What a model file says of its RoPE.

    Attributes:
        dimension: rotary dimension of a head, twice the number of frequencies; None if the file does not say.
        base: RoPE base; None if the file's is no number.
        scaling: the file's ``rope.scaling.*`` keys without the architecture, and ``rope.scale_linear``.
        factor_tensors: names of its tensors with frequency factors.
    """

    dimension: int | None
    base: float | None
    scaling: dict[str, Any]
    factor_tensors: tuple[str, ...]


def read_rope(file: GGUFFile) -> RopeFacts:
    """Reads what an open file says of its RoPE."""
    keys = ModelKeys(file)
    tensors = {tensor.name for tensor in file.tensors}
    return RopeFacts(
        dimension=keys.rope_dimension,
        base=keys.rope_base,
        scaling={name: _plain(file, keys.key(name)) for name in keys.names(*_SCALING)},
        factor_tensors=tuple(name for name in _FACTORS if name in tensors),
    )


def _plain(file: GGUFFile, key: str) -> Any:
    """A value that can be shown: a number, bool or short text, or what kind of array it is."""
    kind = file.kind(key) or ""
    if kind.endswith("[]"):
        return f"{kind[:-2]}[{file.array_size(key)}]"
    value = file.get(key)
    if isinstance(value, str) or (isinstance(value, float) and not math.isfinite(value)):
        return escaped(str(value), 80)
    return value


def longrope_tables(file: GGUFFile) -> Tables | None:
    """The two buckets that the runtime makes of LongRoPE factors: short ones for the original context, then long ones.

    None where it makes none and llama.cpp chooses the factors by the allocated context.

    Source: ``llama_clex_tables::load_longrope`` in ``native/src/tables/llama-clex-tables.cpp``.
    """
    keys = ModelKeys(file)
    if os.environ.get("LLAMA_CLEX_LONGROPE_DISABLE") is not None or not architectures.find(keys.architecture).tables:
        return None
    trained, dimension, base = keys.trained_context, keys.rope_dimension, keys.rope_base
    original = keys.count("rope.scaling.original_context_length", trained)
    scale = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0))
    attention = keys.number("rope.scaling.attn_factor", 1)
    if not trained or not original or trained <= original or not dimension or dimension > MAX_DIMENSION:
        return None
    if not base or base < 0 or scale is None or attention is None:
        return None
    tensors = {tensor.name: tensor for tensor in file.tensors if tensor.name in _FACTORS[1:]}
    rows = []
    for name in _FACTORS[1:]:
        tensor = tensors.get(name)
        if tensor is None or tensor.type != _F32 or math.prod(tensor.shape) != dimension // 2:
            return None
        with np.errstate(all="ignore"):  # what is of no use is for validate() to refuse
            plain = np.float64(base) ** (-2 * np.arange(dimension // 2) / dimension)
            rows.append(plain / (scale or 1) / file.floats(tensor))
    # The nearest float may cover one token less.
    largest = np.float32(trained / original)
    while float(largest) * original < trained:
        largest = np.nextafter(largest, np.float32(np.inf))
    tables = Tables(
        method="longrope",
        original_context_length=original,
        scaling_factors=np.array([1, largest], np.float32),
        inv_freq=np.array(rows),
        # Of the rotated queries and of the rotated keys, so twice in their products.
        attn_scale=None if attention == 1 else np.full(2, attention**2, np.float32),
    )
    try:
        tables.validate()
    except TablesError:
        return None
    return tables
