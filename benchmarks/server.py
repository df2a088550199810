"""Throughput of clex-serve beside llama.cpp's own server of the same source, with the same options, taking turns."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import click
import numpy as np
import psutil

from benchmarks.markdown import row
from benchmarks.sides import STOCK, stock_library
from benchmarks.turns import in_turns, speedup
from clex_local import Server, serve
from clex_local.commands.command import SETTINGS, Command
from clex_local.commands.command_options import options_from
from clex_local.commands.options import option

HEADINGS = ("conversations", "prompt", "tokens/s, stock", "clex-serve / stock", "of writing alone")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What is asked of both servers, and how often."""

    stock: Path = option(
        STOCK, "Folder with the stock server; `make stock-server` builds it.", default_text="build/stock/bin"
    )
    ctx: int = option(8192, "Tokens that one conversation may have.", minimum=256)
    conversations: Sequence[int] = option((1, 4, 8), "Conversations at once. Repeatable.", minimum=1)
    prompt: Sequence[int] = option((64, 4096), "Tokens of each one's prompt. Repeatable.", minimum=1)
    tokens: int = option(32, "Tokens of each answer.", minimum=2)
    rounds: int = option(5, "Turns of each side.", minimum=1)
    kv_type: str = option("f16", "Type of the key and value cache.", choices=("f16", "f32", "q8_0"))
    threads: int | None = option(None, "Threads to compute with.", default_text="the physical cores", minimum=1)
    cpu_time: bool = option(False, "Count the servers' CPU time, of one thread, which a busy machine disturbs less.")


class Seconds(NamedTuple):
    """How long a load took, and its answers without their prompts."""

    all: float
    writing: float


@dataclass
class Load:
    """Conversations at once, the tokens of each one's prompt, and those of its answer."""

    conversations: int
    prompt: int
    answer: int

    def runner(self, server: Server, cpu_time: bool) -> Callable[[], Seconds]:
        """What runs it once, with other prompts each time and the same ones on every server."""
        rng = np.random.default_rng(0)
        process = psutil.Process(server.pid)

        def now() -> float:
            if not cpu_time:
                return time.perf_counter()
            used = process.cpu_times()
            return used.user + used.system

        def run() -> Seconds:
            prompts = [rng.integers(100, 40000, self.prompt).tolist() for _ in range(self.conversations)]
            start = now()
            with ThreadPoolExecutor(self.conversations) as pool:
                answers = list(pool.map(lambda prompt: ask(server, prompt, self.answer, now), prompts))
            end = now()
            # from where all prompts are read
            return Seconds(end - start, end - max(answers))

        return run


def ask(server: Server, prompt: list[int], answer: int, now: Callable[[], float]) -> float:
    """When the first token of a completion came, nothing of which is reused."""
    asked = {
        **{"prompt": prompt, "n_predict": answer, "ignore_eos": True, "cache_prompt": False},
        **{"temperature": 0, "stream": True},
    }
    request = urllib.request.Request(
        f"{server.url}/completion", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        response.readline()
        first = now()
        if b'"tokens_predicted":' + str(answer).encode() not in response.read():
            raise click.ClickException(f"{server.url} ended an answer early")
    return first


def start(stack: ExitStack, model: Path, options: ServerOptions, folder: Path | None) -> Server:
    """A server of ours, or the stock one of a folder."""
    before = os.environ.copy()
    os.environ.pop("LLAMA_CPP_LIB_PATH", None)
    if folder is not None:
        os.environ |= stock_library(folder)
    try:
        return stack.enter_context(
            serve(
                model,
                port=0,
                ctx=options.ctx,
                parallel=max(options.conversations),
                kv_type=options.kv_type,
                threads=1 if options.cpu_time else options.threads,
            )
        )
    finally:
        os.environ.clear()
        os.environ |= before


def parts(rounds: Sequence[Seconds]) -> tuple[list[float], list[float]]:
    """What all took in each round, and writing alone."""
    return [seconds.all for seconds in rounds], [seconds.writing for seconds in rounds]


def ratio(slow: Sequence[float], fast: Sequence[float]) -> str:
    """How many times as fast, with quartiles where there are several rounds."""
    return speedup(slow, fast).text(3) if len(slow) > 1 else f"{slow[0] / fast[0]:.3f}"


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@options_from(ServerOptions)
def main(model: Path, options: ServerOptions) -> None:
    """Print how many tokens per second MODEL, without tables, reads and writes in conversations at once."""
    if not (options.stock / "llama-server").is_file():
        raise click.ClickException(f"{options.stock} has no llama-server; `make stock-server` builds it")
    click.echo(row(HEADINGS))
    click.echo(row(["---", *["---:"] * 4]))
    with ExitStack() as stack:
        # Ours first: this process takes its own library from the environment too.
        ours, stock = (start(stack, model, options, folder) for folder in (None, options.stock))
        for count in options.conversations:
            for prompt in options.prompt:
                load = Load(count, prompt, options.tokens)
                sides = {
                    "stock": load.runner(stock, options.cpu_time),
                    "clex-serve": load.runner(ours, options.cpu_time),
                }
                found = in_turns(sides, options.rounds, warm_up=1)
                speed = count * (prompt + options.tokens) / median(seconds.all for seconds in found["stock"])
                cells = [f"{speed:.1f}", *(ratio(*part) for part in zip(*map(parts, found.values()), strict=True))]
                click.echo(row([str(count), f"{prompt:,}", *cells]))


if __name__ == "__main__":
    main()
