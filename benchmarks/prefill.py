"""Prefill and decode by type of weights: ours, stock llama.cpp and ik_llama.cpp; and the share of the peak."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click

from benchmarks.markdown import row
from benchmarks.random_model import random_model
from benchmarks.sides import STOCK, Server, Side, stock_library
from benchmarks.turns import in_turns, speedup
from clex_local.command import SETTINGS, Command
from clex_local.command_options import options_from
from clex_local.gguf_file import GGUFFile
from clex_local.memory import default_threads
from clex_local.options import option

PEAK = Path(__file__).with_name("peak.cpp")
TYPES = ("q4_k_m", "q8_0", "q4_0", "q6_k", "iq4_xs", "f16")


@dataclass(frozen=True, kw_only=True)
class PrefillOptions:
    """What is compared, and how long."""

    type: Sequence[str] = option(TYPES, "Type of the weights of the random models. Repeatable.")
    shape: Sequence[str] = option(
        ("dense", "moe"), "Random models: 1B-class, 8 experts. Repeatable.", choices=("dense", "moe")
    )
    model: Sequence[Path] = option((), "A file to measure as it is, before the random ones. Repeatable.")
    layers: int = option(8, "Layers of the random models.", minimum=1)
    stock: Path = option(
        STOCK, "Folder of the stock libraries; `make stock` builds them.", default_text="build/stock/bin"
    )
    ik: Path | None = option(None, "llama-bench of an ik_llama.cpp that was built elsewhere.")
    depth: Sequence[int] = option((0, 4096, 16384), "Tokens cached before a prefill. Repeatable.", minimum=0)
    decode_depth: Sequence[int] = option((0, 8192), "Tokens cached before a decode. Repeatable.", minimum=0)
    prompt: int = option(512, "Tokens prefilled at once.", minimum=1)
    tokens: int = option(16, "Tokens decoded in a turn.", minimum=1)
    rounds: int = option(6, "Turns of each side.", minimum=2)
    limit: float = option(300, "Seconds after which a comparison has no more rounds.")
    threads: int | None = option(None, "Threads to compute with.", default_text="the physical cores", minimum=1)


class Peak(NamedTuple):
    """Products of two numbers that one core computes from registers, a second."""

    bytes: float
    bf16: float
    floats: float

    @classmethod
    def measure(cls) -> Peak:
        """Compile the benchmark for this machine and run it."""
        native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder) / "peak"
            compiler = os.environ.get("CXX", "c++")
            subprocess.run([compiler, "-O3", native, "-std=c++17", str(PEAK), "-o", str(program)], check=True)
            done = subprocess.run([str(program)], capture_output=True, text=True, check=True)
        return cls(*(1e9 * float(number) for number in done.stdout.split()))


def products_per_token(path: Path) -> float:
    """Products of two numbers that the weights of all layers take for a token of a prompt."""
    with GGUFFile(path) as file:
        architecture = file.get("general.architecture")
        experts = file.get(f"{architecture}.expert_count", 0)
        used = file.get(f"{architecture}.expert_used_count", 0)
        total = 0.0
        for tensor in file.tensors:
            if tensor.name.startswith("blk.") and len(tensor.shape) >= 2:
                total += math.prod(tensor.shape) * (used / experts if "_exps" in tensor.name else 1)
    return total


def ik_seconds(program: Path, model: Path, threads: int, method: str, depth: int, count: int) -> float:
    """What ik_llama.cpp's own benchmark takes in a process of its own: a prefill after others, or a decode."""
    command = [str(program), "-m", str(model), "-t", str(threads), "-r", "1", "-o", "json", "-fa", "1", "-mmp", "0"]

    def seconds(*arguments: str) -> float:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise click.ClickException(f"{program}: {done.stderr.strip().splitlines()[-1:]}")
        return json.loads(done.stdout)[0]["avg_ns"] / 1e9

    if method == "decode":
        return seconds("-p", "0", "-n", "0", "-gp", f"{depth},{count}")
    # It has no prefill at a depth: the difference of two prompts.
    whole = seconds("-p", str(depth + count), "-n", "0")
    return whole - seconds("-p", str(depth), "-n", "0") if depth else whole


def compare(model: Path, name: str, options: PrefillOptions, peak: Peak) -> None:
    """Let the sides take turns with one model, and print a row for each measurement."""
    threads = options.threads or default_threads()
    n_ctx = max(*options.depth, *options.decode_depth) + max(options.prompt, options.tokens + 1)
    context: dict[str, Any] = {"kv_type": "f16", "flash_attn": True, "threads": threads}
    sides = {
        who: Side.start(f"{who}, {name}", environment, Server, str(model), n_ctx, 0, context)
        for who, environment in (("stock", stock_library(options.stock)), ("ours", {}))
    }
    work = products_per_token(model)
    for method, depths, count in (
        ("prefill", options.depth, options.prompt),
        ("decode", options.decode_depth, options.tokens),
    ):
        for depth in sorted(depths):
            for side in sides.values():
                side.ask("fill", depth)
            asked: dict[str, Callable[[], float]] = {
                who: partial(side.ask, method, depth, count) for who, side in sides.items()
            }
            if options.ik:
                asked["ik"] = partial(ik_seconds, options.ik, model, threads, method, depth, count)
            seconds = in_turns(asked, options.rounds, warm_up=1, limit=options.limit)
            ours = median(seconds["ours"])
            share = ""
            if method == "prefill" and depth == 0 and peak.bytes:
                share = f"{work * count / ours / threads / peak.bytes:.2f}"
            cells = [speedup(seconds["stock"], seconds["ours"]).text()]
            cells += [speedup(seconds["ik"], seconds["ours"]).text()] if options.ik else []
            click.echo(row([name, f"{method} {count:,} at {depth:,}", f"{count / ours:.1f}", *cells, share]))
    for side in sides.values():
        side.stop()


def quantized(source: Path, target: Path, kind: str) -> Path:
    """The random model with weights of another type."""
    from clex_convert.quantize import quantize
    from clex_convert.recipe import Recipe

    quantize(source, target, Recipe(outtype=kind), verbose=False, progress=lambda _: None)
    return target


@click.command("prefill", cls=Command, context_settings=SETTINGS)
@options_from(PrefillOptions)
def main(options: PrefillOptions) -> None:
    """Measure how fast prompts are read with each type of weights, against stock llama.cpp and ik_llama.cpp.

    The sides take turns; printed are our speed and the ratios (above 1: ours is faster), the median over the rounds and
    the quartiles. The last column is the share that the products with weights have of the peak: of what the cores
    compute with 8-bit numbers from registers alone, which is measured first.
    """
    peak = Peak.measure()
    click.echo(f"a core: {peak.bytes / 1e9:.0f}, {peak.bf16 / 1e9:.0f} and {peak.floats / 1e9:.0f}"
        " thousand million products a second of 8-bit numbers, bf16 and float\n")  # fmt: skip
    head = ["model", "", "ours, tok/s", "to stock", *(["to ik"] if options.ik else []), "of the peak"]
    click.echo(row(head))
    click.echo(row(["---", "---", *["---:"] * (len(head) - 2)]))
    for model in options.model:
        compare(model, model.stem, options, peak)
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.shape:
            experts = 8 if shape == "moe" else 0
            source = random_model(Path(folder) / f"{shape}.gguf", n_layer=options.layers, n_expert=experts)
            for kind in options.type:
                path = source if kind == "q8_0" else quantized(source, Path(folder) / f"{shape}-{kind}.gguf", kind)
                compare(path, f"{shape} {kind}", options, peak)
                if path != source:
                    path.unlink()
            source.unlink()


if __name__ == "__main__":
    main()
