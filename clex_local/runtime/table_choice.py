"""The table that a sequence is computed with in a context, and how far it can grow with the same one."""

from __future__ import annotations

from dataclasses import dataclass

import llama_cpp

from clex_local.library import llama_clex


@dataclass(frozen=True)
class TableChoice:
    """Which table the library takes for a length.

    Attributes:
        llm: what computes.
        n_ctx: tokens that its context holds.
        fixed: one table is used for every length.
    """

    llm: llama_cpp.Llama
    n_ctx: int
    fixed: bool

    def of(self, n_tokens: int) -> int:
        """What decides the values computed for a token of a sequence of n_tokens: its bucket, or its length too."""
        model = self.llm.model
        if llama_clex.log_scale(model):
            return n_tokens
        if self.fixed:
            return 0
        return llama_clex.bucket(model, min(n_tokens, llama_clex.max_context(model)))

    def room(self, n_tokens: int) -> int:
        """Tokens that a sequence of n_tokens can grow by without any value of it being computed differently."""
        model = self.llm.model
        if not llama_clex.n_buckets(model):
            return self.n_ctx - n_tokens
        if llama_clex.log_scale(model):
            return 0
        bucket = llama_clex.bucket(model, n_tokens)
        if self.fixed or bucket < 0:
            return self.n_ctx - n_tokens
        last = int(llama_clex.scaling_factor(model, bucket) * llama_clex.original_context(model))
        return (self.n_ctx if last == llama_clex.max_context(model) else last) - n_tokens
