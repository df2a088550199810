"""llama-cpp-python's ``Llama`` for models with length-aware RoPE tables."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp._logger import llama_log_callback

from clex_local import native
from clex_local.errors import ClexError
from clex_local.tables import ContextError, read_tables

_ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR


class ModelError(ClexError, ValueError):
    """A model that cannot be loaded; a ValueError too, as llama-cpp-python raises."""


@dataclass(frozen=True)
class ClexState:
    """The tables of a loaded model, and what they have done so far.

    Attributes:
        method: what made the tables: ``clex``, ``ntk``, ...
        original_context: L, tokens covered at t = 1.
        max_context: tokens covered by the last bucket.
        buckets: scaling factor t of each bucket, ascending from 1.0.
        bucket: index of the bucket now in use; None before the first decode.
        rerotations: times that the cached keys were brought to another table.
        rerotated_cells: cached tokens whose keys were re-rotated, counted each time.
        rerotation_ms: time spent on it, milliseconds.
    """

    method: str
    original_context: int
    max_context: int
    buckets: tuple[float, ...]
    bucket: int | None
    rerotations: int
    rerotated_cells: int
    rerotation_ms: float

    def bucket_of(self, n_tokens: int) -> int:
        """Index of the first bucket with t * L >= n_tokens.

        Raises:
            ContextError: n_tokens is beyond the last bucket.
        """
        for index, factor in enumerate(self.buckets):
            if factor * self.original_context >= n_tokens:
                return index
        raise _too_long(n_tokens, self.max_context)


class Llama(llama_cpp.Llama):
    """llama-cpp-python's ``Llama``, every argument and method of it, aware of the length of the sequence.

    A model whose GGUF has ``clex.*`` tables uses the table of the sequence's actual length, whatever ``n_ctx``, and so
    does one with LongRoPE factors (Phi-3), unless the environment has ``LLAMA_CLEX_LONGROPE_DISABLE``; one with neither
    runs as in llama-cpp-python. ``n_ctx=0`` gives all the context that the tables cover, and so does a larger one:
    there is no table beyond.

    Attributes:
        on_prefill: called with (tokens done, tokens in all) before, between and after the batches of an ``eval`` of
            more than one batch.

    Raises:
        ModelError: the file is missing, is no GGUF, is truncated or cannot be run; the message says which.
        TablesError: its tables break a rule of the metadata.
    """

    def __init__(self, model_path: str, *, n_ctx: int = 512, **kwargs: Any) -> None:
        self.on_prefill: Callable[[int, int], None] | None = None
        self._stack = ExitStack()  # what the base class closes, should the file be refused before it has one
        if not Path(model_path).is_file():
            raise ModelError(f"{model_path}: no such model file")
        tables = read_tables(model_path)
        if tables is not None:
            n_ctx = min(n_ctx, tables.max_context_length)
        with _native_errors(forward=kwargs.get("verbose", True)) as errors:
            try:
                super().__init__(model_path, n_ctx=n_ctx, **kwargs)
            except ValueError as error:
                reason = errors[-1] if errors else str(error)
                raise ModelError(f"{model_path}: {reason}") from error
        self._method = None
        if native.n_buckets(self.model):
            # The library makes tables of its own from the factors of a LongRoPE model.
            self._method = tables.method if tables else "longrope"
        if self._method is not None:
            # The context is padded to a multiple of 256; the base class ends a completion by this.
            self._n_ctx = min(self._n_ctx, native.max_context(self.model))

    @property
    def clex(self) -> ClexState | None:
        """What the tables are and have done; None for a model without tables."""
        if self._method is None:
            return None
        stats = native.get_stats(self.ctx)
        bucket = native.seq_bucket(self.ctx, 0)
        return ClexState(
            method=self._method,
            original_context=native.original_context(self.model),
            max_context=native.max_context(self.model),
            buckets=tuple(native.scaling_factor(self.model, i) for i in range(native.n_buckets(self.model))),
            bucket=None if bucket < 0 else bucket,
            rerotations=stats.n_rerotations,
            rerotated_cells=stats.n_cells,
            rerotation_ms=stats.t_us / 1000,
        )

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens after those in the cache.

        The length after the last of them is declared to the library first, so that a prompt of many batches uses one
        table throughout. An interrupt between batches leaves ``n_tokens`` and the cache in agreement.

        Args:
            tokens: token ids, appended at position ``n_tokens``.

        Raises:
            ContextError: the sequence would be longer than the context, or than the last bucket covers.
        """
        total = self.n_tokens + len(tokens)
        if total > self._n_ctx:
            raise _too_long(total, self._n_ctx)
        if self._method is not None:
            native.seq_reserve(self.ctx, 0, total)
        if len(tokens) <= self.n_batch:
            super().eval(tokens)
            return
        for start in range(0, len(tokens), self.n_batch):
            self._report(start, len(tokens))
            super().eval(tokens[start : start + self.n_batch])
        self._report(len(tokens), len(tokens))

    def _report(self, done: int, total: int) -> None:
        if self.on_prefill is not None:
            self.on_prefill(done, total)


def _too_long(n_tokens: int, limit: int) -> ContextError:
    return ContextError(f"{n_tokens:,} tokens do not fit in a context of {limit:,}")


@contextmanager
def _native_errors(*, forward: bool) -> Iterator[list[str]]:
    """Collect the error lines that llama.cpp logs, which say why it refuses a model; print them too if `forward`."""
    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def collect(level: int, text: bytes, user_data: Any) -> None:
        if level == _ERROR_LEVEL:
            lines.append(text.decode("utf-8", errors="replace").strip())
            if not forward:
                return
        llama_log_callback(level, text, user_data)

    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))
