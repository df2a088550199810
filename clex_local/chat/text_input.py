"""Texts that a person hands over: files, and standard input."""

from __future__ import annotations

import io
import os
import stat
import sys
import threading
import time
from contextlib import suppress

from clex_local.documents.document import LARGEST
from clex_local.documents.encodings import utf8_text
from clex_local.documents.files import STANDARD_INPUT, STDIN_NAME, read_file, read_standard_input
from clex_local.documents.kinds import text_of
from clex_local.errors import ClexError

FIRST_BYTE_TIMEOUT = 5.0  # seconds that a pipe may take until its first byte


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 text file, or standard input for ``-``.

    Raises:
        ClexError: it cannot be read, is not UTF-8 text, or is larger than any context.
    """
    if str(path) == STANDARD_INPUT:
        return utf8_text(read_standard_input(), STDIN_NAME)
    return utf8_text(read_file(path)[0], str(path))


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
                self._chunks.append(sys.stdin.buffer.read(LARGEST + 1))
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
            while size <= LARGEST and (chunk := os.read(number, 1 << 20)):
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
            raise ClexError(f"{STDIN_NAME}: {self._error.strerror or self._error}") from self._error
        text, notes = text_of(b"".join(self._chunks), STDIN_NAME)
        self.notes = [f"{STDIN_NAME}: {note}" for note in notes]
        return text
