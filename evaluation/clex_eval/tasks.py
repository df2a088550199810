"""Questions that fill a context, put to models."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from clex_eval.loading import open_for_evaluation
from clex_eval.models import Model
from clex_eval.options import EvalOptions, Length, names
from clex_eval.ppl import plan
from clex_eval.report import working
from clex_local.commands.options import documented, option
from clex_local.errors import ClexError

T = TypeVar("T")


class Question(NamedTuple):
    """A prompt that ends with the answer begun, the strings that the answer should have, and the tokens left for it."""

    prompt: list[int]
    expected: tuple[str, ...]
    max_tokens: int


# Makes a question of so many tokens, prompt and answer, with its needle at a depth of 0 to 100 if it has one.
Task = Callable[[Model, int, random.Random, "float | None"], Question]


@dataclass(frozen=True)
class Cell:
    """What a score is for: a task, a context length, and a depth of 0 to 100 (None: random, or it has none)."""

    task: str
    length: Length
    depth: float | None = None


@dataclass(frozen=True)
class Result:
    """The answer to one question: ``tokens`` is the length of the prompt and the answer, ``score`` is 0 to 1."""

    model: str
    cell: Cell
    tokens: int
    factor: float | None
    trial: int
    expected: tuple[str, ...]
    answer: str
    score: float


def room(model: Model, expected: Iterable[str], least: int) -> int:
    """Tokens to leave for an answer: twice what it needs, since small vocabularies take many for a word."""
    return max(least, 2 * len(model.tokenize(" " + " ".join(expected))))


@documented
@dataclass(frozen=True, kw_only=True)
class TaskOptions(EvalOptions):
    """How many questions are asked, and how the models are run."""

    trials: int = option(
        1,
        "Questions for each cell of the table. Reading the prompts takes nearly all the time.",
        metavar="N",
        minimum=1,
    )
    seed: int = option(0, "Seed of the random choices.", metavar="N")
    notes: list[str] | None = option(None, "What a reader should know is added to them.", command=False)


def ask(
    models: Sequence[Path],
    cells: Sequence[Cell],
    tasks: Mapping[str, Task],
    score: Callable[[str, tuple[str, ...]], float],
    options: TaskOptions,
    stop: Sequence[str] = (),
) -> Iterator[Result]:
    """Asks each model the questions of each cell, and gives the answers as they come.

    A question depends on its cell, the seed, the number of the trial, and the model's tokens and chat template.

    Args:
        models: GGUF files or Hugging Face folders.
        cells: in the order in which they are asked; a model that keeps its cache need not compute again what a prompt
            begins with as the one before.
        tasks: those of the cells, by their names.
        score: of an answer, by the strings that it should have.
        options: questions for each cell, and how the models are run.
        stop: strings that end an answer.

    Raises:
        ClexError: a model does not cover a length, a task does not fit in it, or a model cannot be run.
    """
    lengths = [cell.length for cell in cells]
    plans = [plan(path, lengths, None, options.clamp, options.extend) for path in models]
    if options.notes is not None:
        options.notes.extend(dict.fromkeys(note for _, _, note in plans if note))
    with working() as work:
        work.expect(len(models) * len(cells) * options.trials)
        for path, name, (covers, sizes, _) in zip(models, names(models), plans, strict=True):
            work.name(name)
            with open_for_evaluation(path, **options.of_models(max(sizes))) as model:
                for cell in cells:
                    size = cell.length.of(covers.original)
                    for trial in range(options.trials):
                        rng = random.Random(f"{cell.task} {size} {cell.depth} {options.seed} {trial}")
                        try:
                            question = tasks[cell.task](model, size, rng, cell.depth)
                        except ClexError as error:
                            raise ClexError(f"{path}: {cell.task} in {size:,} tokens: {error}") from None
                        answer = model.generate(question.prompt, question.max_tokens, stop)
                        yield Result(
                            name,
                            cell,
                            size,
                            model.scaling_factor(size),
                            trial,
                            question.expected,
                            answer,
                            score(answer, question.expected),
                        )
                        work.advance()


def in_groups(results: Iterable[T], key: Callable[[T], Any]) -> Iterator[list[T]]:
    """Groups of successive results of one key; after an error or Ctrl-C what there is of the group, then that error."""
    group: list[T] = []
    try:
        for result in results:
            if group and key(result) != key(group[0]):
                yield group
                group = []
            group.append(result)
    except (KeyboardInterrupt, ClexError):
        if group:
            yield group
        raise
    if group:
        yield group


def mean(results: Iterable[Result]) -> float | None:
    """Mean score; None without any result."""
    scores = [result.score for result in results]
    return fmean(scores) if scores else None


def percent(share: float) -> str:
    """How a table shows a score."""
    return f"{100 * share:.0f}"


def answers(results: Iterable[Result]) -> list[dict[str, Any]]:
    """What the JSON says of each answer."""
    return [
        {
            "tokens": result.tokens,
            "depth": result.cell.depth,
            "trial": result.trial,
            "expected": result.expected,
            "answer": result.answer,
            "score": result.score,
        }
        for result in results
    ]


def parse_depths(text: str) -> tuple[float, ...]:
    """The depths of a text such as ``0,50,100``, ascending.

    Raises:
        ValueError: one of them is no percent.
    """
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not all(0 <= depth <= 100 for depth in found):
        raise ValueError(f"{text!r}: depths are percents from 0 (the beginning) to 100, such as 0,50,100")
    return tuple(found)
