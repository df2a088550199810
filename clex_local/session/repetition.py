"""Notices that an answer says the same again and again."""

from __future__ import annotations

from collections.abc import Sequence

_EVERY = 16  # tokens between two looks
_LONGEST = 128  # tokens of what is repeated
_ENOUGH, _TIMES = 256, 6  # tokens of repetition that are enough, and how often the same must have been said


def is_stuck(tokens: Sequence[int]) -> bool:
    """Whether the end of a text is the same up to 128 tokens, over and over.

    A list of figures or a table that a person asked for has rows that differ; what is alike to the last token 6 times,
    and for 256 tokens at least, goes nowhere.

    Args:
        tokens: of the text; to be asked after each new one.
    """
    if len(tokens) < _ENOUGH or len(tokens) % _EVERY:
        return False
    last = tokens[-1]
    for period in range(1, _LONGEST + 1):
        length = max(_ENOUGH, _TIMES * period)
        if length > len(tokens):
            return False
        if tokens[-1 - period] == last and list(tokens[-length:-period]) == list(tokens[period - length :]):
            return True
    return False
