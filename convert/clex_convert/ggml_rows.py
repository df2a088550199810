"""Rows of tensors between ggml's types and float32, by ggml's own functions."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from clex_convert.file_types import TENSOR_TYPES
from clex_local.model_file.gguf_api import ggml

_F32 = 0  # ggml_type
_Convert = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _Traits(ctypes.Structure):
    """``ggml_type_traits``."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    library = ggml()
    pointer, i64, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_get_type_traits": (ctypes.POINTER(_Traits), [ctypes.c_int]),
        "ggml_row_size": (size, [ctypes.c_int, i64]),
        "ggml_quantize_requires_imatrix": (ctypes.c_bool, [ctypes.c_int]),
        "ggml_quantize_init": (None, [ctypes.c_int]),
        "ggml_quantize_chunk": (size, [ctypes.c_int, pointer, pointer, i64, i64, i64, pointer]),
    }
    for function, (result, arguments) in signatures.items():
        getattr(library, function).restype = result
        getattr(library, function).argtypes = arguments
    return library


def type_name(number: int) -> str:
    """Name of a ``ggml_type`` in small letters."""
    return ggml().ggml_type_name(number).decode().lower()


def can_change(number: int) -> bool:
    """Whether rows of a type can be read as float32, and written again."""
    readable = number == _F32 or bool(_library().ggml_get_type_traits(number).contents.to_float)
    return readable and type_name(number) in TENSOR_TYPES


def is_quantized(number: int) -> bool:
    """Whether a type is quantized, and not one of floats."""
    return _library().ggml_get_type_traits(number).contents.is_quantized


def needs_imatrix(number: int) -> bool:
    """Whether a type can only be made with an importance matrix."""
    return _library().ggml_quantize_requires_imatrix(number)


def row_size(number: int, width: int) -> int:
    """Bytes of a row of so many elements."""
    return _library().ggml_row_size(number, width)


def dequantized(number: int, data: bytes, width: int) -> npt.NDArray[np.float32]:
    """Whole rows as float32 [rows, width].

    Args:
        number: of a ``ggml_type`` that `can_change`.
        data: the rows.
        width: elements of a row.
    """
    if number == _F32:
        return np.frombuffer(data, "<f4").reshape(-1, width).copy()
    rows = np.empty((len(data) // row_size(number, width), width), np.float32)
    convert = _Convert(_library().ggml_get_type_traits(number).contents.to_float)
    convert(data, rows.ctypes.data, rows.size)
    return rows


def quantized(number: int, rows: npt.NDArray[np.float32]) -> bytes:
    """Rows [n, width] of finite values in a type that `can_change` and needs no importance matrix."""
    library, width = _library(), rows.shape[1]
    library.ggml_quantize_init(number)
    size = row_size(number, width)
    result = ctypes.create_string_buffer(len(rows) * size)

    def quantize(part: range) -> None:
        source = rows.ctypes.data + part.start * rows.strides[0]
        target = ctypes.addressof(result) + part.start * size
        library.ggml_quantize_chunk(number, source, target, 0, len(part), width, None)

    parts = list(_parts(len(rows), os.cpu_count() or 1))
    with ThreadPoolExecutor(len(parts)) as pool:  # ctypes lets go of the interpreter's lock
        list(pool.map(quantize, parts))
    return result.raw


def _parts(count: int, parts: int) -> Iterator[range]:
    step = max(1, -(-count // parts))
    for start in range(0, count, step):
        yield range(start, min(start + step, count))
