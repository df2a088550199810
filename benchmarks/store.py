"""The document store: restoring a text against computing it and against reading its files, and what storing costs."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import click
import numpy as np

from benchmarks.markdown import row
from benchmarks.random_model import random_model
from benchmarks.turns import in_turns
from clex_local.commands.command import SETTINGS, Command
from clex_local.commands.command_options import options_from
from clex_local.commands.options import option
from clex_local.library.log import ERROR, logged
from clex_local.runtime.low_level import Context, Model, context_params
from clex_local.store.documents import BLOCK, DocumentStore


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """What is measured, and how long."""

    tokens: int = option(8192, "Tokens of the text.", minimum=2 * BLOCK)
    rounds: int = option(5, "Turns of each side.", minimum=2)
    reads: int = option(
        5, "Turns of computing the text, with and without storing it; 1: once, while it is stored.", minimum=1
    )
    kv_type: str = option("f16", "Type of the cache.")
    flash_attn: bool = option(True, "Flash attention, which the commands have where it is fast.")
    batch: int = option(512, "Tokens computed at once.", minimum=BLOCK)
    threads: int | None = option(None, "Threads to compute with.", default_text="the physical cores", minimum=1)
    folder: Path | None = option(None, "Folder on the disk to measure.", default_text="among temporary files")


class Times(NamedTuple):
    """Seconds: by the clock, and of all threads of this process."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Times:
        """Since whenever."""
        return cls(time.perf_counter(), time.process_time())

    def __sub__(self, other: Times) -> Times:
        return Times(self.wall - other.wall, self.cpu - other.cpu)


class Bench:
    """A model, a text, and a store that has it.

    Args:
        model: computes it.
        options: of the benchmark.
        folder: of the store.

    Attributes:
        restored: tokens that came from the store the last time.
    """

    def __init__(self, model: Model, options: StoreOptions, folder: Path) -> None:
        self.model, self.options, self.folder = model, options, folder
        self.restored = 0
        self.tokens = np.random.default_rng(0).integers(model.n_vocab // 2, size=options.tokens).astype(np.int32)
        self.params = context_params(
            -(-options.tokens // BLOCK) * BLOCK + BLOCK,
            n_batch=options.batch,
            type_k=options.kv_type,
            type_v=options.kv_type,
            flash_attn=options.flash_attn,
            threads=options.threads,
        )

    def compute(self, store: DocumentStore | None = None) -> Times:
        """Compute all but the last token, and store it meanwhile, until the last of it is computed."""
        with closing(Context(self.model, self.params)) as context:
            self._declare(context)
            start = Times.now()
            begin = end = 0
            for begin in range(0, len(self.tokens) - 1, self.options.batch):
                end = min(begin + self.options.batch, len(self.tokens) - 1)
                context.decode((int(self.tokens[i]), i, [0], i == end - 1) for i in range(begin, end))
                if store is not None:
                    store.save(context.pointer, self.tokens[:end])
            context.logits(end - begin - 1)
            return Times.now() - start

    def restore(self, store: DocumentStore) -> Times:
        """Take it from the store."""
        with closing(Context(self.model, self.params)) as context:
            context.clear()  # its memory is there
            start = Times.now()
            count = store.restore(context.pointer, self.tokens)
            times = Times.now() - start
            self.restored = count
            return times

    def _declare(self, context: Context) -> None:
        if self.model.factors:
            context.declare(len(self.tokens))

    def files(self) -> list[Path]:
        """Those of the blocks that were restored, in their order."""
        found = sorted(self.folder.rglob("*.clexblock"), key=lambda file: int(file.name.split(".")[1]))
        return found[: self.restored // BLOCK]

    def read(self) -> Times:
        """Read the files into memory that is there."""
        files = self.files()
        sizes = [file.stat().st_size for file in files]
        buffer = memoryview(bytearray(sum(sizes)))
        start = Times.now()
        offset = 0
        for file, size in zip(files, sizes, strict=True):
            with open(file, "rb", buffering=0) as opened:
                done = 0
                while done < size:
                    done += opened.readinto(buffer[offset + done : offset + size]) or 0
            offset += size
        return Times.now() - start

    def forget(self) -> None:
        """Let the system's page cache drop the files."""
        for file in self.files():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(bench: Bench) -> list[str]:
    """Lines of a table, and a sentence."""
    lines = [row(["", "seconds", "tokens/s", "GB/s", "speed of read()", "CPU time"]), row(["---"] * 6)]
    computing, computed = _computed(bench)
    lines += computed
    with DocumentStore(bench.folder) as store:
        bench.restore(store)  # the model's files are hashed the first time
        size = sum(file.stat().st_size for file in bench.files())
        count, gain = bench.restored, 0.0
        for name, before in {"in memory": lambda: None, "on disk": bench.forget}.items():
            times = in_turns(
                {"ours": _after(before, lambda: bench.restore(store)), "read": _after(before, bench.read)},
                bench.options.rounds,
            )
            ours, reading = _median(times["ours"]), _median(times["read"])
            speeds = [f"{count / ours.wall:,.0f}", f"{size / ours.wall / 1e9:.2f}"]
            speeds += [f"{reading.wall / ours.wall:.2f}", f"{ours.cpu / reading.cpu:.2f} of read()"]
            lines.append(row([f"restored, files {name}", f"{ours.wall:.4f}", *speeds]))
            gain = gain or computing * count / len(bench.tokens) / ours.wall
    lines.append(
        f"\n{count:,} of {len(bench.tokens):,} tokens are restored, {size / 1e6:,.1f} MB: "
        f"from memory {gain:,.0f} times as fast as they are computed."
    )
    return lines


def _computed(bench: Bench) -> tuple[float, list[str]]:
    """Compute and store the text: seconds of computing it, and rows."""
    if bench.options.reads == 1:
        seconds = _storing(bench).wall
        speed = f"{len(bench.tokens) / seconds:,.0f}"
        return seconds, [row(["computed and stored", f"{seconds:.3f}", speed, *[""] * 3])]
    costs = in_turns({"plain": bench.compute, "storing": lambda: _storing(bench)}, bench.options.reads)
    plain, storing = _median(costs["plain"]), _median(costs["storing"])
    more = [f"{storing.wall / plain.wall - 1:+.1%}", "", "", f"{storing.cpu / plain.cpu - 1:+.1%}"]
    return plain.wall, [
        row(["computed", f"{plain.wall:.3f}", f"{len(bench.tokens) / plain.wall:,.0f}", *[""] * 3]),
        row(["computed and stored", f"{storing.wall:.3f}", *more]),
    ]


def _median(times: Sequence[Times]) -> Times:
    return Times(median(time.wall for time in times), median(time.cpu for time in times))


def _storing(bench: Bench) -> Times:
    """Compute the text and store it where nothing is stored."""
    with DocumentStore(bench.folder) as store:
        store.clear()
    with DocumentStore(bench.folder) as store:
        return bench.compute(store)


def _after(before: Callable[[], object], run: Callable[[], Times]) -> Callable[[], Times]:
    def both() -> Times:
        before()
        return run()

    return both


def _model(name: str, folder: Path) -> Path:
    """The file of that name, or a made-up one of the shape of Llama 3.2 1B."""
    if name == "1b":
        return random_model(folder / "1b.gguf", n_head=32, n_head_kv=8, head=64, n_layer=16)
    if not Path(name).exists():
        raise click.BadParameter(f"there is no file {name}")
    return Path(name)


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("model")
@options_from(StoreOptions)
def main(model: str, options: StoreOptions) -> None:
    """Measure the document store with MODEL, a GGUF file; 1b makes one of Llama 3.2 1B's shape, in q8_0."""
    with (
        tempfile.TemporaryDirectory(prefix="clex-store-", dir=options.folder) as folder,
        logged(ERROR),
        closing(Model(_model(model, Path(folder)))) as opened,
    ):
        bench = Bench(opened, options, Path(folder) / "documents")
        click.echo("\n".join(measured(bench)))


if __name__ == "__main__":
    main()
