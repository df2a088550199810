"""Speed with tables, without, and of stock llama.cpp: several processes that take turns."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click

STOCK = Path(__file__).parent.parent / "build" / "stock" / "bin"


class Server:
    """What a process holds: a model, a context, and a cache as long as the last order left it."""

    def __init__(self, path: str, n_ctx: int, gpu_layers: int, options: dict[str, Any]) -> None:
        import numpy as np

        from benchmarks.context import Context, Model

        model = Model(path, gpu_layers)
        self.tokens = np.random.default_rng(0).integers(0, model.n_vocab, n_ctx, np.int32)
        self.context = Context(model, n_ctx, **options)
        self.cached = 0

    def fill(self, depth: int) -> float:
        """Have exactly depth tokens in the cache."""
        self.context.truncate(depth)
        self.cached = min(self.cached, depth)
        seconds = self.context.prefill(self.tokens[self.cached : depth], self.cached) if self.cached < depth else 0.0
        self.cached = depth
        return seconds

    def prefill(self, depth: int, count: int) -> float:
        """Seconds to prefill count tokens after depth cached ones."""
        self.fill(depth)
        self.cached += count
        return self.context.prefill(self.tokens[depth : depth + count], depth)

    def decode(self, depth: int, count: int) -> float:
        """Seconds to decode count tokens, one at a time, after depth cached ones."""
        self.fill(depth)
        self.cached += count + 1
        # The first builds a graph for its own, since another kind of batch came before.
        return sum([self.context.decode(self.tokens[i : i + 1], i) for i in range(depth, depth + count + 1)][1:])


def serve(connection: Any, kind: type[Server], *arguments: Any) -> None:
    """Carry out orders (method, arguments) until None comes."""
    server = kind(*arguments)
    while order := connection.recv():
        connection.send(getattr(server, order[0])(*order[1]))


@dataclass
class Side:
    """One of the things compared: a process and the way to give it orders."""

    name: str
    process: BaseProcess
    connection: Any

    @classmethod
    def start(cls, name: str, environment: dict[str, str], kind: type[Server], *arguments: Any) -> Side:
        """Start a process with additional variables in its environment; it makes a server of that kind."""
        spawn = get_context("spawn")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=serve, args=(theirs, kind, *arguments), daemon=True)
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()
        return cls(name, process, ours)

    def ask(self, method: str, *arguments: int) -> Any:
        """Let the process do something; what it answers."""
        try:
            self.connection.send((method, arguments))
            return self.connection.recv()
        except (EOFError, OSError) as error:
            raise click.ClickException(f"the process {self.name!r} has died; see above") from error

    def stop(self) -> None:
        """End the process."""
        self.connection.send(None)
        self.process.join()


def compare(sides: list[Side], rounds: int, method: str, depth: int, count: int) -> list[str]:
    """Let the sides take turns; the reference's speed, and the others' as a ratio to it, with quartiles."""
    for side in sides:
        side.ask("fill", depth)
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for turn in range(rounds + 1):
        # Whoever comes first comes last next time.
        for side in sides[:: -1 if turn % 2 else 1]:
            seconds[side.name].append(side.ask(method, depth, count))
    reference = seconds.pop(sides[0].name)[1:]  # the first round warms up
    cells = [f"{count / median(reference):.1f}"]
    for times in seconds.values():
        ratios = [base / own for base, own in zip(reference, times[1:], strict=True)]
        low, middle, high = quantiles(ratios, n=4)
        cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
    return cells


@click.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False))
@click.option("--tables", type=click.Path(exists=True, dir_okay=False), help="The same model with tables.")
@click.option(
    "--stock", type=click.Path(path_type=Path), default=STOCK, show_default="build/stock/bin",
    help="Folder of the stock libraries, built with `cmake -S . -B build/stock -DCLEX_STOCK=ON`.",
)  # fmt: skip
@click.option("--amx", is_flag=True, help="Compare with AMX and without instead: the patched library twice.")
@click.option(
    "--depth", "depths", type=click.IntRange(min=0), multiple=True, default=[0, 4096], show_default=True,
    help="Tokens cached before. Repeatable.",
)  # fmt: skip
@click.option("--prompt", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens prefilled at once.")
@click.option("--tokens", type=click.IntRange(min=1), default=16, show_default=True, help="Tokens decoded in a turn.")
@click.option("--rounds", type=click.IntRange(min=2), default=20, show_default=True, help="Turns of each side.")
@click.option("--kv-type", type=click.Choice(["f16", "f32", "q8_0"]), default="f16", show_default=True)
@click.option("--flash-attn", is_flag=True, help="Flash attention.")
@click.option("--threads", type=click.IntRange(min=1), help="[default: the physical cores]")
@click.option("--n-gpu-layers", type=int, default=0, show_default=True, help="Layers on the GPU; -1: all.")
@click.option("--cpu-time", is_flag=True, help="Count CPU time on one thread, which a busy machine disturbs less.")
def main(
    model: str,
    tables: str | None,
    stock: Path,
    amx: bool,
    depths: tuple[int, ...],
    prompt: int,
    tokens: int,
    rounds: int,
    kv_type: str,
    flash_attn: bool,
    threads: int | None,
    n_gpu_layers: int,
    cpu_time: bool,
) -> None:
    """Measure prefill and decode of MODEL, which has no tables, with the stock library and the patched one.

    Each side is a process of its own, and they take turns, so that what else the machine does meets all alike. Printed
    are the speed of the first side and the others' as ratios to it (above 1: faster): the median over the rounds, and
    the quartiles. The first side takes part twice: the ratio of the two is what noise does.
    """
    if amx:
        if "amx_tile" not in Path("/proc/cpuinfo").read_text():
            raise click.ClickException("this CPU has no AMX")
        off = {"GGML_AMX_DISABLE": "1"}
        rows = [("AMX off", model, off), ("AMX off, again", model, off), ("AMX", model, {})]
    else:
        if not stock.is_dir():
            raise click.ClickException(f"{stock}: no such folder; build the stock libraries first, see --help")
        library = {"LLAMA_CPP_LIB_PATH": str(stock.resolve())}
        rows = [("stock", model, library), ("stock, again", model, library), ("patched, no tables", model, {})]
        if tables:
            rows.append(("patched, tables", tables, {}))
    n_ctx = max(depths) + max(prompt, tokens + 1)
    options = {"kv_type": kv_type, "flash_attn": flash_attn, "threads": threads}
    if cpu_time:
        options |= {"threads": 1, "clock": time.process_time}
    sides = [
        Side.start(name, environment, Server, path, n_ctx, n_gpu_layers, options) for name, path, environment in rows
    ]

    click.echo("| | " + " | ".join([f"{sides[0].name}, tok/s", *(side.name for side in sides[1:])]) + " |")
    click.echo("| --- |" + " ---: |" * len(sides))
    for depth in sorted(depths):
        for method, count in (("prefill", prompt), ("decode", tokens)):
            cells = [f"{method} {count:,} at {depth:,}", *compare(sides, rounds, method, depth, count)]
            click.echo("| " + " | ".join(cells) + " |")
    for side in sides:
        side.stop()


if __name__ == "__main__":
    main()
