"""Speed of answers with prompt lookup and without, for answers that repeat their document and for others."""

from __future__ import annotations

import inspect
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import click
import llama_cpp
import numpy as np

from benchmarks.markdown import row
from benchmarks.text import emma
from benchmarks.turns import in_turns, speedup
from clex_local.commands.command import SETTINGS, Command
from clex_local.commands.command_options import options_from
from clex_local.commands.options import option
from clex_local.runtime.llama import Llama
from clex_local.runtime.prompt_lookup import PromptLookup
from clex_local.session.session import Session


@dataclass(frozen=True, kw_only=True)
class LookupOptions:
    """How long it is measured."""

    tokens: int = option(256, "Tokens of an answer, at most.", minimum=2)
    rounds: int = option(5, "Turns of each side.", minimum=2)
    temp: float = option(0.0, "Temperature of the answers that are the model's own.", minimum=0)
    only: Sequence[str] = option((), "Answers measured, by a part of their name. Repeatable.", default_text="all")
    threads: int | None = option(None, "Threads to compute with.", default_text="the physical cores", minimum=1)
    cpu_time: bool = option(False, "Count CPU time on one thread, which a busy machine disturbs less.")


@dataclass(frozen=True)
class Task:
    """What is asked, and the answer, None for what the model makes of it."""

    name: str
    question: str
    answer: str | None = None


@dataclass(frozen=True)
class Run:
    """What one answer took: seconds after its first token."""

    seconds: float
    tokens: list[int]
    drafted: int
    accepted: int


def tasks() -> list[Task]:
    """Answers that repeat what they are about, and some that do not.

    Small models quote badly. Where the answer is given, each of its tokens is the one that is drawn, so that the time
    is that of a model which does what was asked.
    """
    text = emma().read_text(encoding="utf-8")
    start = text.index("\n\n", 50_000)
    passage = text[start : start + 6_000].strip()
    code = inspect.getsource(textwrap.TextWrapper)
    sentences = passage.replace("\n", " ").split(". ")
    quotes = "\n".join(f"{i}. “{sentence}.”" for i, sentence in enumerate(sentences[5:25:4], 1))
    ask = "Here is a text.\n\n{}\n\n{}".format
    return [
        Task("quote a passage", ask(passage, "Repeat the first page word by word."), passage),
        Task("list five sentences of it", ask(passage, "Which sentences matter?"), quotes),
        Task("rename a variable in code", ask(code, "Call chunks pieces."), code.replace("chunk", "piece")),
        Task("own answer: repeat", ask(passage[:1500], "Repeat this text word by word.")),
        Task("own answer: summarize", ask(passage, "What happens in this text?")),
        Task("own answer: a story", "Write a story about a lighthouse keeper and a storm."),
        Task("given answer: other prose", ask(passage, "Go on in this style."), text[-6_000:]),
        Task("given answer: other code", ask(code, "Write a tokenizer."), inspect.getsource(inspect.Signature)),
    ]


def forced(answer: Sequence[int], start: int, tokens: Any, logits: Any) -> Any:
    """A logits processor that lets the tokens of an answer be drawn after a prompt of `start` tokens."""
    logits[answer[len(tokens) - start]] = np.inf
    return logits


def answer(llm: Llama, prompt: list[int], given: list[int] | None, options: LookupOptions, lookup: bool) -> Run:
    """Generate an answer, with prompt lookup or without."""
    llm.draft_model = PromptLookup() if lookup else None
    drafted, accepted = llm.drafted_tokens, llm.accepted_tokens
    processor: Any = None if given is None else partial(forced, given, len(prompt))
    count = min(options.tokens, options.tokens if given is None else len(given))
    llm.set_seed(1)
    steps = llm.generate(prompt, temp=options.temp, logits_processor=processor)
    clock = time.process_time if options.cpu_time else time.perf_counter
    tokens = [next(steps)]
    began = clock()
    while len(tokens) < count and not llama_cpp.llama_vocab_is_eog(llm._model.vocab, tokens[-1]):
        tokens.append(next(steps))
    seconds = clock() - began
    steps.close()
    return Run(seconds, tokens, llm.drafted_tokens - drafted, llm.accepted_tokens - accepted)


@click.command("lookup", cls=Command, context_settings=SETTINGS)
@click.argument("model", type=click.Path(exists=True, dir_okay=False))
@options_from(LookupOptions)
def main(model: str, options: LookupOptions) -> None:
    """Measure how fast MODEL answers with prompt lookup and without: one process, answers in turns.

    Printed are the speed without, the ratio with it (above 1: faster; the median over the rounds, and the quartiles),
    the guesses, and how many tokens of the two answers agree before the first difference.
    """
    threads = 1 if options.cpu_time else options.threads
    llm = Llama(model, n_ctx=8192, n_threads=threads, verbose=False)
    session = Session(llm)
    click.echo(row(["", "prompt", "answer", "tok/s", "with lookup", "guessed", "right", "same"]))
    click.echo(row(["---", *["---:"] * 7]))
    for task in tasks():
        if options.only and not any(part in task.name for part in options.only):
            continue
        prompt = session.prompt(task.question)
        given = None if task.answer is None else llm.tokenize(task.answer.encode(), add_bos=False)
        sides = {on: partial(answer, llm, prompt, given, options, on) for on in (False, True)}
        runs = in_turns(sides, options.rounds, warm_up=1)
        plain, guessed = runs[False], runs[True]
        count = len(plain[0].tokens)
        pairs = zip(plain[0].tokens, guessed[0].tokens, strict=False)
        same = next((i for i, (one, other) in enumerate(pairs) if one != other), count)
        # Per token, should the answers differ in length.
        times = [[run.seconds / max(len(run.tokens) - 1, 1) for run in side] for side in (plain, guessed)]
        cells = [f"{1 / median(times[0]):.1f}", speedup(*times).text(), guessed[0].drafted, guessed[0].accepted, same]
        click.echo(row([task.name, f"{len(prompt):,}", str(count), *map(str, cells)]))
    llm.close()


if __name__ == "__main__":
    main()
