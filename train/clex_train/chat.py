"""Conversations as sequences in a model's own template, of which only the answers are learned."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from clex_local.errors import one_line
from clex_train import TrainError
from clex_train.data import IGNORED, check_file, opened_text

ROLES = ("system", "user", "assistant")

Message = dict[str, str]


def load_conversations(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    report: Callable[[str], None],
) -> list[dict[str, list[int]]]:
    """Tokens and labels of every conversation that fits.

    Args:
        files: of JSON lines, each an object whose ``messages`` have a ``role`` and a ``content`` each.
        tokenizer: of the model, with a chat template.
        length: tokens that a conversation may have. Longer ones are left out, whole: what they ask may be at either
            end.
        report: is told how many are.

    Returns:
        Rows with ``input_ids`` and ``labels``, which are the tokens of the answers and -100 elsewhere; see `labelled`.

    Raises:
        TrainError: a file is missing, a line of it is no conversation, the model has no template or it refuses a
            conversation, or none fits. The message names the file and the line.
    """
    if not tokenizer.chat_template:
        raise TrainError("the model's tokenizer has no chat template, which conversations need")
    if not tokenizer.is_fast:
        raise TrainError("the model's tokenizer cannot say where its tokens are in a text; it needs a tokenizer.json")
    rows, long = [], 0
    for path in files:
        for number, messages in read_conversations(path):
            try:
                row = labelled(messages, tokenizer)
            except TrainError as error:
                raise TrainError(f"{path}: line {number}: {error}") from None
            if len(row["input_ids"]) > length:
                long += 1
            else:
                rows.append(row)
    if not rows:
        raise TrainError(f"none of the {long} conversations fits into {length} tokens; give a larger `length`")
    if long:
        report(f"{long} of {long + len(rows)} conversations are longer than {length} tokens and are left out")
    return rows


def read_conversations(path: Path) -> Iterator[tuple[int, list[Message]]]:
    """The conversations of a file of JSON lines, and the numbers of their lines; empty lines are none.

    Raises:
        TrainError: it cannot be read, or a line is no conversation with an answer.
    """
    check_file(path)
    with opened_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _messages(line, f"{path}: line {number}")


def _messages(line: str, where: str) -> list[Message]:
    try:
        said = json.loads(line)
    except ValueError as error:
        raise TrainError(f"{where}: is not JSON ({one_line(error, 120)})") from None
    messages = said.get("messages") if isinstance(said, dict) else None
    if not isinstance(messages, list) or not messages:
        raise TrainError(f'{where}: is no object with a list of "messages"')
    for message in messages:
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        if role not in ROLES:
            raise TrainError(f"{where}: the role {role!r} is unknown; known: {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise TrainError(f"{where}: the content of a message of the {role} is not text")
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        raise TrainError(f"{where}: has no message of the assistant, there is nothing to learn")
    if not all(answer.strip() for answer in answers):
        raise TrainError(f"{where}: a message of the assistant is empty")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def labelled(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """A conversation in the template of the model, with the answers as labels.

    An answer begins where the template ends that asks for one, and ends with the token that the template writes behind
    it, such as ``<|im_end|>``: the model has to say it. What separates it from the next message is no part of it.

    Raises:
        TrainError: the template refuses the conversation, or has other words than the messages.
    """
    text = _rendered(messages, tokenizer)
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, places = encoded["input_ids"], encoded["offset_mapping"]
    added: Any = tokenizer.get_added_vocab
    ends = {*added().values(), *tokenizer.all_special_ids}
    labels = [IGNORED] * len(ids)
    for begin, end in _answers(messages, text, tokenizer):
        inside = [index for index, (first, behind) in enumerate(places) if begin <= first and behind <= end]
        behind = range(inside[-1] + 1, len(ids)) if inside else ()
        following = next((index for index in behind if text[slice(*places[index])].strip()), None)
        if following is not None and ids[following] in ends:
            inside.append(following)
        for index in inside:
            labels[index] = ids[index]
    return {"input_ids": ids, "labels": labels}


def _answers(messages: list[Message], text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, int]]:
    """Where each answer begins and ends in the text, in characters."""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _rendered(messages[:index], tokenizer, add_generation_prompt=True) if index else ""
        content = message["content"].strip()
        found = text.find(content, len(prompt)) if text.startswith(prompt) else -1
        if found < 0:
            raise TrainError(f"the chat template changes message {index + 1}, so that the answer is not to be found")
        yield len(prompt) if index else found, found + len(content)


def _rendered(messages: list[Message], tokenizer: PreTrainedTokenizerBase, **options: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)  # pyright: ignore[reportArgumentType]
    except Exception as error:  # a template is foreign code and may raise anything
        raise TrainError(f"the chat template refused the conversation ({one_line(error, 120)})") from None
    assert isinstance(text, str)
    return text
