"""LongBench (arXiv 2308.14508): its records read from disk, its truncation and its metrics.

The prompts are our own, one for each kind of task; pass the benchmark's own for scores to compare with published ones.
"""

from __future__ import annotations

import json
import os
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from clex_eval.models import Model
from clex_local.errors import ClexError

_ENDING = re.compile(r"_e$")  # of the names in LongBench-E
PROMPTS = {
    "question": (
        "Read the text and answer the question about it. Give nothing but the answer, in as few words as you can and "
        "in the language of the text.\n\n{context}\n\nQuestion: {input}\nAnswer:"
    ),
    "summary": (
        "Summarize the text in its own language; where a question follows it, with regard to that.\n\n"
        "{context}\n\n{input}\nSummary:"
    ),
    "examples": "Continue the last of these examples as the others do.\n\n{context}\n{input}",
    "retrieval": (
        "Here are numbered paragraphs and the summary of one of them. Name the paragraph it summarizes, with its "
        "number as in the text.\n\n{context}\n\nSummary: {input}\nParagraph:"
    ),
    "count": (
        "Some of these paragraphs come more than once. How many different ones are there? Give nothing but the "
        "number.\n\n"
        "{context}\n\n{input}\nNumber:"
    ),
    "code": "{context}{input}",
}


@dataclass(frozen=True)
class DataSet:
    """How the records of a data set are asked and scored: key of METRICS and of PROMPTS, tokens left for an answer.

    ``chat`` is off where LongBench gives even a chat model the bare prompt; ``first_line`` takes that of the answer.
    """

    metric: str
    prompt: str
    max_tokens: int
    chat: bool = True
    first_line: bool = False


def _data_sets() -> dict[str, DataSet]:
    long, short = DataSet("qa_f1", "question", 128), DataSet("qa_f1", "question", 32)
    summary = DataSet("rouge_l", "summary", 512)
    examples = {"prompt": "examples", "chat": False, "first_line": True}
    retrieval = DataSet("retrieval", "retrieval", 32)
    code = DataSet("code_similarity", "code", 64, chat=False)
    return {
        **dict.fromkeys(("narrativeqa", "qasper"), long),
        **dict.fromkeys(("multifieldqa_en", "multifieldqa_zh"), DataSet("qa_f1", "question", 64)),
        **dict.fromkeys(("hotpotqa", "2wikimqa", "musique"), short),
        **dict.fromkeys(("gov_report", "qmsum", "multi_news", "vcsum"), summary),
        "dureader": DataSet("rouge_l", "question", 128),
        "triviaqa": DataSet("qa_f1", max_tokens=32, **examples),
        "samsum": DataSet("rouge_l", max_tokens=128, **examples),
        **dict.fromkeys(("trec", "lsht"), DataSet("classification", max_tokens=64, **examples)),
        **dict.fromkeys(("passage_retrieval_en", "passage_retrieval_zh"), retrieval),
        "passage_count": DataSet("count", "count", 32),
        **dict.fromkeys(("lcc", "repobench-p"), code),
    }


DATA_SETS = _data_sets()
# For data sets that are not LongBench's.
_OF_METRIC = {
    "qa_f1": DATA_SETS["narrativeqa"],
    "rouge_l": DATA_SETS["gov_report"],
    "classification": DATA_SETS["trec"],
    "retrieval": DATA_SETS["passage_retrieval_en"],
    "count": DATA_SETS["passage_count"],
    "code_similarity": DATA_SETS["lcc"],
}


@dataclass(frozen=True)
class Record:
    """One line of a file: what is asked about a context, the answers that count, and how they are scored."""

    id: str
    dataset: str
    input: str
    context: str
    answers: tuple[str, ...]
    all_classes: tuple[str, ...]
    chinese: bool
    kind: DataSet


def read(path: str | os.PathLike[str], metric: str | None = None) -> Iterator[Record]:
    """The records of a file, one JSON object a line.

    Args:
        path: file in LongBench's format.
        metric: key of METRICS for data sets that are not LongBench's.

    Raises:
        ClexError: the file cannot be read, or a line is no such record; the message says which.
    """
    try:
        with open(path, encoding="utf-8") as file:
            empty = True
            for number, line in enumerate(file, 1):
                if line.strip():
                    empty = False
                    yield _record(line, f"{path}, line {number}", metric)
    except UnicodeDecodeError:
        raise ClexError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise ClexError(f"{path}: cannot be read ({error.strerror or error})") from None
    if empty:
        raise ClexError(f"{path}: has no records")


def _record(line: str, place: str, metric: str | None) -> Record:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise ClexError(f"{place}: not JSON; LongBench's files have one object a line") from None
    if not isinstance(fields, dict):
        raise ClexError(f"{place}: not a JSON object")
    fields = {"_id": "", "language": "en", **fields, "all_classes": fields.get("all_classes") or []}
    for name in ("_id", "dataset", "input", "context", "language"):
        if not isinstance(fields.get(name), str):
            raise ClexError(f"{place}: needs a text in the field {name}")
    for name in ("answers", "all_classes"):
        if not isinstance(fields.get(name), list) or not all(isinstance(text, str) for text in fields[name]):
            raise ClexError(f"{place}: needs a list of texts in the field {name}")
    if not fields["answers"]:
        raise ClexError(f"{place}: has no answers")
    name = fields["dataset"]
    kind = DATA_SETS.get(_ENDING.sub("", name)) or _OF_METRIC.get(metric or "")
    if kind is None:
        raise ClexError(f"{place}: the data set {name!r} is not one of LongBench's; --metric says how to score it")
    if kind.metric == "classification" and not fields["all_classes"]:
        raise ClexError(f"{place}: needs the field all_classes to score a classification")
    return Record(
        fields["_id"],
        name,
        fields["input"],
        fields["context"],
        tuple(fields["answers"]),
        tuple(fields["all_classes"]),
        fields["language"] == "zh",
        kind,
    )


def prompt_tokens(model: Model, record: Record, template: str | None = None) -> tuple[list[int], int]:
    """The prompt of a record, and how many tokens it would have in full.

    A prompt that does not fit in the model's context with the answer loses its middle, as in LongBench.

    Args:
        model: the model to ask.
        record: what to ask.
        template: text with {context} and {input}. Default: that of the record's kind of task.

    Raises:
        ClexError: the context has no room for a prompt.
    """
    texts = {"{context}": record.context, "{input}": record.input}
    template = PROMPTS[record.kind.prompt] if template is None else template
    text = re.sub(r"\{(context|input)\}", lambda match: texts[match[0]], template)
    ask = model.chat if record.kind.chat else lambda text: model.tokenize(text, bos=True)
    tokens, room = ask(text), model.context_length - record.kind.max_tokens
    full = len(tokens)
    if full <= room:
        return tokens, full
    inner = model.tokenize(text)
    keep = min(len(inner), room)
    while len(tokens) > room:
        keep -= max(len(tokens) - room, 1) if len(tokens) < full else full - len(inner)
        if keep < 2:
            raise ClexError(f"a context of {model.context_length:,} tokens has no room for a prompt and its answer")
        halves = inner[: keep // 2], inner[len(inner) - keep // 2 :]
        tokens = ask("".join(model.detokenize(half).strip("\N{REPLACEMENT CHARACTER}") for half in halves))
    return tokens, full


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
