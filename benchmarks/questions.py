"""Questions about *Emma* in LongBench's format, each with the part of the novel around its passage as the context.

They were written by hand, one passage of the novel for each: benchmarks/emma_questions.jsonl. They ask for a name, a
number or a thing that the passage has word for word, since a small model can be asked for no more.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import click

from benchmarks.text import emma

QUESTIONS = Path(__file__).with_name("emma_questions.jsonl")
DATA_SET, METRIC = "emma", "qa_f1"
_RESERVED = 256  # tokens for the instruction, the question and the answer
_PIECE = 1500  # characters that a piece has at most, where its sentences allow
CONTEXTS = ("novel", "passage", "none")


class Question(NamedTuple):
    """What is asked, the strings that count as an answer, and the passage of the novel that has the first of them."""

    question: str
    answers: tuple[str, ...]
    passage: str


def questions() -> list[Question]:
    """All of them, in the order of the novel."""
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
    return [Question(found["question"], tuple(found["answers"]), found["passage"]) for found in map(json.loads, lines)]


def says(answer: str, answers: Iterable[str]) -> bool:
    """Whether the first line of an answer has one of the strings: as whole words, in any case, in the plural too.

    A number that is a part of another one, as four of four-and-twenty or 10 of 10,000, does not count.
    """
    line = answer.strip().partition("\n")[0]
    wanted = "|".join(map(re.escape, answers))
    return re.search(rf"(?<![\w-])({wanted})('?s)?(?!\w|-\w|,\d)", line, re.IGNORECASE) is not None


def pieces(text: str, passages: Sequence[str]) -> Iterator[str]:
    """The paragraphs of a text, each as one line, the long ones in parts; joined they are the text.

    They are parted between sentences, never inside a passage.
    """
    for part in re.split(r"\n\s*\n", text):
        paragraph = " ".join(part.split())
        inside = [(at, at + len(one)) for one in passages if (at := paragraph.find(one)) >= 0]
        ends = [end.start() + 1 for end in re.finditer(r"(?<=[.;!?]) ", paragraph)]
        ends = [end for end in ends if not any(first < end < last for first, last in inside)]
        start = 0
        for end, after in pairwise([*ends, len(paragraph)]):
            if after - start > _PIECE and end > start:
                yield paragraph[start:end]
                start = end
        if paragraph:
            yield paragraph[start:] + "\n\n"


def windows(sizes: list[int], most: int) -> list[range]:
    """The pieces of a book in windows of as many tokens as fit, side by side; the last is filled from before it.

    Args:
        sizes: tokens of each piece.
        most: tokens of a window.

    Raises:
        ValueError: a piece does not fit.
    """
    if max(sizes) > most:
        raise ValueError(f"a piece has {max(sizes):,} tokens, more than {most:,}")
    before = [0, *accumulate(sizes)]
    found, first = [], 0
    while first < len(sizes):
        end = bisect_right(before, before[first] + most) - 1
        found.append(range(first, end))
        first = end
    first = next(k for k, size in enumerate(before) if before[-1] - size <= most)
    return [*found[:-1], range(first, len(sizes))]


def records(tokens: Callable[[str], int], length: int, text: str, context: str = "novel") -> Iterator[dict[str, Any]]:
    """The questions in LongBench's format, in the order of the novel, so that those of one context are together.

    Args:
        tokens: counts those of a text.
        length: tokens of a prompt with its answer.
        text: the novel.
        context: ``novel``: as much of it as fits around the passage; ``passage``: that alone; ``none``: nothing.

    Raises:
        ValueError: the novel does not have a passage, or the length has no room for a piece of it.
    """
    asked = questions()
    if context != "novel":
        for number, question in enumerate(asked):
            yield _record(number, question, question.passage if context == "passage" else "", 0)
        return
    parts = list(pieces(text, [question.passage for question in asked]))
    places = [next((k for k, part in enumerate(parts) if question.passage in part), -1) for question in asked]
    if -1 in places:
        raise ValueError(f"the novel does not have the passage {asked[places.index(-1)].passage!r}")
    covered = 0
    # A text may have a few tokens more than its pieces have.
    for window in windows([tokens(part) for part in parts], length - _RESERVED - length // 64):
        content = "".join(parts[k] for k in window).strip()
        for number, (question, place) in enumerate(zip(asked, places, strict=True)):
            if covered <= place < window.stop:
                yield _record(number, question, content, 100 * content.index(question.passage) / len(content))
        covered = window.stop


def _record(number: int, question: Question, context: str, depth: float) -> dict[str, Any]:
    return {
        "input": question.question,
        "context": context,
        "answers": list(question.answers),
        "length": len(context.split()),
        "dataset": DATA_SET,
        "language": "en",
        "all_classes": None,
        "_id": f"emma-{number + 1}",
        "depth": round(depth, 1),  # of the passage in the context, in percent
    }


def write(path: Path, found: Iterable[Mapping[str, Any]]) -> None:
    """A file in LongBench's format."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in found]
    path.write_text("".join(lines), encoding="utf-8")


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--length", type=click.IntRange(min=2048), default=8192, show_default=True, help="Tokens of a prompt.")
@click.option("--context", type=click.Choice(CONTEXTS), default="novel", show_default=True, help="What can be read.")
def main(model: Path, output: Path, length: int, context: str) -> None:
    """Write the questions for `clex-eval longbench --metric qa_f1`, with contexts of so many of MODEL's tokens."""
    from clex_eval.loading import open_for_evaluation

    with open_for_evaluation(model, ctx=256) as opened:
        text = emma().read_text(encoding="utf-8")
        write(output, records(lambda part: len(opened.tokenize(part)), length, text, context))


if __name__ == "__main__":
    main()
