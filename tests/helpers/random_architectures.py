"""Tiny random models of other architectures than LLaMA, with tables: what their graphs do with RoPE differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from helpers.gguf_maker import gguf_bytes
from helpers.random_gguf import model_parts, ntk_tables

WINDOW = 32

# Keys and layers; the pattern of windows is true for a layer with one.
KINDS: dict[str, dict[str, Any]] = {
    "smollm3": {"n_layer": 4},  # no RoPE in the last of four
    "gemma2": {"n_layer": 4, "keys": {"attention.sliding_window": np.uint32(WINDOW)}},  # a window in every other
    "olmo2": {"n_layer": 4, "keys": {"attention.sliding_window": np.uint32(WINDOW)}},  # in three of four, as OLMo 3
    "lfm2": {"n_layer": 4, "keys": {"shortconv.l_cache": np.uint32(3)}},  # attention in every other layer
    "qwen2vl": {"n_layer": 2, "keys": {"rope.dimension_sections": np.array([4, 6, 6, 0], np.int32)}},
    "hunyuan-dense": {"n_layer": 2},  # a norm with weights behind RoPE
    "talkie": {"n_layer": 2},  # a norm without weights behind RoPE
    "deepseek2": {"n_layer": 2},  # latent attention
    "gpt2": {"n_layer": 2},  # learnt positions
}


def make_architecture(path: Path, name: str, *, only: int | None = None, **options: Any) -> Path:
    """Write the model of `architecture_parts`, whose arguments these are, and return its path."""
    path.write_bytes(gguf_bytes(*architecture_parts(name, only=only, **options)))
    return path


def architecture_parts(
    name: str, *, only: int | None = None, more: Mapping[str, Any] | None = None, head: int = 32, **options: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Keys and tensors of a model of KINDS, as `random_gguf.model_parts`.

    Args:
        name: of KINDS.
        only: the one layer that adds anything to the residual stream. What goes into a layer then does not depend on
            any table, and the keys of a prompt are those of the same prompt in one piece, however it was cut.
        more: keys that are set besides.
    """
    kind = KINDS[name]
    keys, tensors = model_parts(head=head, n_layer=kind["n_layer"], **options)
    keys = {key.replace("llama.", f"{name}.", 1) if key.startswith("llama.") else key: v for key, v in keys.items()}
    keys |= {"general.architecture": name} | {f"{name}.{key}": value for key, value in kind.get("keys", {}).items()}
    _ADAPT.get(name, lambda *_: None)(keys, tensors, head)
    keys |= more or {}
    if only is not None:
        for key in tensors:
            if key.startswith("blk.") and not key.startswith(f"blk.{only}.") and key.endswith(_OUTPUTS + _NORMS):
                tensors[key] = np.zeros_like(tensors[key])
    return keys, tensors


# What a layer adds to the residual stream goes through one of these.
_OUTPUTS = ("attn_output.weight", "ffn_down.weight", "shortconv.out_proj.weight")
_NORMS = ("post_attention_norm.weight", "post_ffw_norm.weight")


def _layers(tensors: dict[str, np.ndarray]) -> Sequence[int]:
    return sorted({int(name.split(".")[1]) for name in tensors if name.startswith("blk.")})


def _ones(count: int) -> np.ndarray:
    return np.ones(count, np.float32)


def _gemma2(keys: dict[str, Any], tensors: dict[str, np.ndarray], head: int) -> None:
    width = tensors["output_norm.weight"].size
    for i in _layers(tensors):
        for norm in ("post_attention_norm", "post_ffw_norm"):
            tensors[f"blk.{i}.{norm}.weight"] = _ones(width)
    del tensors["output.weight"]
    keys |= {"gemma2.attention.key_length": np.uint32(head), "gemma2.attention.value_length": np.uint32(head)}


def _olmo2(keys: dict[str, Any], tensors: dict[str, np.ndarray], head: int) -> None:
    width = tensors["output_norm.weight"].size
    for i in _layers(tensors):
        for norm in ("post_attention_norm", "post_ffw_norm"):
            tensors[f"blk.{i}.{norm}.weight"] = _ones(width)
        tensors[f"blk.{i}.attn_q_norm.weight"] = _ones(tensors[f"blk.{i}.attn_q.weight"].shape[0]) * 2
        tensors[f"blk.{i}.attn_k_norm.weight"] = _ones(tensors[f"blk.{i}.attn_k.weight"].shape[0])
        del tensors[f"blk.{i}.attn_norm.weight"], tensors[f"blk.{i}.ffn_norm.weight"]


def _lfm2(keys: dict[str, Any], tensors: dict[str, np.ndarray], head: int) -> None:
    rng = np.random.default_rng(1)
    width = tensors["output_norm.weight"].size
    tensors["token_embd_norm.weight"] = tensors.pop("output_norm.weight")
    kv = keys["lfm2.attention.head_count_kv"]
    keys["lfm2.attention.head_count_kv"] = np.array([0 if i % 2 == 0 else kv for i in _layers(tensors)], np.int32)
    for i in _layers(tensors):
        if i % 2:
            tensors |= {f"blk.{i}.attn_{x}_norm.weight": _ones(head) for x in "qk"}
            continue
        for part in ("q", "k", "v", "output"):
            del tensors[f"blk.{i}.attn_{part}.weight"]
        for part, shape in {"conv": (width, 3), "in_proj": (3 * width, width), "out_proj": (width, width)}.items():
            values = rng.standard_normal(shape) / np.sqrt(shape[1])
            tensors[f"blk.{i}.shortconv.{part}.weight"] = values.astype(np.float32)


def _head_norms(keys: dict[str, Any], tensors: dict[str, np.ndarray], head: int) -> None:
    for i in _layers(tensors):
        tensors |= {f"blk.{i}.attn_{x}_norm.weight": np.linspace(1, 2, head, dtype=np.float32) for x in "qk"}


def _talkie(keys: dict[str, Any], tensors: dict[str, np.ndarray], head: int) -> None:
    n_head = int(keys["talkie.attention.head_count"])
    keys["talkie.logit_scale"] = np.float32(1)
    del tensors["output_norm.weight"]
    for i in _layers(tensors):
        del tensors[f"blk.{i}.attn_norm.weight"], tensors[f"blk.{i}.ffn_norm.weight"]
        tensors[f"blk.{i}.attn_q_norm.weight"] = np.linspace(1, 2, n_head, dtype=np.float32)[:, None]
        tensors[f"blk.{i}.layer_output_scale.weight"] = _ones(1)


def _gpt2(keys: dict[str, Any], tensors: dict[str, np.ndarray], head: int) -> None:
    width = tensors["output_norm.weight"].size
    tensors["position_embd.weight"] = np.zeros((256, width), np.float32)
    tensors["output_norm.bias"] = np.zeros(width, np.float32)
    keys["gpt2.attention.layer_norm_epsilon"] = np.float32(1e-5)
    keys["gpt2.context_length"] = np.uint32(256)
    for i in _layers(tensors):
        parts = [tensors.pop(f"blk.{i}.attn_{x}.weight") for x in "qkv"]
        tensors[f"blk.{i}.attn_qkv.weight"] = np.concatenate(parts)
        tensors[f"blk.{i}.attn_qkv.bias"] = np.zeros(sum(map(len, parts)), np.float32)
        del tensors[f"blk.{i}.ffn_gate.weight"]
        for part in ("attn_norm", "attn_output", "ffn_norm", "ffn_up", "ffn_down"):
            tensors[f"blk.{i}.{part}.bias"] = np.zeros(len(tensors[f"blk.{i}.{part}.weight"]), np.float32)


def _deepseek2(keys: dict[str, Any], tensors: dict[str, np.ndarray], head: int) -> None:
    rng = np.random.default_rng(1)
    rank, rope, nope = 16, head // 2, head // 2
    width, n_head = tensors["output_norm.weight"].size, int(keys["deepseek2.attention.head_count"])

    def matrix(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    for i in _layers(tensors):
        for part in "kv":
            del tensors[f"blk.{i}.attn_{part}.weight"]
        tensors |= {
            f"blk.{i}.attn_q.weight": matrix(n_head * head, width),
            f"blk.{i}.attn_kv_a_mqa.weight": matrix(rank + rope, width),
            f"blk.{i}.attn_kv_a_norm.weight": _ones(rank),
            f"blk.{i}.attn_k_b.weight": matrix(n_head, rank, nope),
            f"blk.{i}.attn_v_b.weight": matrix(n_head, head, rank),
        }
    u32 = {
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": 0,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": head,
        "attention.value_length_mla": head,
        "rope.dimension_count": rope,
        "leading_dense_block_count": len(_layers(tensors)),
        "expert_shared_count": 1,
        "expert_feed_forward_length": 64,
    }
    keys |= {f"deepseek2.{key}": np.uint32(value) for key, value in u32.items()}
    if "clex.inv_freq" in keys:
        keys["clex.inv_freq"] = ntk_tables(len(keys["clex.scaling_factors"]), rope).reshape(-1)


_ADAPT = {
    "gemma2": _gemma2,
    "olmo2": _olmo2,
    "lfm2": _lfm2,
    "hunyuan-dense": _head_norms,
    "talkie": _talkie,
    "deepseek2": _deepseek2,
    "gpt2": _gpt2,
}
