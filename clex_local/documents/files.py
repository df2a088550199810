"""The bytes of a file and of standard input, of each no more than is refused for its size."""

from __future__ import annotations

import os
import stat
import sys

from clex_local.documents.document import LARGEST, DocumentError

STANDARD_INPUT = "-"  # in place of a path
STDIN_NAME = "standard input"


def read_file(path: str | os.PathLike[str]) -> tuple[bytes, bool]:
    """A file's bytes, and whether it is one and not a pipe or a device.

    Raises:
        DocumentError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read(LARGEST + 1), stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except OSError as error:
        raise DocumentError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in a path
        raise DocumentError(f"{path}: {error}") from error


def read_standard_input() -> bytes:
    """What comes by standard input, to its end.

    Raises:
        DocumentError: it is closed, or cannot be read.
    """
    if sys.stdin is None:
        raise DocumentError(f"{STDIN_NAME}: closed")
    try:
        return sys.stdin.buffer.read(LARGEST + 1)
    except OSError as error:
        raise DocumentError(f"{STDIN_NAME}: {error.strerror or error}") from error
