"""Text of no interest that fills a prompt to an exact number of tokens, with sentences hidden in it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from clex_local.errors import ClexError

# Short sentences of common words, which nearly every vocabulary has as one token each.
FILLER = "The river is wide. The hill is high. The road is long. We walk on. Then we turn back. "
_REACH = 32  # characters around a cut where another one may give the exact number of tokens
_ENDS = ("", ".", "!", " !", "...", " ...")  # of the text, for vocabularies in which no cut does
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def filler(characters: int) -> str:
    """So much of the repeated sentences, without a space at its end."""
    return (FILLER * (characters // len(FILLER) + 1))[:characters].rstrip()


def hide(text: str, needles: Sequence[tuple[float, str]]) -> str:
    """Puts sentences between those of a text.

    Args:
        text: sentences, the last of which may be cut off.
        needles: pairs of a depth, from 0 (before the text) to 100 (behind its last whole sentence), and a sentence.
            Those at one place keep their order.
    """
    ends = [0, *(match.end() for match in re.finditer(r"\.(?: |$)", text))]
    parts, start = [], 0
    for depth, sentence in sorted(needles, key=lambda needle: needle[0]):
        end = min(ends, key=lambda place: abs(place - depth / 100 * ends[-1]))
        parts += [text[start:end].strip(), sentence]
        start = end
    return " ".join(part for part in [*parts, text[start:].strip()] if part)


def largest(count: Callable[[int], int], target: int) -> int:
    """The largest size for which ``count(size)``, which grows with it, is at most target.

    Raises:
        ClexError: not even size 0 fits.
    """
    if count(0) > target:
        raise ClexError(f"the question and its answer take {count(0) - target:,} tokens more than that")
    low, high = 0, 1
    while count(high) <= target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= target else (low, middle)
    return low


def fill(prompt: Callable[[str], list[int]], target: int) -> list[int]:
    """The prompt around a filler that gives it exactly target tokens.

    The filler is cut between words, or inside one where only that gives the number, and may end with marks.
    Should a vocabulary have no such text at all, the prompt is the longest below.

    Args:
        prompt: makes the tokens of a whole prompt from its filler.
        target: tokens of the prompt.

    Raises:
        ClexError: the prompt is longer than that without any filler.
    """
    best = largest(lambda characters: len(prompt(filler(characters))), target)
    near = range(max(0, best - _REACH), best + _REACH)
    cuts = list(dict.fromkeys(filler(size) for size in sorted(near, key=lambda size: abs(size - best))))
    between_words = [text for text in cuts if FILLER[len(text) % len(FILLER)] == " "]
    for text in (text + end for texts in (between_words, cuts) for end in _ENDS for text in texts):
        if len(tokens := prompt(text)) == target:
            return tokens
    return prompt(filler(best))


def words(rng: random.Random, count: int) -> list[str]:
    """Different invented words that can be pronounced. All have six letters, so that none is a part of another."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(3))] = None
    return list(found)
