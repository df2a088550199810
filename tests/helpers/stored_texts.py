"""Texts read with and without a document store, and the files of a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clex_local.runtime.low_level import Context as AnyContext
from clex_local.store.documents import DocumentStore
from helpers.low_level import F16, Context

BLOCK = 256
TEXT_OPTIONS = {"n_ctx": 2048, "n_ubatch": BLOCK, "type_k": F16, "type_v": F16}


def read(context: Context, ids: Sequence[int], start: int = 0, *, piece: int = 256, sequence: int = 0) -> np.ndarray:
    """Compute a text from `start` on, in pieces; the logits of its last token."""
    if context.model.factors:
        context.declare(len(ids), sequence)
    logits = None
    for begin in range(start, len(ids), piece):
        logits = context.feed(ids[begin : begin + piece], begin, sequence)
    assert logits is not None
    return logits


def go_on(context: Context, ids: Sequence[int], count: int, *, sequence: int = 0) -> np.ndarray:
    """Some more tokens, one at a time: logits [count, n_vocab]."""
    return np.stack([context.feed([ids[-1 - i]], len(ids) + i, sequence) for i in range(count)])


def stored(store: DocumentStore, context: AnyContext, ids: Sequence[int], *, sequence: int = 0) -> int:
    """Store a text that was computed, and wait for it."""
    count = store.save(context.pointer, ids, sequence=sequence)
    assert store.flush()
    return count


def block_files(folder: Path) -> list[Path]:
    """Files of blocks, the first of a text first."""
    return sorted(folder.rglob("*.clexblock"), key=lambda path: int(path.name.split(".")[1]))
