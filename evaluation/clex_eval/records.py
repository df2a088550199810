"""Records of LongBench (arXiv 2308.14508), and what its data sets ask for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from clex_local.errors import ClexError

_ENDING = re.compile(r"_e$")  # of the names in LongBench-E


@dataclass(frozen=True)
class DataSet:
    """How the records of a data set are asked and scored: names of a metric and of a prompt, tokens left for an answer.

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
_OTHERS = {
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
        metric: a name from METRICS for data sets that are not LongBench's.

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
    kind = DATA_SETS.get(_ENDING.sub("", name)) or _OTHERS.get(metric or "")
    if kind is None:
        raise ClexError(f"{place}: the data set {name!r} is not one of LongBench's; `metric` says how to score it")
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
