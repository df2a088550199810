"""Ctrl-C while llama.cpp loads, computes or frees.

Python runs the handler of a signal as soon as it runs anything, and in a callback from C that is where ctypes prints
the exception and drops it. So handlers run as ever, and what they raise is kept until C has returned. In ``__del__``
Python drops it as well; there, handlers run later.
"""

from __future__ import annotations

import _thread
import ctypes
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_kept: list[BaseException] = []  # by the main thread, the only one that runs handlers


class _Keeper:
    """Handler of a signal that keeps what the one before raises."""

    def __init__(self, handler: Callable[[int, Any], Any]) -> None:
        self.handler, self.active = handler, True

    def __call__(self, number: int, frame: Any) -> None:
        try:
            self.handler(number, frame)
        except BaseException as error:
            if not self.active:
                raise
            _kept.append(error)


def _handlers() -> Iterator[tuple[signal.Signals | int, Callable[[int, Any], Any]]]:
    """Python's handlers of signals, with their signals; none in a thread that runs no handlers."""
    if is_main_thread():
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler):
                yield number, handler


@contextmanager
def kept_until_return() -> Iterator[None]:
    """Raise what a signal's handler raises inside the block, Ctrl-C's above all, when the block is left.

    C that asks ``progress`` stops early. Threads that run no handlers are left alone.
    """
    keepers: dict[signal.Signals | int, _Keeper] = {}
    try:
        for number, handler in _handlers():
            keepers[number] = _Keeper(handler)
            signal.signal(number, keepers[number])
        yield
    finally:
        for keeper in keepers.values():  # first, in case an interrupt keeps one of them from being replaced
            keeper.active = False
        for number, keeper in keepers.items():
            signal.signal(number, keeper.handler)
        if keepers and _kept:
            raised = _kept[0]
            _kept.clear()
            raise raised from None


@contextmanager
def handled_later() -> Iterator[None]:
    """Have signals that come inside the block handled soon after it, as in a ``__del__``, which nothing can leave."""
    handlers: dict[signal.Signals | int, Callable[[int, Any], Any]] = {}
    came: list[int] = []
    try:
        for number, handler in _handlers():
            handlers[number] = handler
            signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came:  # from another thread, which runs when this one has gone on
            _thread.start_new_thread(signal.raise_signal, (number,))


def is_main_thread() -> bool:
    """Whether this thread is the one that runs handlers."""
    return threading.current_thread() is threading.main_thread()


@ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)
def aborts(data: int | None) -> bool:
    """A ``ggml_abort_callback`` that ends a computation when a handler has raised something."""
    return bool(_kept) and is_main_thread()


@ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_float, ctypes.c_void_p)
def progress(part: float, data: int | None) -> bool:
    """A ``llama_progress_callback`` that ends the loading of a model when a handler has raised something."""
    return not (_kept and is_main_thread())
