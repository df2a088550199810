"""A GGUF file to be written: keys, and tensors whose data are copied from other files or lie in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from clex_convert.errors import ConvertError
from clex_convert.layout import Layout
from clex_local.errors import one_line
from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.gguf_header import GGUFHeader

_CHUNK = 8 << 20
_F32 = 0  # ggml_type


@dataclass(frozen=True)
class TensorData:
    """One tensor and where its data lie.

    Attributes:
        name: its name.
        shape: elements per dimension, the contiguous one first.
        type: number of its ``ggml_type``.
        source: the file that holds the data, or the data, or what makes them, a part after the other.
        offset: first byte in that file.
        size: bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    source: Path | bytes | Callable[[], Iterator[bytes]]
    offset: int
    size: int

    @classmethod
    def of(cls, name: str, values: npt.NDArray[np.float32]) -> TensorData:
        """A one-dimensional float32 tensor in memory."""
        data = np.ascontiguousarray(values, "<f4").tobytes()
        return cls(name, (values.size,), _F32, data, 0, len(data))


def tensors_of(file: GGUFFile) -> list[TensorData]:
    """The tensors of a file, in its order."""
    start = file.data_offset
    return [TensorData(t.name, t.shape, t.type, file.path, start + t.offset, t.size) for t in file.tensors]


class GGUFWriter:
    """Keys and tensors of a file to be written; close it or use it in ``with``.

    Attributes:
        header: the keys; they begin as those of another file.
        tensors: by name, in the order that the file will have them; none at first.
    """

    def __init__(self, keys: GGUFFile) -> None:
        """Takes the keys of a file; its tensors are not taken."""
        self.header = GGUFHeader(keys)
        self.tensors: dict[str, TensorData] = {}

    def __enter__(self) -> GGUFWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.header.close()

    def set(self, keys: dict[str, Any]) -> None:
        """Sets keys; a key that has the value already keeps its place."""
        for key, value in keys.items():
            if not np.array_equal(self.header.get(key), value):
                self.header.set(key, value)

    def add(self, tensor: TensorData) -> None:
        """Adds a tensor, or puts it in the place of the one that has its name."""
        self.tensors[tensor.name] = tensor

    def layout(self) -> Layout:
        """The file; tensor data in other files will be copied bit for bit, a few megabytes at a time.

        `Layout.write` raises ConvertError where a source became shorter or cannot be read.
        """
        tensors, alignment = list(self.tensors.values()), self.header.alignment
        for tensor in tensors:
            self.header.add_tensor(tensor.name, tensor.shape, tensor.type)
        header = self.header.encoded()

        def write_tensors(file: BinaryIO, written: Callable[[int], None]) -> None:
            with ExitStack() as stack:
                sources: dict[Path, BinaryIO] = {}
                for tensor in tensors:
                    if isinstance(tensor.source, Path) and tensor.source not in sources:
                        with reading(tensor.source):
                            sources[tensor.source] = stack.enter_context(tensor.source.open("rb"))
                    for chunk in _chunks(tensor, sources):
                        written(file.write(chunk))
                    # After the last tensor too: readers differ in whether they want it.
                    written(file.write(bytes(-tensor.size % alignment)))

        return Layout(header, len(header) + self.header.data_size, write_tensors, "copying")


def became_shorter(path: Path) -> ConvertError:
    """The error for a file that ends before what its header promises."""
    return ConvertError(f"{path}: became shorter while it was copied; try again")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Words the system's refusal to read a file."""
    try:
        yield
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from None


def _chunks(tensor: TensorData, sources: dict[Path, BinaryIO]) -> Iterator[bytes]:
    if isinstance(tensor.source, bytes):
        yield tensor.source
        return
    if not isinstance(tensor.source, Path):
        yield from tensor.source()
        return
    file, left = sources[tensor.source], tensor.size
    file.seek(tensor.offset)
    while left:
        with reading(tensor.source):
            chunk = file.read(min(_CHUNK, left))
        if not chunk:
            raise became_shorter(tensor.source)
        yield chunk
        left -= len(chunk)
