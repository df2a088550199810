"""A running llama-server."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from clex_local.errors import ClexError
from clex_local.library.loading import library_path

_LISTENING = re.compile(r"listening on (\w+://\S+)")
_PAGE = "serving a page"  # a line of the log, before that
_LEVEL = re.compile(
    r"(?:\x1b\[\d*m)*\d+\.\d+\.\d+\.\d+ (?:\x1b\[\d*m)*([IWEDT]) "
)  # of a line of the log, with --log-prefix
_OTHER_PORT = "default port will be changed"  # a notice about a later llama-server
_KEPT = 50  # lines of the log that tell why the server ended
_SHUTDOWN_TIMEOUT = 20  # seconds for what is being computed to end


class ServerError(ClexError):
    """The server could not start, or ended by itself."""


def server_program() -> Path:
    """The program that serves.

    Raises:
        ServerError: this installation was built without it.
    """
    return _program("llama-server", "its server", "CLEX_SERVER=OFF")


def worker_program() -> Path:
    """The program that computes layers for other machines.

    Raises:
        ServerError: this installation was built without it.
    """
    return _program("ggml-rpc-server", "its program for workers", "CLEX_SERVER=OFF and CLEX_RPC=OFF")


def _program(name: str, what: str, options: str) -> Path:
    program = library_path() / (f"{name}.exe" if sys.platform == "win32" else name)
    if not program.is_file():
        raise ServerError(
            f"{program} is missing: this clex-local was built without {what}; "
            f"install it again without {options} in CMAKE_ARGS"
        )
    return program


class Server:
    """A llama-server that is ready to answer. Use it in ``with``, or ``close`` it.

    Attributes:
        url: where the page is, and under ``/v1`` the OpenAI API.
        has_page: whether the web page was built.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], *, verbose: bool = False) -> None:
        """Start it, and wait until it has loaded its model.

        Raises:
            ServerError: it ended before it was ready; the message says why.
        """
        self._stack = ExitStack()
        self._log: deque[str] = deque(maxlen=_KEPT)
        self._verbose = verbose
        self._ready = threading.Event()
        self.url = ""
        self.has_page = False
        # In a session of its own: a terminal's Ctrl-C comes once, from us.
        self._process = subprocess.Popen(
            [str(server_program()), *arguments, "--log-prefix", "--log-timestamps"],
            env={**os.environ, **environment, "LLAMA_CLEX_END_WITH_STDIN": "1"},
            stdin=subprocess.PIPE,  # which ends with this process, however that ends
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        try:
            self._ready.wait()
        except BaseException:
            self.close()
            raise
        if not self.url:
            code = self.wait()
            raise ServerError(f"llama-server ended ({code}): {self._reason()}")

    def _read_log(self) -> None:
        assert self._process.stdout is not None
        shown = False
        for line in self._process.stdout:
            self._log.append(line)
            level = _LEVEL.match(line)
            if level:
                shown = level[1] in "WE" and _OTHER_PORT not in line
            if self._verbose or (shown and self._ready.is_set()):
                with contextlib.suppress(ValueError, OSError):  # nobody reads it any more
                    sys.stderr.write(line)
                    sys.stderr.flush()
            self.has_page |= _PAGE in line
            if not self.url and (found := _LISTENING.search(line)):
                self.url = found[1]
                self._ready.set()
        self._ready.set()

    def _reason(self) -> str:
        """The line of the log that says why the server ended."""
        lines = list(self._log)
        errors = [line[found.end() :] for line in lines if (found := _LEVEL.match(line)) and found[1] == "E"]
        told = errors or [line for line in lines if not _LEVEL.match(line)] or lines or ["it said nothing"]
        return " ".join(re.sub(r"\x1b\[\d*m", "", told[0]).split())

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def keep(self, stack: ExitStack) -> None:
        """Let it own what it needs until it ends."""
        self._stack.push(stack)

    def signal(self, number: int) -> None:
        """Pass a signal on, unless it has ended."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def wait(self) -> int:
        """Wait until it ends; returns its exit code, as a shell gives it."""
        code = self._process.wait()
        return 128 - code if code < 0 else code

    def close(self) -> int:
        """End it; returns its exit code."""
        self.signal(signal.SIGTERM)
        try:
            self._process.wait(_SHUTDOWN_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
        code = self.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                stream.close()
        self._stack.close()
        return code

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
