"""Where commands begin: Ctrl-C while their modules are imported ends them with a line, as it does later."""

from __future__ import annotations

import _thread
import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from typing import Any

_MODULES = {
    "clex_cache": "clex_local.store.cli",
    "clex_chat": "clex_local.chat.cli",
    "clex_inspect": "clex_local.inspection.cli",
    "clex_serve": "clex_local.server.cli",
}


def _come_again(unraisable: Any) -> None:
    """Have Ctrl-C come once more where Python drops it: in ``__del__``, and in what runs when an object goes."""
    if unraisable.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(unraisable)
        return
    # From another thread, which runs when this one has left the place. The system gives it to the main one, and wakes
    # that; where Python is about to end, there is no thread any more.
    with suppress(RuntimeError):
        if sys.platform == "win32":
            _thread.start_new_thread(signal.raise_signal, (signal.SIGINT,))
        else:
            _thread.start_new_thread(os.kill, (os.getpid(), signal.SIGINT))


def __getattr__(name: str) -> Any:
    """A command by its name, with ``_`` for ``-``."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def leave(number: int, frame: object) -> None:
        # At once: an exception could be raised anywhere in half an import, and become another one there.
        os.write(2, f"{name.replace('_', '-')}: error: interrupted\n".encode())
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _come_again
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
