"""GGUF headers through ggml's own C API, so that Python accepts exactly the files that the runtime accepts.

Only headers are read and made: keys, and where each tensor lies. Tensor data is loaded only where it is asked for.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clex_local.errors import ModelError, escaped
from clex_local.library.loading import load_ggml
from clex_local.library.log import ERROR, WARN, logged

if TYPE_CHECKING:
    from typing_extensions import Self

# enum gguf_type: its names here, and what each is in C and in numpy. Arrays have their element's name plus "[]".
_NUMBERS: dict[int, tuple[str, Any, type[np.generic]]] = {
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
_MAX_HEADER = 128 << 20  # bytes; the library reads 64 MiB of keys, the rest can only be alignment
_TYPE_OF = {dtype: code for code, (_, _, dtype) in _NUMBERS.items()}


class GGUFError(ModelError):
    """A file that is missing, is no GGUF, or is damaged."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF file.

    Attributes:
        name: its name, such as ``blk.0.attn_q.weight``.
        shape: elements per dimension, the contiguous one first; at least one dimension.
        type: number of its ``ggml_type``.
        offset: first byte, counted from the start of the file's data section.
        size: bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    size: int

    @property
    def type_name(self) -> str:
        """Name of its type as llama.cpp writes it: ``f32``, ``q4_K`` ..."""
        return _ggml().ggml_type_name(self.type).decode()


class _InitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


class _MemoryParams(ctypes.Structure):
    """``ggml_init_params``."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


@functools.cache
def _ggml() -> ctypes.CDLL:
    """The ggml-base library, with the signatures that are used here."""
    library = load_ggml()
    pointer, i64, size, string = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t, ctypes.c_char_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "gguf_init_from_file": (pointer, [string, _InitParams]),
        "gguf_init_from_buffer": (pointer, [string, size, _InitParams]),
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
        "ggml_init": (pointer, [_MemoryParams]),
        "ggml_free": (None, [pointer]),
        "ggml_tensor_overhead": (size, []),
        "ggml_new_tensor": (pointer, [pointer, ctypes.c_int, ctypes.c_int, ctypes.POINTER(i64)]),
        "ggml_set_name": (pointer, [pointer, string]),
    }
    for code, (kind, ctype, _) in _NUMBERS.items():
        del code
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

    names = (_ggml().ggml_type_name(code) for code in range(GGML_TYPE_COUNT))
    return {name.decode().lower(): code for code, name in enumerate(names) if name}


class _Header:
    """Keys of a GGUF header in memory; close it or use it in ``with``.

    Source: the functions of llama.cpp's ``ggml/include/gguf.h``.
    """

    _context: int | None = None

    def close(self) -> None:
        """Frees the header; the object is of no use afterwards."""
        if self._context is not None:
            _ggml().gguf_free(self._context)
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
        return _ggml().gguf_get_alignment(self._context)

    def keys(self) -> list[str]:
        """Every key, in the file's order."""
        library = _ggml()
        count = library.gguf_get_n_kv(self._context)
        return [library.gguf_get_key(self._context, i).decode("utf-8", "replace") for i in range(count)]

    def _find(self, key: str) -> int:
        return _ggml().gguf_find_key(self._context, key.encode())

    def __contains__(self, key: str) -> bool:
        return self._find(key) >= 0

    def kind(self, key: str) -> str | None:
        """Type of a key: ``u32``, ``f32``, ``bool``, ``string`` ..., ``f32[]`` for arrays; None if it is absent."""
        index = self._find(key)
        if index < 0:
            return None
        code = _ggml().gguf_get_kv_type(self._context, index)
        suffix = ""
        if code == _ARRAY:
            code, suffix = _ggml().gguf_get_arr_type(self._context, index), "[]"
        return ("string" if code == _STRING else _NUMBERS[code][0]) + suffix

    def get(self, key: str, default: Any = None) -> Any:
        """Value of a key: a Python number, bool or str, a list of str, or a 1-D numpy array (a copy)."""
        index = self._find(key)
        if index < 0:
            return default
        library, context = _ggml(), self._context
        code = library.gguf_get_kv_type(context, index)
        if code == _STRING:
            return library.gguf_get_val_str(context, index).decode("utf-8", "replace")
        if code != _ARRAY:
            return getattr(library, f"gguf_get_val_{_NUMBERS[code][0]}")(context, index)
        code, count = library.gguf_get_arr_type(context, index), library.gguf_get_arr_n(context, index)
        if code == _STRING:
            strings = (library.gguf_get_arr_str(context, index, i) for i in range(count))
            return [string.decode("utf-8", "replace") for string in strings]
        dtype = _NUMBERS[code][2]
        if count == 0:
            return np.empty(0, dtype)
        data = ctypes.string_at(library.gguf_get_arr_data(context, index), count * np.dtype(dtype).itemsize)
        return np.frombuffer(data, dtype).copy()

    def array_size(self, key: str) -> int:
        """Elements of an array, without reading it; 0 if the key is absent or no array."""
        index = self._find(key)
        if index < 0 or _ggml().gguf_get_kv_type(self._context, index) != _ARRAY:
            return 0
        return _ggml().gguf_get_arr_n(self._context, index)


class GGUFFile(_Header):
    """The header of one GGUF file, to read."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads the header.

        Raises:
            GGUFError: the file is missing or unreadable, is not GGUF, breaks a rule of ggml's reader, or ends
                before its last tensor does.
        """
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                magic = file.read(4)
                file_size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise GGUFError(f"{self.path}: cannot be read ({error.strerror})") from None
        if magic != b"GGUF":
            raise GGUFError(f"{self.path}: not a GGUF file (it does not start with the letters GGUF)")
        with logged(WARN, ERROR) as log:
            self._context = _ggml().gguf_init_from_file(os.fsencode(self.path), _InitParams(True, None))
        if self._context is None:
            if any("not enough memory" in line for line in log):
                raise GGUFError(f"{self.path}: cannot be read (not enough memory for its header)")
            first = next(iter(log), "no reason given")
            reason = first.split(": ", 1)[-1].strip()
            raise GGUFError(f"{self.path}: damaged GGUF file ({escaped(reason)}); download or convert it again")
        if self.data_offset > _MAX_HEADER:
            offset = self.data_offset
            self.close()
            raise GGUFError(f"{self.path}: damaged GGUF file (its data begin at byte {offset}); convert it again")
        self.tensors = self._read_tensors()
        needed = self.data_offset + max((tensor.offset + tensor.size for tensor in self.tensors), default=0)
        if file_size < needed:
            self.close()
            raise GGUFError(
                f"{self.path}: truncated GGUF file (its tensors need {needed} bytes, it has {file_size}); "
                "download or convert it again"
            )

    def _read_tensors(self) -> tuple[TensorInfo, ...]:
        library, context = _ggml(), self._context
        tensors = []
        for i in range(library.gguf_get_n_tensors(context)):
            shape = list(library.gguf_get_tensor_ne(context, i).contents)
            while len(shape) > 1 and shape[-1] == 1:
                shape.pop()
            tensors.append(
                TensorInfo(
                    name=library.gguf_get_tensor_name(context, i).decode("utf-8", "replace"),
                    shape=tuple(shape),
                    type=library.gguf_get_tensor_type(context, i),
                    offset=library.gguf_get_tensor_offset(context, i),
                    size=library.gguf_get_tensor_size(context, i),
                )
            )
        return tuple(tensors)

    def floats(self, tensor: TensorInfo) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Values of a small float32 tensor, read from the file.

        Raises:
            GGUFError: the file cannot be read, or has become shorter.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.data_offset + tensor.offset)
                data = file.read(tensor.size)
        except OSError as error:
            raise GGUFError(f"{self.path}: cannot be read ({error.strerror})") from None
        if len(data) != tensor.size:
            raise GGUFError(f"{self.path}: became shorter while it was read; try again")
        return np.frombuffer(data, "<f4")

    @property
    def data_offset(self) -> int:
        """First byte of the data section in the file that was read."""
        return _ggml().gguf_get_data_offset(self._context)

    @property
    def data_size(self) -> int:
        """Bytes of the data section, with the padding after the last tensor."""
        if not self.tensors:
            return 0
        last, alignment = self.tensors[-1], self.alignment
        return (last.offset + last.size + alignment - 1) // alignment * alignment


class GGUFHeader(_Header):
    """The header of a GGUF file to be written: it begins with the keys of another file, or none, without tensors."""

    def __init__(self, source: GGUFFile | None = None) -> None:
        """Takes the keys.

        Raises:
            GGUFError: the file changed since it was opened, or cannot be read any more.
        """
        if source is None:
            self._context = _ggml().gguf_init_empty()
            return
        try:
            with source.path.open("rb") as file:
                data = bytearray(file.read(source.data_offset))
        except OSError as error:
            raise GGUFError(f"{source.path}: cannot be read ({error.strerror})") from None
        data[8:16] = bytes(8)  # the number of tensors: the reader stops after the keys
        with logged():
            self._context = _ggml().gguf_init_from_buffer(bytes(data), len(data), _InitParams(True, None))
        if self._context is None:
            raise GGUFError(f"{source.path}: changed while it was read; try again")

    def set(self, key: str, value: str | np.generic | np.ndarray[Any, Any]) -> None:
        """Sets a key in memory; the numpy type of the value decides the GGUF type.

        Raises:
            TypeError: a value that GGUF has no type for, or a Python number, whose type would be a guess.
        """
        library, name = _ggml(), key.encode()
        if isinstance(value, str):
            library.gguf_set_val_str(self._context, name, value.encode())
        elif isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.type in _TYPE_OF:
            data = np.ascontiguousarray(value)
            code = _TYPE_OF[value.dtype.type]
            library.gguf_set_arr_data(self._context, name, code, data.ctypes.data, data.size)
        elif isinstance(value, np.generic) and type(value) in _TYPE_OF:
            kind = _NUMBERS[_TYPE_OF[type(value)]][0]
            getattr(library, f"gguf_set_val_{kind}")(self._context, name, value.item())
        else:
            raise TypeError(f"{key}: no GGUF type for {type(value).__name__}")

    def remove(self, key: str) -> None:
        """Removes a key in memory, if it is there."""
        _ggml().gguf_remove_key(self._context, key.encode())

    def add_tensor(self, name: str, shape: tuple[int, ...], type: int) -> int:
        """Adds a tensor after the last one.

        Args:
            name: its name, which no other tensor has.
            shape: elements per dimension, the contiguous one first.
            type: number of its ``ggml_type``.

        Returns:
            Its first byte, counted from the start of the data section.
        """
        library = _ggml()
        memory = library.ggml_init(_MemoryParams(library.ggml_tensor_overhead(), None, True))
        try:
            dimensions = (ctypes.c_int64 * len(shape))(*shape)
            tensor = library.ggml_new_tensor(memory, type, len(shape), dimensions)
            library.ggml_set_name(tensor, name.encode())
            library.gguf_add_tensor(self._context, tensor)  # which copies it
        finally:
            library.ggml_free(memory)
        return library.gguf_get_tensor_offset(self._context, library.gguf_get_n_tensors(self._context) - 1)

    @property
    def data_size(self) -> int:
        """Bytes of the data section, with the padding after the last tensor."""
        library, last = _ggml(), _ggml().gguf_get_n_tensors(self._context) - 1
        end = library.gguf_get_tensor_offset(self._context, last) + library.gguf_get_tensor_size(self._context, last)
        return (end + self.alignment - 1) // self.alignment * self.alignment

    def encoded(self) -> bytes:
        """The header as it is in memory, padded: the tensor data follows it directly in a file."""
        library = _ggml()
        buffer = ctypes.create_string_buffer(library.gguf_get_meta_size(self._context))
        library.gguf_get_meta_data(self._context, buffer)
        return buffer.raw
