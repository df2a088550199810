"""Guesses of a draft model that do not reach into another table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp.llama_speculative import LlamaDraftModel

from clex_local.runtime.table_choice import TableChoice


class ClippedDraft(LlamaDraftModel):
    """Another draft model, kept from entering the next table: verified in one batch, all tokens would get it.

    Args:
        model: what guesses.
        tables: those of the sequence.
        counted: told how many guesses there are.
    """

    def __init__(self, model: LlamaDraftModel, tables: TableChoice, counted: Callable[[int], None]) -> None:
        self.model, self.tables, self.counted = model, tables, counted

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:
        """Those of its guesses that fit: int32 [n]."""
        # One batch holds the tokens that are not computed yet and all guesses, of which each has its logits compared.
        llm = self.tables.llm
        waiting = len(input_ids) - llm.n_tokens
        room = min(self.tables.room(len(input_ids)), llm.n_batch - waiting)
        draft = self.model(input_ids, **kwargs)[: max(0, room)]
        self.counted(len(draft))
        return draft
