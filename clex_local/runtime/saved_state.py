"""What llama-cpp-python saves beside llama.cpp's own state: a checksum over it, and what must hold to take it."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from llama_cpp.llama import LlamaState


def checksum(state: LlamaState, scores: bool) -> int:
    """CRC-32 of the tokens of a state, of what they were computed with, and of its logits if `scores`."""
    parts = [np.array([state.n_tokens, state.llama_state_size, state.seed]), state.input_ids[: state.n_tokens]]
    parts.append(getattr(state, "clex_computed", np.array([])))
    if scores:
        parts.append(state.scores)
    value = 0
    for part in parts:
        value = zlib.crc32(np.ascontiguousarray(part).data, value) if part.size else value
    return value


def seal(state: LlamaState, scores: bool) -> None:
    """Let `fault` tell later whether the state is as it is now."""
    state.clex_checksum = (checksum(state, scores), scores)  # pyright: ignore[reportAttributeAccessIssue]


def is_sealed(state: LlamaState) -> bool:
    """Whether the state has a checksum; those that were saved by another ``Llama`` have none."""
    return getattr(state, "clex_checksum", None) is not None


def fault(state: LlamaState, n_vocab: int) -> str | None:
    """Why a state cannot be what ``save_state`` made with this vocabulary; None where nothing is wrong with it.

    The state may be any object. llama.cpp looks at ``llama_state`` itself.
    """
    if wrong := _wrong_kind(state):
        return wrong
    ids, scores, n_tokens = state.input_ids, state.scores, state.n_tokens
    size = memoryview(state.llama_state).nbytes
    if size != state.llama_state_size:
        return f"it has {size:,} of {state.llama_state_size:,} bytes"
    if not 0 <= n_tokens <= len(ids):
        return f"it has {len(ids):,} of {n_tokens:,} tokens"
    if scores.shape[1] != n_vocab:
        return f"its logits have the shape {list(scores.shape)}, the vocabulary has {n_vocab:,} tokens"
    if len(getattr(state, "clex_computed", ids[:n_tokens])) != n_tokens:
        return "it counts its tokens twice and differently"
    if is_sealed(state):
        value, with_scores = state.clex_checksum  # pyright: ignore[reportAttributeAccessIssue]
        if value != checksum(state, with_scores):
            return "it is damaged: its checksum is another one"
    strange = ids[:n_tokens][(ids[:n_tokens] < 0) | (ids[:n_tokens] >= n_vocab)]
    if strange.size:
        return f"it has a token {strange[0]}, the vocabulary has {n_vocab:,}"
    return None


def _wrong_kind(state: Any) -> str | None:
    for name in ("n_tokens", "llama_state_size", "seed"):
        value = getattr(state, name, None)
        if not isinstance(value, (int, np.integer)) or not -(2**63) <= value < 2**63:
            return f"its {name} is no whole number"
    data = getattr(state, "llama_state", None)
    if not isinstance(data, (bytes, bytearray, memoryview)) or not memoryview(data).c_contiguous:
        return "its llama_state is no bytes"
    arrays = {"input_ids": (1, np.integer), "scores": (2, np.floating)}
    if hasattr(state, "clex_computed"):
        arrays["clex_computed"] = (1, np.integer)
    for name, (dimensions, kind) in arrays.items():
        value = getattr(state, name, None)
        if not isinstance(value, np.ndarray) or value.ndim != dimensions or not np.issubdtype(value.dtype, kind):
            kinds = "whole numbers" if kind is np.integer else "numbers"
            return f"its {name} is no array of {kinds} with {dimensions} dimension{'s' if dimensions > 1 else ''}"
    sealed = getattr(state, "clex_checksum", None)
    if sealed is not None and not (isinstance(sealed, tuple) and len(sealed) == 2):
        return "its checksum is none"
    return None
