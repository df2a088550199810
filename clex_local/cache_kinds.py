"""Which kind of cache llama.cpp makes for a model, known from the metadata of its file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from clex_local import architectures
from clex_local.gguf_file import GGUFFile


def has_plain_cache(metadata: Mapping[str, Any] | GGUFFile) -> bool:
    """Whether one key and one value of every head are kept for each token of the context.

    They are not for layers that keep a state (Mamba), compressed keys (DeepSeek) and sliding windows (Gemma).
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str):
        return False

    def has(key: str) -> bool:
        value: Any = metadata.get(f"{arch}.{key}")
        return len(value) > 0 if hasattr(value, "__len__") else bool(value)

    row = architectures.find(arch)
    if row.recurrent or has("ssm.state_size") or has("wkv.head_size"):
        return False
    if has("attention.kv_lora_rank") and not row.expands_keys:
        return False
    if not row.sliding_window or row.windowed_layers not in (0, metadata.get(f"{arch}.block_count")):
        return True
    if row.sliding_window == "always" and metadata.get(f"{arch}.attention.sliding_window") is None:
        return False
    return not has("attention.sliding_window")


def first_table(metadata: Mapping[str, Any] | GGUFFile) -> int | None:
    """Tokens that the first RoPE table covers, where there are more: ``clex.*`` tables, or LongRoPE's sets of factors.

    Raises:
        TypeError, ValueError: a length is no number.
    """
    factors: Any = metadata.get("clex.scaling_factors")
    if hasattr(factors, "__len__") and len(factors) > 1:
        return int(metadata.get("clex.original_context_length") or 0) or None
    tensors = metadata.tensors if isinstance(metadata, GGUFFile) else ()
    longrope = any(tensor.name == "rope_factors_long.weight" for tensor in tensors)
    if not longrope or "LLAMA_CLEX_LONGROPE_DISABLE" in os.environ:
        return None
    arch = metadata.get("general.architecture")
    original = int(metadata.get(f"{arch}.rope.scaling.original_context_length") or 0)
    return original if 0 < original < int(metadata.get(f"{arch}.context_length") or 0) else None
