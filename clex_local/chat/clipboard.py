"""Puts a text on the clipboard: by a tool of the desktop, or by the terminal."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys

from clex_local.errors import ClexError

# Tools, with what must be in the environment for them to reach anybody.
_TOOLS: list[tuple[str, list[str]]] = [
    ("WAYLAND_DISPLAY", ["wl-copy"]),
    ("DISPLAY", ["xclip", "-selection", "clipboard"]),
    ("DISPLAY", ["xsel", "--clipboard", "--input"]),
    ("WSL_DISTRO_NAME", ["clip.exe"]),
]
_SYSTEM = {"darwin": ["pbcopy"], "win32": ["clip"]}
_LARGEST = 100_000  # characters of base64 that terminals take
_SECONDS = 5.0


def copy(text: str) -> str:
    """Put a text on the clipboard, and say how, in words.

    Raises:
        ClexError: none can be reached.
    """
    # Over a connection the tools here would reach a clipboard that nobody sits at.
    if not os.environ.get("SSH_CONNECTION"):
        for command in _commands():
            try:
                # Those of X11 stay there to give the text away, and would keep a pipe open.
                done = subprocess.run(command, input=text.encode("utf-8", "replace"), timeout=_SECONDS, check=False,
                                      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
            except (OSError, subprocess.TimeoutExpired):
                continue
            if done.returncode == 0:
                return f"copied by {command[0]}"
    encoded = base64.b64encode(text.encode("utf-8", "replace")).decode()
    if not sys.stdout.isatty() or os.environ.get("TERM") in ("dumb", "linux", None):
        raise ClexError("no clipboard can be reached from here; /export FILE.md writes a file")
    if len(encoded) > _LARGEST:
        raise ClexError("this is too much for a terminal's clipboard; /export FILE.md writes a file")
    sequence = f"\x1b]52;c;{encoded}\x07"
    if os.environ.get("TMUX"):  # which hands on what is wrapped
        sequence = f"\x1bPtmux;{sequence.replace(chr(27), chr(27) * 2)}\x1b\\"
    sys.stdout.write(sequence)
    sys.stdout.flush()
    return "copied by the terminal, if it lets programs do that (OSC 52)"


def _commands() -> list[list[str]]:
    commands = [command for variable, command in _TOOLS if os.environ.get(variable)]
    if sys.platform in _SYSTEM:
        commands.insert(0, _SYSTEM[sys.platform])
    return [command for command in commands if shutil.which(command[0])]
