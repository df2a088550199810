"""Saved states: llama.cpp's own part, what llama-cpp-python keeps beside it, and a checksum over both.

What must hold for a state to be taken back is looked at before anything of it is.
"""

from __future__ import annotations

import ctypes
import zlib
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp.llama import LlamaState

from clex_local.errors import ClexError
from clex_local.library.interrupt import kept_until_return
from clex_local.library.log import ERROR, logged
from clex_local.runtime.clex_state import too_long
from clex_local.runtime.in_turn import TakesTurns, in_turn, reading


class StateError(ClexError, RuntimeError):
    """A saved state of another model, other tables or another kind of cache; a RuntimeError too, as llama-cpp-python
    raises.
    """


class SavedStates(TakesTurns):
    """``save_state`` and ``load_state`` of llama-cpp-python's ``Llama``, which takes any state for one of its own."""

    _computed: npt.NDArray[np.int64]  # of each cached token, what `TableChoice.of` was when it was computed

    @reading
    def save_state(self) -> LlamaState:
        """As llama-cpp-python's; for ``load_state`` of the same file and the same kind of cache.

        Raises:
            StateError: llama.cpp cannot read what is cached, as where a worker is gone.
        """
        with kept_until_return(), logged(ERROR, forward=self.verbose) as errors:
            state = super().save_state()
        if not state.llama_state_size:  # of which the bindings make an empty state
            reason = errors[-1].split("error saving state: ")[-1] if errors else "llama.cpp did not write it"
            raise StateError(f"{self.model_path}: cannot save the state: {reason}")
        state.clex_computed = self._computed[: self.n_tokens].copy()  # pyright: ignore[reportAttributeAccessIssue]
        seal(state, scores=self._logits_all)
        return state

    @in_turn
    def load_state(self, state: LlamaState) -> None:
        """Take back a state; one that is refused leaves what was there.

        Raises:
            ContextError: the state has more tokens than the context holds.
            StateError: the state is of another model, of other tables, of another type of cache, or damaged. Of models
                that keep more than a KV cache (recurrent ones) a damaged one may leave an empty cache.
        """
        refused = f"{self.model_path}: cannot load the saved state: "
        if wrong := fault(state, self._n_vocab):
            raise StateError(refused + wrong)
        if state.n_tokens > self._n_ctx:
            raise too_long(state.n_tokens, self._n_ctx)
        data = (ctypes.c_uint8 * state.llama_state_size).from_buffer_copy(state.llama_state)
        with kept_until_return(), logged(ERROR, forward=self.verbose) as errors:
            # Only llama.cpp knows how many tokens are in its part of a state: where no checksum holds the parts
            # together, there must be a way back.
            before = None if is_sealed(state) else self._native_state()
            size = llama_cpp.llama_state_set_data(self.ctx, data, state.llama_state_size)
            cached = self._cached()
            if size != state.llama_state_size:
                reason = errors[-1].split("error loading state: ")[-1] if errors else "llama.cpp did not take it"
                if cached < self.n_tokens:
                    self.reset()
                raise StateError(refused + reason)
            if before is not None and cached < state.n_tokens:
                llama_cpp.llama_state_set_data(self.ctx, before, len(before))
                raise StateError(f"{refused}it counts {state.n_tokens:,} tokens, llama.cpp's part of it has {cached:,}")
            self._adopt(state)

    def _adopt(self, state: LlamaState) -> None:
        """Take what Python keeps of a state; llama.cpp has its part."""
        rows = min(state.n_tokens, len(state.scores), len(self.scores))
        self.scores[:rows] = state.scores[:rows]
        self.input_ids[: state.n_tokens] = state.input_ids[: state.n_tokens]
        self.n_tokens = state.n_tokens
        self._requires_eval = True
        self._seed = state.seed
        self._computed[: self.n_tokens] = getattr(state, "clex_computed", -1)

    def _cached(self) -> int:
        """Tokens of the sequence that llama.cpp has; 0 for a model that keeps none."""
        memory = llama_cpp.llama_get_memory(self.ctx)
        return 0 if memory is None else llama_cpp.llama_memory_seq_pos_max(memory, 0) + 1

    def _native_state(self) -> ctypes.Array[ctypes.c_uint8]:
        """llama.cpp's part of a state."""
        data = (ctypes.c_uint8 * llama_cpp.llama_state_get_size(self.ctx))()
        size = llama_cpp.llama_state_get_data(self.ctx, data, len(data))
        return (ctypes.c_uint8 * size).from_buffer(data)


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
