"""``clex-eval ppl``: perplexity by context length."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from clex_eval.loading import coverage, open_for_evaluation
from clex_eval.models import Coverage, Model, Prefill
from clex_eval.options import Length, json_settings, lengths_option, model_options, names, output_options
from clex_eval.report import Column, Report, plot_curves, run, working
from clex_eval.windows import TOKENS, FloatArray, Scored, mean_and_error, span_of, window_likelihoods
from clex_local.command import SETTINGS
from clex_local.errors import ClexError

BLOCK = 512  # tokens of the text that count as one observation, at most


def perplexity(
    models: Sequence[Path],
    text: str,
    *,
    lengths: Sequence[Length] | None = None,
    tokens: int | None = None,
    stride: int | None = None,
    prefill: Prefill = "one-shot",
    chunk: int | None = None,
    by: int | None = None,
    original_context: int | None = None,
    source: str = "the text",
    notes: list[str] | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Perplexity of a text by model and context length.

    Args:
        models: GGUF files and Hugging Face folders.
        text: what is read; every length scores the same tokens of it.
        lengths: context lengths; None: 1, 2, 4 and 8 times the original context, as far as the tables go.
        tokens: how many tokens to score, in whole windows of the largest length; None: 32,768, or what the text has.
        stride: tokens between sliding windows, of each of which only so many are scored; None: windows side by side.
        prefill: ``one-shot`` or ``growing``, as ``Model.negative_log_likelihoods`` says.
        chunk: tokens of a chunk of ``growing``; None: the original context.
        by: give the perplexities of ranges of so many positions in the window too.
        original_context: L in place of what the models say.
        source: what an error calls the text.
        notes: what a reader should know is added to them.
        **options: those of ``open_for_evaluation``.

    Yields:
        One row for each model and length; docs/clex-eval.md lists the keys.

    Raises:
        ClexError: the text is too short, the tables do not cover a length, or a model cannot be run.
    """
    notes = notes if notes is not None else []
    plans = []
    for name, path in zip(names(models), models, strict=True):
        covers, wanted, note = plan(path, lengths, original_context, options.get("clamp", False))
        plans.append((name, path, covers, wanted))
        if note and note not in notes:
            notes.append(note)
    longest = max(wanted[-1] for *_, wanted in plans)  # one for all, so that all score the same tokens
    first: dict[int, Scored] = {}
    with working() as work:
        for number, (name, path, covers, wanted) in enumerate(plans):
            block = min(covers.original, BLOCK)
            with open_for_evaluation(path, ctx=max(wanted), **options) as model:
                read = _tokens(model, text, 1 + 2 * longest + max(tokens or TOKENS, longest))
                span = span_of(longest, len(read) - (not model.bos), tokens, stride, source)
                work.expect(sum(span.count // min(stride or n, n) * n for n in wanted) * (len(plans) - number))
                shortest = None
                for length in wanted:
                    work.name(f"{name}, {length:,} tokens")
                    start = time.monotonic()
                    values = window_likelihoods(
                        model, read, span, length,
                        stride=stride, prefill=prefill, chunk=chunk or covers.original, work=work,
                    )  # fmt: skip
                    seconds = time.monotonic() - start
                    scored = Scored(read, span, length, values)
                    shortest = shortest or scored
                    row = {"model": name, "path": str(path), "original_context": covers.original, "length": length}
                    row["scaling_factor"] = model.scaling_factor(length)
                    row |= _row(scored, shortest, first.setdefault(length, scored), covers.original, block)
                    if by and values.shape[1] == length:
                        row["positions"] = [
                            {"first": a, "end": min(a + by, length)} | _statistics("", values[:, a : a + by], block)
                            for a in range(0, length, by)
                        ]
                    yield row | {"seconds": round(seconds, 2)}


def plan(
    path: Path, lengths: Sequence[Length] | None, original: int | None, clamp: bool
) -> tuple[Coverage, list[int], str]:
    """The coverage of a model, the context lengths to measure, ascending, and what to say about them."""
    covers = coverage(path)
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
                "leave that length out, or go on with the last table by --clamp"
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


@click.command("ppl", context_settings=SETTINGS)
@model_options
@click.option(
    "--text", metavar="FILE", required=True, type=click.Path(path_type=Path), help="Text to read; - is standard input."
)
@lengths_option()
@click.option(
    "--tokens",
    metavar="N",
    type=click.IntRange(min=1),
    show_default=f"{TOKENS:,}, or what the text has",
    help="Tokens to score, rounded up to whole windows of the largest length; every length scores the same ones.",
)
@click.option(
    "--stride",
    metavar="N",
    type=click.IntRange(min=1),
    show_default="windows side by side, all of each scored",
    help="Slide the windows by N tokens and score only the last N of each.",
)
@click.option(
    "--prefill",
    type=click.Choice(["one-shot", "growing"]),
    default="one-shot",
    help="one-shot: one table for a whole window; growing: a window is fed in chunks, and the table grows with it.",
)
@click.option(
    "--chunk",
    metavar="N",
    type=click.IntRange(min=1),
    show_default="the original context",
    help="Tokens of a chunk of --prefill growing.",
)
@click.option(
    "--by",
    metavar="N",
    type=click.IntRange(min=1),
    help="Show the perplexities of N positions in the window at a time too.",
)
@click.option(
    "--original-context",
    metavar="N",
    type=click.IntRange(min=1),
    show_default="the model's",
    help="Tokens that 1x stands for.",
)
@output_options
def command(
    models: tuple[Path, ...],
    text: Path,
    lengths: tuple[Length, ...] | None,
    tokens: int | None,
    stride: int | None,
    prefill: Prefill,
    chunk: int | None,
    by: int | None,
    original_context: int | None,
    picture: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Perplexity of a text by context length.

    Every length scores the same tokens. Of windows side by side, the last tokens of each, as many as the original
    context, show whether what is far away helps: they are compared with the same tokens in the shortest windows.
    Comparisons are differences in nats per token, of the same tokens; errors are standard errors over blocks of the
    text.
    """
    from clex_local.figure import checked_name
    from clex_local.text_input import read_text

    if chunk and prefill != "growing":
        raise click.UsageError("--chunk belongs to --prefill growing")
    if by and stride:
        raise click.UsageError("--by is for windows that are scored whole, without --stride")
    if picture:
        checked_name(picture)
    content = read_text(text)
    given: dict[str, Any] = dict(
        tokens=tokens, stride=stride, prefill=prefill, chunk=chunk, by=by, original_context=original_context, **options
    )
    settings = {"text": str(text), "lengths": [str(length) for length in lengths or default_lengths()]}
    report = report_of(len(models) > 1, stride is not None, settings | json_settings(given))
    rows = perplexity(models, content, lengths=lengths, source=str(text), notes=report.notes, **given)
    run(
        report,
        with_position_columns(report, rows),
        as_json=as_json,
        plot=(lambda: plot(report, picture)) if picture else None,
    )
