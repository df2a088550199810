"""What a loaded model computes with."""

from __future__ import annotations

from dataclasses import dataclass

import llama_cpp

from clex_local.model_file.kv_types import type_name


@dataclass(frozen=True)
class Settings:
    """What a context computes with, chosen or given.

    Attributes:
        flash_attn: flash attention is on.
        type_k, type_v: types of the key and value cache, names from ``kv_types.KV_TYPES``.
        n_threads: threads for single tokens.
        n_threads_batch: threads for more than one token, as in a prompt.
        n_batch: tokens given to llama.cpp at once.
        n_ubatch: tokens computed at once.
    """

    flash_attn: bool
    type_k: str
    type_v: str
    n_threads: int
    n_threads_batch: int
    n_batch: int
    n_ubatch: int

    @classmethod
    def of(cls, params: llama_cpp.llama_context_params) -> Settings:
        """Those of a context."""
        return cls(
            flash_attn=params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
            type_k=type_name(params.type_k),
            type_v=type_name(params.type_v),
            n_threads=params.n_threads,
            n_threads_batch=params.n_threads_batch,
            n_batch=params.n_batch,
            n_ubatch=params.n_ubatch,
        )

    def __str__(self) -> str:
        flash = "flash attention" if self.flash_attn else "no flash attention"
        cache = self.type_k if self.type_k == self.type_v else f"{self.type_k} key and {self.type_v} value"
        threads = f"{self.n_threads} thread{'s' if self.n_threads > 1 else ''}"
        if self.n_threads_batch != self.n_threads:
            threads += f" ({self.n_threads_batch} for prompts)"
        return f"{flash}, {cache} cache, {threads}, {self.n_ubatch:,} tokens at once"
