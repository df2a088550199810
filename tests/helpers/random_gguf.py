"""Tiny random LLaMA models with tables and a byte vocabulary, made in milliseconds, of any head size and length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from helpers.gguf_maker import gguf_bytes

N_VOCAB = 288


def ntk_tables(n_buckets: int, n_rot: int, base: float = 10000.0) -> np.ndarray:
    """NTK frequencies for t = 1, 2, ...: float32 [n_buckets, n_rot / 2]."""
    i = np.arange(n_rot // 2)[None]
    t = np.arange(1, n_buckets + 1)[:, None]
    return (base ** (-2 * i / n_rot) * (2.0 * t - 1) ** (-2 * i / (n_rot - 2))).astype(np.float32)


def make_model(path: Path, **options: Any) -> Path:
    """Write the model of `model_parts`, whose arguments these are, and return its path."""
    path.write_bytes(gguf_bytes(*model_parts(**options)))
    return path


def model_parts(
    *,
    head: int = 32,
    n_head: int = 2,
    n_head_kv: int = 1,
    n_layer: int = 2,
    original: int = 64,
    n_buckets: int = 4,
    seed: int = 0,
    tables: bool = True,
    log_scale: bool = False,
    base: float = 10000.0,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Keys and tensors of a model that can be computed with."""
    rng = np.random.default_rng(seed)
    width, ffn = n_head * head, 64

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    tensors = {"token_embd.weight": matrix(N_VOCAB, width) * np.float32(np.sqrt(width))}
    for i in range(n_layer):
        tensors |= {
            f"blk.{i}.attn_norm.weight": np.ones(width, np.float32),
            # Sharper attention than random weights give: a wrong table is then far from the right one.
            f"blk.{i}.attn_q.weight": matrix(width, width) * 2,
            f"blk.{i}.attn_k.weight": matrix(n_head_kv * head, width),
            f"blk.{i}.attn_v.weight": matrix(n_head_kv * head, width),
            f"blk.{i}.attn_output.weight": matrix(width, width),
            f"blk.{i}.ffn_norm.weight": np.ones(width, np.float32),
            f"blk.{i}.ffn_gate.weight": matrix(ffn, width),
            f"blk.{i}.ffn_up.weight": matrix(ffn, width),
            f"blk.{i}.ffn_down.weight": matrix(width, ffn),
        }
    tensors |= {"output_norm.weight": np.ones(width, np.float32), "output.weight": matrix(N_VOCAB, width)}

    letters = [f"{chr(ord('a') + i)}" for i in range(26)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, "\u2581", "\u2581\u2581", "."]
    keys = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.block_count": np.uint32(n_layer),
        "llama.context_length": np.uint32(original),
        "llama.embedding_length": np.uint32(width),
        "llama.feed_forward_length": np.uint32(ffn),
        "llama.attention.head_count": np.uint32(n_head),
        "llama.attention.head_count_kv": np.uint32(n_head_kv),
        "llama.attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "llama.rope.dimension_count": np.uint32(head),
        "llama.rope.freq_base": np.float32(base),
        "llama.vocab_size": np.uint32(N_VOCAB),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.zeros(N_VOCAB, np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [1] * 29, np.int32),
        "tokenizer.ggml.bos_token_id": np.uint32(1),
        "tokenizer.ggml.eos_token_id": np.uint32(2),
    }
    if tables:
        keys |= {
            "clex.version": np.uint32(1),
            "clex.method": "ntk",
            "clex.original_context_length": np.uint32(original),
            "clex.scaling_factors": np.arange(1, n_buckets + 1, dtype=np.float32),
            "clex.inv_freq": ntk_tables(n_buckets, head, base).reshape(-1),
        }
    if log_scale:
        keys["clex.log_scale"] = np.bool_(True)
    return keys, tensors


def make_lora(path: Path, *, width: int = 64, layer: int = 0, rank: int = 2) -> Path:
    """Write a LoRA adapter for the outputs of the attention of a layer, and return its path."""
    rng = np.random.default_rng(3)
    name = f"blk.{layer}.attn_output.weight"
    tensors = {
        f"{name}.lora_a": rng.standard_normal((rank, width), np.float32),
        f"{name}.lora_b": rng.standard_normal((width, rank), np.float32),
    }
    keys = {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": np.float32(rank),
    }
    path.write_bytes(gguf_bytes(keys, tensors))
    return path


def random_tokens(count: int, seed: int = 0) -> list[int]:
    """Tokens that are neither special nor end the text."""
    return np.random.default_rng(seed).integers(3, N_VOCAB, count).tolist()
