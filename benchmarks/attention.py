"""Attention on the CPU: decode and prefill of stock llama.cpp and of ours, by depth and by type of the KV cache."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from benchmarks.markdown import row
from benchmarks.random_model import random_model
from benchmarks.sides import STOCK, Server, Side, stock_library
from benchmarks.text import emma
from benchmarks.turns import in_turns, speedup
from clex_local.commands.command import SETTINGS, Command
from clex_local.commands.command_options import options_from
from clex_local.commands.options import option
from clex_local.machine import default_threads
from clex_local.model_file.kv_types import KV_TYPES

COMPUTED = 512  # tokens that are computed to fill a cache; more are copies of them
COPIED = 1 << 28  # bytes that each thread copies: far more than the caches hold


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What is compared, and how long."""

    layers: int = option(
        4,
        "Layers of the random model that is measured without MODEL: 32 query and 8 KV heads of 128, q8_0 weights.",
        minimum=1,
    )
    stock: Path = option(
        STOCK, "Folder of the stock libraries; `make stock` builds them.", default_text="build/stock/bin"
    )
    depth: Sequence[int] = option((64, 1024, 4096, 16384), "Tokens cached before. Repeatable.", minimum=1)
    prompt: int = option(512, "Tokens prefilled at once.", minimum=1)
    tokens: int = option(16, "Tokens decoded in a turn.", minimum=1)
    rounds: int = option(10, "Turns of each side.", minimum=2)
    limit: float = option(300, "Seconds after which a comparison has no more rounds.")
    kv_type: Sequence[str] = option(
        ("f16", "q8_0", "q4_0"), "Type of the key and value cache. Repeatable.", choices=tuple(KV_TYPES)
    )
    perplexity: int | None = option(None, "Compare perplexities on so many tokens of Emma instead.", minimum=16)
    windows: int = option(1, "Windows of `perplexity` tokens each.", minimum=1)
    quick: bool = option(False, "Two rounds at 64 and 1,024 tokens, of 128 tokens and 4.")
    threads: int | None = option(None, "Threads to compute with.", default_text="the physical cores", minimum=1)
    cpu_time: bool = option(False, "Count CPU time on one thread, which a busy machine disturbs less.")


class CopyingServer(Server):
    """Fills its cache by computing few tokens and copying their keys and values to further positions."""

    def fill(self, depth: int) -> float:
        """Have exactly depth tokens in the cache."""
        super().fill(min(depth, max(self.cached, COMPUTED)))
        while self.cached < depth:
            count = min(self.cached, depth - self.cached)
            self.context.repeat(count, self.cached)
            self.cached += count
        return 0.0

    def bytes_per_token(self, depth: int) -> int:
        """Bytes that decoding one token after depth others reads: the weights and the cache."""
        self.fill(depth)
        return self.context.model.n_bytes + self.context.sequence_size()

    def likelihoods(self, count: int, prefilled: int, batch: int, window: int) -> npt.NDArray[np.float64]:
        """Negative log-likelihoods of one window of a text but its first `prefilled` tokens, which are one prompt."""
        context = self.context
        text = emma().read_text(encoding="utf-8")[: 16 * count * (window + 1)]
        tokens = context.model.tokenize(text.encode())[window * count : (window + 1) * count]
        sizes = [min(context.n_batch, prefilled - i) for i in range(0, prefilled, context.n_batch)]
        sizes += [batch] * ((count - prefilled) // batch)
        self.cached = 0
        return context.likelihoods(tokens, sizes)[max(prefilled - 1, 0) :]


def copy_bandwidth(threads: int) -> float:
    """Bytes read and written per second by copying, as STREAM's Copy counts them."""
    arrays = [(np.ones(COPIED // 8), np.empty(COPIED // 8)) for _ in range(threads)]
    best = np.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), arrays))
            best = min(best, time.perf_counter() - start)
    return 2 * COPIED * threads / best


def start(model: str, n_ctx: int, options: AttentionOptions) -> dict[tuple[str, str], Side]:
    """A process for each cache type and each of "off", "on" (stock, without and with flash attention) and "ours"."""
    library = stock_library(options.stock)
    clock = time.process_time if options.cpu_time else time.perf_counter
    common: dict[str, Any] = {"threads": threads(options), "clock": clock, "n_seq": 2}
    sides = {}
    for kv_type in dict.fromkeys(options.kv_type):
        for who in ("off", "on", "ours"):
            # Quantized values need flash attention.
            if who == "off" and kv_type.startswith("q"):
                continue
            context = {"kv_type": kv_type, "flash_attn": who != "off", **common}
            environment = {} if who == "ours" else library
            arguments = (CopyingServer, model, n_ctx, 0, context)
            sides[kv_type, who] = Side.start(f"{who}, {kv_type}", environment, *arguments)
    return sides


def compare(sides: dict[tuple[str, str], Side], method: str, depth: int, count: int, options: AttentionOptions) -> None:
    """Let the sides take turns, and print a row for each cache type."""
    for side in sides.values():
        side.ask("fill", depth)
    asked = {key: partial(side.ask, method, depth, count) for key, side in sides.items()}
    seconds = in_turns(asked, options.rounds, limit=options.limit)
    bandwidth = copy_bandwidth(threads(options)) if method == "decode" else 0.0
    for kv_type in dict.fromkeys(options.kv_type):
        ours, stock = seconds[kv_type, "ours"], seconds[kv_type, "on"]
        off = seconds.get((kv_type, "off"))
        better = off if off and median(off) < median(stock) else stock
        share = ""
        if bandwidth:
            rate = sides[kv_type, "ours"].ask("bytes_per_token", depth) * count / median(ours)
            share = f"{rate / bandwidth:.2f}"
        speeds = [f"{count / median(times):.1f}" if times else "-" for times in (off, stock, ours)]
        base = seconds.get(("f16", "ours"))
        ratios = [speedup(slow, ours).text() if slow else "-" for slow in (better, stock, base)]
        click.echo(row([f"{method} {count:,} at {depth:,}", kv_type, *speeds, *ratios, share]))


def threads(options: AttentionOptions) -> int:
    """How many compute."""
    return 1 if options.cpu_time else options.threads or default_threads()


def compare_perplexities(sides: dict[tuple[str, str], Side], tokens: int, options: AttentionOptions) -> None:
    """Print those of a text's first windows: all in batches of 512, and the last quarters in small batches."""
    click.echo(row(["cache", "batch", "stock", "ours", "difference"]))
    click.echo(row(["---", "---:", "---:", "---:", "---:"]))
    prefilled = tokens - tokens // 4
    for kv_type in dict.fromkeys(options.kv_type):
        for first, batch in ((0, 512), (prefilled, 8), (prefilled, 1)):
            stock, ours = (
                np.concatenate(
                    [
                        sides[kv_type, who].ask("likelihoods", tokens, first, batch, window)
                        for window in range(options.windows)
                    ]
                )
                for who in ("on", "ours")
            )
            difference = ours - stock
            error = difference.std() / np.sqrt(difference.size)
            cells = [kv_type, f"{batch}", f"{np.exp(stock.mean()):.3f}", f"{np.exp(ours.mean()):.3f}"]
            click.echo(row([*cells, f"{100 * np.expm1(difference.mean()):+.3f} ± {100 * error:.3f} %"]))


@click.command("attention", cls=Command, context_settings=SETTINGS)
@click.argument("model", required=False, type=click.Path(exists=True, dir_okay=False))
@options_from(AttentionOptions)
def main(model: str | None, options: AttentionOptions) -> None:
    """Measure decode and prefill of MODEL with each type of the KV cache, in stock llama.cpp and in ours.

    Each side is a process of its own, and they take turns. Printed are tokens per second of stock without and with
    flash attention and of ours with it (medians), and ratios (median and quartiles of the rounds; above 1: ours is
    faster): to the better of stock's two, to stock with flash attention, and of ours to ours with an F16 cache. The
    share is that of the copy bandwidth, measured after each comparison with the same threads, which reading the weights
    and the cache once for each decoded token takes.

    With --perplexity, the difference is that of the mean likelihoods and its standard error. Weights that are quantized
    make every rounding matter: take a model with F32 weights to tell a difference of 0.1 %.

    The cached tokens behind the first 512 are copies of these, shifted: a fast way to fill the cache.
    """
    if options.quick:
        options = replace(options, depth=(64, 1024), prompt=128, tokens=4, rounds=2)
    if options.perplexity and not model:
        raise click.ClickException("perplexity needs a MODEL that can read")
    with tempfile.TemporaryDirectory() as folder:
        path = model or str(random_model(Path(folder) / "random.gguf", n_layer=options.layers))
        sides = start(path, options.perplexity or max(options.depth) + max(options.prompt, options.tokens + 1), options)
        if options.perplexity:
            compare_perplexities(sides, options.perplexity, options)
        else:
            columns = ["", "cache", "stock, off", "stock, on", "ours", "ours / better", "ours / on", "ours / ours f16"]
            click.echo(row([*columns, "share"]))
            click.echo(row(["---"] * 2 + ["---:"] * 7))
            for depth in sorted(options.depth):
                for method, count in (("prefill", options.prompt), ("decode", options.tokens)):
                    compare(sides, method, depth, count, options)
        for side in sides.values():
            side.stop()


if __name__ == "__main__":
    main()
