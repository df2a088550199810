"""Text as sequences of one length: read, tokenized and packed through the library ``datasets``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from datasets import Dataset, Features, IterableDataset, Value, load_dataset, load_from_disk
from datasets import Sequence as ListOf
from transformers import PreTrainedTokenizerBase

from clex_local.errors import one_line
from clex_train import TrainError

COLUMN = "text"
# What the loss leaves out, by transformers' convention.
IGNORED = -100
# Characters that are tokenized at once: a file need not fit into memory.
_BLOCK = 1 << 20
# Sequences that a streamed dataset is shuffled among.
_SHUFFLE_BUFFER = 1000


def load_sequences(
    text: Sequence[Path],
    dataset: str | None,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    streaming: bool = False,
    seed: int = 0,
) -> Dataset | IterableDataset:
    """Sequences of `length` tokens with nothing between them but the end-of-text token after each document.

    Args:
        text: UTF-8 text files, a document each.
        dataset: a folder that ``save_to_disk`` wrote, or what ``load_dataset`` takes; documents are in its column
            ``text``.
        tokenizer: of the model; its EOS token ends a document, if it has one.
        length: n.
        streaming: tokenize while training, instead of once before it into the cache of ``datasets``.
        seed: of the order in which a stream is shuffled; the trainer shuffles what is not streamed.

    Returns:
        Rows with one column, ``input_ids``, int32 [n]. What is left over at the end is dropped.

    Raises:
        TrainError: a file is missing or not UTF-8, the dataset cannot be read, or there is less than one sequence.
    """
    # Size and time are here so that the cache does not serve a file that has changed since.
    # No list: datasets would call the generator once for each of its items.
    files = tuple((str(path.resolve()), *_stamp(path)) for path in text)
    source = _documents(dataset, streaming) if dataset is not None else None
    arguments: dict[str, Any] = {"files": files, "dataset": source, "tokenizer": tokenizer, "length": length}
    features = Features({"input_ids": ListOf(Value("int32"), length=length)})
    if next(_packed(**arguments), None) is None:
        raise TrainError(
            f"the text is shorter than one sequence of {length} tokens; give more text or a smaller `length`"
        )
    if streaming:
        stream = IterableDataset.from_generator(_packed, features=features, gen_kwargs=arguments)
        return stream.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
    try:
        rows = Dataset.from_generator(_packed, features=features, gen_kwargs=arguments)
    except Exception as error:  # datasets wraps what a generator raises
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, TrainError):
            cause = cause.__cause__ or cause.__context__
        raise cause or TrainError(f"the text could not be prepared ({one_line(error)})") from None
    assert isinstance(rows, Dataset)
    return rows


def collate(rows: list[dict[str, Any]], vocabulary: int) -> dict[str, torch.Tensor]:
    """A batch of input_ids and labels int64 [B, n], n that of the longest row.

    Labels are those of the rows, or their tokens where they have none; the first token has none, nothing predicts it.
    Padding is on the right, where no token of a row sees it, and has no label.

    Raises:
        TrainError: the tokenizer has tokens that a model with a smaller vocabulary lacks.
    """
    longest, largest = max(len(row["input_ids"]) for row in rows), max(max(row["input_ids"]) for row in rows)
    if largest >= vocabulary:
        raise TrainError(f"the tokenizer makes token {largest}, the model has a vocabulary of {vocabulary} only")

    def stacked(parts: list[Sequence[int]], filler: int) -> torch.Tensor:
        return torch.tensor([[*part, *[filler] * (longest - len(part))] for part in parts])

    labels = stacked([row.get("labels", row["input_ids"]) for row in rows], IGNORED)
    labels[:, 0] = IGNORED  # or the trainer would divide the loss by n, not by n - 1
    return {"input_ids": stacked([row["input_ids"] for row in rows], 0), "labels": labels}


@contextmanager
def opened_text(path: str | Path) -> Iterator[TextIO]:
    """A file of UTF-8 text, with its line ends as they are.

    Raises:
        TrainError: it cannot be read, also later while it is.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            yield file
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "could not be read"
        raise TrainError(f"{path}: {reason} ({one_line(error, 120)})") from None


def check_file(path: Path) -> None:
    """That there is such a file.

    Raises:
        TrainError: there is none.
    """
    if not path.is_file():
        raise TrainError(f"{path}: no such file")


def _stamp(path: Path) -> tuple[int, int]:
    check_file(path)
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _documents(name: str, streaming: bool) -> Dataset | IterableDataset:
    try:
        if Path(name).is_dir() and any((Path(name) / file).exists() for file in ("state.json", "dataset_dict.json")):
            found = load_from_disk(name)
            if isinstance(found, dict):
                found = found["train"]
            if streaming:
                found = found.to_iterable_dataset()
        else:
            found = load_dataset(name, split="train", streaming=streaming)
    except Exception as error:  # of every format it reads, and of the network
        raise TrainError(f"{name}: the dataset could not be loaded ({one_line(error)})") from None
    if found.column_names is not None and COLUMN not in found.column_names:
        raise TrainError(f"{name}: the dataset has no column {COLUMN!r}, only {', '.join(found.column_names)}")
    return found  # pyright: ignore[reportReturnType]


def _packed(
    files: tuple[tuple[str, int, int], ...],
    dataset: Iterable[dict[str, Any]] | None,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
) -> Iterator[dict[str, list[int]]]:
    waiting: list[int] = []
    for block, ends in _blocks(files, dataset):
        waiting += tokenizer(block, add_special_tokens=False, verbose=False)["input_ids"]  # pyright: ignore
        if ends and isinstance(tokenizer.eos_token_id, int):
            waiting.append(tokenizer.eos_token_id)
        whole = len(waiting) // length * length
        for start in range(0, whole, length):
            yield {"input_ids": waiting[start : start + length]}
        del waiting[:whole]


def _blocks(
    files: tuple[tuple[str, int, int], ...], dataset: Iterable[dict[str, Any]] | None
) -> Iterator[tuple[str, bool]]:
    """Text, and whether its document ends with it."""
    for path, *_ in files:
        with opened_text(path) as file:
            # cut between lines, where tokens rarely cross
            block = file.read(_BLOCK) + file.readline(_BLOCK)
            while block:
                following = file.read(_BLOCK) + file.readline(_BLOCK)
                yield block, not following
                block = following
    for row in dataset or ():
        if not isinstance(row[COLUMN], str):
            raise TrainError(f"the dataset's column {COLUMN!r} holds {type(row[COLUMN]).__name__}, not text")
        yield row[COLUMN], True
