"""A GGUF file to be written: keys, and tensors whose data are copied from other files or lie in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from clex_convert.errors import ConvertError, one_line, writing
from clex_local.gguf_file import GGUFFile, GGUFHeader

_CHUNK = 8 << 20
_F32 = 0  # ggml_type


@dataclass(frozen=True)
class TensorData:
    """One tensor and where its data lie.

    Attributes:
        name: its name.
        shape: elements per dimension, the contiguous one first.
        type: number of its ``ggml_type``.
        source: the file that holds the data, or the data.
        offset: first byte in that file.
        size: bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    source: Path | bytes
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

    def write(
        self, target: Path, shown: Path, *, progress: Callable[[float], None], planned: Callable[[], bool]
    ) -> None:
        """Writes the file; tensor data are copied bit for bit, a few megabytes at a time.

        Args:
            target: file to write.
            shown: the file that messages speak of.
            progress: called with the part of the data written, 0 to 1.
            planned: called when the header is written and the data are a hole; whether to fill it.

        Raises:
            ConvertError: a source became shorter or cannot be read, or the disk cannot hold the file.
        """
        offsets = [self.header.add_tensor(t.name, t.shape, t.type) for t in self.tensors.values()]
        total, done, alignment = max(sum(t.size for t in self.tensors.values()), 1), 0, self.header.alignment
        with writing(shown), ExitStack() as stack:  # what closing the file still writes, too
            sources: dict[Path, BinaryIO] = {}
            out = stack.enter_context(target.open("wb"))
            start = out.write(self.header.encoded())
            out.flush()
            out.truncate(start + self.header.data_size)
            if not planned():
                return
            for tensor, offset in zip(self.tensors.values(), offsets, strict=True):
                assert out.tell() == start + offset
                if isinstance(tensor.source, Path) and tensor.source not in sources:
                    with _reading(tensor.source):
                        sources[tensor.source] = stack.enter_context(tensor.source.open("rb"))
                for chunk in _chunks(tensor, sources):
                    out.write(chunk)
                    done += len(chunk)
                    progress(done / total)
                # After the last tensor too: readers differ in whether they want it.
                out.write(bytes(-tensor.size % alignment))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from None


def _chunks(tensor: TensorData, sources: dict[Path, BinaryIO]) -> Iterator[bytes]:
    if isinstance(tensor.source, bytes):
        yield tensor.source
        return
    file, left = sources[tensor.source], tensor.size
    file.seek(tensor.offset)
    while left:
        with _reading(tensor.source):
            chunk = file.read(min(_CHUNK, left))
        if not chunk:
            raise ConvertError(f"{tensor.source}: became shorter while it was copied; try again")
        yield chunk
        left -= len(chunk)
