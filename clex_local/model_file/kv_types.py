"""The types that a key and value cache can have."""

from __future__ import annotations

# name -> (ggml type, values per block, bytes per block)
KV_TYPES: dict[str, tuple[int, int, int]] = {
    "f16": (1, 1, 2),
    "f32": (0, 1, 4),
    "bf16": (30, 1, 2),
    "q8_0": (8, 32, 34),
    "q5_1": (7, 32, 24),
    "q5_0": (6, 32, 22),
    "q4_1": (3, 32, 20),
    "q4_0": (2, 32, 18),
}
TYPE_NAMES = {code: name for name, (code, _, _) in KV_TYPES.items()}


def type_name(code: int) -> str:
    """The name of a ggml type, as far as caches have names for it."""
    return TYPE_NAMES.get(code, f"ggml type {code}")


def cache_name(type_k: str, type_v: str) -> str:
    """The types of keys and values in a word."""
    return type_k if type_k == type_v else f"{type_k}/{type_v}"


def is_quantized(kv_type: str) -> bool:
    """Whether this type of cache needs flash attention."""
    return KV_TYPES[kv_type][1] > 1
