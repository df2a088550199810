"""Questions that fill a context, and how models answer them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from clex_eval.models import Model
from clex_local.errors import ClexError


class Question(NamedTuple):
    """A prompt that ends with the answer begun, the strings that the answer should have, and the tokens left for it."""

    prompt: list[int]
    expected: tuple[str, ...]
    max_tokens: int


# Makes a question of so many tokens, prompt and answer, with its needle at a depth of 0 to 100 if it has one.
Task = Callable[[Model, int, random.Random, float | None], Question]


@dataclass(frozen=True)
class Result:
    """The answer to one question.

    ``depth`` is None where it was drawn at random or means nothing; ``score`` is 0 to 1.
    """

    model: str
    task: str
    length: int
    depth: float | None
    trial: int
    expected: tuple[str, ...]
    answer: str
    score: float


def room(model: Model, expected: Iterable[str], least: int) -> int:
    """Tokens to leave for an answer: twice what it needs, since small vocabularies take many for a word."""
    return max(least, 2 * len(model.tokenize(" " + " ".join(expected))))


def ask(
    model: Model,
    name: str,
    task: Task,
    length: int,
    *,
    score: Callable[[str, tuple[str, ...]], float],
    depths: Sequence[float | None] = (None,),
    trials: int = 1,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> Iterator[Result]:
    """Asks a model the questions of a task at one length, and gives each answer as it comes.

    A question depends on nothing but the arguments. The deepest needles come first: their prompts begin as the others
    do, which a model that keeps its cache need not compute again.

    Raises:
        ClexError: the task does not fit in the length.
    """
    for depth in sorted(depths, key=lambda depth: -(depth or 0)):
        for trial in range(trials):
            rng = random.Random(f"{name} {length} {depth} {seed} {trial}")
            try:
                question = task(model, length, rng, depth)
            except ClexError as error:
                raise ClexError(f"{name} in {length:,} tokens of {model.name}: {error}") from None
            answer = model.generate(question.prompt, question.max_tokens, stop)
            points = score(answer, question.expected)
            yield Result(model.name, name, length, depth, trial, question.expected, answer, points)


def mean(results: Iterable[Result]) -> float | None:
    """Mean score, None without any results."""
    scores = [result.score for result in results]
    return fmean(scores) if scores else None
