"""Texts that a person hands over: files, and standard input."""

from __future__ import annotations

import io
import os
import stat
import sys
import threading
import time
from contextlib import suppress

from clex_local.documents.kinds import text_of
from clex_local.errors import ClexError
from clex_local.sizes import readable_size

LARGEST_TEXT = 256 * 2**20  # bytes; no context holds more, and nobody waits for it to be cut into tokens
FIRST_BYTE_TIMEOUT = 5.0  # seconds that a pipe may take until its first byte
_NAME = "standard input"


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a text file, or standard input for ``-``.

    Raises:
        ClexError: it cannot be read, is not UTF-8 text, or is larger than any context.
    """
    name = _NAME if str(path) == "-" else str(path)
    try:
        if str(path) == "-":
            if sys.stdin is None:
                raise ClexError(f"{_NAME}: closed")
            data = sys.stdin.buffer.read(LARGEST_TEXT + 1)
        else:
            with open(path, "rb") as file:
                data = file.read(LARGEST_TEXT + 1)
    except OSError as error:
        raise ClexError(f"{name}: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in a path
        raise ClexError(f"{name}: {error}") from error
    return decoded(data, name)


def decoded(data: bytes, name: str) -> str:
    """The text that is in a file.

    Raises:
        ClexError: it is not UTF-8 text, or larger than any context.
    """
    if len(data) > LARGEST_TEXT:
        raise ClexError(f"{name}: more than {readable_size(LARGEST_TEXT, memory=True)} of text, no context holds that")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ClexError(f"{name}: not a UTF-8 text file (byte {error.start} is {data[error.start]:#04x})") from error
    if "\0" in text:
        raise ClexError(f"{name}: a binary file, not text")
    return text


def join(parts: list[str]) -> str:
    """Texts and a question about them, as one message."""
    return "\n\n".join(part.strip("\n") for part in parts if part.strip())


class Piped:
    """What comes in by standard input beside a question, read from now on in a thread.

    A command that cron, a service or another program starts may inherit a pipe that nobody ever writes to or closes.
    Such a one is given up after ``FIRST_BYTE_TIMEOUT``; one that has begun is read to its end, however long that takes.
    ``unread`` tells afterwards why there is no text, should there be a reason to tell, and ``notes`` how it was read.
    """

    def __init__(self) -> None:
        self.unread: str | None = None
        self.notes: list[str] = []
        self._deadline = time.monotonic() + FIRST_BYTE_TIMEOUT
        self._chunks: list[bytes] = []
        self._error: OSError | None = None
        self._begun, self._ended = threading.Event(), threading.Event()
        if self._is_ours():
            # Not from the stream: a thread that waits inside one would keep the interpreter from its end.
            threading.Thread(target=self._read, args=(sys.stdin.fileno(),), daemon=True).start()
        else:
            self._begun.set()
            self._ended.set()

    def _is_ours(self) -> bool:
        """Whether there is something to read in a thread."""
        if sys.stdin is None:
            return False
        try:
            number = sys.stdin.fileno()
            mode = os.fstat(number).st_mode
        except io.UnsupportedOperation:  # put in place of standard input by a program in this process
            with suppress(OSError):
                self._chunks.append(sys.stdin.buffer.read(LARGEST_TEXT + 1))
            return False
        except (OSError, ValueError):
            return False
        if stat.S_ISREG(mode):
            with suppress(OSError):
                if 0 < os.lseek(number, 0, os.SEEK_CUR) < os.fstat(number).st_size:
                    # `while read line; do clex-chat ...; done < list`: the rest of the list is not for us.
                    self.unread = "standard input is a file that another program has begun to read"
                    return False
            return True
        return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)

    def _read(self, number: int) -> None:
        size = 0
        try:
            while size <= LARGEST_TEXT and (chunk := os.read(number, 1 << 20)):
                self._chunks.append(chunk)
                size += len(chunk)
                self._begun.set()
        except OSError as error:
            self._error = error
        self._begun.set()
        self._ended.set()

    def text(self) -> str:
        """All of it; nothing where there is nothing.

        Raises:
            ClexError: it cannot be read, or is not text.
        """
        if not self._begun.wait(max(0.0, self._deadline - time.monotonic())):
            self.unread = "standard input is open, but nothing came"
            return ""
        self._ended.wait()
        if self._error is not None:
            raise ClexError(f"{_NAME}: {self._error.strerror or self._error}") from self._error
        text, notes = text_of(b"".join(self._chunks), _NAME)
        self.notes = [f"{_NAME}: {note}" for note in notes]
        return text
