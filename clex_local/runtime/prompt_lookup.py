"""Guesses of the next tokens from the text so far: answers about a document repeat parts of it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp.llama_speculative import LlamaDraftModel

from clex_local.runtime.vocabulary import common_prefix

# The attention of a batch of up to 8 tokens gives each the bits that it has alone (ggml-clex-attn.cpp), as long as all
# of them see as many blocks of 64 positions: the threads share out whole blocks.
_BATCH, _BLOCK = 8, 64
_KEY = 3  # tokens that are looked up
_LONGEST = 32  # tokens that are compared
_CANDIDATES = 16  # places that are compared, the latest ones
_AGREEMENTS = (4, 5, 7, 10, 16, _LONGEST)  # tokens that agree, from which on expected tokens are counted together
_WINDOW = 24  # of them that a rate is of
_LEAST = 3  # guesses that a batch is worth
_BITS = 21  # of a token in a key


class PromptLookup(LlamaDraftModel):
    """Guesses that the text goes on as it did where its last tokens stood before, at the place that agrees longest.

    What it would have guessed is counted too where it guesses nothing, so that it begins when the text begins to repeat
    itself, and ends when that ends. Whether it guesses depends on the tokens alone: the same text, the same guesses.

    Args:
        cost: of computing 8 tokens at once, in tokens computed alone; it guesses where that is expected to pay.
    """

    def __init__(self, cost: float = 4.6) -> None:
        self.cost = cost
        self._ids = np.zeros(256, np.intc)  # the text, and room for more
        self._text: list[int] = []
        self._last: dict[int, int] = {}  # where the tokens of a key last ended
        self._before: list[int] = []  # for each place, where those that end there ended before; -1: nowhere
        self._source: int | None = None  # the place whose token is expected next
        self._agreeing = 0  # tokens before it that agree with the last ones
        self._rates = _Rates()

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:
        """Tokens that may follow, none where they would not pay: int32 [0 to 7].

        Args:
            input_ids: the text so far, [n].
            kwargs: of other draft models.
        """
        self._follow(input_ids)
        return np.array(self._guesses(), np.intc)

    def _guesses(self) -> Sequence[int]:
        if self._source is None:
            return ()
        # The last token of the text is computed with them.
        room = min(_BATCH, _BLOCK - (len(self._text) - 1) % _BLOCK) - 1
        found = self._text[self._source : self._source + room]
        if found and min(found) < 0:  # what stands for an image is no token
            found = found[: next(i for i, token in enumerate(found) if token < 0)]
        if len(found) < _LEAST:
            return ()
        rates = (self._rates.of(self._agreeing + i) for i in range(len(found)))
        gained = sum(accumulate(rates, mul))
        return found if gained > self._extra(len(found)) else ()

    def _extra(self, guesses: int) -> float:
        """What a batch costs beyond its first token, in tokens computed alone: batches of few are dear."""
        return (self.cost - 1) * (guesses / (_BATCH - 1)) ** 0.5

    def _follow(self, input_ids: npt.NDArray[np.intc]) -> None:
        """Take in the text, which mostly is that of the last call and a few tokens more."""
        same = common_prefix(self._ids[: len(self._text)], input_ids)
        if same < len(self._text):
            self._forget(same)
        if len(input_ids) > len(self._ids):
            self._ids = np.resize(self._ids, 2 * len(input_ids))
        self._ids[same : len(input_ids)] = input_ids[same:]
        new = input_ids[same:].tolist()
        if len(new) <= _BATCH:
            for token in new:
                self._add(token)
        else:
            self._add_many(input_ids, same)

    def _forget(self, length: int) -> None:
        """Be as one that has taken in the first tokens alone, with nothing counted."""
        for place in range(len(self._text), length, -1):
            before = self._before.pop()
            if place >= _KEY:
                key = _key(self._text[place - _KEY : place])
                if before < 0:
                    del self._last[key]
                else:
                    self._last[key] = before
            self._text.pop()
        self._source, self._rates = None, _Rates()

    def _add(self, token: int) -> None:
        """Take in a token, and count whether it was the expected one."""
        source, text = self._source, self._text
        hit = source is not None and text[source] == token
        if source is not None:
            self._rates.count(self._agreeing, hit)
            self._source, self._agreeing = (source + 1, self._agreeing + 1) if hit else (None, 0)
        text.append(token)
        place = len(text)
        if place < _KEY:
            self._before.append(-1)
            return
        key = _key(text[-_KEY:])
        before = self._last.get(key, -1)
        self._before.append(before)
        self._last[key] = place
        if self._source is None and before >= 0:
            self._source, self._agreeing = self._longest(before)

    def _add_many(self, input_ids: npt.NDArray[np.intc], start: int) -> None:
        """Take in the tokens from `start` on, with nothing counted."""
        self._text += input_ids[start:].tolist()
        first = max(start, _KEY - 1)
        self._before += [-1] * (first - start)
        ids = input_ids.astype(np.int64)
        keys = sum(ids[first - i : len(ids) - i] << (_BITS * i) for i in range(_KEY))
        last, before = self._last, self._before
        for place, key in enumerate(np.asarray(keys).tolist(), first + 1):
            before.append(last.get(key, -1))
            last[key] = place
        self._source, self._agreeing = None, 0
        if before and before[-1] >= 0:
            self._source, self._agreeing = self._longest(before[-1])

    def _longest(self, place: int) -> tuple[int, int]:
        """Of the places with the last tokens' key, from `place` back, the latest of those that agree longest."""
        text, end = self._text, len(self._text)
        best, longest = place, 0
        for _ in range(_CANDIDATES):
            count = _KEY
            while count < min(_LONGEST, place) and text[place - 1 - count] == text[end - 1 - count]:
                count += 1
            if count > longest:
                best, longest = place, count
            place = self._before[place - 1]
            if place < 0 or longest == _LONGEST:
                break
        return best, longest


class _Rates:
    """How many of the expected tokens came, by the number of agreeing tokens before them."""

    def __init__(self) -> None:
        # As if the first had come for all agreeing ones but one.
        self._rates = [1 - 1 / (least + 1) for least in (_KEY, *_AGREEMENTS)]
        self._counts = [3] * len(self._rates)

    def of(self, agreeing: int) -> float:
        return self._rates[bisect_right(_AGREEMENTS, agreeing)]

    def count(self, agreeing: int, hit: bool) -> None:
        index = bisect_right(_AGREEMENTS, agreeing)
        self._counts[index] = min(self._counts[index] + 1, _WINDOW)
        self._rates[index] += (hit - self._rates[index]) / self._counts[index]


def _key(tokens: Sequence[int]) -> int:
    return sum(token << (_BITS * i) for i, token in enumerate(reversed(tokens)))
