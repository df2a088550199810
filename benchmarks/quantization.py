"""Size and quality of every kind of quantization, on SmolLM2-135M and *Emma*: the table of docs/quantization.md."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from benchmarks.context import Context, Model
from benchmarks.markdown import put_table, row
from benchmarks.text import emma
from clex_convert import convert
from clex_convert.imatrix import compute_imatrix

DOCUMENT = Path(__file__).parent.parent / "docs" / "quantization.md"

# Each without an importance matrix, with one, or both.
PLAIN = (
    *("f16", "q8_0", "q6_k", "q5_k_m", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "iq4_nl", "q4_0", "iq4_xs"),
    *("q3_k_l", "q3_k_m", "iq3_m", "q2_k", "tq1_0"),
)
WITH_IMATRIX = ("q4_k_m", "q4_0", "iq4_xs", "q3_k_m", "iq3_m", "iq3_xxs", "q2_k", "iq2_m", "iq2_xxs", "iq1_s")

WINDOW = 512


def windows(model: Model, text: str, count: int) -> list[npt.NDArray[np.int32]]:
    """The first windows of a text."""
    tokens = model.tokenize(text[: 40 * WINDOW * count].encode())
    return [tokens[k * WINDOW : (k + 1) * WINDOW] for k in range(count)]


@contextmanager
def log_probabilities(path: Path, text: str, count: int, threads: int | None) -> Iterator[tuple[list, Iterator]]:
    """The windows, and for each window those of every next token: float32 [tokens, n_vocab]."""
    model = Model(path)
    parts = windows(model, text, count)

    def each(context: Context) -> Iterator[npt.NDArray[np.float32]]:
        for tokens in parts:
            context.clear()
            context.announce(len(tokens))
            context.timed(tokens, 0, all_logits=True)
            logits = context.all_logits(len(tokens))
            peak = logits.max(axis=1, keepdims=True)
            yield logits - peak - np.log(np.exp(logits - peak).sum(axis=1, keepdims=True, dtype=np.float64))

    with Context(model, WINDOW, threads=threads) as context:
        yield parts, each(context)
    model.close()


def measure(path: Path, text: str, reference: Path, count: int, threads: int | None) -> tuple[float, float, float]:
    """Mean KL divergence from the reference, agreement on the likeliest token, perplexity."""
    divergence, agreement, likelihood = [], [], []
    with log_probabilities(path, text, count, threads) as (parts, predictions):
        for k, (tokens, found) in enumerate(zip(parts, predictions, strict=True)):
            wanted = np.load(reference / f"{k}.npy")
            # In rows: both in float64 at once would take gigabytes for a large vocabulary.
            for a, b in zip(wanted, found, strict=True):
                divergence.append(float((np.exp(a, dtype=np.float64) * (a - b)).sum()))
                agreement.append(a.argmax() == b.argmax())
            likelihood.append(found[np.arange(len(tokens) - 1), tokens[1:]])
    return float(np.mean(divergence)), float(np.mean(agreement)), float(np.exp(-np.mean(likelihood)))


@click.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--windows", "count", type=click.IntRange(min=1), default=4, show_default=True, help="Of 512 tokens.")
@click.option(
    "--chunks", type=click.IntRange(min=1), default=32, show_default=True,
    help="Of 512 tokens, for the importance matrix.",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="[default: the physical cores]")
def main(model: Path, count: int, chunks: int, threads: int | None) -> None:
    """Quantize MODEL to each type, compare it with the unquantized weights and write the table."""
    novel = emma().read_text(encoding="utf-8")
    lines = [
        row(["type", "importance matrix", "MB", "bits per weight", "mean KL", "same likeliest token", "perplexity"]),
        row(["---", "---", *(["---:"] * 5)]),
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain, quantized, matrix = folder / "f32.gguf", folder / "quantized.gguf", folder / "imatrix.gguf"
        convert(model, plain, method="ntk", outtype="f32", check="none")
        # The novel's second half: what is measured is not what the matrix was computed from.
        half = folder / "second half of Emma"
        half.write_text(novel[len(novel) // 2 :], encoding="utf-8")
        compute_imatrix(plain, half, matrix, chunks=chunks)
        with log_probabilities(plain, novel, count, threads) as (_, predictions):
            for k, found in enumerate(predictions):
                np.save(folder / f"{k}.npy", found.astype(np.float32))
        weights = plain.stat().st_size / 4  # to within the header
        base = None
        for outtype, imatrix in [
            ("f32", None),
            *((outtype, None) for outtype in PLAIN),
            *((outtype, matrix) for outtype in WITH_IMATRIX),
        ]:
            path = plain
            if outtype != "f32":
                path = quantized
                convert(plain, quantized, method="ntk", outtype=outtype, imatrix=imatrix, overwrite=True, check="none")
            kl, agreement, perplexity = measure(path, novel, folder, count, threads)
            base = base or perplexity
            size = path.stat().st_size
            cells = [outtype, "yes" if imatrix else "", f"{size / 1e6:.1f}", f"{8 * size / weights:.2f}"]
            change = f"{perplexity:.2f}" if path is plain else f"{perplexity - base:+.2f}"
            lines.append(row([*cells, f"{max(kl, 0):.4f}", f"{agreement:.1%}", change]))
            click.echo(lines[-1])
            put_table(DOCUMENT, "made by benchmarks/quantization.py", "\n".join(lines))


if __name__ == "__main__":
    main()
