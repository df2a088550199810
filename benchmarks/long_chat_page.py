"""The tables and pictures of docs/long-chat.md, of what benchmarks/long_chat_evaluation.py has measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product
from statistics import fmean

import numpy as np
import numpy.typing as npt

from benchmarks.long_chat_results import (
    BLOCK,
    CACHES,
    LENGTHS,
    METHODS,
    PASS_KEY_DEPTHS,
    RULER,
    SHORT,
    TRAINED,
    WEIGHTS,
    Cell,
    Measured,
)
from benchmarks.markdown import put_table, row
from benchmarks.pictures import DOCS, LONG_CHAT

DOCUMENT = DOCS / "long-chat.md"
NAMES = {
    "plain": "plain RoPE",
    "ntk": "NTK, not trained",
    "yarn": "YaRN, not trained",
    "lora": "YaRN, LoRA trained",
    "larger": "**larger factors, LoRA trained**",
    "clex": "**CLEX, trained**",
}
# Below which table which picture is shown, and what it says.
PICTURES = {
    "pass keys by depth": ("long-chat-passkey.svg", "Pass keys found by context length and depth"),
    "perplexity": ("long-chat-perplexity.svg", "Perplexity by context length"),
    "positions": ("long-chat-positions.svg", "Perplexity by position in a long window"),
}
RANGE = 4096  # positions whose perplexity is shown together
_MAIN = WEIGHTS[0], CACHES[0]
_LENGTHS = [f"{length:,}" for length in LENGTHS]

EMPTY = "Not measured yet."
Losses = npt.NDArray[np.float64]


class Figures:
    """What was measured, by its cell."""

    def __init__(self, found: Iterable[Measured]) -> None:
        self._cells: dict[Cell, list[Measured]] = {}
        for one in found:
            self._cells.setdefault(one.cell, []).append(one)
        spans = [{one.item for one in found} for cell, found in self._cells.items() if cell.task == "perplexity"]
        self._spans = sorted(set.intersection(*spans)) if spans else []

    def of(self, cell: Cell) -> list[Measured]:
        """All of a cell."""
        return self._cells.get(cell, [])

    def share(self, *cells: Cell, ending: str = "") -> str:
        """The mean score of cells, of their items with an ending, in percent; nothing unless all are measured."""
        scores = [[one.values["score"] for one in self.of(cell) if one.item.endswith(ending)] for cell in cells]
        return f"{100 * fmean(map(fmean, scores)):.0f}" if all(scores) else ""

    def counted(self, cell: Cell) -> str:
        """The mean score in percent, and of how many."""
        share = self.share(cell)
        return share and f"{share} ({len(self.of(cell))})"

    def losses(self, cell: Cell) -> Losses:
        """Negative log-likelihoods of the blocks of text that every cell has scored: [spans, blocks]."""
        found = {one.item: one.values["blocks"] for one in self.of(cell)}
        return np.array([found[span] for span in self._spans] if found else [])

    def perplexity(self, cell: Cell) -> str:
        """That of the text which every cell has scored, so that all figures are of the same."""
        losses = self.losses(cell)
        return f"{math.exp(losses.mean()):.2f}" if losses.size else ""

    def change(self, cell: Cell, against: Cell) -> str:
        """How much higher a perplexity is than another of the same text, in percent, with the standard error."""
        mine, theirs = self.losses(cell), self.losses(against)
        if not (mine.size and theirs.size):
            return ""
        change = (mine - theirs).reshape(-1)
        error = change.std(ddof=1) / math.sqrt(len(change))
        return f"{100 * math.expm1(change.mean()):+.1f} ± {100 * error:.1f} %"

    def seconds(self, cells: Iterable[Cell], whole: bool) -> str:
        """The mean CPU time of an answer: of those whose whole prompt was read, or of all."""
        values = [one.values for cell in cells for one in self.of(cell)]
        found = [one["cpu_seconds"] for one in values if one["whole"] or not whole]
        return f"{fmean(found):.1f}" if found else ""


def table(names: Sequence[str], columns: Sequence[str], rows: Iterable[tuple[Sequence[str], Sequence[str]]]) -> str:
    """A Markdown table of the rows that have a figure, each with its names before it."""
    kept = [row([*first, *cells]) for first, cells in rows if any(cells)]
    if not kept:
        return EMPTY
    return "\n".join([row([*names, *columns]), row([*["---"] * len(names), *["---:"] * len(columns)]), *kept])


def _cells(method: str, task: str, quantized: tuple[str, str] = _MAIN) -> list[Cell]:
    return [Cell(method, *quantized, length, task) for length in LENGTHS]


def tables(figures: Figures) -> dict[str, str]:
    """Every table of the page by its name."""
    return {
        "pass keys": table(
            ["pass keys found, %"],
            _LENGTHS,
            [([NAMES[one]], [figures.counted(cell) for cell in _cells(one, "passkey")]) for one in METHODS],
        ),
        "pass keys by depth": _by_depth(figures),
        "perplexity": table(
            ["perplexity"],
            _LENGTHS,
            [([NAMES[one]], [figures.perplexity(cell) for cell in _cells(one, "perplexity")]) for one in METHODS],
        ),
        "changes of perplexity": _changes(figures),
        "positions": _positions(figures),
        "questions": _questions(figures),
        "RULER": table(
            ["task", "score, %"],
            _LENGTHS,
            [
                ([task, NAMES[method]], [figures.counted(cell) for cell in _cells(method, task)])
                for task in RULER
                for method in METHODS
            ],
        ),
        "weights and caches": _types(figures),
        "time": _time(figures),
    }


def _by_depth(figures: Figures) -> str:
    rows = []
    for method in METHODS:
        for depth in PASS_KEY_DEPTHS[::-1]:
            shares = [figures.share(cell, ending=f" at {depth:g}") for cell in _cells(method, "passkey")]
            rows.append(([NAMES[method].strip("*"), f"{depth:g} %"], shares))
    return table(["model", "depth"], _LENGTHS, rows)


def _changes(figures: Figures) -> str:
    def cell(method: str, length: int) -> Cell:
        return Cell(method, *_MAIN, length, "perplexity")

    rows = []
    for method in METHODS:
        cells = [
            "" if method == "plain" else figures.change(cell(method, length), cell("plain", length))
            for length in (2048, 8192)
        ]
        cells += [figures.change(cell(method, length), cell(method, 8192)) for length in (16384, 32768)]
        rows.append(([NAMES[method]], cells))
    columns = ["2,048 against plain", "8,192 against plain", "16,384 against its 8,192", "32,768 against its 8,192"]
    return table(["change"], columns, rows)


def _positions(figures: Figures) -> str:
    longest = LENGTHS[-1]
    rows = []
    for method in METHODS:
        losses = figures.losses(Cell(method, *_MAIN, longest, "perplexity"))
        ranges = losses.reshape(-1, longest // RANGE, RANGE // BLOCK).mean(axis=(0, 2)) if losses.size else ()
        rows.append(([NAMES[method].strip("*")], [f"{math.exp(mean):.2f}" for mean in ranges]))
    return table(["perplexity of tokens up to"], [f"{end:,}" for end in range(RANGE, longest + 1, RANGE)], rows)


def _questions(figures: Figures) -> str:
    rows = []
    for method in METHODS:
        short = [Cell(method, *_MAIN, LENGTHS[0], task) for task in SHORT]
        rows.append(([NAMES[method]], [figures.share(cell) for cell in (*short, *_cells(method, "questions"))]))
    return table(["right answers, %"], ["no text", "the passage alone", *_LENGTHS], rows)


def _types(figures: Figures) -> str:
    kinds = {"pass keys": ("passkey",), "questions": ("questions",), "RULER": RULER, "perplexity": ("perplexity",)}
    columns = {f"{what}, {length:,}": (tasks, length) for what, tasks in kinds.items() for length in (8192, 32768)}
    rows = []
    for method, weights, kv_type in product(TRAINED, WEIGHTS, CACHES):
        cells = [[Cell(method, weights, kv_type, n, task) for task in tasks] for tasks, n in columns.values()]
        write = [figures.perplexity if found[0].task == "perplexity" else figures.share for found in cells]
        shown = [of(*found) for of, found in zip(write, cells, strict=True)]
        rows.append(([NAMES[method], f"{weights}, {kv_type}"], shown))
    return table(["model", "weights, cache"], list(columns), rows)


def _time(figures: Figures) -> str:
    rows = []
    for weights, kv_type in product(WEIGHTS, CACHES):
        for task, whole, what in (("passkey", True, "the whole prompt read"), ("questions", False, "questions")):
            alike = zip(*(_cells(one, task, (weights, kv_type)) for one in METHODS), strict=True)
            seconds = [figures.seconds(cells, whole) for cells in alike]
            rows.append(([f"{weights}, {kv_type}", what], seconds))
    return table(["weights, cache", "CPU seconds for an answer"], _LENGTHS, rows)


def write_page(found: Iterable[Measured]) -> None:
    """Write the tables, and draw what there are figures for."""
    for name, content in tables(Figures(found)).items():
        if content != EMPTY and (picture := PICTURES.get(name)):
            content += f"\n\n![{picture[1]}]({picture[0]})"
        put_table(DOCUMENT, f"{name}: made by benchmarks/long_chat_evaluation.py", content)
    for name, draw in LONG_CHAT.items():
        draw(DOCS / name)
