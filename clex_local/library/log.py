"""llama.cpp's log: one callback for the whole process, which keeps apart what each thread wants to know.

A callback that is replaced and freed while another thread is inside it ends the process, so ours is never replaced by
us. The bindings' own takes llama.cpp's debug lines for information, information for warnings and errors for debug
lines, because it numbers the levels as llama.cpp did before; and it prints debug lines whenever ``verbose`` is on.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clex_local.errors import escaped
from clex_local.library.loading import load_ggml

DEBUG, INFO, WARN, ERROR, _CONTINUED = 1, 2, 3, 4, 5  # enum ggml_log_level
_SEVERITY = {DEBUG: logging.DEBUG, INFO: logging.INFO, WARN: logging.WARNING, ERROR: logging.ERROR}
_LEAST = logging.DEBUG if os.environ.get("LLAMA_CLEX_LOG_DEBUG") else logging.INFO
_LOGGER = logging.getLogger("llama-cpp-python")  # that of the bindings, which ``verbose`` sets to DEBUG or ERROR


class _Thread(threading.local):
    level = 0  # of the line before, which the next may continue
    least: int | None = None  # severity that is printed; None: the logger's
    levels: tuple[int, ...] = ()  # that are collected
    lines: list[str] | None = None


_thread = _Thread()
_others: Any = None  # callback of the application, which gets every line
_others_data = ctypes.c_void_p()


@contextmanager
def logged(*levels: int, forward: bool = False) -> Iterator[list[str]]:
    """Collect what llama.cpp and ggml log in this thread inside the block.

    Args:
        *levels: levels of the lines that are wanted.
        forward: print lines too, of information, warnings and errors.

    Yields:
        The lines so far, without white space around them.
    """
    _take()
    before = _thread.least, _thread.levels, _thread.lines
    lines: list[str] = []
    _thread.least, _thread.levels, _thread.lines = _LEAST if forward else logging.CRITICAL, levels, lines
    try:
        yield lines
    finally:
        _thread.least, _thread.levels, _thread.lines = before


def level_of(level: int) -> int:
    """The level of a line that is logged in this thread; one that continues the line before has the level of that."""
    if level != _CONTINUED:
        _thread.level = level
    return _thread.level


def is_shown(level: int) -> bool:
    """Whether a line is for those who want to see the log: debug lines are only with LLAMA_CLEX_LOG_DEBUG set."""
    return _SEVERITY.get(level, logging.INFO) >= _LEAST


def _log(level: int, text: bytes, data: int | None) -> None:
    level = level_of(level)
    if _thread.lines is not None and level in _thread.levels:
        line = text.decode("utf-8", errors="replace").strip()
        _thread.lines.append(line.replace("std::bad_alloc", "there is not enough memory"))
    if _others is not None:
        _others(level, text, _others_data)
        return
    least = max(_LOGGER.level, _LEAST) if _thread.least is None else _thread.least
    if _SEVERITY.get(level, logging.INFO) >= least and sys.stderr is not None:
        # Names and texts come from files.
        lines = text.decode("utf-8", errors="replace").split("\n")
        print("\n".join(escaped(line, 4000) for line in lines), end="", flush=True, file=sys.stderr)


_Callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_callback = _Callback(_log)
_address = ctypes.cast(_callback, ctypes.c_void_p).value


def _take() -> None:
    """Have the log, unless we have it already. An application that had set a callback of its own is told every line."""
    global _others, _others_data
    ggml = load_ggml()
    current, data = ctypes.c_void_p(), ctypes.c_void_p()
    ggml.ggml_log_get(ctypes.byref(current), ctypes.byref(data))
    if current.value == _address:
        return
    bindings, logger = sys.modules.get("llama_cpp.llama_cpp"), sys.modules.get("llama_cpp._logger")
    theirs = logger and ctypes.cast(logger.llama_log_callback, ctypes.c_void_p).value
    _others, _others_data = (None if theirs in (None, current.value) else ctypes.cast(current, _Callback)), data
    library, set_log = (bindings._lib, "llama_log_set") if bindings else (ggml, "ggml_log_set")
    # Their function has types that are only theirs.
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)((set_log, library))(_address, None)
