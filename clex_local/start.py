"""Where commands begin: Ctrl-C while their modules are imported ends them with a line, as it does later."""

from __future__ import annotations

import os
import signal
from importlib import import_module
from typing import Any

_MODULES = {
    "clex_cache": "clex_local.cache_command",
    "clex_chat": "clex_local.chat",
    "clex_inspect": "clex_local.inspect_command",
    "clex_serve": "clex_local.serve_command",
}


def __getattr__(name: str) -> Any:
    """A command by its name, with ``_`` for ``-``."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def leave(number: int, frame: object) -> None:
        # At once: an exception could be raised anywhere in half an import, and become another one there.
        os.write(2, f"{name.replace('_', '-')}: error: interrupted\n".encode())
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    try:
        if before is signal.default_int_handler:  # not where a shell has it ignored
            signal.signal(signal.SIGINT, leave)
    except ValueError:  # not in the main thread
        before = None
    try:
        return import_module(_MODULES[name]).main
    finally:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)


def __dir__() -> list[str]:
    return sorted(_MODULES)
