"""Speed of several threads alone, and beside processes that keep every core busy."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles

import click

from benchmarks.context import default_threads
from benchmarks.markdown import row
from benchmarks.stock import STOCK, Server, Side
from clex_local import library_path

DEPTH = 64  # tokens cached before
OTHERS = {"alone": None, "beside busy": 0, "beside niced": 19}  # niceness of what else runs


class TimedServer(Server):
    """Works for a given time, since a collapse may make a given number of tokens take minutes."""

    def decode_for(self, milliseconds: int, most: int) -> float:
        """Tokens per second, of decoding one at a time for so long, after DEPTH cached ones."""
        self.fill(DEPTH)
        self.context.decode(self.tokens[DEPTH : DEPTH + 1], DEPTH)  # builds a graph
        start = now = time.perf_counter()
        count = 0
        while now < start + milliseconds / 1000:
            # the same few positions again and again, so that the work stays the same
            if count % most == 0:
                self.context.truncate(DEPTH + 1)
            position = DEPTH + 1 + count % most
            self.context.decode(self.tokens[position : position + 1], position)
            count += 1
            now = time.perf_counter()
        self.cached = DEPTH
        return count / (now - start)

    def cost(self, method: str, arguments: tuple[int, ...], turns: int) -> list[float]:
        """How many times as fast it is with the policy as with the planned threads, both in this process in turns."""
        fix = ctypes.CDLL(str(library_path() / "libggml-cpu.so")).ggml_clex_threads_fix
        found = []
        for _ in range(turns + 1):
            speeds = []
            for n_threads in (0, 1 << 10):  # 0: the policy decides
                fix(n_threads, 0)
                speeds.append(getattr(self, method)(*arguments))
            found.append(speeds[0] / speeds[1])
        fix(0, 0)
        return found[1:]

    def prefill_speed(self, count: int) -> float:
        """Tokens per second, of one prompt after DEPTH cached tokens."""
        return count / self.prefill(DEPTH, count)


def burn(niceness: int) -> None:
    """Keep one core busy."""
    os.nice(niceness)
    while True:
        pass


@contextmanager
def others(niceness: int | None) -> Iterator[None]:
    """Have a busy process of that niceness for each core; none where it is None."""
    spawn = get_context("spawn")
    processes = [spawn.Process(target=burn, args=(niceness,), daemon=True) for _ in range(os.cpu_count() or 1)]
    if niceness is None:
        processes = []
    try:
        for process in processes:
            process.start()
        if processes:
            time.sleep(1)
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def measure(sides: list[Side], rounds: int, method: str, *arguments: int) -> dict[str, list[float]]:
    """Speed of each side in each round; the sides take turns."""
    speeds: dict[str, list[float]] = {side.name: [] for side in sides}
    for turn in range(rounds + 1):
        for side in sides[:: -1 if turn % 2 else 1]:
            speeds[side.name].append(side.ask(method, *arguments))
    return {name: values[1:] for name, values in speeds.items()}  # the first round warms up


def cells(speeds: list[float], reference: list[float]) -> list[str]:
    """Median speed, and the ratio to the reference's median with the quartiles."""
    low, middle, high = (value / median(reference) for value in quantiles(speeds, n=4, method="inclusive"))
    return [f"{median(speeds):.1f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"]


@click.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--stock", type=click.Path(path_type=Path), default=STOCK, show_default="build/stock/bin",
    help="Folder of the stock libraries (`make stock`).",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(min=2), help="[default: the physical cores]")
@click.option("--milliseconds", type=click.IntRange(min=1), default=1500, show_default=True, help="Decoding of a turn.")
@click.option("--prompt", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens prefilled at once.")
@click.option("--rounds", type=click.IntRange(min=2), default=5, show_default=True, help="Turns of each side.")
@click.option("--flash-attn", is_flag=True, help="Flash attention.")
@click.option("--only", type=click.Choice(["decode", "prefill"]), help="[default: both]")
@click.option("--beside", multiple=True, type=click.Choice(list(OTHERS)), default=list(OTHERS), help="Repeatable.")
def main(
    model: str,
    stock: Path,
    threads: int | None,
    milliseconds: int,
    prompt: int,
    rounds: int,
    flash_attn: bool,
    only: str | None,
    beside: tuple[str, ...],
) -> None:
    """Measure MODEL with the patched library and the stock one: alone, beside one busy process for each core, and
    beside one of the lowest priority (nice 19) for each core.

    Each side is a process, and they take turns. Printed are tokens per second (medians), and as a ratio to one thread
    alone with the patched library (with the quartiles of the rounds). "Planned" always uses all threads, as without the
    policy (GGML_CLEX_THREADS_FIXED); "passive" is OMP_WAIT_POLICY=passive. What the policy costs alone is measured in
    one process at the end, since threads of the side before may still spin when a turn begins.
    """
    if not stock.is_dir():
        raise click.ClickException(f"{stock}: no such folder; run `make stock` first")
    count = threads or default_threads()
    plain = {"LLAMA_CPP_LIB_PATH": str(stock.resolve())}
    rows = [
        ("patched, 1 thread", 1, {}),
        (f"patched, {count} threads", count, {}),
        (f"patched, {count} threads, planned", count, {"GGML_CLEX_THREADS_FIXED": "1"}),
        (f"stock, {count} threads", count, plain),
        (f"stock, {count} threads, passive", count, {**plain, "OMP_WAIT_POLICY": "passive"}),
    ]
    n_ctx = DEPTH + max(prompt, 64)
    sides = [
        Side.start(name, environment, TimedServer, model, n_ctx, 0, {"threads": n, "flash_attn": flash_attn})
        for name, n, environment in rows
    ]
    orders = {"decode": ("decode_for", milliseconds, 32), "prefill": ("prefill_speed", prompt)}
    orders = {name: order for name, order in orders.items() if only in (None, name)}
    speeds: dict[tuple[str, str], dict[str, list[float]]] = {}
    for who in dict.fromkeys(["alone", *beside]):
        with others(OTHERS[who]):
            for name, order in orders.items():
                speeds[name, who] = measure(sides, rounds, *order)
    costs = {name: sides[1].ask("cost", order[0], order[1:], 2 * rounds) for name, order in orders.items()}
    for side in sides:
        side.stop()
    for name in orders:
        columns = [f"{who}{what}" for who in dict.fromkeys(["alone", *beside]) for what in (", tok/s", " / 1 alone")]
        click.echo(row([name, *columns]))
        click.echo(row(["---", *["---:"] * len(columns)]))
        reference = speeds[name, "alone"][sides[0].name]
        for side in sides:
            found = [speeds[name, who][side.name] for who in dict.fromkeys(["alone", *beside])]
            click.echo(row([side.name, *[cell for values in found for cell in cells(values, reference)]]))

        low, middle, high = quantiles(costs[name], n=4, method="inclusive")
        click.echo(
            f"\nAlone, the policy's speed is {middle:.3f} ({low:.3f} to {high:.3f}) of that of the planned threads.\n"
        )


if __name__ == "__main__":
    main()
