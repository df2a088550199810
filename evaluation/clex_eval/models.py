"""The models that are measured: GGUF files in the quantized runtime; Hugging Face folders are in ``folder.py``."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from clex_local import inspect
from clex_local.decoding import decode_failure
from clex_local.errors import ClexError

Prefill = Literal["one-shot", "growing"]
Policy = Literal["by-length", "fixed"]
Progress = Callable[[int], object]  # called with the tokens computed since the last call

_ROWS = 512  # of logits that are reduced at once


@dataclass(frozen=True)
class Coverage:
    """The context lengths of a model, in tokens.

    Attributes:
        original: L, covered without scaling; of a model without tables what it was trained for.
        maximum: what its last table covers; None where there are no tables and every length is computed alike.
        baked: what the one table covers whose frequencies are the model's own, or None.
    """

    original: int
    maximum: int | None
    baked: int | None = None


class Model(Protocol):
    """A model with a context.

    Attributes:
        name: file or folder name without suffix.
        path: the file or folder.
        original_context_length: L; of a model without tables its trained context.
        context_length: tokens the context holds: what was asked for, at most what the tables cover.
        bos: the token that a text begins with, of a model that wants one; else empty.
    """

    name: str
    path: Path
    original_context_length: int
    context_length: int
    bos: tuple[int, ...]

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """Token ids of a text; special: control tokens written out in it are understood."""
        ...

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without control tokens."""
        ...

    def chat(self, message: str, answer: str = "") -> list[int]:
        """Tokens of one user message by the model's chat template, with the answer begun.

        Without a template: message and answer as one plain text, in a line each.
        """
        ...

    def generate(self, prompt: Sequence[int], max_tokens: int, stop: Sequence[str] = ()) -> str:
        """The likeliest continuation of a prompt, up to a token that ends it or the first of the stop strings."""
        ...

    def negative_log_likelihoods(
        self,
        tokens: npt.NDArray[np.int32],
        *,
        prefill: Prefill = "one-shot",
        chunk: int | None = None,
        last: int | None = None,
        progress: Progress | None = None,
    ) -> npt.NDArray[np.float64]:
        """Those of tokens[1:], each given all before it, in nats: [n - 1], or those of the last ones.

        The last token is only predicted, so a sequence of n - 1 tokens is computed.

        Args:
            tokens: [n].
            prefill: ``one-shot`` takes the table of all n - 1 tokens for each of them; ``growing`` feeds them in
                chunks, each with the table of the tokens so far, to which the cached keys are brought.
            chunk: tokens of such a chunk; None takes the original context length.
            last: how many to give, counted from the end.
            progress: called after each batch.
        """
        ...

    def scaling_factor(self, n_tokens: int) -> float | None:
        """Scaling factor t that a sequence of so many tokens gets; None without tables."""
        ...

    def close(self) -> None:
        """Free the memory."""
        ...

    def __enter__(self) -> Model: ...

    def __exit__(self, *_: object) -> None: ...


def coverage(path: Path) -> Coverage:
    """The context lengths of a GGUF file or a Hugging Face folder, without loading its weights.

    Raises:
        ClexError: it is no model.
    """
    if path.is_dir():
        from clex_eval.folder import folder_coverage

        return folder_coverage(path)
    if not path.exists():
        raise ClexError(f"{path}: no such model: neither a GGUF file nor a Hugging Face folder")
    found = inspect(path)
    if not found.original_context:
        raise ClexError(f"{path}: not a language model (it has no context length)")
    baked = found.baked.context_length if found.baked else None
    return Coverage(found.original_context, found.max_context if found.tables else None, baked)


def open_model(
    path: Path,
    *,
    context: int = 0,
    cache_type: str | None = "f16",
    policy: Policy = "by-length",
    clamp: bool = False,
    flash_attn: bool | None = None,
    batch: int = 512,
    threads: int | None = None,
    n_gpu_layers: int = 0,
) -> Model:
    """Load a GGUF file or a Hugging Face folder; use it in a ``with`` statement.

    Args:
        path: the file or folder. Folders are computed in float32 by transformers; of the options below, only
            ``context``, ``clamp`` and ``threads`` concern them.
        context: tokens the context holds; 0 for all that the tables cover, or that the model was trained for. A model
            without tables takes any.
        cache_type: type of the key and value cache, a name from ``clex_local.memory.KV_TYPES``; None takes F16, or
            q8_0 where only that fits.
        policy: ``by-length`` uses the table of each sequence's length, ``fixed`` the last one for all.
        clamp: allow contexts beyond the last table, which is then used.
        flash_attn: None takes what is faster and fits.
        batch: prompt tokens computed at once.
        threads: None takes the physical cores.
        n_gpu_layers: layers computed on a GPU; -1: all.

    Raises:
        ClexError: it cannot be read or loaded.
    """
    covers = coverage(path)
    if path.is_dir():
        from clex_eval.folder import FolderModel

        if policy == "fixed":
            raise ClexError(f"{path}: transformers chooses the table by the length; --policy fixed needs a GGUF file")
        return FolderModel(path, covers, context, clamp=clamp, threads=threads)
    return GGUFModel(
        path,
        covers,
        context,
        cache_type=cache_type,
        policy=policy,
        clamp=clamp,
        flash_attn=flash_attn,
        batch=batch,
        threads=threads,
        n_gpu_layers=n_gpu_layers,
    )


def held(covers: Coverage, context: int, clamp: bool) -> int:
    """Tokens of a context for which `context` were asked: no more than the tables cover, 0 for as many."""
    wanted = context or covers.maximum or covers.baked or covers.original
    return wanted if clamp or covers.maximum is None else min(wanted, covers.maximum)


def likelihoods(logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """Negative log-likelihoods of the targets [n], in nats, under logits [n, n_vocab]."""
    parts = [np.empty(0)]
    for start in range(0, len(targets), _ROWS):
        rows, wanted = logits[start : start + _ROWS], targets[start : start + _ROWS]
        peak = rows.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(rows - peak).sum(axis=1, dtype=np.float64)) + peak[:, 0]
        parts.append(log_sum - rows[np.arange(len(wanted)), wanted])
    return np.concatenate(parts)


def feeding(model: Model, n_tokens: int, prefill: Prefill, chunk: int | None, last: int | None) -> tuple[int, int, int]:
    """How ``negative_log_likelihoods`` feeds n tokens: inputs, inputs at once, first input whose prediction counts.

    Raises:
        ClexError: they do not fit in the context.
    """
    total = n_tokens - 1
    if total > model.context_length:
        raise ClexError(f"{model.path}: {total:,} tokens do not fit in a context of {model.context_length:,}")
    step = total if prefill == "one-shot" else chunk or model.original_context_length
    return total, step, total - min(last or total, total)


def cut(text: str, stop: Sequence[str]) -> str | None:
    """The text before the first of the stop strings; None if it holds none of them."""
    places = [place for word in stop if (place := text.find(word)) >= 0]
    return text[: min(places)] if places else None


class GGUFModel:
    """A GGUF file in the quantized runtime; see ``Model`` and ``open_model``."""

    def __init__(
        self,
        path: Path,
        covers: Coverage,
        context: int,
        *,
        cache_type: str | None,
        policy: Policy,
        clamp: bool,
        flash_attn: bool | None,
        batch: int,
        threads: int | None,
        n_gpu_layers: int,
    ) -> None:
        from jinja2 import TemplateError

        from clex_local import Llama
        from clex_local.arguments import ContextWarning
        from clex_local.memory import KV_TYPES

        self.path = path
        self.name = path.name.removesuffix(".gguf")
        self.original_context_length = covers.original
        self.context_length = held(covers, context, clamp)
        self._policy, self._clamp, self._maximum = policy, clamp, covers.maximum
        # The runtime's fixed policy takes the table of the context's size.
        n_ctx = max(self.context_length, covers.maximum or 0) if policy == "fixed" else self.context_length
        cache = None if cache_type is None else KV_TYPES[cache_type][0]
        try:
            with warnings.catch_warnings():
                # How a model does beyond its training is what is measured.
                warnings.simplefilter("ignore", ContextWarning)
                self._llm = Llama(
                    str(path),
                    n_ctx=n_ctx,
                    n_batch=batch,
                    n_ubatch=batch,
                    n_threads=threads,
                    n_gpu_layers=n_gpu_layers,
                    type_k=cache,
                    type_v=cache,
                    flash_attn=flash_attn,
                    policy=policy,
                    clamp=clamp,
                    prefix_reuse="exact",  # so that what is cached of an earlier prompt changes no answer
                    verbose=False,
                )
        except TemplateError as error:
            raise ClexError(f"{path}: its chat template is not valid: {error}") from error
        import llama_cpp

        vocab = self._llm._model.vocab
        wanted = llama_cpp.llama_vocab_get_add_bos(vocab) and self._llm.token_bos() >= 0
        self.bos = (self._llm.token_bos(),) if wanted else ()
        self._vocab = vocab
        self._batch = llama_cpp.llama_batch_init(self._llm.n_batch, 0, 1)
        for i in range(self._llm.n_batch):
            self._batch.n_seq_id[i] = 1
            self._batch.seq_id[i][0] = 0

    def __enter__(self) -> GGUFModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory."""
        import llama_cpp

        if self._llm is not None:
            llama_cpp.llama_batch_free(self._batch)
            self._llm.close()
            self._llm: Any = None

    @cached_property
    def _session(self) -> Any:
        from clex_local.session import Sampling, Session

        return Session(self._llm, sampling=Sampling(temp=0))

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """As ``Model`` says."""
        tokens = self._llm.tokenize(text.encode(), add_bos=False, special=special) if text else []
        return [*self.bos, *tokens] if bos else tokens

    def detokenize(self, tokens: Sequence[int]) -> str:
        """As ``Model`` says."""
        return b"".join(map(self._session.piece, tokens)).decode("utf-8", "replace")

    def chat(self, message: str, answer: str = "") -> list[int]:
        """As ``Model`` says."""
        return self._session.prompt(message, answer)

    def generate(self, prompt: Sequence[int], max_tokens: int, stop: Sequence[str] = ()) -> str:
        """As ``Model`` says."""
        import llama_cpp

        from clex_local.session import PromptTooLong

        if len(prompt) + max_tokens > self.context_length:
            raise PromptTooLong(len(prompt) + max_tokens, self.context_length)
        tokens: list[int] = []
        stream = self._llm.generate(list(prompt), temp=0.0)
        try:
            for token in stream:
                if llama_cpp.llama_vocab_is_eog(self._vocab, token):
                    break
                tokens.append(token)
                text = self.detokenize(tokens)
                if (before := cut(text, stop)) is not None:
                    return before
                if len(tokens) == max_tokens:
                    break
        except RuntimeError as error:  # what the bindings make of a failed llama_decode
            raise ClexError(f"{self.path}: the model could not go on: {error}") from error
        finally:
            stream.close()
        return self.detokenize(tokens)

    def negative_log_likelihoods(
        self,
        tokens: npt.NDArray[np.int32],
        *,
        prefill: Prefill = "one-shot",
        chunk: int | None = None,
        last: int | None = None,
        progress: Progress | None = None,
    ) -> npt.NDArray[np.float64]:
        """As ``Model`` says."""
        import llama_cpp

        total, step, first = feeding(self, len(tokens), prefill, chunk, last)
        llm = self._llm
        llm.reset()  # what it had cached is overwritten
        memory: Any = llama_cpp.llama_get_memory(llm.ctx)
        llama_cpp.llama_memory_clear(memory, False)
        parts = [np.empty(0)]
        for start in range(0, total, step):
            end = min(start + step, total)
            self._declare(end)
            for a in range(start, end, llm.n_batch):
                b = min(a + llm.n_batch, end)
                self._decode(tokens[a:b], a, first)
                rows = b - max(a, first)
                if rows > 0:
                    parts.append(likelihoods(self._logits(rows), tokens[b - rows + 1 : b + 1]))
                if progress:
                    progress(b - a)
        return np.concatenate(parts)

    def scaling_factor(self, n_tokens: int) -> float | None:
        """As ``Model`` says."""
        clex = self._llm.clex
        if clex is None:
            return None
        return clex.buckets[-1 if self._policy == "fixed" else clex.bucket_of(min(n_tokens, clex.max_context))]

    def _declare(self, n_tokens: int) -> None:
        from clex_local import llama_clex

        if self._maximum and not llama_clex.seq_reserve(self._llm.ctx, 0, n_tokens):
            raise ClexError(f"{self.path}: its tables do not cover {n_tokens:,} tokens")

    def _decode(self, tokens: npt.NDArray[np.int32], position: int, first: int) -> None:
        """Compute a batch, and the logits of its tokens from position `first` on."""
        import llama_cpp

        batch, count = self._batch, len(tokens)
        batch.n_tokens = count

        def array(pointer: Any) -> npt.NDArray[Any]:
            return np.ctypeslib.as_array(pointer, (count,))

        array(batch.token)[:] = tokens
        array(batch.pos)[:] = np.arange(position, position + count)
        array(batch.logits)[:] = np.arange(position, position + count) >= first
        status = llama_cpp.llama_decode(self._llm.ctx, batch)
        if status:
            raise ClexError(f"{self.path}: cannot compute {count} tokens at {position}: {decode_failure(status)}")

    def _logits(self, rows: int) -> npt.NDArray[np.float32]:
        import llama_cpp

        pointer = ctypes.cast(llama_cpp.llama_get_logits(self._llm.ctx), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (rows, self._llm.n_vocab()))
