"""Passkey retrieval (arXiv 2305.16300): a number in a long text of no interest, asked for at its end."""

from __future__ import annotations

import random
import re

from clex_eval.haystack import fill, hide
from clex_eval.models import Model
from clex_eval.tasks import Question, room

_MESSAGE = (
    "A pass key is hidden in the text below. Everything else in it is irrelevant. Find the pass key and memorize it: "
    "you will be asked for it afterwards.\n{text}\nWhat is the pass key?"
)


def passkey(model: Model, length: int, rng: random.Random, depth: float | None = None) -> Question:
    """A prompt that, with its answer, is exactly length tokens of the model.

    Args:
        model: the model to ask, whose tokens and chat template are used.
        length: tokens of the prompt and the answer.
        rng: draws the five digits of the key, and the depth where none is given.
        depth: where the key is: 0 before the filler, 100 behind it.

    Raises:
        ClexError: the length has no room for the question.
    """
    key = str(rng.randrange(10**4, 10**5))
    needle = (
        rng.uniform(0, 100) if depth is None else depth,
        f"The pass key is {key}. Remember it: {key} is the pass key.",
    )
    max_tokens = room(model, (key,), 16)

    def prompt(text: str) -> list[int]:
        return model.chat(_MESSAGE.format(text=hide(text, [needle])), "The pass key is")

    return Question(fill(prompt, length - max_tokens), (key,), max_tokens)


def score(answer: str, expected: tuple[str, ...]) -> float:
    """1 if the first number in the answer is the key, to the digit."""
    number = re.search(r"\d+", answer)
    return float(number is not None and number[0] == expected[0])
