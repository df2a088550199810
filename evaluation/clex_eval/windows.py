"""Windows of a text: which tokens are scored, what a model makes of them, how sure a mean of them is.

Every length scores the same tokens. A window of n tokens predicts n of them: its first input is the model's BOS token
or, of a model without one, the token before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clex_eval.models import Model, Prefill
from clex_eval.report import Work
from clex_local.errors import ClexError

TOKENS = 32768  # scored unless told otherwise

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Span:
    """Which tokens of a text are scored, the same for every length.

    Attributes:
        start: the first of them; before it there is the context of a sliding window.
        count: how many.
    """

    start: int
    count: int


def span_of(longest: int, available: int, tokens: int | None, stride: int | None, source: str = "the text") -> Span:
    """The tokens to score of a text with `available` tokens to predict.

    Args:
        longest: the largest context length, in tokens.
        available: tokens of the text that can be predicted.
        tokens: how many to score, rounded up to whole windows of the largest length; None: 32,768 or what there is.
        stride: tokens scored in each window; None: all of it.
        source: what an error calls the text.

    Raises:
        ClexError: the text is too short.
    """
    step = min(stride or longest, longest)
    start = longest - step
    wanted = -(-(tokens or TOKENS) // step) * step
    if tokens is None:
        wanted = min(wanted, (available - start) // step * step)
    if wanted <= 0 or start + wanted > available:
        needed = start + max(wanted, step)
        raise ClexError(
            f"{source}: has {available:,} tokens to predict, {needed:,} are needed; take a longer text, or only "
            f"lengths below {longest:,}"
        )
    return Span(start, wanted)


def window_likelihoods(
    model: Model,
    text: npt.NDArray[np.int32],
    span: Span,
    length: int,
    *,
    stride: int | None = None,
    prefill: Prefill = "one-shot",
    chunk: int | None = None,
    work: Work | None = None,
) -> FloatArray:
    """Negative log-likelihoods of the tokens of a span, each window computed afresh: [windows, tokens scored in each].

    Args:
        model: computes them.
        text: its tokens, without BOS.
        span: which of them are scored; where windows do not divide it, its last tokens are not.
        length: tokens of a window.
        stride: how far apart windows are, and how many tokens at the end of each are scored; None: the length.
        prefill: as ``Model.negative_log_likelihoods`` says.
        chunk: the same.
        work: is told of the tokens computed.
    """
    step = min(stride or length, length)
    bos = np.array(model.bos, np.int32)
    first = span.start + (0 if model.bos else 1)
    found = np.empty((span.count // step, step))
    for i in range(len(found)):
        end = first + (i + 1) * step
        begin = end - length
        tokens = np.concatenate([bos, text[begin:end]]) if model.bos else text[begin - 1 : end]
        found[i] = model.negative_log_likelihoods(
            tokens, prefill=prefill, chunk=chunk, last=step, progress=work.advance if work else None
        )
    return found


def mean_and_error(values: FloatArray, block: int) -> tuple[float, float | None]:
    """The mean over consecutive tokens and its standard error, with blocks of the text as the observations.

    Tokens near each other are about as hard, so they are no independent observations. Without two whole blocks there
    is no error.
    """
    values = values.reshape(-1)
    mean = float(values.mean())
    whole = len(values) // block
    if whole < 2:
        return mean, None
    blocks = values[: whole * block].reshape(whole, block).mean(axis=1)
    return mean, float(blocks.std(ddof=1) / math.sqrt(whole))


@dataclass(frozen=True, eq=False)
class Scored:
    """What one model gave for one length: negative log-likelihoods [windows, scored] of a span of a text."""

    tokens: npt.NDArray[np.int32]
    span: Span
    length: int
    values: FloatArray

    def difference(self, other: Scored, last: int | None = None) -> tuple[FloatArray, FloatArray] | None:
        """The values of both for the tokens both scored, or for the last of each window of this; None if there are
        none.
        """
        if self.span != other.span or not np.array_equal(self.tokens, other.tokens):
            return None
        mine, theirs = self.values.reshape(-1), other.values.reshape(-1)
        kept = np.arange(min(len(mine), len(theirs)))
        if last is not None:
            width = self.values.shape[1]
            kept = kept[kept % width >= width - last]
        return (mine[kept], theirs[kept]) if len(kept) else None
