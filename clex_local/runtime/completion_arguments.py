"""Arguments of completions: what is refused, and what llama.cpp is given for the others."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt

from clex_local.errors import ClexError
from clex_local.runtime.sampler import LogitsProcessor


class CompletionError(ClexError, ValueError):
    """A completion was asked for what it cannot do; a ValueError too, as llama-cpp-python raises."""


def check_whole(name: str, value: Any, least: int | None = None) -> None:
    """Refuse what is no whole number, or too small a one."""
    if not isinstance(value, Integral) or (least is not None and int(value) < least):
        bound = "" if least is None else f" of at least {least}"
        raise CompletionError(f"{name} must be a whole number{bound}, not {reprlib.repr(value)}")


def encoded(text: str, what: str) -> bytes:
    """A text as UTF-8; `what` it is is for the error of one that is none."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise CompletionError(f"{what} is no Unicode text: {error.reason}") from None


def token_list(prompt: Any) -> list[int]:
    """A prompt of tokens; bytes would be taken for their numbers."""
    if isinstance(prompt, (bytes, bytearray, memoryview, Mapping)) or not isinstance(prompt, Iterable):
        raise CompletionError(f"the prompt must be a text or a list of tokens, not {type(prompt).__name__}")
    tokens = list(prompt)
    wrong = [token for token in tokens if isinstance(token, bool) or not isinstance(token, Integral)]
    if wrong:
        raise CompletionError(f"the prompt has {reprlib.repr(wrong[0])} among its tokens, which are whole numbers")
    return [int(token) for token in tokens]


def stop_strings(stop: str | Iterable[str] | None) -> list[str]:
    """Stop strings as a list; an empty one would be found everywhere."""
    if stop is not None and (isinstance(stop, (bytes, Mapping)) or not isinstance(stop, Iterable)):
        raise CompletionError(f"stop must be a text or a list of texts, not {reprlib.repr(stop)}")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else list(stop)
    for text in stops:
        if not isinstance(text, str):
            raise CompletionError(f"stop must be a text or a list of texts, not {text!r}")
        encoded(text, "a stop string")
    return [text for text in stops if text]


def biases_of(logit_bias: Mapping[Any, float]) -> dict[int, float]:
    """What to add to the logits of tokens, whose ids may be texts, as in JSON."""
    try:
        biases = {int(token): float(bias) for token, bias in logit_bias.items()}
    except (TypeError, ValueError) as error:
        raise CompletionError(f"logit_bias must map token ids to numbers: {error}") from None
    if any(np.isnan(bias) for bias in biases.values()):
        raise CompletionError("logit_bias has a number that is none (NaN)")
    return biases


def adding(biases: dict[int, float]) -> LogitsProcessor:
    """What adds biases to the logits of tokens."""
    ids, values = np.array(list(biases), np.intp), np.array(list(biases.values()), np.single)

    def add(tokens: npt.NDArray[np.intc], logits: npt.NDArray[np.single]) -> npt.NDArray[np.single]:
        logits[ids] += values
        return logits

    return add
