"""Memory and time of clex-convert on a large model of random weights, beside llama.cpp's own two steps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import click

from benchmarks.markdown import row
from benchmarks.turns import in_turns
from clex_local.commands.command import SETTINGS, Command
from clex_local.commands.command_options import options_from
from clex_local.commands.options import option

TOKENIZER = Path(__file__).parent.parent / "tests" / "data" / "llama"
CONVERT = [sys.executable, "-c", "from clex_convert.cli import main; main()"]
WIDTH, FEED_FORWARD, HEADS = 4096, 11008, 32  # LLaMA-2-7B's
GIB = 2**30
ALLOWANCE = 1.5 * GIB


def make_model(folder: Path, size: float, vocabulary: int) -> int:
    """Writes a LLaMA checkpoint with at least `size` bytes of random bf16 weights, one file for each layer.

    Returns:
        Bytes of its largest tensor.
    """
    import numpy as np
    import torch
    from safetensors.torch import save_file

    head, square, wide = (vocabulary, WIDTH), (WIDTH, WIDTH), (FEED_FORWARD, WIDTH)
    layer = {f"self_attn.{name}_proj.weight": square for name in "qkvo"}
    layer |= {"mlp.gate_proj.weight": wide, "mlp.up_proj.weight": wide, "mlp.down_proj.weight": wide[::-1]}
    layer |= {"input_layernorm.weight": (WIDTH,), "post_attention_layernorm.weight": (WIDTH,)}
    layer_size = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * FEED_FORWARD)
    layers = max(1, -(-int(size - 4 * vocabulary * WIDTH) // layer_size))
    outer = {"model.embed_tokens.weight": head, "model.norm.weight": (WIDTH,), "lm_head.weight": head}
    parts = [{f"model.layers.{i}.{name}": shape for name, shape in layer.items()} for i in range(layers)] + [outer]
    random, weight_map = np.random.default_rng(0), {}

    def weights(shape: tuple[int, ...]) -> torch.Tensor:
        """Random signs and mantissas, and magnitudes from 2^-7 to 2^-5: much faster than a normal distribution."""
        bits = random.integers(0, 2**16, shape, np.uint16) & 0x80FF | 0x3C00
        return torch.from_numpy(bits).view(torch.bfloat16)

    folder.mkdir(parents=True)
    for number, shapes in enumerate(parts, 1):
        part = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file({name: weights(shape) for name, shape in shapes.items()}, folder / part)
        weight_map |= dict.fromkeys(shapes, part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(TOKENIZER / "tokenizer.model", folder)
    return 2 * max(vocabulary, FEED_FORWARD) * WIDTH


@dataclass
class Run:
    """What commands took, one after the other.

    Attributes:
        seconds: wall time.
        cpu: seconds of CPU time, user and system, of all processes.
        peak: largest resident memory that any process had, file pages that it mapped included (VmHWM), in bytes.
        together: the largest sum of these peaks over processes that were there at the same time.
    """

    seconds: float = 0.0
    cpu: float = 0.0
    peak: int = 0
    together: int = 0
    _peaks: dict[int, int] = field(default_factory=dict)

    def run(self, *command: object) -> Run:
        """Runs a command to its end and adds what it took."""
        started, cpu = time.monotonic(), sum(os.times()[2:4])
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT)
            done = threading.Event()
            watcher = threading.Thread(target=self._watch, args=(process.pid, done))
            watcher.start()
            code = process.wait()
            self.seconds += time.monotonic() - started
            self.cpu += sum(os.times()[2:4]) - cpu
            done.set()
            watcher.join()
            if code:
                log.seek(0)
                raise click.ClickException(f"{' '.join(map(str, command))} failed:\n{log.read()[-2000:]}")
        return self

    def _watch(self, root: int, done: threading.Event) -> None:
        # VmHWM only grows, so that a few samples in a second miss what came in the last moments of a process alone.
        while not done.wait(0.05):
            alive = list(self._tree(root, b""))
            self.peak = max([self.peak, *(self._peaks[number] for number in alive)])
            self.together = max(self.together, sum(self._peaks[number] for number in alive))

    def _tree(self, number: int, parent: bytes) -> Iterator[int]:
        """Process ids of a process and all below it, whose peaks are recorded."""
        process = Path(f"/proc/{number}")
        try:
            command = (process / "cmdline").read_bytes()
            status = (process / "status").read_text()
            children = [int(child) for task in process.glob("task/*/children") for child in task.read_text().split()]
        except (OSError, ValueError):
            return  # it has ended
        if command == parent or "VmHWM:" not in status:
            return  # forked, but not yet the other program: its memory is its parent's; or a zombie
        self._peaks[number] = int(status.split("VmHWM:")[1].split()[0]) * 1024
        yield number
        for child in children:
            yield from self._tree(child, command)


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """What is converted, and with what it is compared."""

    size: float = option(4.0, "GB of weights of the model, at least.")
    vocabulary: int = option(32000, "Tokens: decides the largest tensor.")
    outtype: Sequence[str] = option(("bf16", "f16", "q8_0", "q4_k_m"), "Types to convert to. Repeatable.")
    llama_cpp: Path | None = option(
        None, "Folder of llama.cpp's source with convert_hf_to_gguf.py, to take turns with."
    )
    llama_quantize: Path | None = option(
        None, "Its tool llama-quantize.", default_text="build/bin/llama-quantize in that folder"
    )
    check: str = option("basic", "How clex-convert checks its results.")
    rounds: int = option(3, "Turns of each side.", minimum=1)
    folder: Path = option(
        Path("build/bench"), "Where the model and the results are written; they are removed at the end."
    )


class Conversions:
    """The conversions of one model folder by both programs, and the tables of what they took."""

    def __init__(self, folder: Path, options: ConversionOptions) -> None:
        self.options = options
        self.model, self.out, self.middle = (folder / name for name in ("model", "out.gguf", "middle.gguf"))
        self.rows = [row(["conversion", "seconds", "CPU s", "peak, GiB", "peaks together, GiB"])]
        self.ratios = [row(["conversion", "llama.cpp, s", "clex-convert, s", "ratio", "CPU, ratio"])]
        for table in (self.rows, self.ratios):
            table.append(row(["---", *["---:"] * 4]))

    def ours(self, source: Path, target: Path, *more: str) -> Run:
        """What clex-convert takes."""
        os.sync()  # what the run before left to be written is not for this one to wait for
        check = self.options.check
        return Run().run(*CONVERT, source, target, "--method", "ntk", "--check", check, "--overwrite", *more)

    def theirs(self, outtype: str) -> Run:
        """What llama.cpp's script takes, with its tool where the script does not write the type."""
        os.sync()
        llama_cpp = self.options.llama_cpp
        assert llama_cpp is not None
        direct = outtype in ("f32", "f16", "bf16")
        first, result = (outtype, self.out) if direct else ("bf16", self.middle)
        script = llama_cpp / "convert_hf_to_gguf.py"
        run = Run().run(sys.executable, script, self.model, "--outfile", result, "--outtype", first)
        tool = self.options.llama_quantize or llama_cpp / "build" / "bin" / "llama-quantize"
        return run if direct else run.run(tool, self.middle, self.out, outtype)

    def add(self, name: str, runs: list[Run]) -> None:
        """A row of what the runs of a conversion took."""
        seconds, cpu = median(run.seconds for run in runs), median(run.cpu for run in runs)
        peak, together = max(run.peak for run in runs), max(run.together for run in runs)
        cells = [name, f"{seconds:.1f}", f"{cpu:.1f}", f"{peak / GIB:.2f}", f"{together / GIB:.2f}"]
        self.rows.append(row(cells))
        click.echo(self.rows[-1], err=True)

    def compare(self, outtype: str) -> None:
        """Converts the folder in turns with llama.cpp, where there is one."""

        def once(convert: Callable[[], Run]) -> Run:
            run = convert()
            self.out.unlink(missing_ok=True)
            self.middle.unlink(missing_ok=True)
            return run

        sides = {"ours": lambda: once(lambda: self.ours(self.model, self.out, "--outtype", outtype))}
        if self.options.llama_cpp:
            sides["llama.cpp"] = lambda: once(lambda: self.theirs(outtype))
        runs = in_turns(sides, self.options.rounds)
        self.add(f"folder to {outtype}", runs["ours"])
        if self.options.llama_cpp:
            self.add(f"folder to {outtype}, llama.cpp", runs["llama.cpp"])
            seconds = [median(run.seconds for run in runs[side]) for side in ("llama.cpp", "ours")]
            pairs = list(zip(runs["llama.cpp"], runs["ours"], strict=True))
            ratios = median(b.seconds / a.seconds for a, b in pairs), median(b.cpu / a.cpu for a, b in pairs)
            cells = [*(f"{value:.1f}" for value in seconds), *(f"{value:.3f}" for value in ratios)]
            self.ratios.append(row([outtype, *cells]))
            click.echo(self.ratios[-1], err=True)

    def convert_gguf(self) -> None:
        """Converts a GGUF file of the model, which is removed."""
        self.ours(self.model, self.middle, "--outtype", "bf16")
        shutil.rmtree(self.model)
        self.add("GGUF file, copied", [self.ours(self.middle, self.out)])
        self.add("GGUF file to q4_k_m", [self.ours(self.middle, self.out, "--outtype", "q4_k_m")])


@click.command("conversion", cls=Command, context_settings=SETTINGS)
@options_from(ConversionOptions)
def main(options: ConversionOptions) -> None:
    """Convert a synthetic LLaMA folder, and a GGUF file of its size; print peaks of memory, and times.

    With --llama-cpp, convert_hf_to_gguf.py and llama-quantize do the same conversions in turns. Needs Linux, and disk
    space of three times the size.
    """
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="conversion-") as scratch:
        conversions = Conversions(Path(scratch), options)
        largest = make_model(conversions.model, options.size * 1e9, options.vocabulary)
        weights = sum(path.stat().st_size for path in conversions.model.glob("*.safetensors"))
        click.echo(f"{weights / 1e9:.2f} GB of weights, largest tensor {largest / 1e9:.2f} GB; ", nl=False)
        click.echo(f"1.5 GiB + largest: {(ALLOWANCE + largest) / GIB:.2f} GiB\n")
        for outtype in options.outtype:
            conversions.compare(outtype)
        conversions.convert_gguf()
    click.echo("\n".join(conversions.rows))
    if options.llama_cpp:
        click.echo("\n" + "\n".join(conversions.ratios))


if __name__ == "__main__":
    main()
