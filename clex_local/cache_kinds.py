"""Which kind of cache llama.cpp makes for a model, known from the metadata of its file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from clex_local.gguf_file import GGUFFile

# Architectures that are computed with a sliding window where their file names one (`swa_type` in src/models/ of the
# pinned llama.cpp). All others ignore the key, Phi-3 among them.
# fmt: off
_WINDOWED = frozenset((
    "afmoe", "cohere2", "cohere2moe", "deepseek4", "dflash", "dots3note", "exaone-moe", "gemma-embedding", "gemma2",
    "gemma3", "gemma3n", "gemma4", "gemma4-assistant", "gpt-oss", "granite_swa", "laguna", "lfm2", "llama4", "maple",
    "mellum", "mimo2", "modern-bert", "muse-glimmer", "olmo2", "plamo3", "smallthinker", "spark2_5", "step35",
))
# Architectures whose layers, or some of them, keep a state instead of keys and values (llm_arch_is_recurrent and
# llm_arch_is_hybrid there).
_RECURRENT = frozenset((
    "mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7", "jamba", "falcon-h1", "plamo2", "granitehybrid",
    "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe", "qwen3next", "kimi-linear", "bailingmoe3", "kimi-k3",
    "glm5-next", "qwen35", "qwen35moe", "qwen4exp", "deepseek4", "minimax-01",
))
# fmt: on
_WINDOWED_BY_DEFAULT = frozenset({"gemma2", "llama4"})  # also where the file names no window
_EXPANDED = frozenset({"minicpm3", "plm"})  # compressed keys are cached expanded


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

    if arch in _RECURRENT or has("ssm.state_size") or has("wkv.head_size"):
        return False
    if has("attention.kv_lora_rank") and arch not in _EXPANDED:
        return False
    if arch == "exaone4":  # only the large one has a window, whatever its file says
        return metadata.get("exaone4.block_count") != 64
    if arch in _WINDOWED_BY_DEFAULT and metadata.get(f"{arch}.attention.sliding_window") is None:
        return False
    return arch not in _WINDOWED or not has("attention.sliding_window")


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
