"""Measures the chat model of examples/smollm2-long, and its base model, and writes docs/long-chat.md.

Every answer is kept as soon as it is there, in benchmarks/long_chat_results.jsonl, which is part of the repository: the
page takes more than one machine and day. What tells most is measured first; --method, --length, --task and the like
measure a part, and any part makes the page.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from benchmarks import questions
from benchmarks.long_chat_model import CONTEXT, FOLDER, MAX_FACTOR, base
from benchmarks.long_chat_page import write_page
from benchmarks.long_chat_results import (
    BLOCK,
    CACHES,
    LENGTHS,
    METHODS,
    PASS_KEY_DEPTHS,
    SHORT,
    TASKS,
    TRAINED,
    WEIGHTS,
    Cell,
    Measured,
    Results,
)
from benchmarks.pictures import ROOT
from benchmarks.text import emma

if TYPE_CHECKING:
    from clex_eval.models import Model

FILES, RESULTS = FOLDER / "gguf", Path(__file__).with_name("long_chat_results.jsonl")
SHIPPED = ROOT / "examples" / "smollm2-long"
LARGER = (1, 3, 4)  # scaling factors of the model's own context; the adapter's tables have 2 at 16,384 and 3 at 32,768
SPAN = LENGTHS[-1]  # tokens of Emma that a trial scores at every length
ODE_FILE = "clex_layer.safetensors"  # of a checkpoint; a finished adapter has the layer in its one file
# An item of a cell, and what measures it.
Work = tuple[str, "Callable[[Model], dict[str, Any]]"]


def file(method: str, weights: str, adapter: Path) -> Path:
    """The GGUF file of a method; those of the trained model are named by what the adapter holds."""
    if method not in TRAINED:
        return FILES / f"{method}-{weights}.gguf"
    held = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes())
    for other in (adapter / ODE_FILE, adapter / "config.json"):
        if other.exists():
            held.update(other.read_bytes())
    return FILES / f"{method}-{held.hexdigest()[:8]}-{weights}.gguf"


def learned(adapter: Path) -> bool:
    """Whether its CLEX layer has moved away from YaRN's tables, where it begins."""
    from safetensors import safe_open

    for path in (adapter / "adapter_model.safetensors", adapter / ODE_FILE):
        if path.exists():
            with safe_open(path, "numpy") as tensors:
                if any(tensors.get_tensor(name).any() for name in tensors.keys() if name.endswith("ode_down_proj")):  # noqa: SIM118
                    return True
    return False


def trained_tables(adapter: Path) -> tuple[int, int]:
    """The original context in tokens and the largest scaling factor that an adapter was trained with."""
    from clex_convert.lora import Adapter

    config = Adapter(adapter).rope_config  # a checkpoint's is empty
    return config.get("max_position_embeddings", CONTEXT), config.get("rope_scaling", {}).get("max_factor", MAX_FACTOR)


def make(method: str, weights: str, adapter: Path) -> Path:
    """Convert the base model, unless the file is there."""
    from clex_convert import convert

    path = file(method, weights, adapter)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        context, factor = trained_tables(adapter)
        # plain: one table, which is that of its own RoPE, run beyond its length
        settings: dict[str, Any] = {
            "plain": {"method": "ntk", "max_factor": 1},
            "ntk": {"method": "ntk", "max_factor": MAX_FACTOR},
            "yarn": {"method": "yarn", "max_factor": MAX_FACTOR},
            "lora": {"lora": adapter, "method": "yarn", "original_context": context, "max_factor": factor},
            "larger": {"lora": adapter, "method": "yarn", "original_context": CONTEXT, "factors": LARGER},
            "clex": {"lora": adapter},
        }[method]
        if method == "clex" and (layer := adapter / ODE_FILE).exists():
            settings |= {"clex_weights": layer, "dynamics": "yarn", "act": "tanh", "max_factor": factor}
        convert(base(), path, outtype=weights, check="none", **settings)
    return path


def works(cell: Cell, trials: int) -> Iterator[Work]:
    """What there is to measure in a cell, in an order in which prompts begin as the ones before them."""
    if cell.task == "perplexity":
        for trial in range(trials):
            yield f"{trial}", lambda model, trial=trial: _perplexity(model, cell.length, trial)
    elif cell.task in ("questions", *SHORT):
        for number in range(len(questions.questions())):
            yield f"{number}", lambda model, number=number: _question(model, cell, number)
    elif cell.task == "passkey":
        for depth in PASS_KEY_DEPTHS:
            for trial in range(trials):
                yield f"{trial} at {depth:g}", lambda model, d=depth, t=trial: _task(model, cell, t, d)
    else:
        for trial in range(trials):
            yield f"{trial}", lambda model, t=trial: _task(model, cell, t, None)


def _task(model: Model, cell: Cell, trial: int, depth: float | None) -> dict[str, Any]:
    """The question that `clex-eval` asks too, of the seed 0."""
    from clex_eval import passkey, ruler

    make, score = (passkey.question, passkey.score) if cell.task == "passkey" else (ruler.TASKS[cell.task], ruler.score)
    rng = random.Random(f"{cell.task} {cell.length} {depth} 0 {trial}")
    question = make(model, cell.length, rng, depth)
    stop = ("\n",) if cell.task == "passkey" else ()
    found = _timed(lambda: model.generate(question.prompt, question.max_tokens, stop))
    return found | {"expected": question.expected, "score": score(found["answer"], question.expected)}


def _timed(ask: Callable[[], str]) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    answer = ask()
    return {
        "answer": answer,
        "seconds": round(time.perf_counter() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
    }


@cache
def _records(path: Path, length: int, context: str) -> list[Any]:
    """The questions as records of clex-eval, with contexts by a model's tokens."""
    from clex_eval.loading import open_for_evaluation
    from clex_eval.records import read

    text = emma().read_text(encoding="utf-8")
    with open_for_evaluation(path, ctx=256) as model, TemporaryDirectory() as folder:
        written = Path(folder) / "emma.jsonl"
        made = questions.records(lambda part: len(model.tokenize(part)), length, text, context)
        questions.write(written, made)
        return list(read(written, questions.METRIC))


def _question(model: Model, cell: Cell, number: int) -> dict[str, Any]:
    from clex_eval.longbench import prompt_tokens
    from clex_eval.metrics import score

    context = {"closed_book": "none", "passage": "passage"}.get(cell.task, "novel")
    record = _records(model.path, cell.length, context)[number]
    prompt, full = prompt_tokens(model, record)
    if len(prompt) < full:
        raise click.ClickException(f"{record.id}: has {full:,} tokens, which do not fit in {cell.length:,}")
    found = _timed(lambda: model.generate(prompt, record.kind.max_tokens, ("\n",)))
    right = questions.says(found["answer"], record.answers)
    return found | {"score": float(right), "f1": round(score(record, found["answer"]), 4), "prompt": full}


def _perplexity(model: Model, length: int, trial: int) -> dict[str, Any]:
    from clex_eval.windows import Span, window_likelihoods

    text = np.array(model.tokenize(emma().read_text(encoding="utf-8")), np.int32)
    if (trial + 1) * SPAN >= len(text):
        raise click.ClickException(f"Emma has {len(text) // SPAN} spans of {SPAN:,} tokens: ask for fewer --trials")
    wall, cpu = time.perf_counter(), time.process_time()
    values = window_likelihoods(model, text, Span(trial * SPAN, SPAN), length)
    return {
        "blocks": np.round(values.reshape(-1, BLOCK).mean(axis=1), 6).tolist(),
        "seconds": round(time.perf_counter() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
    }


def measure(cell: Cell, path: Path, results: Results, trials: int, threads: int | None) -> None:
    """What is missing of a cell."""
    from clex_eval.loading import open_for_evaluation

    missing = [(item, work) for item, work in works(cell, trials) if not results.has(cell, path.stem, item)]
    if not missing:
        return
    click.echo(f"{path.stem}, {cell.cache} cache, {cell.task}, {cell.length:,}: {len(missing)} to measure")
    with open_for_evaluation(path, ctx=cell.length, kv_type=cell.cache, clamp=True, threads=threads) as model:
        for number, (item, work) in enumerate(missing):
            # The first answer has its whole prompt to read, the others what does not begin as the one before.
            values = work(model) | {"whole": number == 0, "threads": threads or os.cpu_count()}
            results.add(Measured(cell, path.stem, item, values))


def chosen(options: dict[str, Sequence[Any]], methods: Sequence[str]) -> list[Cell]:
    """The cells of these options, in the order in which they are measured.

    Other weights and caches than the first are measured of the trained models, and of what is asked for by name.
    """
    found = [
        Cell(method, weights, kv_type, length, task)
        for method in options["method"] or methods
        for weights in options["weights"] or WEIGHTS
        for kv_type in options["kv_type"] or CACHES
        for task in options["task"] or TASKS
        for length in options["length"] or LENGTHS
        if task not in SHORT or length == LENGTHS[0]
        if options["method"] or method in TRAINED or (weights, kv_type) == (WEIGHTS[0], CACHES[0])
    ]
    return sorted(found, key=lambda cell: cell.rank)


def several(name: str, values: Sequence[Any], parse: type = str) -> Callable[[Any], Any]:
    """An option that may be given several times."""
    kind = click.Choice([str(value) for value in values])
    callback = lambda _, __, given: tuple(parse(value) for value in given)  # noqa: E731
    return click.option(f"--{name}", type=kind, multiple=True, callback=callback, help="[default: all]")


@click.command()
@several("method", METHODS)
@several("weights", WEIGHTS)
@several("kv-type", CACHES)
@several("length", LENGTHS, int)
@several("task", TASKS)
@click.option(
    "--trials", type=click.IntRange(min=1), default=2, show_default=True,
    help="Pass keys at each of five depths, questions of each of RULER's tasks, spans of 32,768 tokens of Emma.",
)  # fmt: skip
@click.option(
    "--adapter", type=click.Path(exists=True, file_okay=False, path_type=Path), default=SHIPPED,
    help="What benchmarks.long_chat_model has trained, or a checkpoint of it.  [default: examples/smollm2-long]",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="[default: all cores]")
@click.option("--page", is_flag=True, help="Measure nothing, only write the page.")
def main(trials: int, adapter: Path, threads: int | None, page: bool, **options: Sequence[Any]) -> None:
    """Measure what is not measured yet, and write docs/long-chat.md and its pictures: many hours on two cores."""
    methods = list(METHODS)
    if not learned(adapter):
        methods.remove("clex")  # it is what "lora" is
        click.echo(f"{adapter}: its tables are YaRN's, so it is measured as `lora` alone")
    results = Results(RESULTS)
    cells = [] if page else chosen(options, methods)
    for cell in cells:
        measure(cell, make(cell.method, cell.weights, adapter), results, trials, threads)
    models = {file(method, weights, adapter).stem for method in methods for weights in WEIGHTS}
    write_page(results.of(models))


if __name__ == "__main__":
    main()
