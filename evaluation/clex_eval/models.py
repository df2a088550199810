"""What every measurement asks of a model, and what the two kinds of models share: ``gguf.py`` and ``folder.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from clex_local.errors import ClexError

Prefill = Literal["one-shot", "growing"]
Policy = Literal["by-length", "fixed"]
Progress = Callable[[int], object]  # called with the tokens computed since the last call

_ROWS = 512  # of logits that are reduced at once


@dataclass(frozen=True)
class Coverage:
    """The context lengths of a model, in tokens.

    Attributes:
        original: L, covered without scaling; of a model without tables what it was trained for.
        maximum: what its last table covers; None where there are no tables and every length is computed alike.
        baked: what the one table covers whose frequencies are the model's own, or None.
    """

    original: int
    maximum: int | None
    baked: int | None = None

    def context_size(self, ctx: int, clamp: bool) -> int:
        """Tokens of a context for which `ctx` were asked: no more than the tables cover, 0 for as many."""
        wanted = ctx or self.maximum or self.baked or self.original
        return wanted if clamp or self.maximum is None else min(wanted, self.maximum)


class Model(Protocol):
    """A model with a context.

    Attributes:
        name: file or folder name without suffix.
        path: the file or folder.
        original_context_length: L; of a model without tables its trained context.
        context_length: tokens the context holds: what was asked for, at most what the tables cover.
        bos: the token that a text begins with, of a model that wants one; else empty.
    """

    name: str
    path: Path
    original_context_length: int
    context_length: int
    bos: tuple[int, ...]

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """Token ids of a text; special: control tokens written out in it are understood."""
        ...

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without control tokens."""
        ...

    def chat(self, message: str, answer: str = "") -> list[int]:
        """Tokens of one user message by the model's chat template, with the answer begun.

        Without a template: message and answer as one plain text, in a line each.
        """
        ...

    def generate(self, prompt: Sequence[int], max_tokens: int, stop: Sequence[str] = ()) -> str:
        """The likeliest continuation of a prompt, up to a token that ends it or the first of the stop strings."""
        ...

    def negative_log_likelihoods(
        self,
        tokens: npt.NDArray[np.int32],
        *,
        prefill: Prefill = "one-shot",
        chunk: int | None = None,
        last: int | None = None,
        progress: Progress | None = None,
    ) -> npt.NDArray[np.float64]:
        """Those of tokens[1:], each given all before it, in nats: [n - 1], or those of the last ones.

        The last token is only predicted, so a sequence of n - 1 tokens is computed.

        Args:
            tokens: [n].
            prefill: ``one-shot`` takes the table of all n - 1 tokens for each of them; ``growing`` feeds them in
                chunks, each with the table of the tokens so far, to which the cached keys are brought.
            chunk: tokens of such a chunk; None takes the original context length.
            last: how many to give, counted from the end.
            progress: called after each batch.
        """
        ...

    def scaling_factor(self, n_tokens: int) -> float | None:
        """Scaling factor t that a sequence of so many tokens gets; None without tables."""
        ...

    def close(self) -> None:
        """Free the memory."""
        ...

    def __enter__(self) -> Model: ...

    def __exit__(self, *_: object) -> None: ...


def likelihoods(logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """Negative log-likelihoods of the targets [n], in nats, under logits [n, n_vocab]."""
    parts = [np.empty(0)]
    for start in range(0, len(targets), _ROWS):
        rows, wanted = logits[start : start + _ROWS], targets[start : start + _ROWS]
        peak = rows.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(rows - peak).sum(axis=1, dtype=np.float64)) + peak[:, 0]
        parts.append(log_sum - rows[np.arange(len(wanted)), wanted])
    return np.concatenate(parts)


class PrefillPlan(NamedTuple):
    """How a sequence is computed whose tokens are scored.

    Attributes:
        inputs: tokens that are computed, all but the last one of the sequence.
        step: how many of them get one table together.
        first: the first of them whose prediction is scored.
    """

    inputs: int
    step: int
    first: int


def plan_prefill(model: Model, n_tokens: int, prefill: Prefill, chunk: int | None, last: int | None) -> PrefillPlan:
    """The plan of ``negative_log_likelihoods`` for n tokens.

    Raises:
        ClexError: they do not fit in the context.
    """
    inputs = n_tokens - 1
    if inputs > model.context_length:
        raise ClexError(f"{model.path}: {inputs:,} tokens do not fit in a context of {model.context_length:,}")
    step = inputs if prefill == "one-shot" else chunk or model.original_context_length
    return PrefillPlan(inputs, step, inputs - min(last or inputs, inputs))


def before_stop(text: str, stop: Sequence[str]) -> str | None:
    """The text before the first of the stop strings; None if it holds none of them."""
    places = [place for word in stop if (place := text.find(word)) >= 0]
    return text[: min(places)] if places else None
