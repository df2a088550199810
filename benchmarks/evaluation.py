"""The tables and pictures of docs/evaluation.md, from what benchmarks/small_model.py trains, and from examples/bytes.

Each measurement is kept as a file in build/small-model/results, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from benchmarks.markdown import put_table, row
from benchmarks.pictures import BYTES, DOCS, EVALUATION
from benchmarks.small_model import CONTEXT, FOLDER, MAX_FACTOR, folder
from benchmarks.text import emma
from clex_eval.options import json_settings

DOCUMENT = DOCS / "evaluation.md"
RESULTS, FILES = FOLDER / "results", FOLDER / "gguf"
LENGTHS = tuple(CONTEXT * t for t in (1, 2, 4, 8, 16))
# The methods are read at twice what any was trained for as well: t beyond 16, and positions beyond them.
FARTHER = 2 * MAX_FACTOR
READ = (*LENGTHS, CONTEXT * FARTHER)
TOKENS = 1 << 17  # bytes of Emma that every length scores


@dataclass(frozen=True)
class Variant:
    """A trained model, how it is converted, and how it is run."""

    model: str  # a method of benchmarks/small_model.py, or the name of BYTES
    convert: Mapping[str, Any] = field(default_factory=dict)
    outtype: str = "q8_0"
    run: Mapping[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = LENGTHS

    def folder(self, seed: int) -> Path:
        """The trained model."""
        return BYTES if self.model == BYTES.name else folder(self.model, seed)

    def gguf(self, seed: int) -> Path:
        """The file, whose name says what is in it."""
        values = [f"{key}={len(value) if key == 'factors' else value}" for key, value in self.convert.items()]
        name = "-".join([self.model, str(seed), self.outtype, *values])
        return FILES / f"{re.sub(r'[^A-Za-z0-9=.-]', '_', name)}.gguf"

    def result(self, seed: int) -> Path:
        """Where its measurement is kept."""
        # Measurements that were kept before have the JSON's name of the cache's type.
        values = [f"{key}={value}" for key, value in json_settings(self.run).items()]
        if self.lengths != LENGTHS:
            values.append("-".join(map(str, self.lengths)))
        return RESULTS / f"{self.gguf(seed).stem}--{'-'.join(values)}.json"


def _closed(method: str) -> Variant:
    return Variant("plain", {"method": method, "max_factor": FARTHER}, lengths=READ)


def _trained(model: str, **more: Any) -> Variant:
    return Variant(model, {"max_factor": FARTHER, **more}, lengths=READ)


def _as_it_is(model: str) -> Variant:
    # one table, which is that of plain RoPE
    return Variant(model, {"method": "ntk", "max_factor": 1}, lengths=READ)


# The methods, by what the document calls them.
METHODS = {
    "plain RoPE": _as_it_is("plain"),
    "PI, not trained": _closed("linear"),
    "NTK, not trained": _closed("ntk"),
    "YaRN, not trained": _closed("yarn"),
    "PI, trained at 8x": Variant("pi", lengths=READ),
    "YaRN, trained at 8x": Variant("yarn", lengths=READ),
    "**CLEX**": _trained("clex"),
    "CLEX, log scale": _trained("clex", log_scale=True),
    "CLEX, fast with decay": _trained("clex-pulled"),
    "NTK, trained like CLEX": _trained("ntk"),
    "NTK, trained like CLEX, log scale": _trained("ntk", log_scale=True),
    "CLEX around YaRN": _trained("clex-yarn"),
    "CLEX around YaRN, fast with decay": _trained("clex-yarn-pulled"),
    "YaRN, trained like CLEX": _trained("yarn-frozen"),
    "plain RoPE, trained with skips": _as_it_is("skips"),
    "CLEX, the authors' positions": _trained("clex-random"),
}
# Of the methods those that differ from CLEX in one thing, and the learned dynamics beside their closed forms.
CONTROLS = ("ntk", "clex-yarn", "yarn-frozen", "skips", "clex-random")
LEARNED = {
    "**CLEX**": "NTK, trained like CLEX",
    "CLEX, fast with decay": "NTK, trained like CLEX",
    "CLEX around YaRN": "YaRN, trained like CLEX",
    "CLEX around YaRN, fast with decay": "YaRN, trained like CLEX",
}

# Lengths that no grid but the finest fits.
BETWEEN = tuple(CONTEXT * t // 4 for t in (5, 10, 14, 22, 36, 50))
GRIDS = {
    "1 bucket (t = 16)": Variant(BYTES.name, run={"policy": "fixed"}, lengths=BETWEEN),
    "1, 2, 4, 8, 16": Variant(BYTES.name, {"factors": (1, 2, 4, 8, 16)}, lengths=BETWEEN),
    "1, 2, 3, ... 16": Variant(BYTES.name, lengths=BETWEEN),
    "1, 1.25, 1.5, ... 16": Variant(BYTES.name, {"factors": tuple(t / 4 for t in range(4, 65))}, lengths=BETWEEN),
}
POLICIES = {
    "by length, one-shot": Variant(BYTES.name),
    "by length, growing": Variant(BYTES.name, run={"prefill": "growing"}),
    "fixed (t = 16)": Variant(BYTES.name, run={"policy": "fixed"}),
}
TYPES = {
    "F32, F32": Variant(BYTES.name, outtype="f32", run={"kv_type": "f32"}),
    "F16, F16": Variant(BYTES.name, outtype="f16"),
    "F16, q8_0": Variant(BYTES.name, outtype="f16", run={"kv_type": "q8_0"}),
    "F16, q4_0": Variant(BYTES.name, outtype="f16", run={"kv_type": "q4_0"}),
    "Q8_0, F16": Variant(BYTES.name),
    "Q4_K_M, F16": Variant(BYTES.name, outtype="q4_k_m"),
}


def make(variant: Variant, seed: int) -> None:
    """Convert the trained model."""
    from clex_convert import convert

    convert(
        variant.folder(seed), variant.gguf(seed),
        outtype=variant.outtype, pre_tokenizer="gpt-2", check="none", **variant.convert,
    )  # fmt: skip


def measure(variant: Variant, seed: int) -> list[dict[str, Any]]:
    """The rows that clex-eval gives for a variant, one for each length."""
    from clex_eval.options import Length
    from clex_eval.ppl import perplexity

    result = variant.result(seed)
    if not result.exists():
        # By itself, each length scores as much of the text as its windows fill.
        rows = [
            found
            for length in variant.lengths
            for found in perplexity(
                [variant.gguf(seed)], emma().read_text(encoding="utf-8"), lengths=[Length(tokens=length)],
                tokens=TOKENS, original_context=CONTEXT, clamp=True, threads=1, **variant.run,
            )
        ]  # fmt: skip
        keep(result, rows)
    return json.loads(result.read_text(encoding="utf-8"))


def keep(result: Path, rows: list[dict[str, Any]]) -> None:
    """Write a measurement, all of it or nothing."""
    partial = result.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(rows), encoding="utf-8")
    partial.rename(result)


Losses = npt.NDArray[np.float64]


def losses(variant: Variant, seeds: int) -> list[Losses]:
    """For each length the mean negative log-likelihoods of the text's blocks: [seeds, blocks]."""
    found = [measure(variant, seed) for seed in range(1, seeds + 1) if variant.folder(seed).exists()]
    lengths = range(len(variant.lengths))
    least = [min(len(rows[k]["block_nll"]) for rows in found) for k in lengths]
    return [np.array([rows[k]["block_nll"][: least[k]] for rows in found]) for k in lengths]


def perplexities(variant: Variant, seeds: int) -> list[str]:
    """The perplexity for each length: over seeds, with half the range between the seeds."""
    cells = []
    for values in losses(variant, seeds):
        each = np.exp(values.mean(axis=1))
        spread = f" ± {(each.max() - each.min()) / 2:.2f}" if len(each) > 1 else ""
        cells.append(f"{np.exp(values.mean()):.2f}{spread}")
    return cells


def difference(variant: Variant, other: Variant, seeds: int) -> list[str]:
    """How much higher the perplexity is than another's, in percent: the mean over the seeds and its standard error.

    The error is that over the text's blocks where there is one seed, or the larger of that and that over the seeds.
    """
    cells = []
    for mine, theirs in zip(losses(variant, seeds), losses(other, seeds), strict=True):
        both, count = np.minimum(mine.shape, theirs.shape)
        change = mine[:both, :count] - theirs[:both, :count]
        over_text = change.mean(axis=0)
        errors = [over_text.std(ddof=1) / math.sqrt(count)]
        if len(change) > 1:
            errors.append(change.mean(axis=1).std(ddof=1) / math.sqrt(len(change)))
        cells.append(f"{100 * math.expm1(change.mean()):+.2f} ± {100 * max(errors):.2f} %")
    return cells


def heading(first: str, lengths: Sequence[int]) -> list[str]:
    """The first two lines of a table with a column for each length."""
    names = [f"{n / CONTEXT:g}x ({n:,})" for n in lengths]
    return [row([first, *names]), row(["---", *["---:"] * len(names)])]


def table(first: str, variants: Mapping[str, Variant], cells: Callable[[Variant], Iterable[str]]) -> str:
    """A Markdown table with a row for each variant that has been trained."""
    kept = {name: variant for name, variant in variants.items() if variant.folder(1).exists()}
    if not kept:
        return "Not trained yet."
    lengths = next(iter(kept.values())).lengths
    return "\n".join([*heading(first, lengths), *(row([name, *cells(variant)]) for name, variant in kept.items())])


def references() -> str:
    """The same model in transformers and in the runtime, everything in float32: perplexities to five digits."""
    from clex_eval.options import Length
    from clex_eval.ppl import perplexity

    cached = RESULTS / "reference.json"
    runtime = TYPES["F32, F32"]
    if not cached.exists():
        rows = list(
            perplexity(
                [runtime.folder(1), runtime.gguf(1)], emma().read_text(encoding="utf-8"), tokens=1 << 15,
                lengths=[Length(tokens=n) for n in LENGTHS], kv_type="f32",
            )
        )  # fmt: skip
        keep(cached, rows)
    rows = json.loads(cached.read_text(encoding="utf-8"))
    lines = heading("float32", LENGTHS)
    for name, k in (("transformers", 0), ("runtime", 1)):
        lines.append(row([name, *(f"{found['perplexity']:.5f}" for found in rows[k * 5 : k * 5 + 5])]))
    return "\n".join(lines)


def controls(seeds: int) -> str:
    """Two tables: the methods that differ from CLEX in one thing, and learned dynamics beside their closed forms."""
    clex = METHODS["**CLEX**"]
    others = {name: METHODS[name] for name in METHODS if METHODS[name].model in CONTROLS}
    learned = {name: METHODS[name] for name, form in LEARNED.items() if METHODS[form].folder(1).exists()}
    closed = {METHODS[name].model: METHODS[LEARNED[name]] for name in learned}
    return "\n\n".join(
        (
            table("against CLEX", others, lambda variant: difference(variant, clex, seeds)),
            table("learned, against its closed form", learned, lambda one: difference(one, closed[one.model], seeds)),
        )
    )


def _details(first: str, variants: Mapping[str, Variant]) -> str:
    return table(first, variants, lambda variant: perplexities(variant, 1))


# What has to be measured for each table of the document, and what makes it for a number of seeds.
TABLES: dict[str, tuple[Mapping[str, Variant], Callable[[int], str]]] = {
    "methods": (METHODS, lambda seeds: table("method", METHODS, lambda variant: perplexities(variant, seeds))),
    "controls": (METHODS, controls),
    "grids": (GRIDS, lambda _: _details("buckets", GRIDS)),
    "policies": (POLICIES, lambda _: _details("policy, prefill", POLICIES)),
    "types": (TYPES, lambda _: table("weights, cache", TYPES, lambda one: difference(one, TYPES["F32, F32"], 1))),
    "reference": ({"runtime": TYPES["F32, F32"]}, lambda _: references()),
}


@click.command()
@click.option(
    "--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Trained models of each method."
)
@click.option("--jobs", type=click.IntRange(min=1), default=2, show_default=True, help="Measurements at a time.")
@click.option("--table", "names", type=click.Choice(list(TABLES)), multiple=True, help="What to write.  [default: all]")
def main(seeds: int, jobs: int, names: tuple[str, ...]) -> None:
    """Measure what is not measured yet, and write docs/evaluation.md: about an hour on two cores."""
    for place in (RESULTS, FILES):
        place.mkdir(parents=True, exist_ok=True)
    names = names or tuple(TABLES)
    variants = [variant for name in names for variant in TABLES[name][0].values()]
    wanted = [
        (variant, seed)
        for seed in range(1, seeds + 1)
        for variant in variants
        if variant.folder(seed).exists() and (seed == 1 or variant.model != BYTES.name)
    ]
    with ProcessPoolExecutor(jobs) as pool:
        for work, name in ((make, Variant.gguf), (measure, Variant.result)):
            missing = {path: pair for pair in wanted if not (path := name(*pair)).exists()}
            for run in [pool.submit(work, *pair) for pair in missing.values()]:
                run.result()
    for name in names:
        put_table(DOCUMENT, f"{name}: made by benchmarks/evaluation.py", TABLES[name][1](seeds))
    for name, draw in EVALUATION.items():
        draw(DOCS / name)


if __name__ == "__main__":
    main()
