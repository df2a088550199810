"""The end of a model: what is left of it answers with one error, and nothing is left to Python's shutdown."""

from __future__ import annotations

import atexit
import os
import weakref
from typing import Any, NoReturn

from clex_local.errors import ClexError


class ClosedError(ClexError, RuntimeError):
    """A model that was closed is used."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path}: this Llama was closed; make another one to go on")


class Closed:
    """Stands for the parts of a ``Llama`` that were freed, which llama.cpp would read nevertheless."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __getattr__(self, name: str) -> NoReturn:
        raise ClosedError(self._path)


_open: weakref.WeakSet[Any] = weakref.WeakSet()
_process = os.getpid()


def close_at_exit(llm: Any) -> None:
    """Free a ``Llama`` before Python takes away the functions that do so.

    What llama-cpp-python leaves to ``__del__`` ends in "Exception ignored ... 'NoneType' object is not callable".
    """
    _open.add(llm)


@atexit.register
def _close_all() -> None:
    for llm in list(_open):
        if llm._turn.busy or os.getpid() != _process:
            # A daemon thread computes with it, or it is the parent's: the system takes the memory back.
            for part in (llm._ctx, llm._batch, llm._model):
                part._exit_stack.pop_all()
            llm._stack.pop_all()
            if llm._stored is not None:
                llm._stored.store.detach()
        else:
            llm.close()
