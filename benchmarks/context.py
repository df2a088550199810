"""A context driven through llama.cpp's own API, of the patched library or of the one in ``LLAMA_CPP_LIB_PATH``."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from itertools import repeat
from pathlib import Path

import clex_local  # noqa: F401, it chooses the library, before llama_cpp loads one

# isort: split
import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp._logger import set_verbose

from clex_eval.models import likelihoods
from clex_local.runtime import low_level
from clex_local.runtime.low_level import Tokens, context_params

if low_level.PATCHED:
    from clex_local.library import llama_clex

set_verbose(False)


class Model(low_level.Model):
    """A loaded model, not mapped: decode differs by several percent between a file and its copy, by how they lie in the
    page cache.
    """

    def __init__(self, path: str | os.PathLike[str], n_gpu_layers: int = 0) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such model file")
        super().__init__(path, n_gpu_layers, load_mode=llama_cpp.LLAMA_LOAD_MODE_NONE)


class Context(low_level.Context):
    """A context that computes one sequence, and says how long it took; others can keep copies of its cells."""

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
        self.model, self.clock = model, clock
        params = context_params(
            n_ctx,
            n_batch=n_batch,
            n_seq=n_seq,
            unified=n_seq > 1,
            type_k=kv_type,
            type_v=kv_type,
            flash_attn=flash_attn,
            threads=threads,
        )
        super().__init__(model, params)

    def announce(self, n_tokens: int) -> None:
        """Declare how long the sequence will be; nothing without tables."""
        if self.model.factors:
            self.declare(n_tokens)

    def timed(self, tokens: Tokens, position: int, all_logits: bool = False) -> float:
        """Compute one batch and the logits of its last token, or of all; returns the seconds it took."""
        last = position + len(tokens) - 1
        self._fill((token, place, (0,), all_logits or place == last) for place, token in enumerate(tokens, position))
        start = self.clock()
        status = llama_cpp.llama_decode(self.pointer, self._batch)
        llama_cpp.llama_synchronize(self.pointer)
        seconds = self.clock() - start
        if status:
            raise RuntimeError(f"llama.cpp failed to decode {len(tokens)} tokens at {position} (status {status})")
        return seconds

    def prefill(self, tokens: Tokens, position: int = 0) -> float:
        """Compute a prompt in batches, with the table of its whole length; returns the seconds it took."""
        self.announce(position + len(tokens))
        return sum(self.timed(tokens[i : i + self.n_batch], position + i) for i in range(0, len(tokens), self.n_batch))

    def likelihoods(
        self, tokens: npt.NDArray[np.int32], batches: Iterable[int] | None = None
    ) -> npt.NDArray[np.float64]:
        """Negative log-likelihoods of tokens[1:], each given all before it, of one prompt of all the tokens: [n - 1].

        The prompt is computed in batches of the given sizes, or of the context's. The logits of one batch at a time
        are kept, not those of the prompt (24,576 x 49,152 floats are 4.8 GB).
        """
        self.clear()
        self.announce(len(tokens))
        parts, start = [], 0
        for size in batches or repeat(self.n_batch):
            batch = tokens[start : start + size]
            if not len(batch):
                break
            self.timed(batch, start, all_logits=True)
            targets = tokens[start + 1 : start + 1 + len(batch)]
            parts.append(likelihoods(self.all_logits(len(batch))[: len(targets)], targets))
            start += size
        return np.concatenate(parts)

    def forget(self, n_tokens: int) -> None:
        """Forget the tokens from position n_tokens on, and what was declared."""
        self.truncate(n_tokens)
        self.announce(0)

    def repeat(self, n_tokens: int, position: int) -> None:
        """Put shifted copies of the first n_tokens keys and values at a position; takes a context of two sequences."""
        llama_cpp.llama_memory_seq_cp(self.memory, 0, 1, 0, n_tokens)
        state = self.save_sequence(1)
        llama_cpp.llama_memory_seq_rm(self.memory, 1, -1, -1)
        if not self.load_sequence(state, 1):
            raise RuntimeError(f"llama.cpp cannot copy {n_tokens} cached tokens")
        llama_cpp.llama_memory_seq_add(self.memory, 1, 0, -1, position)
        llama_cpp.llama_memory_seq_cp(self.memory, 1, 0, -1, -1)
        llama_cpp.llama_memory_seq_rm(self.memory, 1, -1, -1)

    @property
    def factor(self) -> float | None:
        """Scaling factor t of the last decode; None without tables."""
        return self.model.factors[self.bucket()] if self.model.factors else None

    @property
    def rerotations(self) -> tuple[int, int, float]:
        """What was re-rotated so far: how often, how many cells, in how many seconds."""
        stats = llama_clex.get_stats(self.pointer)
        return stats.n_rerotations, stats.n_cells, stats.t_us / 1e6
