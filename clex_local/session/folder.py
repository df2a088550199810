"""The folder of saved conversations: their names, who has one open, and files that are never lost by writing another.

A conversation that is open is locked, so that a second process is told. What another program did to its file meanwhile
is not overwritten either: the conversation goes on under another name then.
"""

from __future__ import annotations

import hashlib
import os
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from clex_local.errors import escaped
from clex_local.file_lock import FileLock, InUse
from clex_local.private_files import make_private, users_folder, write_private
from clex_local.session.saved_session import SavedSession, SessionError, now

LONGEST_NAME = 100  # bytes
# Names of devices on Windows, with any extension; a folder may be on a disk that goes there.
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}
_ENDING = ".json"


def sessions_folder() -> Path:
    """Where sessions are kept: what the environment's ``CLEX_SESSIONS`` says, or a folder among the user's data."""
    from platformdirs import user_data_path

    folder = users_folder(user_data_path, "CLEX_SESSIONS")
    return folder if os.environ.get("CLEX_SESSIONS") else folder / "sessions"


def file_name(name: str) -> str:
    """The name of a session's file, without its ending: the same for names that some file system takes for one.

    Raises:
        SessionError: no file can have this name on every system.
    """
    plain = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
    # Letters and the marks on them, of every script, and numbers.
    allowed = all(unicodedata.category(letter)[0] in "LMN" or letter in "-_." for letter in plain)
    if not plain or not allowed or plain[0] in "-." or plain[-1] == ".":
        raise SessionError(
            f"{name!r} is no name for a session: letters, digits, - _ . are, and none begins with - or ."
        )
    if len(plain.encode()) > LONGEST_NAME:
        raise SessionError(f"the name {escaped(name, 40)!r} of a session is too long")
    if plain.split(".")[0] in _DEVICES:
        raise SessionError(f"{name!r} is no name for a session: Windows has a device of that name")
    return plain


@dataclass(frozen=True)
class Listed:
    """A file of the folder: the conversation in it, or why it cannot be read."""

    name: str
    session: SavedSession | None
    fault: str = ""


class KeptSession:
    """A conversation's file, which is this process's until it is closed.

    Args:
        folder: where it is.
        name: of the session.

    Attributes:
        name: as it was given first.
        path: of the file.
        saved: what was in the file when it was opened or written last; None for a new one.

    Raises:
        SessionError: the name is none, another process has it open, or the file cannot be read or is not a session.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._file_name = folder, file_name(name)
        self._lock = _lock(folder, self._file_name, name)
        try:
            self.path = folder / f"{self._file_name}{_ENDING}"
            for stale in folder.glob(f".{self.path.name}.*.tmp"):  # of a process that was killed while it wrote
                with suppress(OSError):
                    stale.unlink()
            self._seen, self._content = _state(self.path), b""
            self.saved: SavedSession | None = None
            if self._seen:
                self.saved, self._content = read_session(self.path), _digest(self.path.read_bytes())
            self.name = self.saved.name if self.saved else name
        except BaseException:
            self._lock.close()
            raise

    def write(self, session: SavedSession) -> str | None:
        """Write the conversation.

        Returns:
            What somebody should know, in a line.

        Raises:
            SessionError: it cannot be written; what was there is as it was.
        """
        note = self._step_aside() if self._written_by_others() else None
        session.name, session.saved = self.name, now()
        try:
            text = session.text()
            write_private(self.path, text)
            self._seen, self._content = _state(self.path), _digest(text.encode())
        except OSError as error:
            raise SessionError(f"{self.path}: not saved: {error.strerror or error}") from error
        self.saved = session
        return note

    def discard(self) -> None:
        """Remove the file, if it is there as it was written last: there is nothing in it to go on with."""
        if self._seen and not self._written_by_others():
            with suppress(OSError):
                self.path.unlink()
        self._seen, self._content, self.saved = None, b"", None

    def _written_by_others(self) -> bool:
        now = _state(self.path)
        if now is None or now == self._seen:
            return False
        try:  # a copy that came back from a backup, or new times alone
            return _digest(self.path.read_bytes()) != self._content
        except OSError:
            return True

    def _step_aside(self) -> str:
        """Go on under another name, because another program has written the file."""
        for number in range(2, 1000):
            other = f"{self._file_name[: LONGEST_NAME - 4]}-{number}"
            if _state(self._folder / f"{other}{_ENDING}") is not None:
                continue
            with suppress(SessionError):
                lock = _lock(self._folder, other, other)
                self._lock.close()
                old, self.name, self._lock, self._file_name = self.path, other, lock, other
                self.path = self._folder / f"{other}{_ENDING}"
                return f"another program has written {old}: this conversation is saved as {other}"
        raise SessionError(f"{self.path}: not saved: another program has written it")

    def close(self) -> None:
        """Let others have it."""
        self._lock.close()


def is_session(folder: Path, name: str) -> bool:
    """Whether there is a file for a session of this name; nothing is opened or made.

    Raises:
        SessionError: the name is none, or the folder cannot be looked at.
    """
    return _state(folder / f"{file_name(name)}{_ENDING}") is not None


def _lock(folder: Path, file: str, name: str) -> FileLock:
    try:
        make_private(folder)
        return FileLock(folder / f".{file}.lock")
    except InUse as error:
        by = f" ({error.process})" if error.process else ""
        raise SessionError(
            f"the session {name} is open in another process{by}: one at a time can go on with it"
        ) from None
    except OSError as error:
        raise SessionError(f"{folder}: sessions cannot be kept there: {error.strerror or error}") from error


def _state(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is written; None where there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SessionError(f"{path}: {error.strerror or error}") from error
    return (found.st_ino, found.st_size, found.st_mtime_ns)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def read_session(path: Path) -> SavedSession:
    """Read a session's file.

    Raises:
        SessionError: it cannot be read, or is none.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never end
            raise SessionError(f"{path}: no file")
        return SavedSession.parse(path.read_text("utf-8"), str(path))
    except UnicodeDecodeError:
        raise SessionError(f"{path}: a damaged session, or none: not UTF-8") from None
    except OSError as error:
        raise SessionError(f"{path}: {error.strerror or error}") from error


def listed_sessions(folder: Path | None = None) -> Iterator[Listed]:
    """Every session in a folder, the last one first; also what should be one and cannot be read.

    Raises:
        SessionError: the folder cannot be read.
    """
    folder = folder or sessions_folder()
    try:
        paths = [path for path in folder.iterdir() if path.suffix == _ENDING and not path.name.startswith(".")]
    except FileNotFoundError:
        return
    except OSError as error:
        raise SessionError(f"{folder}: {error.strerror or error}") from error
    found = []
    for path in paths:
        try:
            session = read_session(path)
            found.append(Listed(session.name, session))
        except SessionError as error:
            found.append(Listed(path.stem, None, str(error)))
    yield from sorted(found, key=lambda item: item.session.saved if item.session else "", reverse=True)
