"""What llama-cpp-python saves beside llama.cpp's own state: a checksum over it, and what must hold to take it."""

from __future__ import annotations

import zlib

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


def fault(state: LlamaState, n_vocab: int) -> str | None:
    """Why a state cannot be what ``save_state`` made with this vocabulary; None where nothing is wrong with it.

    llama.cpp looks at ``llama_state`` itself. States that were saved by another ``Llama`` have no checksum.
    """
    ids, scores, n_tokens = state.input_ids, state.scores, state.n_tokens
    if len(state.llama_state) != state.llama_state_size:
        return f"it has {len(state.llama_state):,} of {state.llama_state_size:,} bytes"
    if not 0 <= n_tokens <= len(ids):
        return f"it has {len(ids):,} of {n_tokens:,} tokens"
    if scores.ndim != 2 or scores.shape[1] != n_vocab:
        return f"its logits have the shape {list(scores.shape)}, the vocabulary has {n_vocab:,} tokens"
    if len(getattr(state, "clex_computed", ids[:n_tokens])) != n_tokens:
        return "it counts its tokens twice and differently"
    sealed = getattr(state, "clex_checksum", None)
    if sealed is not None and sealed[0] != checksum(state, sealed[1]):
        return "it is damaged: its checksum is another one"
    return None
