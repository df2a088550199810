"""Prefill and decode by type of weights: ours, stock llama.cpp and ik_llama.cpp; and the share of the peak."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import tempfile
import time
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
from clex_local.commands.command import SETTINGS, Command
from clex_local.commands.command_options import options_from
from clex_local.commands.options import option
from clex_local.machine import default_threads
from clex_local.model_file.gguf_file import GGUFFile

PEAK = Path(__file__).with_name("peak.cpp")
OTHER_SIDE = Path(__file__).with_name("other_side.cpp")
TYPES = ("q4_k_m", "q8_0", "q4_0", "q6_k", "iq4_xs", "f16")


# Sizes of the random models: of SmolLM2-135M, of Llama 3.2 1B but for its heads, and the latter with 8 experts.
SHAPES: dict[str, dict[str, int]] = {
    "small": {"width": 576, "feed_forward": 1536, "n_head": 9, "n_head_kv": 3, "head": 64},
    "dense": {},
    "moe": {"n_expert": 8},
}


@dataclass(frozen=True, kw_only=True)
class PrefillOptions:
    """What is compared, and how long."""

    type: Sequence[str] = option(TYPES, "Type of the weights of the random models. Repeatable.")
    shape: Sequence[str] = option(
        tuple(SHAPES),
        "Random models: like SmolLM2-135M, 1B-class, 8 experts. Repeatable.",
        choices=tuple(SHAPES),
    )
    model: Sequence[Path] = option((), "A file to measure as it is, before the random ones. Repeatable.")
    layers: int = option(2, "Layers of the random models; the small one has four times as many.", minimum=1)
    stock: Path = option(
        STOCK, "Folder of the stock libraries; `make stock` builds them.", default_text="build/stock/bin"
    )
    ik: Path | None = option(None, "Folder of an ik_llama.cpp that was built in its folder `build`.")
    long_type: Sequence[str] = option(
        ("q4_k_m",), "Types of which all of the following is measured too, not the beginning alone. Repeatable."
    )
    depth: Sequence[int] = option((4096, 16384), "Tokens cached before a prefill. Repeatable.", minimum=1)
    decode_depth: Sequence[int] = option((8192,), "Tokens cached before a decode. Repeatable.", minimum=1)
    whole: int = option(4096, "Tokens of a prompt that is read in one go.", minimum=1)
    prompt: int = option(512, "Tokens prefilled at once.", minimum=1)
    tokens: int = option(16, "Tokens decoded in a turn.", minimum=1)
    rounds: int = option(5, "Turns of each side.", minimum=2)
    limit: float = option(30, "Seconds after which a comparison has no more rounds.")
    pause: float = option(0.3, "Seconds before each turn, in which threads of the side before stop spinning.")
    threads: int | None = option(None, "Threads to compute with.", default_text="the physical cores", minimum=1)
    other_threads: Sequence[int] = option(
        (), "Threads of which our prefill is compared to that with `threads`. Repeatable.", minimum=1
    )


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


class OtherSide:
    """A process with another llama.cpp, which takes the orders of `Side`."""

    def __init__(self, program: Path, model: Path, n_ctx: int, threads: int) -> None:
        command = [str(program), str(model), str(n_ctx), str(threads)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    @staticmethod
    def build(folder: Path, target: Path) -> Path:
        """Compile the program against the headers and the library of a build.

        Raises:
            click.ClickException: there is no such build.
        """
        libraries = [path for name in ("llama", "ggml") for path in (folder / "build").rglob(f"lib{name}.so")]
        if len(libraries) != 2:
            raise click.ClickException(f"{folder}: no shared libraries of llama.cpp in its folder `build`")
        compiler = [os.environ.get("CXX", "c++"), "-O2", "-std=c++17"]
        compiler += [f"-I{folder / name}" for name in ("include", "ggml/include")]
        linked = [*map(str, libraries), *(f"-Wl,-rpath,{path.parent}" for path in libraries)]
        subprocess.run([*compiler, str(OTHER_SIDE), *linked, "-o", str(target)], check=True)
        return target

    def ask(self, method: str, *arguments: int) -> float:
        """Let the process do something; the seconds it took."""
        assert self.process.stdin
        assert self.process.stdout
        depth, count = (*arguments, 0)[:2]
        self.process.stdin.write(f"{method} {depth} {count}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise click.ClickException(f"{self.process.args}: has ended")

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def measurements(options: PrefillOptions, long: bool) -> list[tuple[str, int, int]]:
    """What is measured of one model: the method, tokens that are cached before, and tokens."""
    found = [("prefill", 0, options.prompt), ("decode", 0, options.tokens)]
    if long:
        found += [("prefill", 0, options.whole)]
        found += [("prefill", depth, options.prompt) for depth in options.depth]
        found += [("decode", depth, options.tokens) for depth in options.decode_depth]
    return sorted(found, key=lambda each: each[1])  # what is cached grows


def compare_threads(side: Side, name: str, options: PrefillOptions, threads: int) -> None:
    """Print a row for the prefill of ours with each other number of threads: its speed to that with `threads`."""

    def measure(count: int) -> float:
        side.ask("threads", count)
        return side.ask("prefill", 0, options.prompt)

    for other in options.other_threads:
        seconds = in_turns({n: partial(measure, n) for n in (threads, other)}, options.rounds, warm_up=1)
        ratio = speedup(seconds[threads], seconds[other]).text()
        click.echo(f"{name}, prefill {options.prompt:,} at 0: {other} threads to {threads}: {ratio}", err=True)
    side.ask("threads", threads)


def rested(pause: float, side: Side | OtherSide, *order: Any) -> float:
    """What a side answers to an order that it gets after a pause.

    Without one our threads take those of the side before, which spin for a while, for other programs, and make way.
    """
    time.sleep(pause)
    return side.ask(*order)


def compare(model: Path, name: str, options: PrefillOptions, peak: Peak, other: Path | None, long: bool) -> None:
    """Let the sides take turns with one model, and print a row for each measurement."""
    threads = options.threads or default_threads()
    todo = measurements(options, long)
    n_ctx = -(-max(depth + count + 1 for _, depth, count in todo) // 256) * 256
    context: dict[str, Any] = {"kv_type": "f16", "flash_attn": True, "threads": threads}
    sides: dict[str, Side | OtherSide] = {
        who: Side.start(f"{who}, {name}", environment, Server, str(model), n_ctx, 0, context)
        for who, environment in (("stock", stock_library(options.stock)), ("ours", {}))
    }
    if other:
        sides["ik"] = OtherSide(other, model, n_ctx, threads)
    work = products_per_token(model)
    for method, depth, count in todo:
        for side in sides.values():
            side.ask("fill", depth)
        asked: dict[str, Callable[[], float]] = {
            who: partial(rested, options.pause, side, method, depth, count) for who, side in sides.items()
        }
        seconds = in_turns(asked, options.rounds, warm_up=1, limit=options.limit)
        ours = median(seconds["ours"])
        share = ""
        if method == "prefill" and depth == 0 and peak.bytes:
            share = f"{work * count / ours / threads / peak.bytes:.2f}"
        cells = [speedup(seconds[who], seconds["ours"]).text() for who in sides if who != "ours"]
        click.echo(row([name, f"{method} {count:,} at {depth:,}", f"{count / ours:.1f}", *cells, share]))
    if options.other_threads and isinstance(sides["ours"], Side):
        compare_threads(sides["ours"], name, options, threads)
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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        other = OtherSide.build(options.ik.resolve(), folder / "other_side") if options.ik else None
        for model in options.model:
            compare(model, model.stem, options, peak, other, True)
        for shape in options.shape:
            layers = options.layers * (4 if shape == "small" else 1)
            source = random_model(folder / f"{shape}.gguf", n_layer=layers, **SHAPES[shape])
            for kind in options.type:
                path = source if kind == "q8_0" else quantized(source, folder / f"{shape}-{kind}.gguf", kind)
                compare(path, f"{shape} {kind}", options, peak, other, kind in options.long_type)
                if path != source:
                    path.unlink()
            source.unlink()


if __name__ == "__main__":
    main()
