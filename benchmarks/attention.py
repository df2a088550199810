"""Attention on the CPU: decode and prefill of stock llama.cpp and of ours, by depth and by type of the KV cache."""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from benchmarks.context import KV_TYPES, default_threads
from benchmarks.markdown import row
from benchmarks.random_model import random_model
from benchmarks.stock import STOCK, Server, Side
from benchmarks.text import emma

PIECE = 512  # tokens that are computed to fill a cache; more are copies of them
COPIED = 1 << 28  # bytes that each thread copies: far more than the caches hold


class CopyingServer(Server):
    """Fills its cache by computing few tokens and copying their keys and values to further positions."""

    def fill(self, depth: int) -> float:
        """Have exactly depth tokens in the cache."""
        super().fill(min(depth, max(self.cached, PIECE)))
        while self.cached < depth:
            count = min(self.cached, depth - self.cached)
            self.context.repeat(count, self.cached)
            self.cached += count
        return 0.0

    def bytes_per_token(self, depth: int) -> int:
        """Bytes that decoding one token after depth others reads: the weights and the cache."""
        self.fill(depth)
        return self.context.model.n_bytes + self.context.n_bytes

    def likelihoods(self, count: int, prefilled: int, batch: int, window: int) -> npt.NDArray[np.float64]:
        """Negative log-likelihoods of one window of a text but its first `prefilled` tokens, which are one prompt."""
        context = self.context
        text = emma().read_text(encoding="utf-8")[: 16 * count * (window + 1)]
        tokens = context.model.tokenize(text)[window * count : (window + 1) * count]
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


def ratio(slow: list[float], fast: list[float]) -> str:
    """How many times as fast: the median over the rounds, and the quartiles."""
    low, middle, high = quantiles([a / b for a, b in zip(slow, fast, strict=True)], n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def start(
    model: str, n_ctx: int, kv_types: list[str], stock: Path, common: dict[str, Any]
) -> dict[tuple[str, str], Side]:
    """A process for each cache type and each of "off", "on" (stock, without and with flash attention) and "ours"."""
    library = {"LLAMA_CPP_LIB_PATH": str(stock.resolve())}
    sides = {}
    for kv_type in kv_types:
        for who in ("off", "on", "ours"):
            # Quantized values need flash attention.
            if who == "off" and kv_type.startswith("q"):
                continue
            options = {"kv_type": kv_type, "flash_attn": who != "off", "n_seq": 2, **common}
            environment = {} if who == "ours" else library
            arguments = (CopyingServer, model, n_ctx, 0, options)
            sides[kv_type, who] = Side.start(f"{who}, {kv_type}", environment, *arguments)
    return sides


def compare(
    sides: dict[tuple[str, str], Side], kv_types: list[str], threads: int, method: str, depth: int, count: int,
    rounds: int, limit: float,
) -> None:  # fmt: skip
    """Let the sides take turns, and print a row for each cache type."""
    for side in sides.values():
        side.ask("fill", depth)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in sides}
    began = time.monotonic()
    for turn in range(rounds):
        # Whoever comes first comes last next time.
        for key in list(sides)[:: -1 if turn % 2 else 1]:
            seconds[key].append(sides[key].ask(method, depth, count))
        if turn and time.monotonic() - began > limit:
            break
    bandwidth = copy_bandwidth(threads) if method == "decode" else 0.0
    for kv_type in kv_types:
        ours, stock = seconds[kv_type, "ours"], seconds[kv_type, "on"]
        off = seconds.get((kv_type, "off"))
        better = off if off and median(off) < median(stock) else stock
        share = ""
        if bandwidth:
            rate = sides[kv_type, "ours"].ask("bytes_per_token", depth) * count / median(ours)
            share = f"{rate / bandwidth:.2f}"
        speeds = [f"{count / median(times):.1f}" if times else "-" for times in (off, stock, ours)]
        base = seconds.get(("f16", "ours"))
        ratios = [ratio(better, ours), ratio(stock, ours), ratio(base, ours) if base else "-"]
        click.echo(row([f"{method} {count:,} at {depth:,}", kv_type, *speeds, *ratios, share]))


def compare_perplexities(sides: dict[tuple[str, str], Side], kv_types: list[str], tokens: int, windows: int) -> None:
    """Print those of a text's first windows: all in batches of 512, and the last quarters in small batches."""
    click.echo(row(["cache", "batch", "stock", "ours", "difference"]))
    click.echo(row(["---", "---:", "---:", "---:", "---:"]))
    prefilled = tokens - tokens // 4
    for kv_type in kv_types:
        for first, batch in ((0, 512), (prefilled, 8), (prefilled, 1)):
            stock, ours = (
                np.concatenate(
                    [sides[kv_type, who].ask("likelihoods", tokens, first, batch, window) for window in range(windows)]
                )
                for who in ("on", "ours")
            )
            difference = ours - stock
            error = difference.std() / np.sqrt(difference.size)
            cells = [kv_type, f"{batch}", f"{np.exp(stock.mean()):.3f}", f"{np.exp(ours.mean()):.3f}"]
            click.echo(row([*cells, f"{100 * np.expm1(difference.mean()):+.3f} ± {100 * error:.3f} %"]))


@click.command()
@click.argument("model", required=False, type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--layers", type=click.IntRange(min=1), default=4, show_default=True,
    help="Layers of the random model that is measured without MODEL: 32 query and 8 KV heads of 128, q8_0 weights.",
)  # fmt: skip
@click.option(
    "--stock", type=click.Path(exists=True, file_okay=False, path_type=Path), default=STOCK,
    show_default="build/stock/bin", help="Folder of the stock libraries; `make stock` builds them.",
)  # fmt: skip
@click.option(
    "--depth", "depths", type=click.IntRange(min=1), multiple=True, default=[64, 1024, 4096, 16384],
    show_default=True, help="Tokens cached before. Repeatable.",
)  # fmt: skip
@click.option("--prompt", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens prefilled at once.")
@click.option("--tokens", type=click.IntRange(min=1), default=16, show_default=True, help="Tokens decoded in a turn.")
@click.option("--rounds", type=click.IntRange(min=2), default=10, show_default=True, help="Turns of each side.")
@click.option(
    "--limit", type=float, default=300, show_default=True, help="Seconds after which a comparison has no more rounds."
)
@click.option(
    "--kv-type", "kv_types", type=click.Choice(list(KV_TYPES)), multiple=True, default=["f16", "q8_0", "q4_0"],
    show_default=True, help="Repeatable.",
)  # fmt: skip
@click.option(
    "--perplexity", type=click.IntRange(min=16), help="Compare perplexities on so many tokens of Emma instead."
)
@click.option(
    "--windows", type=click.IntRange(min=1), default=1, show_default=True, help="Windows of --perplexity tokens each."
)
@click.option("--quick", is_flag=True, help="Two rounds at 64 and 1,024 tokens, of 128 tokens and 4.")
@click.option("--threads", type=click.IntRange(min=1), help="[default: the physical cores]")
@click.option("--cpu-time", is_flag=True, help="Count CPU time on one thread, which a busy machine disturbs less.")
def main(
    model: str | None,
    layers: int,
    stock: Path,
    depths: tuple[int, ...],
    prompt: int,
    tokens: int,
    rounds: int,
    limit: float,
    kv_types: tuple[str, ...],
    perplexity: int | None,
    windows: int,
    quick: bool,
    threads: int | None,
    cpu_time: bool,
) -> None:
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
    if quick:
        depths, prompt, tokens, rounds = (64, 1024), 128, 4, 2
    if perplexity and not model:
        raise click.ClickException("perplexity needs a MODEL that can read")
    types, count = list(dict.fromkeys(kv_types)), 1 if cpu_time else threads or default_threads()
    common = {"threads": count, "clock": time.process_time if cpu_time else time.perf_counter}
    with tempfile.TemporaryDirectory() as folder:
        path = model or str(random_model(Path(folder) / "random.gguf", n_layer=layers))
        n_ctx = perplexity or max(depths) + max(prompt, tokens + 1)
        sides = start(path, n_ctx, types, stock, common)
        if perplexity:
            compare_perplexities(sides, types, perplexity, windows)
        else:
            columns = ["", "cache", "stock, off", "stock, on", "ours", "ours / better", "ours / on", "ours / ours f16"]
            click.echo(row([*columns, "share"]))
            click.echo(row(["---"] * 2 + ["---:"] * 7))
            for depth in sorted(depths):
                for method, many in (("prefill", prompt), ("decode", tokens)):
                    compare(sides, types, count, method, depth, many, rounds, limit)
        for side in sides.values():
            side.stop()


if __name__ == "__main__":
    main()
