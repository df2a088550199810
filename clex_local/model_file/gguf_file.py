"""GGUF files to read: their keys, and where each tensor lies. Tensor data is loaded only where it is asked for."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clex_local.errors import ModelError, escaped
from clex_local.library.log import ERROR, WARN, logged
from clex_local.model_file.gguf_api import HeaderKeys, InitParams, ggml

_MAX_HEADER = 128 << 20  # bytes; the library reads 64 MiB of keys, the rest can only be alignment


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
        return ggml().ggml_type_name(self.type).decode()


class GGUFFile(HeaderKeys):
    """The header of one GGUF file, to read."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads the header.

        Raises:
            GGUFError: the file is missing or unreadable, is not GGUF, breaks a rule of ggml's reader, or ends
                before its last tensor does.
        """
        self.path = Path(path)
        try:
            mode = os.stat(self.path).st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):  # whose end may never come
                raise GGUFError(f"{self.path}: not a file but a pipe or a device")
            with self.path.open("rb") as file:
                magic = file.read(4)
                file_size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise GGUFError(f"{self.path}: cannot be read ({error.strerror})") from None
        except ValueError as error:  # a NUL in a path
            if isinstance(error, GGUFError):
                raise
            raise GGUFError(f"{self.path}: cannot be read ({error})") from None
        if magic != b"GGUF":
            raise GGUFError(f"{self.path}: not a GGUF file (it does not start with the letters GGUF)")
        with logged(WARN, ERROR) as log:
            self._context = ggml().gguf_init_from_file(os.fsencode(self.path), InitParams(True, None))
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
        library, context = ggml(), self._context
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
        return ggml().gguf_get_data_offset(self._context)

    @property
    def data_size(self) -> int:
        """Bytes of the data section, with the padding after the last tensor."""
        if not self.tensors:
            return 0
        last, alignment = self.tensors[-1], self.alignment
        return (last.offset + last.size + alignment - 1) // alignment * alignment
