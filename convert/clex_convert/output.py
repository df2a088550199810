"""The output file: written beside its place under another name, and put there only when it is complete."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from clex_convert.errors import ConvertError, rename, writing
from clex_local.sizes import readable_size


class Output:
    """One output file and its temporary files, in a ``with``: whatever happens, only a complete file stays.

    Errors that pass through the ``with`` and speak of a temporary file speak of the output afterwards.

    Temporary files are hidden files beside the target, named after it, and locked while their process lives. Those
    that a killed process left behind are removed by the next run for the same target.
    """

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        """Checks the target before any work is done.

        Raises:
            ConvertError: it exists and `overwrite` is not set, is not a regular file, or its folder is missing.
        """
        self.path = path
        self.overwrite = overwrite
        self._temporary: dict[Path, int | None] = {}  # and the descriptor that holds the lock
        self._names: list[Path] = []  # of all that there were
        self._check()
        if not path.parent.is_dir():
            raise ConvertError(f"{path}: the folder {path.parent} does not exist; create it first")

    def _check(self) -> None:
        if os.path.lexists(self.path):
            if self.path.is_dir():
                raise ConvertError(f"{self.path}: is a folder; give the name of a file in it")
            if not self.path.is_file() and not self.path.is_symlink():
                raise ConvertError(f"{self.path}: is not a regular file, choose another name for the output")
            if not self.overwrite:
                raise ConvertError(f"{self.path}: already exists; pass `overwrite=True` to replace it")

    def __enter__(self) -> Output:
        self._remove_stale()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for path in self._names:
            rename(error, path, self.path)
        for path in list(self._temporary):
            self.discard(path)

    def _prefix(self) -> str:
        return f".{self.path.name[:180]}."

    def _remove_stale(self) -> None:
        pattern = re.compile(re.escape(self._prefix()) + r"[0-9a-f]{16}\.tmp")
        for entry in os.listdir(self.path.parent):
            if pattern.fullmatch(entry):
                with contextlib.suppress(OSError):
                    _remove_unlocked(self.path.parent / entry)

    def temporary(self) -> Path:
        """Creates an empty file beside the target, which goes away with this object.

        Raises:
            ConvertError: the folder cannot be written.
        """
        while True:
            path = self.path.parent / f"{self._prefix()}{secrets.token_hex(8)}.tmp"
            self._names.append(path)
            with writing(self.path):
                self._temporary[path] = None
                descriptor = self._temporary[path] = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
                with contextlib.suppress(OSError):  # file systems without locks have nobody who takes it for stale
                    _lock(descriptor, wait=True)
                # Another run may have come between the last two steps and removed it.
                if os.fstat(descriptor).st_nlink:
                    return path
            self.discard(path)

    def check_room(self, needed: int) -> None:
        """Checks that the disk has room, where it tells how much it has.

        Args:
            needed: bytes that are still to be written beside the target.

        Raises:
            ConvertError: it has less.
        """
        try:
            free = shutil.disk_usage(self.path.parent).free
        except OSError:
            return
        if needed > free:
            raise ConvertError(
                f"{self.path}: needs {readable_size(needed)} of disk while it is made, {self.path.parent} has "
                f"{readable_size(free)} free; make room first"
            )

    def discard(self, path: Path) -> None:
        """Removes a temporary file that is needed no more."""
        if sys.platform == "win32":
            self._close(path)
        with contextlib.suppress(OSError):
            path.unlink()
        self._close(path)
        self._temporary.pop(path, None)

    def _close(self, path: Path) -> None:
        descriptor = self._temporary.get(path)
        if descriptor is not None:
            self._temporary[path] = None
            os.close(descriptor)

    def commit(self, path: Path) -> str:
        """Puts a complete temporary file in the target's place, on the disk and all at once.

        Returns:
            Its SHA-256 in hexadecimal digits.

        Raises:
            ConvertError: the target appeared meanwhile, or the disk refuses.
        """
        with writing(self.path):
            # Reading it back takes about as long as the disk takes to write it.
            with path.open("rb+") as file, ThreadPoolExecutor(1) as pool:
                synced = pool.submit(os.fsync, file.fileno())
                digest = _sha256(path)
                synced.result()
            self._check()
            if sys.platform == "win32":  # where a file that is open keeps its name
                self._close(path)
            if self.overwrite:
                os.replace(path, self.path)
            else:
                self._rename_new(path)
            _sync_folder(self.path.parent)
        return digest

    def _rename_new(self, path: Path) -> None:
        # A hard link fails where the name exists, at once; file systems without them get the plain rename.
        try:
            os.link(path, self.path)
        except FileExistsError:
            self._check()
        except OSError:
            os.replace(path, self.path)


def _remove_unlocked(path: Path) -> None:
    if sys.platform == "win32":
        path.unlink()  # refused while its process lives, which has it open
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _lock(descriptor, wait=False)
        path.unlink()
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> None:
    """Locks a file; an OSError where another process has the lock and this one does not wait."""
    if sys.platform != "win32":  # where nobody removes a file that is open
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sha256(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(4 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    # So that the new name survives a power cut; not every system lets a folder be opened.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
