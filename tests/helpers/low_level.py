"""A context driven through llama.cpp's own API, for what ``Llama`` does not reach."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import llama_cpp
import numpy as np
from llama_cpp._logger import set_verbose

import clex_local  # noqa: F401, the library must be chosen before llama_cpp is imported
from clex_local import llama_clex
from clex_local.log import logged

set_verbose(False)

F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, BF16 = 0, 1, 2, 3, 6, 7, 8, 30
WARN, ERROR = 3, 4

# benchmarks/gpu_check.sh runs the tests with all layers on a GPU.
GPU_LAYERS = int(os.environ.get("CLEX_TEST_GPU_LAYERS", "0"))


class Model:
    def __init__(self, path: object) -> None:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = GPU_LAYERS
        self.pointer = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self.pointer, f"{path} was refused"
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.pointer))

    def close(self) -> None:
        llama_cpp.llama_model_free(self.pointer)


def context_params(
    *, n_ctx=1024, n_seq=1, n_ubatch=512, type_k=F32, type_v=F32, flash_attn=0, unified=False
) -> llama_cpp.llama_context_params:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, 512, n_ubatch, n_seq
    params.type_k, params.type_v = type_k, type_v
    params.flash_attn_type, params.kv_unified = flash_attn, unified
    params.n_threads = params.n_threads_batch = 1  # tiny models: threads would only wait for each other
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


class Context:
    """One llama_context; token items are (token, position, sequences, wants logits)."""

    def __init__(self, model: Model, *, n_seq=1, unified=False, **options: int) -> None:
        self.model = model
        self.pointer = llama_cpp.llama_init_from_model(
            model.pointer, context_params(n_seq=n_seq, unified=unified, **options)
        )
        assert self.pointer
        self.memory = llama_cpp.llama_get_memory(self.pointer)
        self.batch = llama_cpp.llama_batch_init(512, 0, n_seq)

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.pointer)

    def try_decode(self, items: Iterable[tuple[int, int, Sequence[int], bool]]) -> int:
        items = list(items)
        self.batch.n_tokens = len(items)
        for i, (token, position, sequences, wanted) in enumerate(items):
            self.batch.token[i] = int(token)
            self.batch.pos[i] = position
            self.batch.n_seq_id[i] = len(sequences)
            for k, sequence in enumerate(sequences):
                self.batch.seq_id[i][k] = sequence
            self.batch.logits[i] = wanted
        return llama_cpp.llama_decode(self.pointer, self.batch)

    def decode(self, items: Iterable[tuple[int, int, Sequence[int], bool]]) -> None:
        assert self.try_decode(items) == 0

    def logits(self, i: int) -> np.ndarray:
        pointer = llama_cpp.llama_get_logits_ith(self.pointer, i)
        return np.ctypeslib.as_array(pointer, shape=(self.model.n_vocab,)).copy()

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

    def bucket(self, sequence: int = 0) -> int:
        return llama_clex.seq_bucket(self.pointer, sequence)

    @property
    def rerotated_cells(self) -> int:
        return llama_clex.get_stats(self.pointer).n_cells

    def last_position(self, sequence: int = 0) -> int:
        return llama_cpp.llama_memory_seq_pos_max(self.memory, sequence)

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

    def save_sequence(self, sequence: int) -> bytes:
        size = llama_cpp.llama_state_seq_get_size(self.pointer, sequence)
        data = (ctypes.c_uint8 * size)()
        return bytes(data[: llama_cpp.llama_state_seq_get_data(self.pointer, data, size, sequence)])

    def load_sequence(self, state: bytes, sequence: int) -> bool:
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        return llama_cpp.llama_state_seq_set_data(self.pointer, data, len(state), sequence) > 0

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
