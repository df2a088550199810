"""The synthetic tasks of RULER (arXiv 2404.06654) that need no data set, made to fill a length of the model's tokens.

The tasks, their sizes and their scores are the paper's; the wording and the invented words are our own, so that a score
compares models and lengths measured here, not with published ones.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from clex_eval import report
from clex_eval.haystack import fill, hide, largest, words
from clex_eval.models import Model
from clex_eval.options import Length, lengths_option, models_argument, output_options
from clex_eval.report import Column, Report
from clex_eval.tasks import (
    Cell,
    Question,
    Task,
    TaskOptions,
    answers,
    ask,
    in_groups,
    mean,
    parse_depths,
    percent,
    room,
)
from clex_local.commands.command import SETTINGS, Command
from clex_local.commands.command_options import options_from
from clex_local.commands.options import documented, option, takes_options
from clex_local.errors import ClexError
from clex_local.figure import checked_name

_NEEDLES = 4  # of niah_multikey; one of them is asked for
_HOPS = 4  # of a chain of variables
_COMMON = 10  # words to find among the common ones
_ALPHA = 2.0  # of the Zipf distribution of the coded words
_NOISE = "..."  # the likeliest coded word, which does not count
_SHORT = 4096  # below it, words are repeated less often


def score(answer: str, expected: tuple[str, ...]) -> float:
    """Share of the expected strings that the answer has, upper and lower case being the same."""
    return sum(text.lower() in answer.lower() for text in expected) / len(expected)


def niah_single(model: Model, length: int, rng: random.Random, depth: float | None = None) -> Question:
    """A word's number in repeated noise, at a depth of 0 to 100, or a random one."""
    return _niah(model, length, rng, depth, 1)


def niah_multikey(model: Model, length: int, rng: random.Random, depth: float | None = None) -> Question:
    """As niah_single, among the numbers of three other words at random depths."""
    return _niah(model, length, rng, depth, _NEEDLES)


def _niah(model: Model, length: int, rng: random.Random, depth: float | None, count: int) -> Question:
    keys, numbers = words(rng, count), rng.sample(range(10**6, 10**7), count)
    depths = [rng.uniform(0, 100) for _ in keys]
    if depth is not None:
        depths[0] = depth
    needles = [
        (place, f"The secret number of {key} is {number}.")
        for place, key, number in zip(depths, keys, numbers, strict=True)
    ]
    expected = (str(numbers[0]),)
    max_tokens = room(model, expected, 24)

    def prompt(text: str) -> list[int]:
        message = (
            "Some secret numbers are hidden in the text below. Memorize them: afterwards you will be asked for one.\n"
            f"{hide(text, needles)}\nWhat is the secret number of {keys[0]} that the text gives?"
        )
        return model.chat(message, f"The secret number of {keys[0]} is")

    return Question(fill(prompt, length - max_tokens), expected, max_tokens)


def variable_tracking(model: Model, length: int, rng: random.Random, _: float | None = None) -> Question:
    """A number and the variables that get it through a chain of assignments, hidden in repeated noise."""

    def chain() -> tuple[list[str], str, list[str]]:
        names: dict[str, None] = {}
        while len(names) <= _HOPS:
            names["".join(rng.choices(string.ascii_uppercase, k=5))] = None
        number = str(rng.randrange(10**4, 10**5))
        values = [number, *(f"VAR {name}" for name in names)]
        return list(names), number, [f"VAR {name} = {value}." for name, value in zip(names, values, strict=False)]

    def question(text: str, number: str) -> str:
        return (
            "Follow the chain of variable assignments that is hidden in the text below.\n"
            f"{text}\nQuestion: which variables have the value {number}, directly or through others?"
        )

    begun = f"Answer: these {_HOPS + 1} variables have the value {{}}:"
    (names, number, lines), depths = chain(), sorted(rng.uniform(0, 100) for _ in range(_HOPS + 1))
    shown, its_number, its_lines = chain()
    example = f"{question(' '.join(its_lines), its_number)}\n{begun.format(its_number)} {' '.join(shown)}\n\n"
    expected = tuple(names)
    max_tokens = room(model, expected, 30)

    def prompt(text: str) -> list[int]:
        hidden = hide(text, list(zip(depths, lines, strict=True)))
        return model.chat(example + question(hidden, number), begun.format(number))

    return Question(fill(prompt, length - max_tokens), expected, max_tokens)


def common_words(model: Model, length: int, rng: random.Random, _: float | None = None) -> Question:
    """Ten words of a list that are in it thirty times, the others three times; ten times and once where it is short."""
    often, seldom = (30, 3) if length >= _SHORT else (10, 1)
    seed = rng.getrandbits(64)

    def question(listed: list[str]) -> str:
        return (
            f"In the numbered list of words below, some words come more often than the others. Memorize those.\n"
            f"{_numbered(listed)}\nQuestion: which {_COMMON} words come most often in the list?"
        )

    def repeated(found: list[str], often: int, seldom: int, rng: random.Random) -> list[str]:
        listed = found[:_COMMON] * often + found[_COMMON:] * seldom
        rng.shuffle(listed)
        return listed

    begun = f"Answer: the {_COMMON} words that come most often are:"
    shown = words(rng, 2 * _COMMON)
    example = f"{question(repeated(shown, 3, 1, rng))}\n{begun} {_numbered(shown[:_COMMON])}\n\n"
    expected = tuple(words(random.Random(seed), _COMMON))
    max_tokens = room(model, (_numbered(list(expected)),), 120)

    def prompt(others: int) -> list[int]:
        drawn = random.Random(seed)  # gives the expected words first, whatever the number of the others
        return model.chat(example + question(repeated(words(drawn, _COMMON + others), often, seldom, drawn)), begun)

    others = largest(lambda others: len(prompt(others)), length - max_tokens)
    if not others:
        raise ClexError("leaves no room for uncommon words")
    return Question(prompt(others), expected, max_tokens)


def frequent_words(model: Model, length: int, rng: random.Random, _: float | None = None) -> Question:
    """The three most frequent of coded words that are distributed as Zipf says, the noise among them apart."""
    coded: dict[str, None] = {_NOISE: None}
    while len(coded) < max(length // 50, 10):
        coded["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    shares = [rank**-_ALPHA for rank in range(1, len(coded) + 1)]
    expected = tuple(list(coded)[1:4])
    seed, max_tokens = rng.getrandbits(64), room(model, expected, 50)

    def counts(total: int) -> list[int]:
        return [int(total * share / sum(shares)) for share in shares]

    def prompt(total: int) -> list[int]:
        text = [word for word, count in zip(coded, counts(total), strict=True) for _ in range(count)]
        random.Random(seed).shuffle(text)
        message = (
            f"Count how often each coded word comes in the text below.\n{' '.join(text)}\n"
            f"Question: leaving out the dots '{_NOISE}', which three coded words come most often? Name nothing else."
        )
        return model.chat(message, "Answer: the three coded words that come most often are:")

    total = largest(lambda total: len(prompt(total)), length - max_tokens)
    if counts(total)[3] <= counts(total)[4]:
        raise ClexError("leaves no room for words of different frequencies")
    return Question(prompt(total), expected, max_tokens)


def _numbered(listed: list[str]) -> str:
    return " ".join(f"{place}. {word}" for place, word in enumerate(listed, 1))


TASKS: dict[str, Task] = {
    task.__name__: task for task in (niah_single, niah_multikey, variable_tracking, common_words, frequent_words)
}
HAVE_DEPTH = ("niah_single", "niah_multikey")


def parse_tasks(text: str) -> tuple[str, ...]:
    """The tasks of a text with commas between their names.

    Raises:
        ValueError: there is no such task.
    """
    found = tuple(dict.fromkeys(text.split(",")))
    for task in found:
        if task not in TASKS:
            raise ValueError(f"{task!r} is none of {', '.join(TASKS)}")
    return found


@documented
@dataclass(frozen=True, kw_only=True)
class RulerOptions(TaskOptions):
    """Which tasks are given, how often, and how the models are run."""

    tasks: Sequence[str] = option(
        tuple(TASKS), f"Tasks: {', '.join(TASKS)}.", default_text="all", metavar="TASK,...", parse=parse_tasks
    )
    depths: Sequence[float] | None = option(
        None,
        "Where the needles of niah_* are, in percent; a row for each.",
        default_text="anywhere",
        metavar="D,D,...",
        parse=parse_depths,
    )


@takes_options(RulerOptions)
def ruler(models: Sequence[Path], lengths: Sequence[Length], options: RulerOptions) -> Iterator[dict[str, Any]]:
    """Gives models the tasks: one row for each model and task, when it is complete.

    A row has the score at each length and over all of them, 0 to 1, and the answers.

    Args:
        models: GGUF files or Hugging Face folders.
        lengths: tokens of a prompt with its answer.
        {options}

    Raises:
        ClexError: a model cannot be run, or a task does not fit in a length.
    """
    cells = [
        Cell(task, length, None if depth is None else float(depth))
        for task in options.tasks
        for depth in (options.depths if options.depths and task in HAVE_DEPTH else (None,))
        for length in lengths
    ]
    found = ask(models, cells, TASKS, score, options)
    for group in in_groups(found, lambda result: (result.model, result.cell.task, result.cell.depth)):
        scores = {str(length): mean(result for result in group if result.cell.length == length) for length in lengths}
        yield {
            "model": group[0].model,
            "task": group[0].cell.task,
            "depth": group[0].cell.depth,
            **scores,
            "all": mean(group),
            "answers": answers(group),
        }


def plot(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Draws the scores of each model in each task over the length, the mean of all depths, into a PNG or SVG file.

    Args:
        rows: of ``ruler``.
        output: a name that ends with .png or .svg; replaced if it exists.

    Raises:
        ClexError: the file cannot be written.
    """
    scores: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        curve = scores.setdefault(f"{row['model']}: {row['task']}", {})
        for answer in row["answers"]:
            curve.setdefault(answer["tokens"], []).append(100 * answer["score"])
    report.plot_scores(output, "RULER", scores, "context length (tokens)")


@click.command("ruler", cls=Command, context_settings=SETTINGS)
@models_argument
@lengths_option("1x,2x")
@options_from(RulerOptions, without=("ctx",))
@output_options
def command(
    models: tuple[Path, ...],
    lengths: tuple[Length, ...],
    options: RulerOptions,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Give models the generated tasks of RULER that need no data set, at each length: the share of each answer found.

    niah_*: the number of a word in repeated noise, alone or among others; variable_tracking: the variables that get a
    number through a chain of assignments; common_words: the ten words that come most often in a list; frequent_words:
    the three most frequent of coded words.
    """
    if picture:
        checked_name(picture)
    columns = [
        Column("model", "model"),
        Column("task", "task"),
        *([Column("depth", "depth", "{:g} %".format)] if options.depths else []),
        *(Column(str(length), f"{length}", percent) for length in lengths),
        Column("all", "all", percent),
    ]
    found = Report("ruler", columns)
    found.settings = {"models": models, "lengths": [str(length) for length in lengths]}
    found.settings |= options.settings("ctx", "notes")
    report.run(
        found,
        ruler(models, lengths, **vars(replace(options, notes=found.notes))),
        as_json=as_json,
        plot=(lambda: plot(found.rows, picture)) if picture else None,
    )
