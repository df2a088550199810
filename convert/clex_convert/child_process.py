"""llama.cpp's C functions in a child process.

A child can be stopped at once (the C functions do not look for Ctrl-C), its memory is given back when it ends, and
where llama.cpp aborts on a file it cannot bear, the converter still ends with a readable message.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from clex_local.errors import one_line, shown

_REPORT = "clex-report "

Progress = Callable[[float], None]


def run_child(
    module: str,
    request: dict[str, Any],
    *,
    verbose: bool,
    line_read: Callable[[str], None] = lambda line: None,
    reported: Callable[[Any], None] = lambda value: None,
) -> str | None:
    """Runs a module of this package that calls llama.cpp.

    Args:
        module: its full name; its ``__main__`` begins with `request`.
        request: what it is to do, to be passed as JSON.
        verbose: show llama.cpp's log.
        line_read: called with each line of the log.
        reported: called with each value that the child passes to `report`.

    Returns:
        None if it succeeds, otherwise the reason that llama.cpp's log gives.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "GGML_NO_BACKTRACE": "1",
        "GGML_CLEX_ATTN_F32": "1",  # a child measures what quantizing changes: rounding of its own would be in it
    }
    last: deque[str] = deque(maxlen=200)
    with subprocess.Popen(
        [sys.executable, "-m", module],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with child.stdin as stdin:
                stdin.write(json.dumps(request))
            for line in child.stdout:
                if line.startswith(_REPORT):
                    reported(json.loads(line[len(_REPORT) :]))
                    continue
                if verbose:
                    sys.stderr.write(shown(line))
                last.append(line.strip())
                line_read(line)
            code = child.wait()
        except BaseException:
            child.kill()
            raise
    if code == 0:
        return None
    return _reason(list(last), code)


# A refusal of the quantizer or the loader, an exception that nobody catches, a failed assertion.
_REASONS = (
    r"failed to quantize: (.*)",
    r"error loading model\b.*?: (.*)",
    r"(cannot encode the text: .*)",
    r"what\(\): *(.*)",
    r"(\S+: GGML_ASSERT.*)",
)


def _reason(lines: list[str], code: int) -> str:
    if code == -9:  # SIGKILL, a name that Windows does not have
        return "its process was killed, as the system does when memory runs out; close other programs and try again"
    for pattern in _REASONS:
        for line in reversed(lines):
            if match := re.search(pattern, line):
                return one_line(match[1])
    said = next((line for line in reversed(lines) if line), "it said nothing")
    return one_line(f"{said} (exit code {code})")


# In the child


def _end_with_parent() -> None:
    """Ends this process as soon as nobody can read what it says: its parent was killed."""
    if not hasattr(select, "poll"):
        return
    watch = select.poll()
    watch.register(1, 0)  # no more than that the other end of the pipe was closed

    def wait() -> None:
        watch.poll()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


_kept: Any = None  # the callback must outlive the call that sets it


def request() -> dict[str, Any]:
    """What the parent wants; from here on llama.cpp's log goes to it."""
    _end_with_parent()
    wanted = json.loads(sys.stdin.read())
    # Ctrl-C reaches the whole process group; the C code would keep Python's handler from running.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from llama_cpp import llama_cpp

    global _kept
    _kept = _log_callback(llama_cpp)
    llama_cpp.llama_log_set(_kept, ctypes.c_void_p(0))
    return wanted


def report(value: Any) -> None:
    """Tells the parent something that can be JSON."""
    _write(f"\n{_REPORT}{json.dumps(value)}\n".encode())


def _write(text: bytes) -> None:
    try:
        os.write(1, text)
    except OSError:
        os._exit(1)  # the parent is gone, so is the need for the result


def _log_callback(llama_cpp: Any) -> Any:
    from clex_local.library.log import is_shown, level_of

    def log(level: int, text: bytes, data: Any) -> None:
        if is_shown(level_of(level)):
            _write(text)

    return llama_cpp.llama_log_callback(log)
