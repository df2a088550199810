"""Python in processes of their own, which can import the helpers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run(code: str, *arguments: object, before: Sequence[str] = (), stderr: int | None = None) -> subprocess.Popen[str]:
    """Start code with arguments in ``sys.argv``; its output is to be read.

    Args:
        code: the program.
        arguments: what it is given.
        before: a command that starts Python.
        stderr: as of ``Popen``.
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [*before, sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=stderr)
