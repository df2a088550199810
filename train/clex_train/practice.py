"""Conversations about long made-up contexts, for practice in finding things: ``python -m clex_train.practice``.

Three tasks in turns: facts hidden in running text or in sentences that repeat, the value of a key in a long list, and
how often a word occurs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import click
from transformers import PreTrainedTokenizerBase

from clex_convert.errors import writing
from clex_convert.output import Output
from clex_convert.transformers_folder import load_tokenizer
from clex_local.commands.command import SETTINGS, Command, say
from clex_local.errors import one_line
from clex_train import TrainError
from clex_train.chat import labelled

_THINGS = (
    "anchor apple arrow basket bell bridge button candle carpet castle chimney clock cloud compass copper curtain desk "
    "drum feather fence forest garden glove hammer harbour island jacket kettle ladder lantern lemon letter marble "
    "meadow mirror needle orchard paddle pepper piano pillow pocket quarry ribbon river saddle shovel silver spoon "
    "statue tunnel umbrella valley violin wagon whistle window winter"
)
_COLOURS = "amber azure black brown crimson golden green grey ivory orange purple scarlet violet white yellow"
_SENTENCES = (
    "The rain had stopped before anybody noticed it.",
    "Somebody had left the door of the workshop open.",
    "There was little to say about the journey, and it was said.",
    "In the evening the lamps along the river were lit one by one.",
    "He counted the steps, as he always did, and forgot the number.",
    "The letter was read twice and put back between the books.",
)
# How a fact is told, asked for and answered: in several ways, lest a model learn the words of one.
_FACTS = (
    ("The number of the {0} is {1}.", "What is the number of the {0}?", "The number of the {0} is {1}."),
    ("Remember the code for the {0}: {1}.", "What is the code for the {0}?", "The code for the {0} is {1}."),
    ("{1} is the key that opens the {0}.", "Which key opens the {0}?", "The key that opens the {0} is {1}."),
    ("Note that the {0} has the password {1}.", "Which password does the {0} have?", "{1}"),
    ("They paid {1} crowns for the {0}.", "How many crowns did they pay for the {0}?", "They paid {1} crowns."),
)
# How often the question stands in front of the context as well.
_ANNOUNCED = 1 / 3
# What a context holds at least, in tokens, as a part of the most.
_SHORTEST = 1 / 8
# How often facts are hidden in sentences of ours, which repeat, and not in a text.
_REPEATING = 1 / 3
# How often what is asked for stands at the very beginning, where models that are stretched lose it first.
_FIRST = 1 / 4

TASKS = ("facts", "keys", "counting")

Task = tuple[list[str], str, str]


@dataclass(frozen=True)
class _Maker:
    """Makes the tasks of one tokenizer; `filler` are paragraphs of running text."""

    tokenizer: PreTrainedTokenizerBase
    filler: Sequence[str]
    random: Random

    def lines(self, room: int, line: Callable[[int], str]) -> list[str]:
        """The lines number 0, 1, ... that fit into so many tokens."""
        made: list[str] = []
        while True:
            following = line(len(made))
            room -= len(self.tokenizer(f"{following}\n", add_special_tokens=False)["input_ids"])  # pyright: ignore
            if room < 0:
                return made
            made.append(following)

    def place(self, places: int) -> int:
        """Where something is put: one of 0, 1, ..., or the first."""
        return 0 if self.random.random() < _FIRST else self.random.randrange(places)

    def hidden_facts(self, room: int) -> Task:
        things = self.random.sample(_THINGS.split(), 4)
        facts = {thing: self.random.randrange(10_000, 100_000) for thing in things}
        told, question, answer = self.random.choice(_FACTS)
        filler = _SENTENCES if self.random.random() < _REPEATING else self.filler
        start = self.random.randrange(len(filler))
        text = self.lines(room - 80, lambda index: filler[(start + index) % len(filler)])
        for fact in facts.items():
            text.insert(self.place(len(text) + 1), told.format(*fact))
        thing = self.random.choice(things)
        asked = question.format(thing)
        if self.random.random() < _ANNOUNCED:
            text.insert(0, asked)
        return text, asked, answer.format(thing, facts[thing])

    def key_values(self, room: int) -> Task:
        pairs: dict[str, str] = {}

        def line(_: int) -> str:
            while (key := f"{self.random.choice(_COLOURS.split())}-{self.random.randrange(10_000)}") in pairs:
                pass
            pairs[key] = str(self.random.randrange(10_000, 100_000))
            return f"{key}: {pairs[key]}"

        text = self.lines(room, line)
        key, _, value = text[self.place(len(text))].partition(": ")
        return text, f"What is the value of {key}?", f"The value of {key} is {value}."

    def counting(self, room: int) -> Task:
        word, *others = self.random.sample(_THINGS.split(), 20)
        text = self.lines(room, lambda _: self.random.choice(others))
        wanted = min(self.random.randint(1, 9), len(text))
        for index in self.random.sample(range(len(text)), wanted):
            text[index] = word
        return text, f"How many lines of this list are the word {word}?", f"{wanted} lines are the word {word}."


def conversations(
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    tokens: int,
    *,
    text: str = "",
    seed: int = 0,
    tasks: Sequence[str] = TASKS,
) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Conversations of one question and its answer each, in the format that `clex_train.chat` reads.

    Args:
        tokenizer: of the model, with a chat template.
        count: how many.
        tokens: that each has at most, in the template; their numbers are spread evenly by their logarithm, from an
            eighth of it on.
        text: that facts are hidden in; sentences of ours where it is empty.
        seed: of all that is random.
        tasks: which of TASKS, in turns.

    Raises:
        TrainError: the tokenizer has no template, or so few tokens are not enough.
    """
    if not tokenizer.chat_template:
        raise TrainError("the model's tokenizer has no chat template, which conversations need")
    random = Random(seed)
    filler = [part for paragraph in text.split("\n\n") if (part := " ".join(paragraph.split()))] or _SENTENCES
    maker = _Maker(tokenizer, filler, random)
    made: list[Callable[[int], Task]] = [maker.hidden_facts, maker.key_values, maker.counting]
    makers = [made[TASKS.index(task)] for task in tasks]
    for index in range(count):
        room = math.exp(random.uniform(math.log(tokens * _SHORTEST), math.log(tokens)))
        yield _fitting(makers[index % len(makers)], int(room), tokens, tokenizer)


def _fitting(
    make: Callable[[int], Task], room: int, tokens: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[dict[str, str]]]:
    while room > 0:
        room = int(room * 0.9) - 8  # for the template and the question
        try:
            lines, question, answer = make(room)
        except (IndexError, ValueError):  # nothing fits
            break
        asked = "\n".join([*lines, "", question])
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        if len(labelled(messages, tokenizer)["input_ids"]) <= tokens:
            return {"messages": messages}
    raise TrainError(f"a task does not fit into {tokens} tokens; give a larger `tokens`")


@click.command("python -m clex_train.practice", cls=Command, context_settings=SETTINGS)
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUT.jsonl", type=click.Path(path_type=Path))
@click.option("--count", type=click.IntRange(min=1), default=1000, show_default=True, help="Conversations.")
@click.option(
    "--tokens", type=click.IntRange(min=256), default=2048, show_default=True, help="Most that one has in the template."
)
@click.option(
    "--task", "tasks", type=click.Choice(TASKS), multiple=True, help="What is asked for. Repeatable.  [default: all]"
)
@click.option(
    "--text", type=click.Path(path_type=Path), help="UTF-8 text to hide facts in.  [default: made-up sentences]"
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all that is random.")
@click.option("--overwrite", is_flag=True, help="Replace an existing OUT.jsonl.")
def main(
    model: Path,
    output: Path,
    count: int,
    tokens: int,
    tasks: tuple[str, ...],
    text: Path | None,
    seed: int,
    overwrite: bool,
) -> None:
    """Write conversations for `clex-train --chat`, questions about long contexts, for the tokenizer of a model."""
    target = Output(output, overwrite=overwrite)
    try:
        tokenizer = load_tokenizer(model)
    except Exception as error:  # of the tokenizers' own packages
        raise TrainError(f"{model}: holds no tokenizer that transformers can load ({one_line(error)})") from None
    try:
        words = text.read_text(encoding="utf-8") if text else ""
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"{text}: is no text that can be read ({one_line(error, 120)})") from None
    with target:
        temporary = target.temporary()
        with writing(output), temporary.open("w", encoding="utf-8") as file:
            for made in conversations(tokenizer, count, tokens, text=words, seed=seed, tasks=tasks or TASKS):
                file.write(json.dumps(made, ensure_ascii=False) + "\n")
        target.commit(temporary)
    say(f"{output}: {count} conversations")


if __name__ == "__main__":
    main()
