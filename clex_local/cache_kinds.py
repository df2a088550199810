"""Which kind of cache llama.cpp makes for a model, known from the metadata of its file."""

from __future__ import annotations

import os
from typing import Any

from clex_local import architectures
from clex_local.gguf_file import GGUFFile
from clex_local.model_keys import ModelKeys


def has_plain_cache(keys: ModelKeys) -> bool:
    """Whether one key and one value of every head are kept for each token of the context.

    They are not for layers that keep a state (Mamba), compressed keys (DeepSeek) and sliding windows (Gemma).
    """
    if not keys.architecture:
        return False
    row = architectures.find(keys.architecture)
    if row.recurrent or keys.has("ssm.state_size") or keys.has("wkv.head_size"):
        return False
    if keys.has("attention.kv_lora_rank") and not row.expands_keys:
        return False
    return not has_windows(keys)


def has_windows(keys: ModelKeys) -> bool:
    """Whether layers attend through a sliding window, as llama.cpp computes the model."""
    row = architectures.find(keys.architecture)
    if not row.sliding_window or row.windowed_layers not in (0, keys.get("block_count")):
        return False
    if row.sliding_window == "always" and keys.get("attention.sliding_window") is None:
        return True
    return keys.has("attention.sliding_window")


def first_table(keys: ModelKeys) -> int | None:
    """Tokens that the first RoPE table covers, where there are more: ``clex.*`` tables, or LongRoPE's sets of factors.

    Raises:
        TypeError, ValueError: a length is no number.
    """
    metadata = keys.metadata
    factors: Any = metadata.get("clex.scaling_factors")
    if hasattr(factors, "__len__") and len(factors) > 1:
        return int(metadata.get("clex.original_context_length") or 0) or None
    tensors = metadata.tensors if isinstance(metadata, GGUFFile) else ()
    longrope = any(tensor.name == "rope_factors_long.weight" for tensor in tensors)
    if not longrope or "LLAMA_CLEX_LONGROPE_DISABLE" in os.environ:
        return None
    return keys.original_context if 0 < keys.original_context < keys.trained_context else None
