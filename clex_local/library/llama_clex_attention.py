"""The function of llama-clex-attention.h, for ctypes; see that header for what it does."""

from __future__ import annotations

import ctypes

import llama_cpp

from clex_local.library.llama_clex import declare


class Attention(ctypes.Structure):
    """``llama_clex_attention``: attention of one layer."""

    _fields_ = (
        ("n_head", ctypes.c_int32),
        ("n_head_kv", ctypes.c_int32),
        ("size_k", ctypes.c_int32),
        ("size_v", ctypes.c_int32),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
    )


attention_time = declare(
    *("llama_clex_attention_time", ctypes.c_double, llama_cpp.llama_context_p_ctypes, Attention),
    *(ctypes.c_int32, ctypes.c_int32),
)
