"""A context driven through llama.cpp's own API, with what tests ask of it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp._logger import set_verbose

import clex_local  # noqa: F401, the library must be chosen before llama_cpp is imported
from clex_local.library import llama_clex
from clex_local.library.log import logged
from clex_local.runtime import low_level
from helpers.device import model_params

set_verbose(False)

F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, BF16 = 0, 1, 2, 3, 6, 7, 8, 30
WARN, ERROR = 3, 4


class Model(low_level.Model):
    """A model where the tests compute, or where fields of ``llama_model_params`` say."""

    def __init__(self, path: object, **params: Any) -> None:
        super().__init__(str(path), **(params or model_params()))


def context_params(
    *, n_ctx=1024, n_seq=1, n_ubatch=512, type_k=F32, type_v=F32, flash_attn=0, unified=False, swa_full=True
) -> llama_cpp.llama_context_params:
    params = low_level.context_params(
        n_ctx,
        n_ubatch=n_ubatch,
        n_seq=n_seq,
        unified=unified,
        type_k=type_k,
        type_v=type_v,
        flash_attn=bool(flash_attn),
        threads=1,  # tiny models: threads would only wait for each other
    )
    params.swa_full = swa_full
    return params


def refusal(model: Model, **options: int) -> str | None:
    """Why the library makes no context of these options; None if it makes one."""
    with logged(ERROR) as lines:
        pointer = llama_cpp.llama_init_from_model(model.pointer, context_params(**options))
    if pointer:
        llama_cpp.llama_free(pointer)
        return None
    assert lines, "refused without a message"
    return "\n".join(lines)


class Context(low_level.Context):
    """One llama_context; token items are (token, position, sequences, wants logits)."""

    def __init__(self, model: Model, **options: int) -> None:
        self.model = model
        super().__init__(model, context_params(**options))

    def feed(self, tokens: Sequence[int], position: int, sequence: int = 0) -> np.ndarray:
        """Decode tokens of one sequence in one batch; the logits of the last."""
        last = len(tokens) - 1
        self.decode((t, position + i, [sequence], i == last) for i, t in enumerate(tokens))
        return self.logits(last)

    def steps(self, tokens: Sequence[int], prefill: int, count: int, sequence: int = 0) -> np.ndarray:
        """Prefill, then feed one token at a time: logits [count + 1, n_vocab]."""
        out = [self.feed(tokens[:prefill], 0, sequence)]
        out += [self.feed(tokens[i : i + 1], i, sequence) for i in range(prefill, prefill + count)]
        return np.stack(out)

    @property
    def rerotated_cells(self) -> int:
        return llama_clex.get_stats(self.pointer).n_cells

    @contextmanager
    def abort_at(self, count: int) -> Iterator[Callable[[], int]]:
        """Answer the count-th question whether to abort with yes; gives how many were asked."""
        asked = 0

        def answer(user_data):
            nonlocal asked
            asked += 1
            return asked == count

        callback = llama_cpp.ggml_abort_callback(answer)
        llama_cpp.llama_set_abort_callback(self.pointer, callback, None)
        try:
            yield lambda: asked
        finally:
            llama_cpp.llama_set_abort_callback(self.pointer, llama_cpp.ggml_abort_callback(), None)

    def save(self) -> bytes:
        size = llama_cpp.llama_state_get_size(self.pointer)
        data = (ctypes.c_uint8 * size)()
        return bytes(data[: llama_cpp.llama_state_get_data(self.pointer, data, size)])

    def load(self, state: bytes) -> bool:
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        return llama_cpp.llama_state_set_data(self.pointer, data, len(state)) == len(state) > 0

    def save_file(self, path: object, tokens: Sequence[int], sequence: int | None = None) -> bool:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        name = str(path).encode()
        if sequence is None:
            return llama_cpp.llama_state_save_file(self.pointer, name, array, len(tokens))
        return llama_cpp.llama_state_seq_save_file(self.pointer, name, sequence, array, len(tokens)) > 0

    def load_file(self, path: object, sequence: int | None = None) -> list[int] | None:
        """The tokens of the file; None if it was refused."""
        array, count = (llama_cpp.llama_token * 4096)(), ctypes.c_size_t()
        name = str(path).encode()
        if sequence is None:
            done = llama_cpp.llama_state_load_file(self.pointer, name, array, 4096, ctypes.byref(count))
        else:
            done = llama_cpp.llama_state_seq_load_file(self.pointer, name, sequence, array, 4096, ctypes.byref(count))
        return list(array[: count.value]) if done else None
