"""Conversations to train on: what is learned of them, how long they may be, what is refused, and those for practice."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from datasets import Dataset
from safetensors.torch import load_file

from clex_train import TrainError
from clex_train.chat import labelled, load_conversations
from clex_train.cli import main
from clex_train.data import IGNORED, collate, load_sequences
from clex_train.model import load_model
from clex_train.practice import conversations
from clex_train.practice import main as practice
from clex_train.train import train
from helpers.tiny_models import make_model
from helpers.training_steps import watched_steps

pytestmark = [pytest.mark.train, pytest.mark.folders, pytest.mark.usefixtures("datasets_cache")]

CHATML = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}<|im_start|>system\nBe brief."
    "<|im_end|>\n{% endif %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# With a space and nothing special between question and answer, and the end of the text behind an answer.
INST = (
    "{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% elif message.role == 'system' %}{{ raise_exception('no system messages') }}"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
TOKENS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LONG = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Two,\n\nnaïvely \N{GRINNING FACE}"},
    {"role": "user", "content": "Two,\n\nnaïvely \N{GRINNING FACE}"},
    {"role": "assistant", "content": "Two, yes."},
]


def tokenizer_with(golden_dir, template: str | None) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(golden_dir("phi2"))
    tokenizer.add_tokens(list(TOKENS), special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def parts(row: dict[str, list[int]], tokenizer: Any) -> list[tuple[bool, str]]:
    """The text of a row in pieces, and whether each is learned."""
    assert all(label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    grouped = itertools.groupby(zip(row["input_ids"], row["labels"], strict=True), key=lambda one: one[1] != IGNORED)
    return [(learned, tokenizer.decode([token for token, _ in group])) for learned, group in grouped]


# what is learned


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            CHATML,
            [
                "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{0}<|im_end|>\n<|im_start|>assistant\n",
                "{1}<|im_end|>",
                "\n<|im_start|>user\n{2}<|im_end|>\n<|im_start|>assistant\n",
                "{3}<|im_end|>",
                "\n",
            ],
        ),
        (
            LLAMA_3,
            [
                "{bos}<|start_header_id|>user<|end_header_id|>\n\n{0}<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
                "{1}<|eot_id|>",
                "<|start_header_id|>user<|end_header_id|>\n\n{2}<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
                "{3}<|eot_id|>",
            ],
        ),
        (INST, ["[INST] {0} [/INST]", " {1}{eos}", "[INST] {2} [/INST]", " {3}{eos}"]),
    ],
    ids=["ChatML", "Llama 3", "INST"],
)
def test_answers_and_the_tokens_that_end_them_are_learned_alone(golden_dir, template, expected):
    """Of an answer that a user repeats, too, and with characters that are several tokens."""
    tokenizer = tokenizer_with(golden_dir, template)
    words = [message["content"] for message in LONG]
    found = parts(labelled(LONG, tokenizer), tokenizer)
    wanted = [part.format(*words, bos=tokenizer.bos_token, eos=tokenizer.eos_token) for part in expected]
    assert [text for _, text in found] == wanted
    assert [learned for learned, _ in found] == [index % 2 == 1 for index in range(len(wanted))]


def test_an_answer_that_begins_the_conversation(golden_dir):
    tokenizer = tokenizer_with(golden_dir, LLAMA_3)
    found = parts(labelled(LONG[1:], tokenizer), tokenizer)
    assert [text for learned, text in found if learned] == [f"{LONG[k]['content']}<|eot_id|>" for k in (1, 3)]


def test_padding_has_no_label(golden_dir):
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    batch = collate(rows, 5)
    assert batch["input_ids"].shape == (2, 3)
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [IGNORED] * 3]
    with pytest.raises(TrainError, match="makes token 4, the model has a vocabulary of 4 only"):
        collate(rows, 4)


def test_padded_rows_are_learned_as_they_are_alone(base, tmp_path):
    """The loss of a batch is that of its answers' tokens, each in its own row."""
    seen: dict[str, Any] = {}
    path = written(tmp_path, [LONG, LONG[:2]])
    with watched_steps(lambda _, inputs, loss: seen.update(inputs, loss=loss)):
        options = dict(no_clex=True, positions="none", max_steps=1, batch_size=2, bf16=False, length=200)
        train(base, tmp_path / "out", chat=[path], **options)
    model, losses = load_model(base), []
    with torch.no_grad():
        for ids, labels in zip(seen["input_ids"], seen["labels"], strict=True):
            size = int((labels != IGNORED).nonzero().max()) + 1
            losses.append(
                torch.nn.functional.cross_entropy(
                    model(ids[None, :size]).logits[0, :-1], labels[1:size], ignore_index=IGNORED, reduction="none"
                )
            )
    learned = torch.cat([one[one != 0] for one in losses])
    assert len(learned) == int((seen["labels"] != IGNORED).sum())
    assert float(seen["loss"]) == pytest.approx(float(learned.mean()), rel=1e-4)


# files


@pytest.fixture(scope="module")
def base(tmp_path_factory, golden_dir) -> Path:
    """A tiny LLaMA that has a template."""
    folder = tmp_path_factory.mktemp("base") / "base"
    make_model("Llama", dict(hidden_size=64, intermediate_size=96), folder, golden_dir("llama"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = INST
    tokenizer.save_pretrained(folder)
    return folder


def written(folder: Path, made: list[Any]) -> Path:
    path = folder / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n\n" for messages in made), encoding="utf-8")
    return path


def test_longer_conversations_are_left_out_and_said(golden_dir, tmp_path):
    tokenizer, lines = tokenizer_with(golden_dir, CHATML), []
    path = written(tmp_path, [LONG, LONG[:2], LONG[2:]])
    whole = [labelled(messages, tokenizer) for messages in (LONG[:2], LONG[2:])]
    length = max(len(row["input_ids"]) for row in whole)
    assert load_conversations([path], tokenizer, length, lines.append) == whole
    assert lines == [f"1 of 3 conversations are longer than {length} tokens and are left out"]
    with pytest.raises(TrainError, match=r"none of the 3 conversations fits into 5 tokens; give a larger `length`"):
        load_conversations([path], tokenizer, 5, lines.append)


def test_conversations_train_a_model(base, tmp_path):
    path = written(tmp_path, [LONG, LONG[:2]] * 4)
    options = dict(length=200, max_factor=3, time_dt=1.0, batch_size=2, learning_rate=3e-3, warmup_ratio=0.0, epochs=3)
    lines: list[str] = []
    result = train(base, tmp_path / "out", chat=[path], log_steps=1, report=lines.append, **options)
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    assert result.steps == 12
    assert losses[-1] < losses[0] - 0.5
    before, after = (load_file(folder / "model.safetensors") for folder in (base, result.path))
    assert (after["model.norm.weight"] != before["model.norm.weight"]).any()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "chat.jsonl: line 3: is not JSON"),
        ("[]", 'line 3: is no object with a list of "messages"'),
        ('{"messages": []}', 'line 3: is no object with a list of "messages"'),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "line 3: the role 'robot' is unknown; known: system, "),
        ('{"messages": ["x"]}', "line 3: the role None is unknown"),
        ('{"messages": [{"role": "user", "content": 1}]}', "line 3: the content of a message of the user is not text"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "line 3: has no message of the assistant"),
        ('{"messages": [{"role": "assistant", "content": " "}]}', "line 3: a message of the assistant is empty"),
        (
            '{"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]}',
            "line 3: the chat template refused the conversation (no system messages)",
        ),
        (b"\xff", "chat.jsonl: is not UTF-8 text"),
    ],
)
def test_a_line_that_is_no_conversation(base, tmp_path, line, message):
    path = written(tmp_path, [LONG])
    with path.open("ab") as file:
        file.write(line if isinstance(line, bytes) else line.encode())
    output = refused(base, tmp_path / "out", "--chat", path)
    assert message in output


def refused(*arguments: Any) -> str:
    """The one line that clex-train ends with."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 1, result.output
    assert len(result.output.splitlines()) == 1, result.output
    assert not Path(arguments[1]).exists()
    return result.output


def test_models_and_options_that_do_not_go_with_conversations(base, tmp_path, golden_dir):
    path = written(tmp_path, [LONG])
    assert "missing: no such file" in refused(base, tmp_path / "out", "--chat", tmp_path / "missing")
    assert "conversations are tokenized at once; give --chat without --streaming" in refused(
        base, tmp_path / "out", "--chat", path, "--text", path, "--streaming", "--max-steps", 1
    )
    for template, message in (
        (None, "has no chat template"),
        ("{{ messages[0].content | upper }}", "the chat template changes message 2, so that the answer is not to be"),
    ):
        with pytest.raises(TrainError, match=message):
            load_conversations([path], tokenizer_with(golden_dir, template), 100, print)


# with text


def numbered(count: int) -> str:
    """Text whose every sequence of some tokens says where in it it is."""
    return "".join(f"{n} and {n * n} are numbers.\n" for n in range(count))


def rows_of(base: Path, folder: Path, **options: Any) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of what one epoch of a training reads, in its order."""
    seen: list[tuple[list[int], list[int]]] = []

    def keep(_: Any, inputs: dict[str, Any], __: Any) -> None:
        for ids, labels in zip(inputs["input_ids"].tolist(), inputs["labels"].tolist(), strict=True):
            seen.append((ids, labels))

    with watched_steps(keep):
        train(base, folder, no_clex=True, positions="none", bf16=False, **options)
    return seen


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> dict[str, Any]:
    """Options of a training on ten conversations and some text."""
    folder = tmp_path_factory.mktemp("mixed")
    words = folder / "text.txt"
    words.write_text(numbered(105), encoding="utf-8")
    talks = [[{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}!"}] for n in range(10)]
    return {"chat": [written(folder, talks)], "text": [words], "length": 48, "learning_rate": 0.0}


def test_text_has_as_many_sequences_as_there_are_conversations(base, tmp_path, mixed):
    """From all parts of it, whether a file or a dataset, in a mixed order; of the text every token is learned."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    whole = [row["input_ids"] for row in load_sequences(mixed["text"], None, tokenizer, 48)]
    talks = [row["input_ids"] for row in load_conversations(mixed["chat"], tokenizer, 48, print)]
    assert len(whole) > 3 * len(talks)
    assert len(whole) % len(talks) > 3
    Dataset.from_dict({"text": [mixed["text"][0].read_text(encoding="utf-8")]}).save_to_disk(tmp_path / "saved")
    for name, source in (("file", {}), ("dataset", {"text": [], "dataset": str(tmp_path / "saved")})):
        seen = rows_of(base, tmp_path / name, **{**mixed, **source})
        assert sorted(ids for ids, _ in seen if ids in talks) == sorted(talks)
        texts = [(ids, labels) for ids, labels in seen if ids in whole]
        assert len(seen) == 2 * len(texts) == 2 * len(talks)
        assert all(labels[1:] == ids[1:] for ids, labels in texts)
        places = [0, *sorted(whole.index(ids) for ids, _ in texts), len(whole)]
        assert max(behind - before for before, behind in itertools.pairwise(places)) <= len(whole) // len(talks) + 1
        kinds = [ids in talks for ids, _ in seen]
        assert kinds not in (sorted(kinds), sorted(kinds, reverse=True))


def test_text_with_fewer_sequences_than_conversations_is_read_once(base, tmp_path, mixed):
    short = tmp_path / "short.txt"
    short.write_text(numbered(12), encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    whole = [row["input_ids"] for row in load_sequences([short], None, tokenizer, 48)]
    assert 1 < len(whole) < 10
    seen = [ids for ids, _ in rows_of(base, tmp_path / "out", **{**mixed, "text": [short]})]
    assert len(seen) == 10 + len(whole)
    assert sorted(ids for ids in seen if ids in whole) == sorted(whole)


def test_resumed_training_on_both_equals_an_uninterrupted_one(base, tmp_path, mixed):
    options = {**mixed, "learning_rate": 1e-3, "max_steps": 6, "log_steps": 1, "max_factor": 2, "time_dt": 1.0}
    whole = train(base, tmp_path / "whole", **options)

    def interrupt(line: str) -> None:
        if line.startswith("step 3/"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="saved a checkpoint at step"):
        train(base, tmp_path / "parts", **options, report=interrupt)
    parts = train(base, tmp_path / "parts", **options, resume=True)
    assert (parts.steps, parts.loss) == (whole.steps, whole.loss)
    assert (parts.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()


# practice


def test_practice_has_the_answers_in_its_contexts(golden_dir):
    tokenizer = tokenizer_with(golden_dir, CHATML)
    text = "\n\n".join(f"Paragraph {n} is about\nnothing." for n in range(50))
    made = list(conversations(tokenizer, 48, 1500, text=text, seed=1))
    assert made == list(conversations(tokenizer, 48, 1500, text=text, seed=1))
    assert made != list(conversations(tokenizer, 48, 1500, text=text, seed=2))
    sizes = [len(labelled(one["messages"], tokenizer)["input_ids"]) for one in made]
    assert max(sizes) <= 1500
    assert max(sizes) > 2 * min(sizes)
    at_the_beginning = {"hidden fact": 0, "key": 0}
    ways, announced = set(), 0
    fillers = {"is about nothing.": 0, "The rain had stopped": 0}
    for index, one in enumerate(made):
        asked, answer = (message["content"] for message in one["messages"])
        lines = asked.splitlines()
        if index % 3 == 0:
            (number,) = re.findall(r"\d{5}", answer)
            (fact,) = (line for line in lines if number in line)
            (thing,) = re.findall(r"the (\w+)(?: have)?\?$", asked)
            assert f"the {thing}" in fact
            ways.add(fact.split()[0])
            (filler,) = (one for one in fillers if one in asked)
            fillers[filler] += 1
            assert sum(bool(re.search(r"\b\d{5}\b", line)) for line in lines) == 4
            asked_before = lines[0] == lines[-1]
            announced += asked_before
            at_the_beginning["hidden fact"] += fact == lines[asked_before]
        elif index % 3 == 1:
            key, value = re.fullmatch(r"The value of (\S+) is (\d+)\.", answer).groups()
            assert lines.count(f"{key}: {value}") == 1
            at_the_beginning["key"] += lines[0] == f"{key}: {value}"
        else:
            count, word = re.fullmatch(r"(\d+) lines are the word (\w+)\.", answer).groups()
            assert lines.count(word) == int(count)
    assert all(0 < count < 10 for count in at_the_beginning.values()), at_the_beginning
    assert len(ways) >= 4
    assert 0 < announced < 12
    assert 0 < fillers["The rain had stopped"] < fillers["is about nothing."]
    keys = list(conversations(tokenizer, 4, 1500, tasks=["keys"]))
    assert all("What is the value of" in one["messages"][0]["content"] for one in keys)


def test_practice_is_written_for_training(base, tmp_path):
    arguments = [str(base), str(tmp_path / "practice.jsonl"), "--count", "4", "--tokens", "1024"]
    done = CliRunner().invoke(practice, arguments)
    assert done.exit_code == 0, done.output
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    assert len(load_conversations([tmp_path / "practice.jsonl"], tokenizer, 1024, print)) == 4
    again = CliRunner().invoke(practice, arguments)
    assert (again.exit_code, again.output.count("\n")) == (1, 1), again.output
    assert "practice.jsonl: already exists; pass --overwrite to replace it" in again.output
    before = (tmp_path / "practice.jsonl").read_bytes()
    for more in (["--seed", "1"], ["--seed", "0"]):
        replaced = CliRunner().invoke(practice, [*arguments, *more, "--overwrite"])
        assert replaced.exit_code == 0, replaced.output
        assert ((tmp_path / "practice.jsonl").read_bytes() == before) is (more[1] == "0")
    facts = CliRunner().invoke(practice, [*arguments, "--task", "facts", "--overwrite"])
    assert facts.exit_code == 0, facts.output
    lines = (tmp_path / "practice.jsonl").read_text().splitlines()
    asked = [json.loads(line)["messages"][0]["content"] for line in lines]
    assert sum(bool(re.search(r" the \w+(?: have)?\?$", one)) for one in asked) == 4
    assert not any("What is the value of" in one for one in asked)
    nowhere = CliRunner().invoke(practice, [str(base), str(tmp_path / "no" / "x.jsonl")])
    assert (nowhere.exit_code, "does not exist; create it first" in nowhere.output) == (1, True), nowhere.output
    arguments[1] = str(tmp_path / "other.jsonl")
    failed = CliRunner().invoke(practice, [*arguments, "--text", str(tmp_path / "missing")])
    assert (failed.exit_code, failed.output.count("\n")) == (1, 1), failed.output
    assert "missing: is no text that can be read" in failed.output
    assert os.listdir(tmp_path) == ["practice.jsonl"]
    with pytest.raises(TrainError, match="a task does not fit into 40 tokens; give a larger `tokens`"):
        list(conversations(tokenizer, 3, 40))
