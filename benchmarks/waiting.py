"""Speed of several threads alone, and beside processes that keep every core busy."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import click

from benchmarks.markdown import row
from benchmarks.sides import STOCK, Server, Side, stock_library
from benchmarks.turns import in_turns, quartiles
from clex_local import library_path
from clex_local.commands.command import SETTINGS, Command
from clex_local.commands.command_options import options_from
from clex_local.commands.options import option
from clex_local.machine import default_threads

DEPTH = 64  # tokens cached before
OTHERS = {"alone": None, "beside busy": 0, "beside niced": 19}  # niceness of what else runs


class TimedServer(Server):
    """Works for a given time, since a collapse may make a given number of tokens take minutes."""

    def decode_for(self, milliseconds: int, most: int) -> float:
        """Tokens per second, of decoding one at a time for so long, after DEPTH cached ones."""
        self.fill(DEPTH)
        self.context.timed(self.tokens[DEPTH : DEPTH + 1], DEPTH)  # builds a graph
        start = now = time.perf_counter()
        count = 0
        while now < start + milliseconds / 1000:
            # the same few positions again and again, so that the work stays the same
            if count % most == 0:
                self.context.forget(DEPTH + 1)
            position = DEPTH + 1 + count % most
            self.context.timed(self.tokens[position : position + 1], position)
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
    return in_turns({side.name: partial(side.ask, method, *arguments) for side in sides}, rounds, warm_up=1)


def cells(speeds: list[float], reference: list[float]) -> list[str]:
    """Median speed, and the ratio to the reference's median with the quartiles."""
    return [f"{median(speeds):.1f}", quartiles([speed / median(reference) for speed in speeds]).text()]


def start(model: str, prompt: int, threads: int, stock: Path, flash_attn: bool) -> list[Side]:
    """The sides, the reference first, then the policy of many threads."""
    plain = stock_library(stock)
    rows = [
        ("patched, 1 thread", 1, {}),
        (f"patched, {threads} threads", threads, {}),
        (f"patched, {threads} threads, planned", threads, {"GGML_CLEX_THREADS_FIXED": "1"}),
        (f"stock, {threads} threads", threads, plain),
        (f"stock, {threads} threads, passive", threads, {**plain, "OMP_WAIT_POLICY": "passive"}),
    ]
    n_ctx = DEPTH + max(prompt, 64)
    return [
        Side.start(name, environment, TimedServer, model, n_ctx, 0, {"threads": n, "flash_attn": flash_attn})
        for name, n, environment in rows
    ]


@dataclass(frozen=True, kw_only=True)
class WaitingOptions:
    """What is compared, and how long."""

    stock: Path = option(
        STOCK, "Folder of the stock libraries; `make stock` builds them.", default_text="build/stock/bin"
    )
    threads: int | None = option(None, "Threads to compute with.", default_text="the physical cores", minimum=2)
    milliseconds: int = option(1500, "Decoding of a turn.", minimum=1)
    prompt: int = option(512, "Tokens prefilled at once.", minimum=1)
    rounds: int = option(5, "Turns of each side.", minimum=2)
    flash_attn: bool = option(False, "Flash attention.")
    only: str | None = option(None, "What is measured.", default_text="both", choices=("decode", "prefill"))
    beside: Sequence[str] = option(tuple(OTHERS), "What else runs. Repeatable.", choices=tuple(OTHERS))


@click.command("waiting", cls=Command, context_settings=SETTINGS)
@click.argument("model", type=click.Path(exists=True, dir_okay=False))
@options_from(WaitingOptions)
def main(model: str, options: WaitingOptions) -> None:
    """Measure MODEL with the patched library and the stock one: alone, beside one busy process for each core, and
    beside one of the lowest priority (nice 19) for each core.

    Each side is a process, and they take turns. Printed are tokens per second (medians), and as a ratio to one thread
    alone with the patched library (with the quartiles of the rounds). "Planned" always uses all threads, as without the
    policy (GGML_CLEX_THREADS_FIXED); "passive" is OMP_WAIT_POLICY=passive. What the policy costs alone is measured in
    one process at the end, since threads of the side before may still spin when a turn begins.
    """
    sides = start(
        model, options.prompt, options.threads or default_threads(), options.stock, flash_attn=options.flash_attn
    )
    orders = {"decode": ("decode_for", options.milliseconds, 32), "prefill": ("prefill_speed", options.prompt)}
    orders = {name: order for name, order in orders.items() if options.only in (None, name)}
    companies = list(dict.fromkeys(["alone", *options.beside]))
    speeds: dict[tuple[str, str], dict[str, list[float]]] = {}
    for company in companies:
        with others(OTHERS[company]):
            for name, order in orders.items():
                speeds[name, company] = measure(sides, options.rounds, *order)
    costs = {name: sides[1].ask("cost", order[0], order[1:], 2 * options.rounds) for name, order in orders.items()}
    for side in sides:
        side.stop()
    for name in orders:
        click.echo(row([name, *(f"{company}{what}" for company in companies for what in (", tok/s", " / 1 alone"))]))
        click.echo(row(["---", *["---:"] * (2 * len(companies))]))
        reference = speeds[name, "alone"][sides[0].name]
        for side in sides:
            found = [speeds[name, company][side.name] for company in companies]
            click.echo(row([side.name, *(cell for values in found for cell in cells(values, reference))]))
        click.echo(f"\nAlone, the policy's speed is {quartiles(costs[name]).text(3)} of that of the planned threads.\n")


if __name__ == "__main__":
    main()
