"""What the evaluation of the chat model has found so far: one line of JSON for each answer or span of text.

A line is appended as soon as it is known, so an interrupted evaluation goes on where it was, and several at a time can
add to one file.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK = 512  # tokens of text whose likelihoods are kept as one mean
LENGTHS = (2048, 4096, 8192, 16384, 32768)
METHODS = ("plain", "ntk", "yarn", "lora", "larger", "clex")
# Made with the adapter: its LoRA part with YaRN's tables, with larger factors of them, and with its CLEX layer's.
TRAINED = ("lora", "larger", "clex")
WEIGHTS, CACHES = ("q8_0", "q4_k_m"), ("f16", "q8_0")
RULER = ("niah_single", "niah_multikey", "variable_tracking", "common_words", "frequent_words")
SHORT = ("closed_book", "passage")  # questions without the novel, and with their passages alone: no matter of length
TASKS = ("passkey", "perplexity", *SHORT, "questions", *RULER)
PASS_KEY_DEPTHS = (100.0, 75.0, 50.0, 25.0, 0.0)  # the deepest first: the others' prompts begin as that one does


@dataclass(frozen=True)
class Cell:
    """What is measured together: a model in one quantization and cache, at a length, in a task."""

    method: str
    weights: str
    cache: str
    length: int
    task: str

    @property
    def rank(self) -> tuple[int, ...]:
        """Cells are measured in this order: what tells most comes first."""
        quantized = 2 * WEIGHTS.index(self.weights) + CACHES.index(self.cache)
        group = 0 if self.task in ("passkey", "perplexity") else 2 if self.task in RULER else 1
        return (
            quantized > 0,
            group,
            self.method == "plain" or self.length == 4096,
            quantized,
            (16384, 32768, 8192, 2048, 4096).index(self.length),
            TASKS.index(self.task),
            METHODS[::-1].index(self.method),
        )


@dataclass(frozen=True)
class Measured:
    """One answer, or one span of text.

    Attributes:
        cell: what it belongs to.
        model: the file without suffix, which says which adapter is in it.
        item: which question of the cell: its trial, and where there is one its depth or its context.
        values: `score` and `answer`, or `blocks` of negative log-likelihoods; `seconds`, `cpu_seconds` and more.
    """

    cell: Cell
    model: str
    item: str
    values: dict[str, Any]


class Results:
    """The file, and what is in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[tuple[Cell, str, str], Measured] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    read = json.loads(line)
                    one = Measured(Cell(**read["cell"]), read["model"], read["item"], read["values"])
                except (ValueError, KeyError, TypeError):
                    continue  # cut off where the machine went down
                self.found[one.cell, one.model, one.item] = one

    def has(self, cell: Cell, model: str, item: str) -> bool:
        """Whether it is measured."""
        return (cell, model, item) in self.found

    def add(self, one: Measured) -> None:
        """Keep it, at once."""
        self.found[one.cell, one.model, one.item] = one
        line = json.dumps(
            {"cell": vars(one.cell), "model": one.model, "item": one.item, "values": one.values}, ensure_ascii=False
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            if file.tell() and self.path.read_bytes()[-1:] != b"\n":
                file.write("\n")  # after a line that was cut off
            file.write(f"{line}\n")
            file.flush()
            os.fsync(file.fileno())

    def of(self, models: set[str]) -> list[Measured]:
        """What was measured of some models."""
        return [one for one in self.found.values() if one.model in models]
