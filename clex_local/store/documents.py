"""The document store: what was computed of a text, on disk, for every later process that begins with the same text."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clex_local.errors import ClexError
from clex_local.library import llama_clex_store
from clex_local.library.log import ERROR, logged
from clex_local.model_file.kv_types import type_name
from clex_local.sizes import size_in_bytes
from clex_local.store.cache_folder import cache_folder

BLOCK = llama_clex_store.BLOCK
OFF = ("0", "off", "no", "false")


class StoreError(ClexError):
    """The folder of a document store cannot be used."""


@dataclass(frozen=True)
class Document:
    """A text in the store: a block of it that no other one goes on from, and all before that.

    Attributes:
        name: of its last block, hexadecimal; what ``DocumentStore.remove`` takes.
        model: what the model's file calls it.
        model_id: hash of the content of the model's files, hexadecimal.
        begin: how the text begins.
        type_k, type_v: of the cache that it was computed in.
        tokens: how many are stored.
        size: bytes of its files.
        own_size: bytes of those that no other document has.
        created, used: seconds since 1970.
    """

    name: str
    model: str
    model_id: str
    begin: str
    type_k: str
    type_v: str
    tokens: int
    size: int
    own_size: int
    created: int
    used: int


@dataclass(frozen=True)
class StoreStats:
    """What this process did with a store.

    Attributes:
        restored: tokens taken from it.
        stored: tokens written to it.
        skipped: blocks that were not copied at once because the disk was behind.
        damaged: files removed that were not what their names say.
        evicted: files removed because of the limit.
        size: bytes of all files, as far as is known; None before the first was written.
        limit: bytes that they may have.
        restore_seconds: time spent on taking tokens from it.
        store_seconds: time that computing was held up.
        stopped: a file could not be written, and nothing more is.
    """

    restored: int
    stored: int
    skipped: int
    damaged: int
    evicted: int
    size: int | None
    limit: int
    restore_seconds: float
    store_seconds: float
    stopped: bool


@dataclass(frozen=True)
class StoreCheck:
    """What reading all files found: their number and bytes; those removed, as damaged or with nothing before them."""

    files: int
    size: int
    damaged: int
    orphans: int


def store_folder() -> Path:
    """Where the store of the commands is."""
    return cache_folder() / "documents"


def store_wanted(store: bool | str | os.PathLike[str] | None) -> Path | None:
    """The folder that an argument ``store`` means, None for no store; ``CLEX_STORE=0`` in the environment is none."""
    if not store or os.environ.get("CLEX_STORE", "").lower() in OFF:
        return None
    return store_folder() if store is True else Path(os.path.expanduser(store)).absolute()


def size_limit() -> int:
    """Bytes that a store may have: ``CLEX_CACHE_SIZE`` in the environment; 0 for the library's default.

    Raises:
        StoreError: the variable is no size.
    """
    given = os.environ.get("CLEX_CACHE_SIZE", "")
    try:
        return size_in_bytes(given) if given else 0
    except ValueError as error:
        raise StoreError(f"CLEX_CACHE_SIZE={given}: {error}") from None


class DocumentStore:
    """A store in a folder; close it or use it in ``with``, for what waits to be written.

    Args:
        folder: made where it is not there; None is that of the commands.
        limit: bytes that it may have, those that were not used for the longest time go first; None takes what
            ``CLEX_CACHE_SIZE`` says, or a fifth of the disk's free space.

    Raises:
        StoreError: the folder cannot be made, belongs to another user or can be written by others.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, limit: int | None = None) -> None:
        self.folder = store_folder() if folder is None else Path(folder)
        with logged(ERROR) as lines:
            pointer = llama_clex_store.open_(os.fsencode(self.folder), size_limit() if limit is None else limit)
        if not pointer:
            reason = lines[-1].split(": ", 1)[-1] if lines else f"{self.folder}: it cannot be used"
            raise StoreError(f"no document store: {reason}")
        self._pointer: Any = pointer
        self._close = weakref.finalize(self, llama_clex_store.close, pointer)

    def __enter__(self) -> DocumentStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what waits, and free it."""
        self._close()
        self._pointer = None

    def detach(self) -> None:
        """Leave it to the end of the process: another thread is inside of it."""
        self._close.detach()

    def refusal(self, context: object) -> str | None:
        """Why texts of a context (``llama_context *``) cannot be stored; None if they can."""
        return llama_clex_store.refusal(self._pointer, context)

    def restore(
        self,
        context: object,
        tokens: Sequence[int] | npt.NDArray[np.int32],
        *,
        total: int = 0,
        exact: bool = False,
        sequence: int = 0,
    ) -> int:
        """Give a sequence the longest stored beginning of a text, of which it has the first tokens, or none.

        Args:
            context: ``llama_context *``.
            tokens: the text.
            total: tokens that the sequence will have, if more than the text.
            exact: only what was computed with the table for that length.
            sequence: its id.

        Returns:
            Tokens that the sequence has now, fewer than the text's.
        """
        array, count = _array(tokens)
        flags = llama_clex_store.EXACT if exact else 0
        return llama_clex_store.restore(self._pointer, context, sequence, array, count, total, flags)

    def save(self, context: object, tokens: Sequence[int] | npt.NDArray[np.int32], *, sequence: int = 0) -> int:
        """Store the blocks of a sequence, whose text the tokens are, that are not there yet; they are written later.

        Returns:
            Tokens that are stored, or will be.
        """
        return llama_clex_store.save(self._pointer, context, sequence, *_array(tokens))

    def flush(self) -> bool:
        """Wait until everything is written; whether it could be."""
        return llama_clex_store.flush(self._pointer)

    @property
    def stats(self) -> StoreStats:
        """What this process did with it."""
        stats = llama_clex_store.get_stats(self._pointer)
        return StoreStats(
            restored=stats.n_restored,
            stored=stats.n_stored,
            skipped=stats.n_skipped,
            damaged=stats.n_damaged,
            evicted=stats.n_evicted,
            size=None if stats.n_bytes < 0 else stats.n_bytes,
            limit=stats.max_bytes,
            restore_seconds=stats.t_restore_us / 1e6,
            store_seconds=stats.t_store_us / 1e6,
            stopped=stats.stopped,
        )

    def documents(self) -> list[Document]:
        """All texts, those used last first."""
        count = llama_clex_store.list_(self._pointer, None, 0)
        while True:
            found = (llama_clex_store.Document * count)()
            now = llama_clex_store.list_(self._pointer, found, count)
            if now <= count:
                return [_document(item) for item in found[:now]]
            count = now

    def remove(self, name: str) -> int | None:
        """Remove a text, as far as no other one needs its blocks.

        Returns:
            Bytes freed; None where no text has that name.
        """
        freed = llama_clex_store.remove(self._pointer, name.encode())
        return None if freed < 0 else freed

    def clear(self) -> int:
        """Remove all; the bytes freed."""
        return llama_clex_store.clear(self._pointer)

    def check(self) -> StoreCheck:
        """Read every file, and remove those that are damaged or that nothing leads to."""
        result = llama_clex_store.check(self._pointer)
        return StoreCheck(result.n_files, result.n_bytes, result.n_damaged, result.n_orphans)


def _array(tokens: Sequence[int] | npt.NDArray[np.int32]) -> tuple[Any, int]:
    array = np.ascontiguousarray(tokens, np.int32)
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), len(array)


def _document(item: llama_clex_store.Document) -> Document:
    return Document(
        name=item.name.decode(),
        model=item.model.decode("utf-8", errors="replace"),
        model_id=item.model_id.decode(),
        begin=item.begin.decode("utf-8", errors="replace"),
        type_k=type_name(item.type_k),
        type_v=type_name(item.type_v),
        tokens=item.n_tokens,
        size=item.n_bytes,
        own_size=item.n_bytes_own,
        created=item.t_created,
        used=item.t_used,
    )
