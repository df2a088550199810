"""A file that one process at a time holds, and that is free as soon as that process ends, however it ends."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path


class InUse(Exception):
    """Another process holds the lock. ``process`` is its number, where it is known."""

    def __init__(self, process: str) -> None:
        super().__init__(process)
        self.process = process


class FileLock:
    """Holds a lock until it is closed. On a file system without locks nothing is held, and nothing is refused.

    Raises:
        InUse: somebody else has it.
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            if not _taken(self._descriptor):
                raise InUse(_number(self._descriptor))
            if sys.platform != "win32":  # where nobody can read what is locked
                with suppress(OSError):
                    os.ftruncate(self._descriptor, 0)
                    os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give it back. The file stays: another process may be about to lock it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


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
