"""Ctrl-C while llama.cpp loads, computes or frees.

Python runs the handler of a signal as soon as it runs anything, and in a callback from C that is where ctypes prints
the exception and drops it. So handlers run as ever, and what they raise is kept until C has returned. In ``__del__``
Python drops it as well; there, handlers run later. Where C waits for a worker, it asks here whether it shall go on.
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
_AT_ONCE = 3  # times that Ctrl-C comes, after which also a worker that lives is not waited for

_Waiting = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_int)


class WorkerSilent(KeyboardInterrupt):
    """Ctrl-C while C waited for a worker that did not answer; nothing can be computed there any more."""


class _Waits:
    """Waits for workers, of which there may be none."""

    def __init__(self) -> None:
        self.ask: Callable[[Any], object] = lambda function: None  # has C ask a function
        self.depth = 0  # of blocks in which it does
        self.given_up: str | None = None  # a worker

    def begin(self) -> None:
        self.depth += 1
        if self.depth == 1:
            self.given_up = None
            self.ask(_waiting)

    def end(self) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.ask(_NOBODY)


_waits = _Waits()


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

    C that asks ``progress`` stops early, and waits for no worker that does not answer: then Ctrl-C is `WorkerSilent`.
    Threads that run no handlers are left alone.
    """
    keepers: dict[signal.Signals | int, _Keeper] = {}
    try:
        for number, handler in _handlers():
            keepers[number] = _Keeper(handler)
            signal.signal(number, keepers[number])
        if keepers:
            _waits.begin()
        yield
    finally:
        if keepers:
            _waits.end()
        for keeper in keepers.values():  # first, in case an interrupt keeps one of them from being replaced
            keeper.active = False
        for number, keeper in keepers.items():
            signal.signal(number, keeper.handler)
        if keepers and _kept:
            raised = _kept[0]
            _kept.clear()
            if _waits.given_up and isinstance(raised, KeyboardInterrupt):
                raised = WorkerSilent(
                    f"the worker at {_waits.given_up} does not answer; what it computed is lost: start it again, and "
                    "load the model anew"
                )
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


def asked_while_waiting(ask: Callable[[Any], object]) -> None:
    """Have C ask here while it waits for workers; `ask` tells it which function."""
    _waits.ask = ask


@_Waiting
def _waiting(worker: bytes, silent: int) -> int:
    """A ``ggml_backend_rpc_waiting_t``: whether to hurry, or not to wait at all."""
    if not is_main_thread():
        return 0
    if silent:
        _waits.given_up = worker.decode()
    return min(len(_kept), 1) + (len(_kept) >= _AT_ONCE)


_NOBODY = _Waiting()


@ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)
def aborts(data: int | None) -> bool:
    """A ``ggml_abort_callback`` that ends a computation when a handler has raised something."""
    return bool(_kept) and is_main_thread()


@ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_float, ctypes.c_void_p)
def progress(part: float, data: int | None) -> bool:
    """A ``llama_progress_callback`` that ends the loading of a model when a handler has raised something."""
    return not (_kept and is_main_thread())
