"""Embeddings of texts: each as if it were alone, whatever its length and whatever is computed beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import llama_cpp
import numpy as np
import numpy.typing as npt

from clex_local.errors import ClexError
from clex_local.library import llama_clex
from clex_local.library.decoding import NOT_FINITE, DecodeError, decode_errors
from clex_local.library.interrupt import kept_until_return
from clex_local.model_file.tables import ContextError

_NONE, _MEAN, _CLS = (
    llama_cpp.LLAMA_POOLING_TYPE_NONE,
    llama_cpp.LLAMA_POOLING_TYPE_MEAN,
    llama_cpp.LLAMA_POOLING_TYPE_CLS,
)
_RANK = llama_cpp.LLAMA_POOLING_TYPE_RANK


class EmbeddingError(ClexError, RuntimeError, ValueError):
    """Texts that cannot be embedded; llama-cpp-python raises one or the other of its bases."""


def embeddings(
    llm: llama_cpp.Llama, texts: Sequence[str], truncate: bool = False
) -> tuple[list[npt.NDArray[np.float32]], int]:
    """Embed texts, and empty the cache.

    llama-cpp-python reads the rows of every text but the first at wrong places, cuts texts at the size of a batch, and
    writes in front of the batch for a text without tokens.

    Returns:
        Of each text its tokens' embeddings [tokens, n_embd] without pooling, otherwise one row: [n_embd], or the scores
        [n_outputs] of a model that ranks. And the number of tokens in all.

    Raises:
        ContextError: a text is longer than the context, unless `truncate` cuts it there.
        DecodeError: there is not enough memory, or the model computes values that are no numbers.
        EmbeddingError: a text has no tokens, or the model was not loaded for embeddings.
    """
    if not llm.context_params.embeddings:
        raise EmbeddingError(f"{llm.model_path}: loaded without embedding=True, which embeddings need")
    sequences = _tokenized(llm, texts, truncate)
    rows: list[npt.NDArray[np.float32]] = []
    try:
        with decode_errors(llm.model_path):
            for group in _groups(sequences, llm.context_params.n_ubatch, llm.context_params.n_seq_max):
                with kept_until_return():  # C may wait for a worker
                    rows += _together(llm, group) if len(group) > 1 else [_alone(llm, group[0])]
    finally:
        llm._ctx.kv_cache_clear()
        llm.reset()
    # llama_decode looks at the last only, and at none of an encoder.
    if not all(np.isfinite(row).all() for row in rows):
        raise DecodeError(llm.model_path, NOT_FINITE)
    return rows, sum(map(len, sequences))


def _tokenized(llm: llama_cpp.Llama, texts: Sequence[str], truncate: bool) -> list[list[int]]:
    limit, place = _limit(llm)
    sequences = [llm.tokenize(_encoded(llm, text)) for text in texts]
    for i, tokens in enumerate(sequences):
        if not tokens:
            raise EmbeddingError(f"{llm.model_path}: text {i + 1} of {len(texts)} has no tokens to embed")
        if len(tokens) > limit and not truncate:
            raise ContextError(
                f"text {i + 1} of {len(texts)} has {len(tokens):,} tokens, {place} {limit:,}; truncate=True cuts it"
            )
    return [tokens[:limit] for tokens in sequences]


def _encoded(llm: llama_cpp.Llama, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise EmbeddingError(f"{llm.model_path}: a text is not valid Unicode ({error.reason})") from error


def _limit(llm: llama_cpp.Llama) -> tuple[int, str]:
    """The longest text, in tokens, and what holds it."""
    if llama_clex.causal(llm.ctx):
        return llm._n_ctx, "the context (n_ctx) holds"
    # All tokens see each other, so all of a text is computed at once; positions beyond the training may have no row.
    n_ubatch, trained = llm.context_params.n_ubatch, llm._model.n_ctx_train()
    if trained and trained < min(n_ubatch, llm._n_ctx):
        return trained, "the model was trained for"
    return min(n_ubatch, llm._n_ctx), "a batch (n_ctx, n_batch and n_ubatch) holds"


def _groups(sequences: list[list[int]], n_ubatch: int, n_seq_max: int) -> Iterator[list[list[int]]]:
    """Texts that fit in a ubatch together: llama.cpp pools what one ubatch has of a text."""
    group: list[list[int]] = []
    for tokens in sequences:
        if group and (len(group) == n_seq_max or sum(map(len, group)) + len(tokens) > n_ubatch):
            yield group
            group = []
        group.append(tokens)
    if group:
        yield group


def _together(llm: llama_cpp.Llama, group: list[list[int]]) -> list[npt.NDArray[np.float32]]:
    _begin(llm, [len(tokens) for tokens in group])
    for i, tokens in enumerate(group):
        _add(llm, tokens, 0, i)
    llm._ctx.decode(llm._batch)
    if llm.pooling_type() == _NONE:
        ends = np.cumsum([len(tokens) for tokens in group])
        return np.split(_token_rows(llm, int(ends[-1])), ends[:-1])
    return [_pooled(llm, i) for i in range(len(group))]


def _alone(llm: llama_cpp.Llama, tokens: list[int]) -> npt.NDArray[np.float32]:
    """One text, in several ubatches where it is longer than one, and pooled over all of them."""
    _begin(llm, [len(tokens)])
    pooling, size = llm.pooling_type(), llm.context_params.n_ubatch
    parts = []
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        llm._batch.reset()
        _add(llm, part, start, 0)
        llm._ctx.decode(llm._batch)
        parts.append(_token_rows(llm, len(part)) if pooling == _NONE else _pooled(llm, 0))
        if pooling == _CLS:  # the first token's, which sees no other
            break
    if pooling == _NONE:
        return np.concatenate(parts)
    if pooling == _MEAN:
        weights = [min(size, len(tokens) - start) for start in range(0, len(tokens), size)]
        return np.average(parts, axis=0, weights=weights).astype(np.float32)
    return parts[-1]


def _begin(llm: llama_cpp.Llama, lengths: list[int]) -> None:
    """An empty cache, and the length of each sequence declared."""
    llm._batch.reset()
    llm._ctx.kv_cache_clear()
    if llama_clex.n_buckets(llm.model) > 0:
        for i, length in enumerate(lengths):
            llama_clex.seq_reserve(llm.ctx, i, length)


def _add(llm: llama_cpp.Llama, tokens: list[int], position: int, sequence: int) -> None:
    # Every token is an output whatever the pooling: llama.cpp wants it so, and warns otherwise.
    batch = llm._batch.batch
    for i, token in enumerate(tokens, batch.n_tokens):
        batch.token[i] = token
        batch.pos[i] = position + i - batch.n_tokens
        batch.seq_id[i][0] = sequence
        batch.n_seq_id[i] = 1
        batch.logits[i] = True
    batch.n_tokens += len(tokens)


def _token_rows(llm: llama_cpp.Llama, count: int) -> npt.NDArray[np.float32]:
    pointer = llama_cpp.llama_get_embeddings(llm.ctx)
    return np.ctypeslib.as_array(pointer, shape=(count, llama_cpp.llama_model_n_embd_out(llm.model))).copy()


def _pooled(llm: llama_cpp.Llama, sequence: int) -> npt.NDArray[np.float32]:
    width = llama_cpp.llama_model_n_embd_out(llm.model)
    if llm.pooling_type() == _RANK:
        width = llama_cpp.llama_model_n_cls_out(llm.model)
    pointer = llama_cpp.llama_get_embeddings_seq(llm.ctx, sequence)
    if not pointer:
        raise EmbeddingError(f"{llm.model_path}: llama.cpp gave no embedding")
    return np.ctypeslib.as_array(pointer, shape=(width,)).copy()
