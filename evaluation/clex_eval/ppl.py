"""``clex-eval ppl``: perplexity by context length."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from clex_eval.loading import coverage, open_for_evaluation
from clex_eval.models import Coverage, Model, Prefill
from clex_eval.options import (
    LENGTHS_HELP,
    EvalOptions,
    Length,
    models_argument,
    names,
    output_options,
    parse_lengths,
)
from clex_eval.report import Column, Report, Work, plot_curves, run, working
from clex_eval.windows import TOKENS, FloatArray, Scored, Span, mean_and_error, span_of, window_likelihoods
from clex_local.chat.text_input import read_text
from clex_local.commands.command import SETTINGS, Command
from clex_local.commands.command_options import options_from
from clex_local.commands.options import documented, option, takes_options
from clex_local.errors import ClexError
from clex_local.figure import checked_name

BLOCK = 512  # tokens of the text that count as one observation, at most


@documented
@dataclass(frozen=True, kw_only=True)
class PerplexityOptions(EvalOptions):
    """Which tokens are scored, in which contexts, and how the models are run."""

    lengths: Sequence[Length] | None = option(
        None,
        LENGTHS_HELP,
        default_text="1x,2x,4x,8x, as far as the tables go",
        metavar="N,N,...",
        parse=parse_lengths,
    )
    tokens: int | None = option(
        None,
        "Tokens to score, rounded up to whole windows of the largest length; every length scores the same ones.",
        default_text=f"{TOKENS:,}, or what the text has",
        metavar="N",
        minimum=1,
    )
    stride: int | None = option(
        None,
        "Slide the windows by N tokens and score only the last N of each.",
        default_text="windows side by side, all of each scored",
        metavar="N",
        minimum=1,
    )
    prefill: Prefill = option(
        "one-shot",
        "one-shot: one table for a whole window; growing: a window is fed in chunks, and the table grows with it.",
        choices=("one-shot", "growing"),
    )
    chunk: int | None = option(
        None,
        "Tokens of a chunk of `prefill='growing'`.",
        default_text="the original context",
        metavar="N",
        minimum=1,
    )
    by: int | None = option(
        None, "Show the perplexities of N positions in the window at a time too.", metavar="N", minimum=1
    )
    original_context: int | None = option(
        None, "Tokens that 1x stands for.", default_text="the model's", metavar="N", minimum=1
    )
    source: str = option("the text", "What an error calls the text.", command=False)
    notes: list[str] | None = option(None, "What a reader should know is added to them.", command=False)


@takes_options(PerplexityOptions)
def perplexity(models: Sequence[Path], text: str, options: PerplexityOptions) -> Iterator[dict[str, Any]]:
    """Perplexity of a text by model and context length.

    Args:
        models: GGUF files and Hugging Face folders.
        text: what is read; every length scores the same tokens of it.
        {options}

    Yields:
        One row for each model and length; docs/clex-eval.md lists the keys.

    Raises:
        ClexError: the text is too short, the tables do not cover a length, or a model cannot be run.
    """
    notes = options.notes if options.notes is not None else []
    plans = []
    for name, path in zip(names(models), models, strict=True):
        covers, lengths, note = plan(path, options.lengths, options.original_context, options.clamp, options.extend)
        plans.append((name, path, covers, lengths))
        if note and note not in notes:
            notes.append(note)
    longest = max(lengths[-1] for *_, lengths in plans)  # one for all, so that all score the same tokens
    first: dict[int, Scored] = {}
    with working() as work:
        for number, (name, path, covers, lengths) in enumerate(plans):
            with open_for_evaluation(path, **options.of_models(max(lengths))) as model:
                tokens = _tokens(model, text, 1 + 2 * longest + max(options.tokens or TOKENS, longest))
                span = span_of(longest, len(tokens) - (not model.bos), options.tokens, options.stride, options.source)
                stride = options.stride or longest
                work.expect(sum(span.count // min(stride, n) * n for n in lengths) * (len(plans) - number))
                named = {"model": name, "path": str(path), "original_context": covers.original}
                for row in _rows(model, name, covers.original, tokens, span, lengths, first, options, work):
                    yield named | row


def _rows(
    model: Model,
    name: str,
    original: int,
    tokens: npt.NDArray[np.int32],
    span: Span,
    lengths: Sequence[int],
    first: dict[int, Scored],
    options: PerplexityOptions,
    work: Work,
) -> Iterator[dict[str, Any]]:
    """The rows of one model; `first` has what the first model gave for each length, and gets what is missing there."""
    block = min(original, BLOCK)
    shortest = None
    for length in lengths:
        work.name(f"{name}, {length:,} tokens")
        start = time.monotonic()
        values = window_likelihoods(
            model,
            tokens,
            span,
            length,
            stride=options.stride,
            prefill=options.prefill,
            chunk=options.chunk or original,
            work=work,
        )
        seconds = time.monotonic() - start
        scored = Scored(tokens, span, length, values)
        shortest = shortest or scored
        row: dict[str, Any] = {"length": length, "scaling_factor": model.scaling_factor(length)}
        row |= _row(scored, shortest, first.setdefault(length, scored), original, block)
        if options.by and values.shape[1] == length:
            row["positions"] = _by_position(values, options.by, block)
        yield row | {"seconds": round(seconds, 2)}


def _by_position(values: FloatArray, by: int, block: int) -> list[dict[str, Any]]:
    length = values.shape[1]
    return [
        {"first": a, "end": min(a + by, length)} | _statistics("", values[:, a : a + by], block)
        for a in range(0, length, by)
    ]


def plan(
    path: Path, lengths: Sequence[Length] | None, original: int | None, clamp: bool, extend: str | None = None
) -> tuple[Coverage, list[int], str]:
    """The coverage of a model, the context lengths to measure, ascending, and what to say about them."""
    covers = coverage(path, extend)
    covers = replace(covers, original=original or covers.original)
    wanted = sorted({n.of(covers.original) for n in lengths or default_lengths()})
    note = ""
    if covers.maximum is None:
        if wanted[-1] > (covers.baked or covers.original):
            what = "has no tables" if covers.baked is None else "is baked for one length"
            note = f"{path.name} {what}: beyond {covers.baked or covers.original:,} tokens it is run as it is"
    elif wanted[-1] > covers.maximum and not clamp:
        if lengths or wanted[0] > covers.maximum:
            raise ClexError(
                f"{path}: its tables cover {covers.maximum:,} tokens, not {wanted[-1]:,}; "
                "leave that length out, or go on with the last table by `clamp=True`"
            )
        wanted = [n for n in wanted if n <= covers.maximum]
        note = f"{path.name}: its tables cover {covers.maximum:,} tokens, longer contexts are left out"
    return covers, wanted, note


def default_lengths() -> tuple[Length, ...]:
    """1, 2, 4 and 8 times the original context."""
    return tuple(Length(factor=t) for t in (1, 2, 4, 8))


def _tokens(model: Model, text: str, most: int) -> npt.NDArray[np.int32]:
    """The first tokens of a text, without reading much more of it than that takes."""
    size = 6 * most
    while True:
        found = model.tokenize(text[:size])
        # the last ones may be cut differently than in the whole text
        if size >= len(text) or len(found) >= most + 64:
            return np.array(found[:most], np.int32)
        size *= 2


def _row(scored: Scored, shortest: Scored, first: Scored, original: int, block: int) -> dict[str, Any]:
    values = scored.values
    row: dict[str, Any] = {"windows": len(values), "tokens": values.size}
    row |= _statistics("", values, block)
    last = min(original, scored.length)
    if values.shape[1] == scored.length:
        row["last_tokens"] = last
        row |= _statistics("last_", values[:, scored.length - last :], block)
        row |= _paired("last_change", scored.difference(shortest, last) if scored is not shortest else None, block)
    row |= _paired("difference", scored.difference(first) if scored is not first else None, block)
    row["block_tokens"] = block
    whole = values.size // block * block
    row["block_nll"] = np.round(values.reshape(-1)[:whole].reshape(-1, block).mean(axis=1), 6).tolist()
    return row


def _statistics(prefix: str, values: FloatArray, block: int) -> dict[str, float | None]:
    mean, error = mean_and_error(values, block)
    with np.errstate(over="ignore"):
        found = float(np.exp(mean))
    return {
        f"{prefix}nll": mean,
        f"{prefix}nll_error": error,
        f"{prefix}perplexity": found,
        f"{prefix}perplexity_error": None if error is None else found * error,
    }


def _paired(name: str, pair: tuple[FloatArray, FloatArray] | None, block: int) -> dict[str, float | None]:
    mean, error = (None, None) if pair is None else mean_and_error(pair[0] - pair[1], block)
    return {name: mean, f"{name}_error": error}


def _number(value: float) -> str:
    return f"{value:,.4f}" if value < 1000 else f"{value:,.0f}" if value < 1e7 else f"{value:.2e}"


def _error(value: float) -> str:
    return f"± {_number(value)}"


def report_of(several: bool, sliding: bool, settings: dict[str, Any]) -> Report:
    """An empty report with the columns of such a run."""
    columns = [
        Column("model", "model"),
        Column("length", "context", lambda n: f"{n:,}"),
        Column("scaling_factor", "t", lambda t: f"{t:g}"),
        Column("windows", "windows", lambda n: f"{n:,}"),
        Column("perplexity", "perplexity", _number),
        Column("perplexity_error", "", _error),
    ]
    if not sliding:
        columns += [
            Column("last_perplexity", "of the last", _number),
            Column("last_perplexity_error", "", _error),
            Column("last_change", "vs shortest", lambda x: f"{x:+.4f}"),
            Column("last_change_error", "", _error),
        ]
    if several:
        columns += [
            Column("difference", "vs first model", lambda x: f"{x:+.4f}"),
            Column("difference_error", "", _error),
        ]
    columns.append(Column("seconds", "s", lambda s: f"{s:.1f}"))
    return Report("ppl", columns, settings=settings)


def with_position_columns(report: Report, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows; the report gets a column for each range of positions in them."""
    shown = 0
    for row in rows:
        for i, part in enumerate(row.get("positions", [])[shown:], shown):
            write = lambda parts, i=i: _number(parts[i]["perplexity"]) if i < len(parts) else "-"  # noqa: E731
            report.columns.append(Column("positions", f"from {part['first']:,}", write))
            shown += 1
        yield row


def plot(report: Report, output: Path) -> None:
    """Draw the perplexities of a report over the context length.

    Raises:
        ClexError: as ``plot_curves``.
    """
    rows = report.rows
    lengths = sorted({row["length"] for row in rows})
    series: dict[str, list[float | None]] = {}
    errors: dict[str, list[float | None]] = {}
    models = list(dict.fromkeys(row["model"] for row in rows))

    def add(name: str, model: str, key: str) -> None:
        by_length = {row["length"]: row for row in rows if row["model"] == model}
        series[name] = [by_length[n].get(key) if n in by_length else None for n in lengths]
        errors[name] = [by_length[n].get(f"{key}_error") if n in by_length else None for n in lengths]

    for model in models:
        add(model, model, "perplexity")
    if len(models) == 1 and any(row.get("last_perplexity") for row in rows):
        add("of the last tokens of each window", models[0], "last_perplexity")
    values = [v for curve in series.values() for v in curve if v is not None and math.isfinite(v)]
    originals = sorted({row["original_context"] for row in rows})
    marks = {f"original context, {n:,} tokens": n for n in originals} if len(originals) == 1 else {}
    way = f"sliding by {report.settings['stride']:,}" if report.settings["stride"] else report.settings["prefill"]
    plot_curves(
        output,
        f"Perplexity by context length, {way}",
        lengths,
        series,
        "context length (tokens)",
        "perplexity",
        errors=errors,
        marks=marks,
        log_y=bool(values) and max(values) > 4 * min(values),
    )


@click.command("ppl", cls=Command, context_settings=SETTINGS)
@models_argument
@click.option(
    "--text", metavar="FILE", required=True, type=click.Path(path_type=Path), help="Text to read; - is standard input."
)
@options_from(PerplexityOptions, without=("ctx",))
@output_options
def command(
    models: tuple[Path, ...], text: Path, options: PerplexityOptions, picture: Path | None, as_json: bool
) -> None:
    """Perplexity of a text by context length.

    Every length scores the same tokens. Of windows side by side, the last tokens of each, as many as the original
    context, show whether what is far away helps: they are compared with the same tokens in the shortest windows.
    Comparisons are differences in nats per token, of the same tokens; errors are standard errors over blocks of the
    text.
    """
    if options.chunk and options.prefill != "growing":
        raise click.UsageError("--chunk belongs to --prefill growing")
    if options.by and options.stride:
        raise click.UsageError("--by is for windows that are scored whole, without --stride")
    if picture:
        checked_name(picture)
    content = read_text(text)
    settings = {"text": str(text), **options.settings("ctx", "source", "notes")}
    settings["lengths"] = [str(length) for length in options.lengths or default_lengths()]
    report = report_of(len(models) > 1, options.stride is not None, settings)
    rows = perplexity(models, content, **vars(replace(options, source=str(text), notes=report.notes)))
    run(
        report,
        with_position_columns(report, rows),
        as_json=as_json,
        plot=(lambda: plot(report, picture)) if picture else None,
    )
