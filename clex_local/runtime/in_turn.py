"""Methods of a ``Llama`` that one thread at a time is inside of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import llama_cpp

from clex_local.errors import ModelError
from clex_local.runtime.turn import Turn


class TakesTurns(llama_cpp.Llama):
    """A ``Llama`` whose callers wait for each other."""

    _turn: Turn


Model = TypeVar("Model", bound=TakesTurns)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def in_turn(
    method: Callable[Concatenate[Model, Arguments], Result], *, reading: bool = False
) -> Callable[Concatenate[Model, Arguments], Result]:
    """Decorates a method that one thread at a time is inside of; one that is only `reading` disturbs no stream.

    The method raises ``ClosedError`` for a model that was closed, and ModelError for one loaded without what computes.
    """

    @functools.wraps(method)
    def wrapped(self: Model, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with self._turn.take(reading=reading):
            _ = self._ctx.ctx  # of a closed model, too, that is the answer
            if self.model_params.vocab_only:
                raise ModelError(f"{self.model_path}: loaded with vocab_only=True, without what computes")
            return method(self, *args, **kwargs)

    return wrapped


reading = functools.partial(in_turn, reading=True)
