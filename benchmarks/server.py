"""Throughput of clex-serve beside llama.cpp's own server of the same source, with the same options, taking turns.

The stock server is built once by ``cmake --build build/stock --target llama-server`` after ``make stock``.
"""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click
import numpy as np

from benchmarks.markdown import row
from benchmarks.sides import STOCK
from clex_local import Server, serve


@dataclass
class Load:
    """Conversations at once, the tokens of each one's prompt, and those of its answer."""

    conversations: int
    prompt: int
    answer: int

    def run(self, server: Server, seed: int) -> tuple[float, float]:
        """Tokens per second, of reading and of writing, of all conversations together."""
        rng = np.random.default_rng(seed)
        prompts = [rng.integers(100, 40000, self.prompt).tolist() for _ in range(self.conversations)]
        start = time.perf_counter()
        with ThreadPoolExecutor(self.conversations) as pool:
            timings = list(pool.map(lambda prompt: ask(server, prompt, self.answer), prompts))
        total = time.perf_counter() - start
        writing = max(timing["predicted_ms"] for timing in timings) / 1000
        tokens = self.conversations * (self.prompt + self.answer)
        return tokens / total, self.conversations * self.answer / writing


def ask(server: Server, prompt: list[int], answer: int) -> dict[str, Any]:
    """The timings of one completion, nothing of which is reused."""
    asked = {"prompt": prompt, "n_predict": answer, "ignore_eos": True, "cache_prompt": False, "temperature": 0}
    request = urllib.request.Request(
        f"{server.url}/completion", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)["timings"]


def start(stack: ExitStack, model: Path, stock: bool, **options: Any) -> Server:
    """A server of ours, or the stock one."""
    before = os.environ.pop("LLAMA_CPP_LIB_PATH", None)
    if stock:
        os.environ["LLAMA_CPP_LIB_PATH"] = str(STOCK)
    try:
        return stack.enter_context(serve(model, port=0, **options))
    finally:
        os.environ.pop("LLAMA_CPP_LIB_PATH", None)
        if before is not None:
            os.environ["LLAMA_CPP_LIB_PATH"] = before


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The middle of the ratios, with quartiles."""
    low, middle, high = quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


@click.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--ctx", type=int, default=8192)
@click.option("--conversations", type=int, multiple=True, default=(1, 4, 8))
@click.option("--prompt", "prompts", type=int, multiple=True, default=(64, 4096))
@click.option("--answer", type=int, default=32)
@click.option("--rounds", type=int, default=5)
@click.option("--threads", type=int)
def main(
    model: Path,
    ctx: int,
    conversations: tuple[int, ...],
    prompts: tuple[int, ...],
    answer: int,
    rounds: int,
    threads: int | None,
) -> None:
    """Print how many tokens per second MODEL, without tables, reads and writes in conversations at once."""
    click.echo(row(["conversations", "prompt", "tokens/s, stock", "clex-serve / stock", "of writing alone"]))
    click.echo(row(["---"] * 5))
    with ExitStack() as stack:
        options: dict[str, Any] = {"ctx": ctx, "parallel": max(conversations), "threads": threads}
        sides = [start(stack, model, stock, **options) for stock in (True, False)]
        for count in conversations:
            for prompt in prompts:
                load = Load(count, prompt, answer)
                speeds: list[list[tuple[float, float]]] = [[], []]
                for turn in range(rounds + 1):
                    # Whoever comes first comes last next time.
                    for side in (0, 1) if turn % 2 else (1, 0):
                        speeds[side].append(load.run(sides[side], turn))
                stock, ours = ([*zip(*side[1:], strict=True)] for side in speeds)  # the first round warms up
                cells = [f"{median(stock[0]):.1f}", ratio(ours[0], stock[0]), ratio(ours[1], stock[1])]
                click.echo(row([str(count), f"{prompt:,}", *cells]))


if __name__ == "__main__":
    main()
