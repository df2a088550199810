"""Trains the small models of docs/evaluation.md: bytes as vocabulary, 3.5 million parameters, 256 bytes of context.

One model is trained on plain text; then each method continues from it, with each seed, for the same number of tokens.
What is there already is not trained again, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from benchmarks.text import CACHE, training_texts

FOLDER = CACHE.parent / "small-model"
CONTEXT, MAX_FACTOR = 256, 16
TOKENS_PER_STEP = 32 * CONTEXT
STEPS, FINE_TUNING_STEPS = 1200, 120

BASE = (
    "--no-clex --from-scratch --positions none --learning-rate 1.5e-3 --weight-decay 0.1 --seed 1"
    f" --max-steps {STEPS} --save-steps 100"
).split()
_FINE_TUNING = f"--learning-rate 3e-4 --max-steps {FINE_TUNING_STEPS}".split()
_CLEX = f"--max-factor {MAX_FACTOR} --act tanh --time-dt 0.1 --factors-per-batch 4".split()
_LEARNED, _FROZEN = ["--ode-learning-rate", "3e-5"], ["--ode-learning-rate", "0"]
# Ten times faster, and pulled back to the closed form: 3 % of the way in each step at the learning rate's peak.
_PULLED = ["--ode-learning-rate", "3e-4", "--ode-weight-decay", "100"]
_YARN = ["--dynamics", "yarn"]


def _scaling(kind: str, factor: int) -> list[str]:
    """A scaling that transformers knows, fixed at one factor, as it is applied in the field."""
    rope = {"rope_type": kind, "factor": float(factor), "original_max_position_embeddings": CONTEXT}
    return ["--no-clex", "--positions", "none", "--rope-scaling", json.dumps(rope)]


# The length of the sequences, and what else each method asks of clex-train.
METHODS: dict[str, tuple[int, list[str]]] = {
    "plain": (CONTEXT, ["--no-clex", "--positions", "none"]),
    "clex": (CONTEXT, [*_CLEX, *_LEARNED, "--positions", "chunked"]),
    "ntk": (CONTEXT, [*_CLEX, *_FROZEN, "--positions", "chunked"]),
    "clex-pulled": (CONTEXT, [*_CLEX, *_PULLED, "--positions", "chunked"]),
    "clex-yarn": (CONTEXT, [*_CLEX, *_YARN, *_LEARNED, "--positions", "chunked"]),
    "yarn-frozen": (CONTEXT, [*_CLEX, *_YARN, *_FROZEN, "--positions", "chunked"]),
    "clex-yarn-pulled": (CONTEXT, [*_CLEX, *_YARN, *_PULLED, "--positions", "chunked"]),
    "skips": (CONTEXT, ["--no-clex", *_CLEX, "--positions", "chunked"]),
    "clex-random": (4 * CONTEXT, [*_CLEX, *_LEARNED, "--positions", "random"]),
    "pi": (8 * CONTEXT, _scaling("linear", 8)),
    "yarn": (8 * CONTEXT, _scaling("yarn", 8)),
}


def shape(folder: Path) -> Path:
    """A folder with the configuration and the tokenizer, whose tokens are the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    vocabulary = {symbol: k for k, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    # llama.cpp wants at least one merge; these two bytes never follow each other in UTF-8.
    vocabulary |= {"ÿÿ": 256, "<|endoftext|>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("ÿ", "ÿ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, model_max_length=CONTEXT
    ).save_pretrained(folder)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=288,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=257,
        eos_token_id=257,
    ).save_pretrained(folder)
    return folder


def train(model: Path, output: Path, length: int, options: Sequence[str]) -> Path:
    """One run of clex-train on one core, with its output beside the folder; nothing if the folder is there.

    Raises:
        click.ClickException: it failed.
    """
    if output.exists():
        return output
    command = [
        *(sys.executable, "-m", "clex_train.cli", str(model), str(output)),
        *(part for text in training_texts() for part in ("--text", str(text))),
        *("--length", str(length), "--batch-size", str(TOKENS_PER_STEP // length)),
        # In bfloat16 products as small as these are no faster, and on some processors slower.
        "--no-bf16",
        *options,
    ]
    if output.with_name(f"{output.name}.checkpoints").exists():
        command.append("--resume")
    with output.with_suffix(".log").open("a") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    if code:
        raise click.ClickException(f"{output.name}: clex-train failed; see {log.name}")
    click.echo(f"{output.name}: {Path(log.name).read_text().splitlines()[-1]}")
    return output


def save_example(model: Path, output: Path) -> None:
    """Write a trained model with weights in bfloat16, the CLEX layer's excepted: 7 MB."""
    from safetensors.torch import load_file, save_file

    from clex_train.saving import in_bfloat16

    output.mkdir(parents=True, exist_ok=True)
    weights = in_bfloat16(load_file(model / "model.safetensors"))
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    for path in model.glob("*.json"):
        (output / path.name).write_bytes(path.read_bytes())
    config = json.loads((model / "config.json").read_text(encoding="utf-8")) | {"dtype": "bfloat16"}
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def folder(method: str, seed: int) -> Path:
    """The model that a method trains with a seed, whether it is there or not."""
    return FOLDER / f"{method}-{seed}"


@click.command()
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each method.")
@click.option("--jobs", type=click.IntRange(min=1), default=2, show_default=True, help="Runs at a time, a core each.")
@click.option("--method", "chosen", type=click.Choice(list(METHODS)), multiple=True, help="[default: all]")
@click.option(
    "--example", type=click.Path(path_type=Path), help="Write the first CLEX model in bfloat16 there as well."
)
def main(seeds: int, jobs: int, chosen: tuple[str, ...], example: Path | None) -> None:
    """Train everything into build/small-model: about two hours on two cores."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    base = train(shape(FOLDER / "shape"), FOLDER / "base", CONTEXT, BASE)
    with ThreadPoolExecutor(jobs) as pool:
        runs = [
            pool.submit(
                train,
                base,
                folder(name, seed),
                METHODS[name][0],
                [*_FINE_TUNING, *METHODS[name][1], "--seed", str(seed)],
            )
            for seed in range(1, seeds + 1)
            for name in chosen or METHODS
        ]
        for run in runs:
            run.result()
    if example:
        save_example(folder("clex", 1), example)


if __name__ == "__main__":
    main()
