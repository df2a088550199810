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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import click

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


@click.command()
@click.option("--size", type=float, default=4.0, show_default=True, help="GB of weights of the model, at least.")
@click.option("--vocabulary", type=int, default=32000, show_default=True, help="Tokens: decides the largest tensor.")
@click.option(
    "--outtype", "outtypes", multiple=True, default=["bf16", "f16", "q8_0", "q4_k_m"], show_default=True,
    help="Types to convert to. Repeatable.",
)  # fmt: skip
@click.option(
    "--llama-cpp", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of llama.cpp's source with convert_hf_to_gguf.py, to take turns with.",
)  # fmt: skip
@click.option(
    "--llama-quantize", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Its tool llama-quantize.  [default: build/bin/llama-quantize in that folder]",
)  # fmt: skip
@click.option("--check", default="basic", show_default=True, help="How clex-convert checks its results.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Turns of each side.")
@click.option(
    "--folder", type=click.Path(file_okay=False, path_type=Path), default=Path("build/bench"), show_default=True,
    help="Where the model and the results are written; they are removed at the end.",
)  # fmt: skip
def main(
    size: float,
    vocabulary: int,
    outtypes: tuple[str, ...],
    llama_cpp: Path | None,
    llama_quantize: Path | None,
    check: str,
    rounds: int,
    folder: Path,
) -> None:
    """Convert a synthetic LLaMA folder, and a GGUF file of its size; print peaks of memory, and times.

    With --llama-cpp, convert_hf_to_gguf.py and llama-quantize do the same conversions in turns. Needs Linux, and disk
    space of three times the size.
    """
    if llama_cpp and not llama_quantize:
        llama_quantize = llama_cpp / "build" / "bin" / "llama-quantize"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="conversion-") as scratch:
        model, out, middle = (Path(scratch) / name for name in ("model", "out.gguf", "middle.gguf"))
        largest = make_model(model, size * 1e9, vocabulary)
        weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        click.echo(f"{weights / 1e9:.2f} GB of weights, largest tensor {largest / 1e9:.2f} GB; ", nl=False)
        click.echo(f"1.5 GiB + largest: {(ALLOWANCE + largest) / GIB:.2f} GiB\n")

        def ours(source: Path, target: Path, *options: str) -> Run:
            os.sync()  # what the run before left to be written is not for this one to wait for
            return Run().run(*CONVERT, source, target, "--method", "ntk", "--check", check, "--overwrite", *options)

        def theirs(outtype: str) -> Run:
            assert llama_cpp is not None
            os.sync()
            direct = outtype in ("f32", "f16", "bf16")
            first, result = ("bf16", middle) if not direct else (outtype, out)
            script = llama_cpp / "convert_hf_to_gguf.py"
            run = Run().run(sys.executable, script, model, "--outfile", result, "--outtype", first)
            return run if direct else run.run(llama_quantize, middle, out, outtype)

        lines = ["| conversion | seconds | CPU s | peak, GiB | peaks together, GiB |", "| --- " + "| ---: " * 4 + "|"]
        times = ["| conversion | llama.cpp, s | clex-convert, s | ratio | CPU, ratio |", "| --- " + "| ---: " * 4 + "|"]

        def row(name: str, runs: list[Run]) -> None:
            seconds, cpu = median(run.seconds for run in runs), median(run.cpu for run in runs)
            peak, together = max(run.peak for run in runs), max(run.together for run in runs)
            lines.append(f"| {name} | {seconds:.1f} | {cpu:.1f} | {peak / GIB:.2f} | {together / GIB:.2f} |")
            click.echo(lines[-1], err=True)

        for outtype in outtypes:
            sides: tuple[list[Run], list[Run]] = [], []
            for turn in range(rounds):
                for side in (0, 1) if turn % 2 else (1, 0):
                    if side:
                        sides[1].append(ours(model, out, "--outtype", outtype))
                    elif llama_cpp:
                        sides[0].append(theirs(outtype))
                    out.unlink(missing_ok=True)
                    middle.unlink(missing_ok=True)
            row(f"folder to {outtype}", sides[1])
            if llama_cpp:
                row(f"folder to {outtype}, llama.cpp", sides[0])
                wall = [(median(run.seconds for run in side)) for side in sides]
                ratio = median(b.seconds / a.seconds for a, b in zip(*sides, strict=True))
                cpu = median(b.cpu / a.cpu for a, b in zip(*sides, strict=True))
                times.append(f"| {outtype} | {wall[0]:.1f} | {wall[1]:.1f} | {ratio:.3f} | {cpu:.3f} |")
                click.echo(times[-1], err=True)

        ours(model, middle, "--outtype", "bf16")
        shutil.rmtree(model)
        row("GGUF file, copied", [ours(middle, out)])
        row("GGUF file to q4_k_m", [ours(middle, out, "--outtype", "q4_k_m")])
    click.echo("\n".join(lines))
    if llama_cpp:
        click.echo("\n" + "\n".join(times))


if __name__ == "__main__":
    main()
