"""Models of any architecture, made of keys alone: llama.cpp invents the tensors that they ask for.

Good for a look at a graph; the weights hold nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from clex_local.library.loading import library_path
from clex_local.model_file.architectures import find

LAYERS, HEADS, WIDTH, VOCABULARY = 4, 2, 256, 128
_U32, _F32 = 4, 6  # gguf_type
_PATTERN = np.arange(LAYERS, dtype=np.uint32) % 2
_HEADS_OF_LAYERS = np.array([HEADS, 0, HEADS, HEADS], np.uint32)

# What architectures read, all of them under the same names.
_KEYS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "context_length": 256,
    "embedding_length": WIDTH,
    "block_count": LAYERS,
    "leading_dense_block_count": 1,
    "feed_forward_length": 384,
    "use_parallel_residual": False,
    "logit_scale": 1.0,
    "full_attention_interval": 2,
    "attention.head_count": HEADS,
    "attention.head_count_kv": HEADS,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.clamp_kqv": 1.0,
    "attention.sliding_window": 32,
    "attention.sliding_window_pattern": 2,
    "rope.dimension_sections": np.full(4, WIDTH // HEADS // 4, np.uint32),
    "ssm.inner_size": 2 * WIDTH,
    "ssm.conv_kernel": 4,
    "ssm.state_size": 128,
    "ssm.time_step_rank": HEADS,
    "ssm.group_count": 2,
    "shortconv.l_cache": 3,
}
_WITH_EXPERTS = (
    *("grok", "qwen3vlmoe", "qwen35moe", "phimoe", "cohere2moe", "dbrx", "arctic", "deepseek", "bailingmoe"),
    *("bailingmoe2", "hy_v3", "lfm2moe", "grovemoe", "minimax-m2", "mimo2", "step35", "mellum", "laguna"),
    *("qwen3next", "gpt-oss", "llama4", "glm4moe", "smallthinker", "afmoe", "exaone-moe", "kimi-linear", "minimax-01"),
    "deepseek2",
)
_EXPERTS: dict[str, Any] = {
    "expert_feed_forward_length": 384,
    "expert_shared_feed_forward_length": 192,
    "interleave_moe_layer_step": 2,
    "expert_count": 2,
    "expert_used_count": 2,
    "expert_shared_count": 1,
    "expert_gating_func": 2,
    "expert_group_scale": 1.0,
    "experts_per_group": 1,
}
_BY_LAYER = {"attention.sliding_window_pattern": _PATTERN}
_LATENT = {
    "attention.head_count_kv": 1,
    "attention.q_lora_rank": 32,
    "attention.kv_lora_rank": 64,
    "attention.key_length": 96,
    "attention.value_length": 64,
    "attention.key_length_mla": 96,
    "attention.value_length_mla": 64,
    "rope.dimension_count": 32,
}
_SOME_LAYERS = {"attention.head_count": _HEADS_OF_LAYERS, "attention.head_count_kv": _HEADS_OF_LAYERS}
# What an architecture wants otherwise; None for a key that it has not.
_CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("cohere2moe", "granite_swa", "mimo2", "spark2_5"), _BY_LAYER),
    **dict.fromkeys(("granitehybrid", "lfm2moe"), _SOME_LAYERS),
    "qwen35": {"ssm.inner_size": 256},
    "qwen35moe": {"ssm.inner_size": 256},
    "step35": {"embedding_length": 160, **_BY_LAYER},
    "laguna": {"embedding_length": 160},
    "lfm2": {**_SOME_LAYERS, "attention.sliding_window_pattern": None},
    "mamba": {"ssm.group_count": None},
    "jamba": {"ssm.group_count": None, **_SOME_LAYERS},
    "qwen3next": {"ssm.inner_size": 256},
    "gemma4": {
        "attention.key_length": 64,
        "attention.value_length": 64,
        "attention.key_length_swa": 32,
        "attention.value_length_swa": 32,
        "attention.shared_kv_layers": 1,
        "embedding_length_per_layer_input": 64,
        **_BY_LAYER,
    },
    "nemotron_h": {
        "attention.head_count_kv": np.array([0, HEADS, 0, 0], np.uint32),
        "feed_forward_length": np.array([0, 0, 384, 0], np.uint32),
    },
    "minimax-01": {"residual_scale": 1.0},
    "llama4": {"attention.sliding_window": None},  # it is 8,192
    "smallthinker": {"attention.sliding_window": 4096},
    "deepseek2": _LATENT,
    "kimi-linear": {**_LATENT, "attention.head_count_kv": np.array([0, 1, 0, 0], np.uint32), "kda.head_dim": 64},
    "rwkv7": {
        "wkv.head_size": 64,
        "attention.decay_lora_rank": 32,
        "attention.iclr_lora_rank": 32,
        "attention.value_residual_mix_lora_rank": 32,
        "attention.gate_lora_rank": 32,
    },
    "plamo2": {"ssm.group_count": 0, **_SOME_LAYERS},
    "gemma3n": {"embedding_length": 64, "block_count": 22},
    "hrm_text": {"block_count": 6, "hrm.layers_per_stack": 1, "hrm.h_cycles": 2, "hrm.l_cycles": 2},
}
_SetTensor = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)


class _Metadata:
    """A gguf_context."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(next(Path(library_path()).glob("libggml-base.*"))))
        self._library.gguf_init_empty.restype = ctypes.c_void_p
        self.context = ctypes.c_void_p(self._library.gguf_init_empty())

    def set(self, key: str, value: Any) -> None:
        name = ctypes.c_char_p(key.encode())
        if isinstance(value, bool):
            self._library.gguf_set_val_bool(self.context, name, ctypes.c_bool(value))
        elif isinstance(value, int):
            self._library.gguf_set_val_u32(self.context, name, ctypes.c_uint32(value))
        elif isinstance(value, float):
            self._library.gguf_set_val_f32(self.context, name, ctypes.c_float(value))
        elif isinstance(value, str):
            self._library.gguf_set_val_str(self.context, name, ctypes.c_char_p(value.encode()))
        elif isinstance(value, list):
            texts = (ctypes.c_char_p * len(value))(*[text.encode() for text in value])
            self._library.gguf_set_arr_str(self.context, name, texts, ctypes.c_size_t(len(value)))
        else:
            kind = ctypes.c_int(_F32 if value.dtype == np.float32 else _U32)
            self._library.gguf_set_arr_data(
                self.context, name, kind, ctypes.c_void_p(value.ctypes.data), ctypes.c_size_t(value.size)
            )

    def free(self) -> None:
        self._library.gguf_free(self.context)


def made_up_keys(architecture: str) -> dict[str, Any]:
    """The metadata of a model of an architecture, but for the vocabulary."""
    experts = _EXPERTS if architecture in _WITH_EXPERTS else {}
    found = {**_KEYS, **experts, **_CHANGES.get(architecture, {})}
    unread = ("ssm.",) if architecture.startswith("lfm2") else ("shortconv.",)
    if not find(architecture).recurrent or architecture == "minimax-01":
        unread = ("ssm.", "shortconv.")
    keys = {key: value for key, value in found.items() if value is not None and not key.startswith(unread)}
    return {"general.architecture": architecture, **{f"{architecture}.{key}": value for key, value in keys.items()}}


@contextmanager
def made_up_model(architecture: str) -> Iterator[Any]:
    """A loaded model of an architecture."""
    metadata = _Metadata()
    for key, value in made_up_keys(architecture).items():
        metadata.set(key, value)
    metadata.set("tokenizer.ggml.model", "test")
    metadata.set("tokenizer.ggml.tokens", [f"token {i}" for i in range(VOCABULARY)])
    metadata.set("tokenizer.ggml.scores", np.zeros(VOCABULARY, np.float32))
    init = llama_cpp.llama_cpp._lib.llama_model_init_from_user
    init.restype = llama_cpp.llama_model_p_ctypes
    init.argtypes = [ctypes.c_void_p, _SetTensor, ctypes.c_void_p, llama_cpp.llama_model_params]
    params = llama_cpp.llama_model_default_params()
    model = init(metadata.context, _SetTensor(lambda tensor, data: None), None, params)
    metadata.free()
    assert model, f"llama.cpp makes no model of the architecture {architecture}"
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)
