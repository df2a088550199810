"""How well it is said how long a prompt will take: the estimate and what it then took, by length."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import click

from benchmarks.markdown import row
from benchmarks.text import emma
from clex_local.commands.command import SETTINGS, Command


@dataclass(frozen=True)
class Reading:
    """A prompt that was read.

    Attributes:
        told: seconds that it would take in all, when that was first said.
        after: tokens that were read by then.
        took: seconds.
    """

    told: float
    after: int
    took: float


def read(model: str, length: int, threads: int | None, kv_type: str | None) -> Reading:
    """Read a prompt of so many tokens in this process, as clex-chat does."""
    from clex_local import open_model
    from clex_local.chat.reading_time import ReadingTime

    with closing(open_model(model, ctx=length, threads=threads, kv_type=kv_type, store=False)) as llm:
        data = emma().read_bytes()
        tokens = llm.tokenize(data)
        tokens = (tokens * (length // len(tokens) + 1))[:length]
        reading, told, start = ReadingTime(llm), [], time.perf_counter()

        def update(done: int, total: int) -> None:
            reading.update(done, total)
            left = reading.left() if reading.known else None
            if left is not None and done < total and not told:
                told.append((time.perf_counter() - start + left, done))

        llm.on_prefill = update
        llm.eval(tokens)
        took = time.perf_counter() - start
        reading.remember()
    seconds, after = told[0] if told else (float("nan"), 0)
    return Reading(seconds, after, took)


def in_a_process(*arguments: object) -> Reading:
    """The same in a new process, which brings the weights into memory first."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(read, arguments)


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--length",
    "lengths",
    type=click.IntRange(min=1024),
    multiple=True,
    default=(2048, 8192, 32768),
    help="Tokens of a prompt. Repeatable.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), show_default="the physical cores", help="Threads to compute with."
)
@click.option("--kv-type", show_default="as clex-chat chooses", help="Type of the key and value cache.")
def main(model: Path, lengths: Sequence[int], threads: int | None, kv_type: str | None) -> None:
    """Read prompts of a MODEL that covers them, and compare the time with what was said before.

    First each length where no speed is known, so that it is said after two batches; then where the shortest has been
    read once, and at last where all have been. Run it on an idle machine. SmolLM2 with tables for 32,768 tokens takes
    twelve minutes on two cores without tile registers, eleven of them for the longest.
    """  # fmt: skip
    emma()
    click.echo(row(["tokens", "known before", "said", "after tokens", "took", "said / took"]))
    click.echo(row(["---:", "---", "---:", "---:", "---:", "---:"]))

    def measure(length: int, known: str) -> None:
        found = in_a_process(str(model), length, threads, kv_type)
        times = [f"{found.told:.1f} s", f"{found.after:,}", f"{found.took:.1f} s", f"{found.told / found.took:.2f}"]
        click.echo(row([f"{length:,}", known, *times]))

    shortest = min(lengths)
    for length in lengths:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["CLEX_CACHE"] = folder
            measure(length, "nothing")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CLEX_CACHE"] = folder
        in_a_process(str(model), shortest, threads, kv_type)
        for length in sorted(lengths):
            measure(length, "shorter ones")
        for length in lengths:
            measure(length, "all lengths")


if __name__ == "__main__":
    main()
