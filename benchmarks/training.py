"""A step of clex-train with a LoRA adapter beside a loop of plain torch, in turns in one process, by CPU time."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import click

RANK = 16


class _Plain:
    """The model without a CLEX layer, adapters in float32 on frozen weights in bfloat16, and AdamW: no Trainer."""

    def __init__(self, folder: Path, length: int) -> None:
        import peft
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model: Any = peft.get_peft_model(network, config).train()
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=2e-5)
        self.tokens = torch.randint(3, len(AutoTokenizer.from_pretrained(folder)), (1, length))

    def step(self) -> None:
        import torch

        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.argument("text", type=click.Path(path_type=Path, exists=True))
@click.option("--length", default=1024, show_default=True, help="Tokens of a sequence.")
@click.option("--steps", default=6, show_default=True, help="Steps of each, the first of which does not count.")
@click.option("--threads", default=1, show_default=True, help="Of torch.")
@click.option("--dynamics", default="yarn", show_default=True, help="As clex-train has it.")
def main(model: Path, text: Path, length: int, steps: int, threads: int, dynamics: str) -> None:
    """CPU seconds a step of both takes on the model folder MODEL with the text of TEXT, and how they relate."""
    import torch

    from clex_train.train import train

    torch.set_num_threads(threads)
    plain, times = _Plain(model, length), {"plain": [], "clex-train": []}
    plain.step()
    since = time.process_time()

    def turn(line: str) -> None:
        nonlocal since
        begun = time.process_time()
        times["clex-train"].append(begun - since)
        plain.step()
        since = time.process_time()
        times["plain"].append(since - begun)

    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = dict(lora_rank=RANK, length=length, max_steps=steps, log_steps=1, dynamics=dynamics)
        train(model, Path(folder) / "out", text=[text], positions="chunked", bf16=True, report=turn, **options)
    for name, found in times.items():
        kept = found[1:]
        middle = median(kept)
        click.echo(f"{name}: {middle:.2f} s of CPU a step, {length / middle:.0f} tokens/s; mean {mean(kept):.2f} s")
    ratio = median(one / other for one, other in zip(times["clex-train"][1:], times["plain"][1:], strict=True))
    click.echo(f"clex-train / plain: {ratio:.2f}")


if __name__ == "__main__":
    main()
