"""clex-chat as a process: from a script, and in a pseudo-terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest

BREAK = r"(?:\s|\x1b\[[\d;]*m)+"  # between words: lines are broken there, each with its own style
COMMAND = [sys.executable, "-m", "clex_local.chat.cli"]

needs_terminal = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")


def sessions_folder() -> Any:
    """A fixture of every test in a module: where its sessions are. What is typed in it is not remembered elsewhere."""

    @pytest.fixture(autouse=True)
    def folder(tmp_path, monkeypatch):
        monkeypatch.setenv("CLEX_SESSIONS", str(tmp_path / "sessions"))
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        return tmp_path / "sessions"

    return folder


def run(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    # One thread: computers that run tests are busy, and threads that wait for each other get nowhere then.
    return subprocess.run(
        [*COMMAND, "--threads", "1", *map(str, arguments)], input=stdin or "", capture_output=True, text=True
    )


class Pty:
    """clex-chat in a pseudo-terminal that, as real ones do, tells where its cursor is."""

    def __init__(self, model, *options: str, width: int = 120, **environment: str):
        import pexpect

        self.chat = pexpect.spawn(
            COMMAND[0],
            [*COMMAND[1:], *([str(model)] if model else []), "--threads", "1", "--temp", "0", *options],
            env=os.environ | {"TERM": "xterm"} | environment,
            encoding="utf-8",
            timeout=60,
            dimensions=(40, width),
        )
        self.end = pexpect.EOF

    def expect(self, pattern: Any) -> int:
        """Wait for a pattern, in which a space is also where a line was broken, and ``.`` also the end of one."""
        if isinstance(pattern, str):
            pattern = re.sub(r" (?![+*?{])", lambda _: BREAK, pattern)
        return self.chat.expect(pattern)

    def prompt(self, status: str) -> None:
        """Wait for the prompt with this status line."""
        self.chat.expect_exact("\x1b[6n")
        self.chat.send("\x1b[1;1R")
        self.chat.expect(status)

    def close(self) -> int:
        self.chat.expect(self.end)
        self.chat.close()
        return self.chat.exitstatus
