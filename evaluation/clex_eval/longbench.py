"""``clex-eval longbench``: records of LongBench's format read from disk, its truncation and its metrics.

The prompts are our own, one for each kind of task: for scores to compare with published ones, give the benchmark's own
and take its English and code data sets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import click

from clex_eval import report
from clex_eval.loading import open_for_evaluation
from clex_eval.metrics import METRICS, check_packages, score
from clex_eval.models import Model
from clex_eval.options import EvalOptions, models_argument, names, output_options
from clex_eval.records import Record, read
from clex_eval.report import Column, Report, working
from clex_eval.tasks import in_groups
from clex_local.chat.text_input import read_text
from clex_local.commands.command import SETTINGS, Command
from clex_local.commands.command_options import options_from
from clex_local.commands.options import documented, option, takes_options
from clex_local.errors import ClexError
from clex_local.figure import checked_name

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
    keep = room - (full - len(inner))
    while keep >= 2:
        halves = inner[: keep // 2], inner[len(inner) - keep // 2 :]
        tokens = ask("".join(model.detokenize(half).strip("\N{REPLACEMENT CHARACTER}") for half in halves))
        if len(tokens) <= room:
            return tokens, full
        keep -= len(tokens) - room
    raise ClexError(f"a context of {model.context_length:,} tokens has no room for a prompt and its answer")


@dataclass(frozen=True)
class Answer:
    """What a model said to a record: ``tokens`` is what its prompt had in full, ``score`` is 0 to 1."""

    model: str
    record: Record
    tokens: int
    truncated: bool
    text: str
    score: float


@documented
@dataclass(frozen=True, kw_only=True)
class LongBenchOptions(EvalOptions):
    """What is asked, how it is scored, and how the models are run."""

    ctx: int = option(
        0,
        "Tokens that a prompt and its answer may have. A longer prompt loses its middle.",
        default_text="all that the model covers",
        metavar="N",
        minimum=0,
    )
    metric: str | None = option(
        None, "Metric of data sets that are not LongBench's; theirs are known.", choices=tuple(METRICS)
    )
    limit: int | None = option(None, "Only the first N records of each data set.", metavar="N", minimum=1)
    template: str | None = option(None, "Prompt in place of our own, with {context} and {input}.", command=False)


def ask(models: Sequence[Path], records: Sequence[Record], options: LongBenchOptions) -> Iterator[Answer]:
    """Puts records to models and gives the answers as they come."""
    with working() as work:
        work.expect(len(models) * len(records))
        for path, name in zip(models, names(models), strict=True):
            work.name(name)
            with open_for_evaluation(path, **options.of_models(options.ctx)) as model:
                for record in records:
                    tokens, full = prompt_tokens(model, record, options.template)
                    text = model.generate(tokens, record.kind.max_tokens)
                    yield Answer(name, record, full, len(tokens) < full, text, score(record, text))
                    work.advance()


@takes_options(LongBenchOptions)
def longbench(models: Sequence[Path], files: Sequence[Path], options: LongBenchOptions) -> Iterator[dict[str, Any]]:
    """Puts the records of files to models: one row for each model and data set, when it is complete.

    A row has the mean score, 0 to 1, how many prompts were truncated, and the answers.

    Args:
        models: GGUF files or Hugging Face folders.
        files: in LongBench's format.
        {options}

    Raises:
        ClexError: a file is not in this format, or a model cannot be run.
    """
    sets: dict[str, list[Record]] = {}
    for file in files:
        for record in read(file, options.metric):
            sets.setdefault(record.dataset, []).append(record)
    records = [record for found in sets.values() for record in islice(found, options.limit)]
    check_packages(record.kind.metric for record in records)
    found = ask(models, records, options)
    for group in in_groups(found, lambda answer: (answer.model, answer.record.dataset)):
        yield {
            "model": group[0].model,
            "dataset": group[0].record.dataset,
            "metric": group[0].record.kind.metric,
            "records": len(group),
            "truncated": sum(answer.truncated for answer in group),
            "score": fmean(answer.score for answer in group),
            "answers": [
                {
                    "id": answer.record.id,
                    "tokens": answer.tokens,
                    "truncated": answer.truncated,
                    "answer": answer.text,
                    "score": answer.score,
                }
                for answer in group
            ],
        }


def plot(rows: Iterable[dict[str, Any]], output: Path) -> None:
    """Draws each model's mean score over prompts up to 1024, 2048, ... tokens into a PNG or SVG file.

    Args:
        rows: of ``longbench``.
        output: a name that ends with .png or .svg; replaced if it exists.

    Raises:
        ClexError: the file cannot be written.
    """
    scores: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        for answer in row["answers"]:
            longest = max(1024, 1 << (answer["tokens"] - 1).bit_length())
            scores.setdefault(row["model"], {}).setdefault(longest, []).append(100 * answer["score"])
    report.plot_scores(output, "LongBench", scores, "prompt, up to so many tokens")


@click.command("longbench", cls=Command, context_settings=SETTINGS)
@models_argument
@options_from(LongBenchOptions)
@click.option(
    "--prompt",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    show_default="one for each kind of task",
    help="Prompt for all records: a text with {context} and {input}.",
)
@output_options
def command(
    models: tuple[Path, ...],
    options: LongBenchOptions,
    prompt: Path | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Score models on files in LongBench's format, which are the arguments whose names end with .jsonl.

    The metric is that of the data set which a record names. A prompt that does not fit in the context loses its
    middle, as in LongBench; the table says how many did.
    """
    files = [path for path in models if path.suffix == ".jsonl"]
    models = tuple(path for path in models if path.suffix != ".jsonl")
    if not files or not models:
        raise click.UsageError("give at least one model and one FILE.jsonl")
    if picture:
        checked_name(picture)
    template = None if prompt is None else read_text(prompt)
    if template is not None and "{context}" not in template:
        raise ClexError(f"{prompt}: has no {{context}}")
    columns = [
        Column("model", "model"),
        Column("dataset", "data set"),
        Column("metric", "metric"),
        Column("records", "records", "{:,}".format),
        Column("truncated", "truncated", "{:,}".format),
        Column("score", "score", lambda share: f"{100 * share:.1f}"),
    ]
    found = Report("longbench", columns)
    found.settings = {"models": models, "files": files, "prompt": prompt, **options.settings("template")}
    report.run(
        found,
        longbench(models, files, **vars(replace(options, template=template))),
        as_json=as_json,
        plot=(lambda: plot(found.rows, picture)) if picture else None,
    )


command.params[0].metavar = "MODEL... FILE.jsonl..."
