"""ggml's own C API of GGUF headers, so that Python accepts exactly the files that the runtime accepts.

Source: the functions of llama.cpp's ``ggml/include/gguf.h``.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from clex_local.library.loading import load_ggml

if TYPE_CHECKING:
    from typing_extensions import Self

# enum gguf_type: its names here, and what each is in C and in numpy. Arrays have their element's name plus "[]".
NUMBERS: dict[int, tuple[str, Any, type[np.generic]]] = {
    0: ("u8", ctypes.c_uint8, np.uint8),
    1: ("i8", ctypes.c_int8, np.int8),
    2: ("u16", ctypes.c_uint16, np.uint16),
    3: ("i16", ctypes.c_int16, np.int16),
    4: ("u32", ctypes.c_uint32, np.uint32),
    5: ("i32", ctypes.c_int32, np.int32),
    6: ("f32", ctypes.c_float, np.float32),
    7: ("bool", ctypes.c_bool, np.bool_),
    10: ("u64", ctypes.c_uint64, np.uint64),
    11: ("i64", ctypes.c_int64, np.int64),
    12: ("f64", ctypes.c_double, np.float64),
}
_STRING, _ARRAY = 8, 9
TYPE_OF = {dtype: code for code, (_, _, dtype) in NUMBERS.items()}


class InitParams(ctypes.Structure):
    """``gguf_init_params``."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


class MemoryParams(ctypes.Structure):
    """``ggml_init_params``."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


@functools.cache
def ggml() -> ctypes.CDLL:
    """The ggml-base library, with the signatures that are used here."""
    library = load_ggml()
    pointer, i64, size, string = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t, ctypes.c_char_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "gguf_init_from_file": (pointer, [string, InitParams]),
        "gguf_init_from_buffer": (pointer, [string, size, InitParams]),
        "gguf_init_empty": (pointer, []),
        "gguf_free": (None, [pointer]),
        "gguf_get_alignment": (size, [pointer]),
        "gguf_get_data_offset": (size, [pointer]),
        "gguf_get_n_kv": (i64, [pointer]),
        "gguf_find_key": (i64, [pointer, string]),
        "gguf_get_key": (string, [pointer, i64]),
        "gguf_get_kv_type": (ctypes.c_int, [pointer, i64]),
        "gguf_get_arr_type": (ctypes.c_int, [pointer, i64]),
        "gguf_get_arr_n": (size, [pointer, i64]),
        "gguf_get_arr_data": (pointer, [pointer, i64]),
        "gguf_get_arr_str": (string, [pointer, i64, size]),
        "gguf_get_val_str": (string, [pointer, i64]),
        "gguf_get_n_tensors": (i64, [pointer]),
        "gguf_get_tensor_name": (string, [pointer, i64]),
        "gguf_get_tensor_ne": (ctypes.POINTER(i64 * 4), [pointer, i64]),
        "gguf_get_tensor_type": (ctypes.c_int, [pointer, i64]),
        "gguf_get_tensor_offset": (size, [pointer, i64]),
        "gguf_get_tensor_size": (size, [pointer, i64]),
        "ggml_type_name": (string, [ctypes.c_int]),
        "gguf_remove_key": (i64, [pointer, string]),
        "gguf_set_val_str": (None, [pointer, string, string]),
        "gguf_set_arr_data": (None, [pointer, string, ctypes.c_int, pointer, size]),
        "gguf_add_tensor": (None, [pointer, pointer]),
        "gguf_get_meta_size": (size, [pointer]),
        "gguf_get_meta_data": (None, [pointer, pointer]),
        "ggml_init": (pointer, [MemoryParams]),
        "ggml_free": (None, [pointer]),
        "ggml_tensor_overhead": (size, []),
        "ggml_new_tensor": (pointer, [pointer, ctypes.c_int, ctypes.c_int, ctypes.POINTER(i64)]),
        "ggml_set_name": (pointer, [pointer, string]),
    }
    for kind, ctype, _ in NUMBERS.values():
        signatures[f"gguf_get_val_{kind}"] = (ctype, [pointer, i64])
        signatures[f"gguf_set_val_{kind}"] = (None, [pointer, string, ctype])
    for function, (result, arguments) in signatures.items():
        getattr(library, function).restype = result
        getattr(library, function).argtypes = arguments
    return library


@functools.cache
def tensor_types() -> dict[str, int]:
    """Number of every ``ggml_type`` by its name in small letters."""
    from llama_cpp import GGML_TYPE_COUNT

    names = (ggml().ggml_type_name(code) for code in range(GGML_TYPE_COUNT))
    return {name.decode().lower(): code for code, name in enumerate(names) if name}


class HeaderKeys:
    """Keys of a GGUF header in memory; close it or use it in ``with``."""

    _context: int | None = None

    def close(self) -> None:
        """Frees the header; the object is of no use afterwards."""
        if self._context is not None:
            ggml().gguf_free(self._context)
            self._context = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._context is not None and sys is not None:  # the library is missing when Python shuts down
            self.close()

    @property
    def alignment(self) -> int:
        """Bytes that the data section, and each tensor in it, is aligned to."""
        return ggml().gguf_get_alignment(self._context)

    def keys(self) -> list[str]:
        """Every key, in the file's order."""
        library = ggml()
        count = library.gguf_get_n_kv(self._context)
        return [library.gguf_get_key(self._context, i).decode("utf-8", "replace") for i in range(count)]

    def _find(self, key: str) -> int:
        return ggml().gguf_find_key(self._context, key.encode())

    def __contains__(self, key: str) -> bool:
        return self._find(key) >= 0

    def kind(self, key: str) -> str | None:
        """Type of a key: ``u32``, ``f32``, ``bool``, ``string`` ..., ``f32[]`` for arrays; None if it is absent."""
        index = self._find(key)
        if index < 0:
            return None
        code = ggml().gguf_get_kv_type(self._context, index)
        suffix = ""
        if code == _ARRAY:
            code, suffix = ggml().gguf_get_arr_type(self._context, index), "[]"
        return ("string" if code == _STRING else NUMBERS[code][0]) + suffix

    def get(self, key: str, default: Any = None) -> Any:
        """Value of a key: a Python number, bool or str, a list of str, or a 1-D numpy array (a copy)."""
        index = self._find(key)
        if index < 0:
            return default
        library, context = ggml(), self._context
        code = library.gguf_get_kv_type(context, index)
        if code == _STRING:
            return library.gguf_get_val_str(context, index).decode("utf-8", "replace")
        if code != _ARRAY:
            return getattr(library, f"gguf_get_val_{NUMBERS[code][0]}")(context, index)
        code, count = library.gguf_get_arr_type(context, index), library.gguf_get_arr_n(context, index)
        if code == _STRING:
            strings = (library.gguf_get_arr_str(context, index, i) for i in range(count))
            return [string.decode("utf-8", "replace") for string in strings]
        dtype = NUMBERS[code][2]
        if count == 0:
            return np.empty(0, dtype)
        data = ctypes.string_at(library.gguf_get_arr_data(context, index), count * np.dtype(dtype).itemsize)
        return np.frombuffer(data, dtype).copy()

    def array_size(self, key: str) -> int:
        """Elements of an array, without reading it; 0 if the key is absent or no array."""
        index = self._find(key)
        if index < 0 or ggml().gguf_get_kv_type(self._context, index) != _ARRAY:
            return 0
        return ggml().gguf_get_arr_n(self._context, index)
