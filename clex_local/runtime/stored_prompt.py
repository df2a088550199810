"""What a ``Llama`` takes from the document store and gives to it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from clex_local.library.interrupt import kept_until_return
from clex_local.runtime.vocabulary import common_prefix
from clex_local.store.documents import BLOCK, DocumentStore, StoreError, store_wanted

if TYPE_CHECKING:
    from typing_extensions import Self

    from clex_local.runtime.completion import Completions


class StoredPrompt:
    """The sequence of a ``Llama`` and a store that it is read from and written to.

    Attributes:
        store: the store.
        restored: tokens of the last prompt that came from it.
    """

    def __init__(self, llm: Completions, store: DocumentStore, exact: bool) -> None:
        self.store = store
        self.restored = 0
        self._llm = llm
        self._exact = exact
        self._stopped = False  # it was said that no more is stored
        self._saved = 0  # blocks of the sequence that were handed to the store for this prompt

    @classmethod
    def of(cls, llm: Completions, store: bool | str | os.PathLike[str] | None, *, exact: bool) -> Self | None:
        """One for an argument ``store``, None where there is to be none or the model's texts cannot be stored.

        Raises:
            StoreError: the folder cannot be used.
        """
        folder = store_wanted(store)
        if folder is None or llm.model_params.vocab_only:
            return None
        try:
            opened = DocumentStore(folder)
        except StoreError as error:
            if store is not True:
                raise
            print(f"clex_local: {error}; what is read is not kept", file=sys.stderr)  # nobody asked for this folder
            return None
        refusal = opened.refusal(llm.ctx)
        if llm.verbose:
            print(f"clex_local: document store: {refusal or folder}", file=sys.stderr)
        if refusal:
            opened.close()
            return None
        return cls(llm, opened, exact)

    def restore(self, tokens: Sequence[int]) -> int:
        """Take what a prompt begins with, where that is more than what is in the cache already.

        Returns:
            Tokens that the cache has as it had them; those behind them came from the store.
        """
        self.restored = 0
        self._saved = 0  # what was stored may have been removed since the last prompt
        llm = self._llm
        cached = common_prefix(llm.input_ids[: llm.n_tokens], tokens)
        if len(tokens) - 1 - cached < BLOCK:
            return llm.n_tokens
        # What is cached of another text goes now, as it would in any case.
        llm._ctx.kv_cache_seq_rm(-1, cached, -1)
        found = self.store.restore(llm.ctx, tokens, exact=self._exact)
        if found != llm.n_tokens:
            llm._requires_eval = True
        llm.input_ids[cached:found] = tokens[cached:found]
        llm.n_tokens = found
        self.restored = max(0, found - cached)
        if llm.verbose and self.restored:
            print(f"clex_local: {self.restored:,} tokens from the document store", file=sys.stderr)
        return min(cached, found)

    @property
    def saved(self) -> int:
        """Tokens of the sequence that are in the store, or on their way."""
        return 0 if self._stopped else min(self._saved * BLOCK, self._llm.n_tokens)

    def save(self) -> None:
        """Hand over the blocks that the sequence has got since the last time."""
        llm = self._llm
        blocks = llm.n_tokens // BLOCK
        if blocks > self._saved:
            with kept_until_return():
                self.store.save(llm.ctx, llm.input_ids[: llm.n_tokens])
            if not self._stopped and self.store.stats.stopped:
                self._stopped = True
                print(
                    f"clex_local: {self.store.folder}: a file could not be written, no more is stored", file=sys.stderr
                )
        self._saved = blocks

    def close(self) -> None:
        """Write what waits."""
        self.store.close()
