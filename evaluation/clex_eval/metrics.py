"""The metrics of LongBench (arXiv 2308.14508), by rouge-score and rapidfuzz.

Chinese texts are compared by characters, not by words.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from clex_eval.records import DATA_SETS, Record
from clex_local.errors import ClexError


def score(record: Record, answer: str) -> float:
    """How good an answer is, 0 to 1: the best over the answers that count."""
    if record.kind.first_line:
        answer = answer.lstrip("\n").split("\n")[0]
    return max(METRICS[record.kind.metric](answer, right, record) for right in record.answers)


class _Tokenizer:
    """Words for rouge-score: as SQuAD compares them, without articles, or single characters where a text is Chinese."""

    def __init__(self, characters: bool, articles: bool) -> None:
        self.characters, self.articles = characters, articles

    def tokenize(self, text: str) -> list[str]:
        text = text.lower()
        if self.characters:
            return [character for character in text if character.isalnum()]
        words = "".join(character for character in text if character not in string.punctuation).split()
        return [word for word in words if self.articles or word not in ("a", "an", "the")]


@cache
def _rouge(name: str, characters: bool, articles: bool) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ClexError("needs the Python package rouge-score: pip install 'clex-local[eval]'") from None
    return RougeScorer([name], tokenizer=_Tokenizer(characters, articles))


def _qa_f1(answer: str, right: str, record: Record) -> float:
    # The F1 of words that SQuAD scores is ROUGE-1 on its words.
    return _rouge("rouge1", record.chinese, articles=False).score(right, answer)["rouge1"].fmeasure


def _rouge_l(answer: str, right: str, record: Record) -> float:
    return _rouge("rougeL", record.chinese, articles=True).score(right, answer)["rougeL"].fmeasure


def _classification(answer: str, right: str, record: Record) -> float:
    # A class whose name is a part of the right one's is not a second answer.
    named = [name for name in record.all_classes if name in answer and (name == right or name not in right)]
    return 1 / len(named) if right in named else 0.0


def _retrieval(answer: str, right: str, record: Record) -> float:
    return _count(answer, "".join(re.findall(r"\d+", right)[:1]), record)


def _count(answer: str, right: str, record: Record) -> float:
    numbers = re.findall(r"\d+", answer)
    return numbers.count(right) / len(numbers) if numbers else 0.0


def _code_similarity(answer: str, right: str, record: Record) -> float:
    try:
        from rapidfuzz.fuzz import ratio
    except ImportError:
        raise ClexError("needs the Python package rapidfuzz: pip install 'clex-local[eval]'") from None
    lines = (line for line in answer.lstrip("\n").split("\n") if not any(mark in line for mark in ("`", "#", "//")))
    return ratio(next(lines, ""), right) / 100


METRICS: dict[str, Callable[[str, str, Record], float]] = {
    "qa_f1": _qa_f1,
    "rouge_l": _rouge_l,
    "classification": _classification,
    "retrieval": _retrieval,
    "count": _count,
    "code_similarity": _code_similarity,
}


def check_packages(names: Iterable[str]) -> None:
    """Finds out before any answer is asked for whether metrics can be computed.

    Raises:
        ClexError: a package is missing.
    """
    nothing = Record("", "", "", "", ("",), ("",), False, DATA_SETS["lcc"])
    for name in set(names):
        METRICS[name]("", "", nothing)
