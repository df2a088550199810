"""A context driven through llama.cpp's own API, of the patched library or of the one in ``LLAMA_CPP_LIB_PATH``."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from pathlib import Path
from types import TracebackType
from typing import Any

import clex_local  # noqa: F401, it chooses the library, before llama_cpp loads one

# isort: split
import llama_cpp
import numpy as np
import numpy.typing as npt
import psutil
from llama_cpp._logger import set_verbose

from clex_eval.models import likelihoods

PATCHED = hasattr(llama_cpp.llama_cpp._lib, "llama_clex_n_buckets")
if PATCHED:
    from clex_local import llama_clex

KV_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2}

set_verbose(False)


def default_threads() -> int:
    """The physical cores."""
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


class Model:
    """A loaded model.

    Attributes:
        factors: scaling factor t of each bucket; empty without tables.
        original_context: tokens covered at t = 1; 0 without tables.
    """

    def __init__(self, path: str | os.PathLike[str], n_gpu_layers: int = 0) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such model file")
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        # Not mapped: decode differs by several percent between a file and its copy, by how they lie in the page cache.
        params.use_mmap = False
        pointer = llama_cpp.llama_model_load_from_file(os.fspath(path).encode(), params)
        if not pointer:
            raise RuntimeError(f"{path}: llama.cpp cannot load it")
        self.pointer = pointer
        self.vocab: Any = llama_cpp.llama_model_get_vocab(pointer)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.original_context: int = llama_clex.original_context(pointer) if PATCHED else 0
        buckets = llama_clex.n_buckets(pointer) if PATCHED else 0
        self.factors = [llama_clex.scaling_factor(pointer, i) for i in range(buckets)]

    @property
    def n_bytes(self) -> int:
        """Size of all weights."""
        return llama_cpp.llama_model_size(self.pointer)

    def tokenize(self, text: str) -> npt.NDArray[np.int32]:
        """Token ids of a text, without special tokens."""
        data = text.encode()
        tokens = (llama_cpp.llama_token * len(data))()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), tokens, len(data), False, False)
        return np.array(tokens[:count], np.int32)

    @property
    def bos(self) -> list[int]:
        """The token that a text begins with, for a model that wants one."""
        wanted = llama_cpp.llama_vocab_get_add_bos(self.vocab)
        return [int(llama_cpp.llama_vocab_bos(self.vocab))] if wanted else []

    def close(self) -> None:
        """Free the model; its contexts must be closed already."""
        llama_cpp.llama_model_free(self.pointer)


class Context:
    """A context that computes one sequence; others can keep copies of its cells."""

    def __init__(
        self,
        model: Model,
        n_ctx: int,
        *,
        kv_type: str = "f16",
        flash_attn: bool = False,
        n_batch: int = 512,
        n_seq: int = 1,
        threads: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_batch, n_batch
        params.n_seq_max, params.kv_unified = n_seq, n_seq > 1
        params.type_k = params.type_v = KV_TYPES[kv_type]
        params.flash_attn_type = int(flash_attn)
        params.n_threads = params.n_threads_batch = threads or default_threads()
        self.model, self.n_batch, self.clock = model, n_batch, clock
        pointer = llama_cpp.llama_init_from_model(model.pointer, params)
        if not pointer:
            raise RuntimeError(f"llama.cpp cannot make a context of {n_ctx} tokens with a {kv_type} cache")
        self.pointer = pointer
        self.memory: Any = llama_cpp.llama_get_memory(pointer)
        self.batch = llama_cpp.llama_batch_init(n_batch, 0, 1)

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.pointer)

    def declare(self, n_tokens: int) -> None:
        """Announce how long the sequence will be; nothing without tables."""
        if self.model.factors and not llama_clex.seq_reserve(self.pointer, 0, n_tokens):
            raise ValueError(f"the tables do not cover {n_tokens:,} tokens")

    def decode(self, tokens: Sequence[int] | npt.NDArray[np.int32], position: int, all_logits: bool = False) -> float:
        """Compute one batch and the logits of its last token, or of all; returns the seconds it took."""
        last = len(tokens) - 1
        self.batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            self.batch.token[i] = int(token)
            self.batch.pos[i] = position + i
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = 0
            self.batch.logits[i] = all_logits or i == last
        start = self.clock()
        status = llama_cpp.llama_decode(self.pointer, self.batch)
        llama_cpp.llama_synchronize(self.pointer)
        seconds = self.clock() - start
        if status:
            raise RuntimeError(f"llama.cpp failed to decode {len(tokens)} tokens at {position} (status {status})")
        return seconds

    def prefill(self, tokens: Sequence[int] | npt.NDArray[np.int32], position: int = 0) -> float:
        """Compute a prompt in batches, with the table of its whole length; returns the seconds it took."""
        self.declare(position + len(tokens))
        return sum(self.decode(tokens[i : i + self.n_batch], position + i) for i in range(0, len(tokens), self.n_batch))

    def logits(self, rows: int) -> npt.NDArray[np.float32]:
        """Logits of the last batch, [rows, n_vocab]: a view that the next decode overwrites."""
        pointer = llama_cpp.llama_get_logits(self.pointer)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (rows, self.model.n_vocab))

    def likelihoods(
        self, tokens: npt.NDArray[np.int32], batches: Iterable[int] | None = None
    ) -> npt.NDArray[np.float64]:
        """Negative log-likelihoods of tokens[1:], each given all before it, of one prompt of all the tokens: [n - 1].

        The prompt is computed in batches of the given sizes, or of the context's. The logits of one batch at a time
        are kept, not those of the prompt (24,576 x 49,152 floats are 4.8 GB).
        """
        self.clear()
        self.declare(len(tokens))
        parts, start = [], 0
        for size in batches or repeat(self.n_batch):
            batch = tokens[start : start + size]
            if not len(batch):
                break
            self.decode(batch, start, all_logits=True)
            targets = tokens[start + 1 : start + 1 + len(batch)]
            parts.append(likelihoods(self.logits(len(batch))[: len(targets)], targets))
            start += size
        return np.concatenate(parts)

    def truncate(self, n_tokens: int) -> None:
        """Forget the tokens from position n_tokens on, and what was declared."""
        llama_cpp.llama_memory_seq_rm(self.memory, 0, n_tokens, -1)
        self.declare(0)

    def repeat(self, n_tokens: int, position: int) -> None:
        """Put shifted copies of the first n_tokens keys and values at a position; takes a context of two sequences."""
        sequence = llama_cpp.llama_seq_id
        llama_cpp.llama_memory_seq_cp(self.memory, 0, 1, 0, n_tokens)
        size = llama_cpp.llama_state_seq_get_size(self.pointer, sequence(1))
        state = (ctypes.c_uint8 * size)()
        llama_cpp.llama_state_seq_get_data(self.pointer, state, size, sequence(1))
        llama_cpp.llama_memory_seq_rm(self.memory, 1, -1, -1)
        if not llama_cpp.llama_state_seq_set_data(self.pointer, state, size, sequence(1)):
            raise RuntimeError(f"llama.cpp cannot copy {n_tokens} cached tokens")
        llama_cpp.llama_memory_seq_add(self.memory, 1, 0, -1, position)
        llama_cpp.llama_memory_seq_cp(self.memory, 1, 0, -1, -1)
        llama_cpp.llama_memory_seq_rm(self.memory, 1, -1, -1)

    @property
    def n_bytes(self) -> int:
        """Size of the keys and values of all tokens, and some hundred bytes."""
        return llama_cpp.llama_state_seq_get_size(self.pointer, llama_cpp.llama_seq_id(0))

    def clear(self) -> None:
        """Forget everything."""
        llama_cpp.llama_memory_clear(self.memory, True)

    @property
    def factor(self) -> float | None:
        """Scaling factor t of the last decode; None without tables."""
        return self.model.factors[llama_clex.seq_bucket(self.pointer, 0)] if self.model.factors else None

    @property
    def rerotations(self) -> tuple[int, int, float]:
        """What was re-rotated so far: how often, how many cells, in how many seconds."""
        stats = llama_clex.get_stats(self.pointer)
        return stats.n_rerotations, stats.n_cells, stats.t_us / 1e6
