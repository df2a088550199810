"""Headers of GGUF files to be written."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from clex_local.library.log import logged
from clex_local.model_file.gguf_api import NUMBERS, TYPE_OF, HeaderKeys, InitParams, MemoryParams, ggml
from clex_local.model_file.gguf_file import GGUFError, GGUFFile


class GGUFHeader(HeaderKeys):
    """The header of a GGUF file to be written: it begins with the keys of another file, or none, without tensors."""

    def __init__(self, source: GGUFFile | None = None) -> None:
        """Takes the keys.

        Raises:
            GGUFError: the file changed since it was opened, or cannot be read any more.
        """
        if source is None:
            self._context = ggml().gguf_init_empty()
            return
        try:
            with source.path.open("rb") as file:
                data = bytearray(file.read(source.data_offset))
        except OSError as error:
            raise GGUFError(f"{source.path}: cannot be read ({error.strerror})") from None
        data[8:16] = bytes(8)  # the number of tensors: the reader stops after the keys
        with logged():
            self._context = ggml().gguf_init_from_buffer(bytes(data), len(data), InitParams(True, None))
        if self._context is None:
            raise GGUFError(f"{source.path}: changed while it was read; try again")

    def set(self, key: str, value: str | np.generic | np.ndarray[Any, Any]) -> None:
        """Sets a key in memory; the numpy type of the value decides the GGUF type.

        Raises:
            TypeError: a value that GGUF has no type for, or a Python number, whose type would be a guess.
        """
        library, name = ggml(), key.encode()
        if isinstance(value, str):
            library.gguf_set_val_str(self._context, name, value.encode())
        elif isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.type in TYPE_OF:
            data = np.ascontiguousarray(value)
            code = TYPE_OF[value.dtype.type]
            library.gguf_set_arr_data(self._context, name, code, data.ctypes.data, data.size)
        elif isinstance(value, np.generic) and type(value) in TYPE_OF:
            kind = NUMBERS[TYPE_OF[type(value)]][0]
            getattr(library, f"gguf_set_val_{kind}")(self._context, name, value.item())
        else:
            raise TypeError(f"{key}: no GGUF type for {type(value).__name__}")

    def remove(self, key: str) -> None:
        """Removes a key in memory, if it is there."""
        ggml().gguf_remove_key(self._context, key.encode())

    def add_tensor(self, name: str, shape: tuple[int, ...], type: int) -> int:
        """Adds a tensor after the last one.

        Args:
            name: its name, which no other tensor has.
            shape: elements per dimension, the contiguous one first.
            type: number of its ``ggml_type``.

        Returns:
            Its first byte, counted from the start of the data section.
        """
        library = ggml()
        memory = library.ggml_init(MemoryParams(library.ggml_tensor_overhead(), None, True))
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
        library, last = ggml(), ggml().gguf_get_n_tensors(self._context) - 1
        end = library.gguf_get_tensor_offset(self._context, last) + library.gguf_get_tensor_size(self._context, last)
        return (end + self.alignment - 1) // self.alignment * self.alignment

    def encoded(self) -> bytes:
        """The header as it is in memory, padded: the tensor data follows it directly in a file."""
        library = ggml()
        buffer = ctypes.create_string_buffer(library.gguf_get_meta_size(self._context))
        library.gguf_get_meta_data(self._context, buffer)
        return buffer.raw
