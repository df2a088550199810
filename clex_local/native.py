"""The functions of llama-clex.h, for ctypes; see that header for what they do."""

from __future__ import annotations

import ctypes

import llama_cpp
from llama_cpp import llama_cpp as _bindings

from clex_local.errors import ClexError


class Stats(ctypes.Structure):
    """``llama_clex_stats``."""

    _fields_ = (
        ("n_rerotations", ctypes.c_int64),
        ("n_cells", ctypes.c_int64),
        ("t_us", ctypes.c_int64),
    )


def _declare(name: str, result: type | None, *arguments: type) -> ctypes._NamedFuncPointer:
    try:
        function = getattr(_bindings._lib, name)
    except AttributeError:
        directory = _bindings._lib._name
        raise ClexError(f"{directory} is not the llama.cpp of clex-local; unset LLAMA_CPP_LIB_PATH") from None
    function.restype, function.argtypes = result, arguments
    return function


_model = llama_cpp.llama_model_p_ctypes
_context = llama_cpp.llama_context_p_ctypes

n_buckets = _declare("llama_clex_n_buckets", ctypes.c_int32, _model)
original_context = _declare("llama_clex_original_context", ctypes.c_int32, _model)
max_context = _declare("llama_clex_max_context", ctypes.c_int32, _model)
scaling_factor = _declare("llama_clex_scaling_factor", ctypes.c_float, _model, ctypes.c_int32)
bucket = _declare("llama_clex_bucket", ctypes.c_int32, _model, ctypes.c_int64)
seq_reserve = _declare("llama_clex_seq_reserve", ctypes.c_bool, _context, ctypes.c_int32, ctypes.c_int32)
seq_bucket = _declare("llama_clex_seq_bucket", ctypes.c_int32, _context, ctypes.c_int32)
get_stats = _declare("llama_clex_get_stats", Stats, _context)
