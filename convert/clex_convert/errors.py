"""Errors of the converter, and the wording of those that other packages and the system raise."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from clex_local.errors import ClexError, one_line

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class ConvertError(ClexError):
    """A conversion that cannot be done; nothing was written."""


class NotFiniteError(ConvertError):
    """Weights, or what is computed with them, that are NaN or infinite."""


def rename(error: BaseException | None, path: str | os.PathLike[str], name: str | os.PathLike[str]) -> None:
    """Lets an error speak of a file by another name; what a temporary file will be is what a user knows."""
    if isinstance(error, ClexError):
        error.args = tuple(str(text).replace(str(path), str(name)) for text in error.args)


@contextmanager
def called(path: str | os.PathLike[str], name: str | os.PathLike[str]) -> Iterator[None]:
    """Lets the errors that pass through speak of a file by another name."""
    try:
        yield
    except ClexError as error:
        rename(error, path, name)
        raise


def disk_full(path: str | os.PathLike[str]) -> ConvertError:
    """The error for a file that the disk has no room for."""
    return ConvertError(f"{path}: could not be written: the disk is full or a size limit was reached; make room first")


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Words the operating system's refusal to write `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise disk_full(path) from None
        raise ConvertError(f"{path}: could not be written ({error.strerror or one_line(error)})") from None


@contextmanager
def extra_packages() -> Iterator[None]:
    """Words the absence of a package that only conversions need."""
    try:
        yield
    except ImportError as error:
        missing = (error.name or one_line(error)).partition(".")[0]
        raise ConvertError(
            f"this conversion needs the Python package {missing}: pip install 'clex-local[convert]'"
        ) from None
