"""A file that one process at a time holds, and that is free as soon as that process ends, however it ends."""

from __future__ import annotations

import errno
import itertools
import os
import sys
from contextlib import suppress
from pathlib import Path

_ATTEMPTS = 100  # file systems that number a file anew each time have it then


class InUse(Exception):
    """Another process holds the lock. ``process`` is its number, where it is known."""

    def __init__(self, process: str) -> None:
        super().__init__(process)
        self.process = process


class FileLock:
    """Holds a lock until it is closed, which removes the file.

    On a file system without locks nothing is held, and nothing is refused.

    Raises:
        InUse: somebody else has it.
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = _opened(path)
        if sys.platform != "win32":  # where nobody can read what is locked
            with suppress(OSError):
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Give it back, and remove the file."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        if sys.platform != "win32":  # while it is held: nobody else's is removed
            with suppress(OSError):
                os.unlink(self._path)
        os.close(descriptor)
        if sys.platform == "win32":  # which removes nothing that somebody has open
            with suppress(OSError):
                os.unlink(self._path)


def _opened(path: Path) -> int:
    """A descriptor of the file that has this name, locked."""
    for attempt in itertools.count():
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            if not _taken(descriptor):
                raise InUse(_number(descriptor))
            if _is_named(descriptor, path) or attempt == _ATTEMPTS:
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # who held it has removed it before we had it
    raise AssertionError("not reached")


def _is_named(descriptor: int, path: Path) -> bool:
    if sys.platform == "win32":
        return True
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _taken(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
    return True


def _number(descriptor: int) -> str:
    if sys.platform == "win32":
        return ""
    with suppress(OSError):
        text = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
        return text if text.isdigit() else ""
    return ""
