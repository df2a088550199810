"""Passkey retrieval (arXiv 2305.16300): a number in a long text of no interest, asked for at its end."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from clex_eval import report
from clex_eval.haystack import fill, hide
from clex_eval.models import Model
from clex_eval.options import Length, lengths_option, models_argument, output_options
from clex_eval.report import Column, Report
from clex_eval.tasks import (
    Cell,
    Question,
    Result,
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
from clex_local.figure import checked_name

DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)
_MESSAGE = (
    "A pass key is hidden in the text below. Everything else in it is irrelevant. Find the pass key and memorize it: "
    "you will be asked for it afterwards.\n{text}\nWhat is the pass key?"
)


def question(model: Model, length: int, rng: random.Random, depth: float | None = None) -> Question:
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
    place = rng.uniform(0, 100) if depth is None else depth
    needle = (place, f"The pass key is {key}. Remember it: {key} is the pass key.")
    max_tokens = room(model, (key,), 16)

    def prompt(text: str) -> list[int]:
        return model.chat(_MESSAGE.format(text=hide(text, [needle])), "The pass key is")

    return Question(fill(prompt, length - max_tokens), (key,), max_tokens)


def score(answer: str, expected: tuple[str, ...]) -> float:
    """1 if the first number in the answer is the key, to the digit."""
    number = re.search(r"\d+", answer)
    return float(number is not None and number[0] == expected[0])


@documented
@dataclass(frozen=True, kw_only=True)
class PasskeyOptions(TaskOptions):
    """Where the keys are hidden, how many of them, and how the models are run."""

    depths: Sequence[float] = option(
        DEPTHS,
        "Where in the text the key is, in percent.",
        default_text=",".join(f"{depth:g}" for depth in DEPTHS),
        metavar="D,D,...",
        parse=parse_depths,
    )


@takes_options(PasskeyOptions)
def passkey(models: Sequence[Path], lengths: Sequence[Length], options: PasskeyOptions) -> Iterator[dict[str, Any]]:
    """Asks models for keys hidden in their contexts: one row for each model and length, when it is complete.

    A row has the share of right answers at each depth and over all of them, 0 to 1, and the answers.

    Args:
        models: GGUF files or Hugging Face folders.
        lengths: tokens of a prompt with its answer.
        {options}

    Raises:
        ClexError: a model cannot be run, or not at such a length.
    """
    # The deepest first: the others' prompts begin as that one does, and what a model has cached of it is kept.
    depths = sorted(options.depths, reverse=True)
    cells = [Cell("passkey", length, float(depth)) for length in lengths for depth in depths]
    found = ask(models, cells, {"passkey": question}, score, options, stop=("\n",))
    for group in in_groups(found, lambda result: (result.model, result.cell.length)):
        yield _row(group, options.depths)


def _row(group: list[Result], depths: Sequence[float]) -> dict[str, Any]:
    shares = {f"{depth:g}": mean(result for result in group if result.cell.depth == depth) for depth in depths}
    return {
        "model": group[0].model,
        "length": group[0].tokens,
        "scaling_factor": group[0].factor,
        **shares,
        "all": mean(group),
        "answers": answers(group),
    }


def plot(rows: Sequence[dict[str, Any]], depths: Sequence[float], output: Path) -> None:
    """Draws a heat map for each model into a PNG or SVG file.

    Args:
        rows: of ``passkey``.
        depths: those of the rows.
        output: a name that ends with .png or .svg; replaced if it exists.

    Raises:
        ClexError: the file cannot be written.
    """
    titles = list(dict.fromkeys(row["model"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    of = {(row["model"], row["length"]): row for row in rows}
    values = [
        [[of.get((title, length), {}).get(f"{depth:g}") for length in lengths] for depth in depths] for title in titles
    ]
    report.plot_heat_map(output, titles, lengths, depths, values)


@click.command("passkey", cls=Command, context_settings=SETTINGS)
@models_argument
@lengths_option("1x,2x")
@options_from(PasskeyOptions, without=("ctx",))
@output_options
def command(
    models: tuple[Path, ...],
    lengths: tuple[Length, ...],
    options: PasskeyOptions,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Hide a number in a text of each length and ask for it: the share found, by length and depth.

    With its answer begun, each prompt fills the length to the token. Text before the key is read once for all depths,
    so that one trial at five depths costs about 3.5 times as much as reading the length once, and another one 2.5.
    """
    if picture:
        checked_name(picture)
    columns = [
        Column("model", "model"),
        Column("length", "tokens", "{:,}".format),
        Column("scaling_factor", "t", "{:g}".format),
        *(Column(f"{depth:g}", f"{depth:g} %", percent) for depth in options.depths),
        Column("all", "all", percent),
    ]
    found = Report("passkey", columns)
    found.settings = {"models": models, "lengths": [str(length) for length in lengths]}
    found.settings |= options.settings("ctx", "notes")
    report.run(
        found,
        passkey(models, lengths, **vars(replace(options, notes=found.notes))),
        as_json=as_json,
        plot=(lambda: plot(found.rows, options.depths, picture)) if picture else None,
    )
