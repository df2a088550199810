"""A GGUF file that is known to the byte before any tensor is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from clex_convert.errors import writing


@dataclass(frozen=True)
class Layout:
    """The header of a file, how large the file is, and what writes the rest.

    Attributes:
        header: its first bytes, up to the first tensor.
        size: bytes of the whole file.
        write_tensors: writes all that follows the header, and calls its second argument with the bytes of each part.
        doing: what that is called where progress is shown.
        new_vocabulary: whether the vocabulary was made of a tokenizer's files, and not copied from a GGUF file.
        notes: what the user should know, a sentence each.
    """

    header: bytes
    size: int
    write_tensors: Callable[[BinaryIO, Callable[[int], None]], None]
    doing: str
    new_vocabulary: bool = False
    notes: tuple[str, ...] = ()

    def write_header(self, path: Path) -> None:
        """Writes the header to a file that is as long as it will be; llama.cpp reads all but tensors from it.

        Raises:
            ConvertError: the disk cannot hold it.
        """
        with writing(path), path.open("wb") as file:
            file.write(self.header)
            file.flush()
            file.truncate(self.size)

    def write(self, path: Path, progress: Callable[[float], None]) -> None:
        """Writes the tensors behind the header that `write_header` has written.

        Args:
            path: that file.
            progress: called with the part of the tensors written, 0 to 1.

        Raises:
            ConvertError: a tensor cannot be read or made, or the disk cannot hold it.
        """
        total, done = max(self.size - len(self.header), 1), 0

        def written(count: int) -> None:
            nonlocal done
            done += count
            progress(done / total)

        with writing(path), path.open("rb+") as file:  # what closing the file still writes, too
            file.seek(len(self.header))
            self.write_tensors(file, written)
