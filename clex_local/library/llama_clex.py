"""The functions of llama-clex.h, for ctypes; see that header for what they do."""

from __future__ import annotations

import ctypes
import enum

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as _bindings

from clex_local.errors import ClexError


class Stats(ctypes.Structure):
    """``llama_clex_stats``."""

    _fields_ = (
        ("n_rerotations", ctypes.c_int64),
        ("n_cells", ctypes.c_int64),
        ("t_us", ctypes.c_int64),
    )


class Layers(ctypes.Structure):
    """``llama_clex_layers_info``: how many layers of a model the tables rotate."""

    _fields_ = (
        ("n_table", ctypes.c_int32),
        ("n_windowed", ctypes.c_int32),
        ("n_unrotated", ctypes.c_int32),
    )


class Policy(enum.IntEnum):
    """``enum llama_clex_policy``."""

    BY_LENGTH = 0
    FIXED = 1


def declare(name: str, result: type | None, *arguments: type) -> ctypes._NamedFuncPointer:
    """A function of our library."""
    try:
        function = getattr(_bindings._lib, name)
    except AttributeError:
        directory = _bindings._lib._name
        advice = "unset LLAMA_CPP_LIB_PATH, or build it again (make native)"
        raise ClexError(f"{directory} is not the llama.cpp of this clex-local: {advice}") from None
    function.restype, function.argtypes = result, arguments
    return function


_model = llama_cpp.llama_model_p_ctypes
_context = llama_cpp.llama_context_p_ctypes

_takes_tables = declare(
    *("llama_clex_takes_tables", ctypes.c_bool, _model),
    *(ctypes.POINTER(Layers), ctypes.c_char_p, ctypes.c_size_t),
)
_method = declare("llama_clex_method", ctypes.c_char_p, _model)
n_buckets = declare("llama_clex_n_buckets", ctypes.c_int32, _model)
original_context = declare("llama_clex_original_context", ctypes.c_int32, _model)
max_context = declare("llama_clex_max_context", ctypes.c_int32, _model)
scaling_factor = declare("llama_clex_scaling_factor", ctypes.c_float, _model, ctypes.c_int32)
_inv_freq = declare(
    "llama_clex_inv_freq", ctypes.c_int32, _model, ctypes.c_int32, ctypes.POINTER(ctypes.c_float), ctypes.c_int32
)
attn_scale = declare("llama_clex_attn_scale", ctypes.c_float, _model, ctypes.c_int32)
log_scale = declare("llama_clex_log_scale", ctypes.c_bool, _model)
bucket = declare("llama_clex_bucket", ctypes.c_int32, _model, ctypes.c_int64)
set_policy = declare("llama_clex_set_policy", ctypes.c_bool, _context, ctypes.c_int, ctypes.c_bool)
seq_reserve = declare("llama_clex_seq_reserve", ctypes.c_bool, _context, ctypes.c_int32, ctypes.c_int32)
seq_bucket = declare("llama_clex_seq_bucket", ctypes.c_int32, _context, ctypes.c_int32)
get_stats = declare("llama_clex_get_stats", Stats, _context)
causal = declare("llama_clex_causal", ctypes.c_bool, _context)

imatrix_init = declare("llama_clex_imatrix_init", ctypes.c_void_p)
imatrix_collect = declare("llama_clex_imatrix_collect", ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
imatrix_save = declare(
    *("llama_clex_imatrix_save", ctypes.c_bool, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p),
    *(ctypes.c_uint32, ctypes.c_uint32),
)


def takes_tables(model: object) -> tuple[Layers, str]:
    """Ask the graph of a model, with tables or without, which of its layers tables rotate.

    Returns:
        The layers, and why tables cannot be used with the model: empty if they can.
    """
    layers, reason = Layers(), ctypes.create_string_buffer(512)
    _takes_tables(model, layers, reason, len(reason))
    return layers, reason.value.decode("utf-8", errors="replace")


def method(model: object) -> str:
    """What made the tables of a model; empty without tables."""
    return _method(model).decode("utf-8", errors="replace")


def inv_freq(model: object, bucket: int) -> npt.NDArray[np.float32]:
    """Inverse frequencies of a bucket, float32 [n_rot / 2], in rad/position; empty if there is no such bucket."""
    values = np.empty(_inv_freq(model, bucket, None, 0), np.float32)
    _inv_freq(model, bucket, values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size)
    return values
