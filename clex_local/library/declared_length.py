"""The bindings' own ``Llama`` declares the length of a prompt, so that it is right on the patched library."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

# This is imported in the middle of the import of llama_cpp, and may be what imports it.
if TYPE_CHECKING:
    from llama_cpp import Llama


def declare_lengths(cls: type[Llama]) -> None:
    """Let ``cls.eval`` declare the length that the sequence will have, for all batches of the tokens to use one table.

    The method as it was is ``cls.eval.__wrapped__``.
    """
    from clex_local.library import llama_clex

    original = cls.eval

    @functools.wraps(original)
    def eval(self: Llama, tokens: Sequence[int]) -> None:
        # As the method does itself, too late: the declaration goes with the last token of what was cached.
        self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        llama_clex.seq_reserve(self.ctx, 0, self.n_tokens + len(tokens))
        original(self, tokens)

    cls.eval = eval
