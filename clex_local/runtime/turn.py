"""Whose turn it is to use a model: calls of several threads follow one another, and streams keep what they began."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from clex_local.errors import ClexError

Item = TypeVar("Item")


class StreamError(ClexError, RuntimeError):
    """A stream that was left in the middle is taken up again after another call has used the model."""


class _Stream:
    """A generator that uses the model in every step."""

    lost = False  # another call took the model between two steps
    thread = 0  # of its last step
    ended = 0.0  # when that was over, seconds


class Turn:
    """Gives one model to one caller at a time.

    A call waits until no other thread is inside one. A stream (a completion that is streamed, ``generate``) has the
    turn from its first step until it ends, is closed or is dropped. One that is left in the middle stops nobody for
    ever: a call of the thread that left it takes the model at once, since only that thread could go on with it; a call
    of another thread takes it when there was no step for `idle_timeout` seconds. Going on with the stream is then an
    error, where it would continue another text. Of those that may go on, the one that has waited longest does, so that
    a stream lets what is not in its way pass before its next step.
    """

    idle_timeout = 30.0

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._thread: int | None = None  # the one inside a call or a step
        self._depth = 0
        self._changing = False  # it does more than read
        self._stream: _Stream | None = None
        # threads that wait, in the order in which they came, and how long the stream keeps each from going on, seconds
        self._waiting: dict[int, Callable[[], float]] = {}

    @property
    def busy(self) -> bool:
        """Whether another thread is inside a call."""
        return self._thread not in (None, threading.get_ident())

    @contextmanager
    def take(self, *, reading: bool = False, at_once: bool = False) -> Iterator[None]:
        """The turn, for the block.

        Args:
            reading: the block changes nothing that a stream would miss, so that none is in its way.
            at_once: do not wait for a stream that is between two steps.
        """
        with self._inside(None, reading, at_once):
            yield

    def stream(self, steps: Generator[Item, Any, Any]) -> Generator[Item, Any, Any]:
        """The same generator, which has the turn from its first step to its last.

        Raises:
            StreamError: another call has used the model between two steps.
        """
        stream, sent = _Stream(), None
        try:
            while True:
                with self._inside(stream, False, False):
                    try:
                        item = steps.send(sent)
                    except StopIteration as end:
                        return end.value
                sent = yield item
        finally:
            steps.close()
            with self._changed:
                if self._stream is stream:
                    self._stream = None
                self._changed.notify_all()

    @contextmanager
    def _inside(self, stream: _Stream | None, reading: bool, at_once: bool) -> Iterator[None]:
        me = threading.get_ident()
        with self._changed:  # a reentrant lock: streams are also dropped, and closed, by the garbage collector
            if self._thread != me:
                self._wait(me, stream, reading, at_once)
                self._changing = False
            if not (reading or self._changing):
                self._changing = True
                other, self._stream = self._stream, stream
                if other is not None and other is not stream:
                    other.lost = True
            self._thread = me
            self._depth += 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if self._depth == 0:
                    self._thread = None
                    if stream is not None:
                        stream.thread, stream.ended = me, time.monotonic()
                    self._changed.notify_all()

    def _wait(self, me: int, stream: _Stream | None, reading: bool, at_once: bool) -> None:
        def seconds() -> float:
            other = self._stream
            if other is None or other is stream or other.thread == me or reading or at_once:
                return 0.0
            return max(0.0, other.ended + self.idle_timeout - time.monotonic())

        # A signal's handler may use the model while its thread waits: it has the place of the call that it came into.
        outer = self._waiting.get(me)
        try:
            self._waiting[me] = seconds
            while True:
                if stream is not None and stream.lost:
                    raise StreamError("the stream cannot go on: another call has used the model since its last token")
                left = threading.TIMEOUT_MAX
                if self._thread is None:
                    first = next((thread for thread, wait in self._waiting.items() if wait() == 0.0), None)
                    if first == me:
                        return
                    if first is None:
                        left = seconds()
                self._changed.wait(left)
        finally:
            if outer is None:
                self._waiting.pop(me, None)
            else:
                self._waiting[me] = outer
            self._changed.notify_all()
