"""A model and one sequence, for the children that compute with the file at hand."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path
from typing import Any

import clex_local  # noqa: F401, it chooses the library, before llama_cpp loads one

# isort: split
import llama_cpp
import numpy as np
import numpy.typing as npt

from clex_local import llama_clex
from clex_local.decoding import NOT_FINITE, decode_failure
from clex_local.memory import default_threads

_RESIDENT = 256 << 20  # bytes of the file that may be in this process' memory, or not much more
_MADV_DONTNEED = 4  # Linux


def _keep_out(path: Path) -> None:
    """Gives pages of the mapped file back as they pile up: each is used once, and may be larger than the memory."""
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    inode, page = str(path.stat().st_ino), os.sysconf("SC_PAGESIZE")

    def resident_file_pages() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[2])

    def watch() -> None:
        start = resident_file_pages()
        while True:
            time.sleep(0.01)
            if (resident_file_pages() - start) * page < _RESIDENT:
                continue
            with open("/proc/self/maps") as file:
                maps = [line.split() for line in file]
            for first, last in (line[0].split("-") for line in maps if line[4] == inode):
                libc.madvise(int(first, 16), int(last, 16) - int(first, 16), _MADV_DONTNEED)

    threading.Thread(target=watch, daemon=True).start()


class NotFinite(SystemExit):
    """The model computes values that are no numbers."""


class Decoder:
    """One model of a file and one context; the process ends soon, so neither is freed."""

    def __init__(self, path: Path, n_ctx: int, *, n_batch: int, callback: Any = None, user_data: Any = None) -> None:
        """Loads the model and makes a context of at most what its tables, or else its training, cover.

        Args:
            path: GGUF file.
            n_ctx: tokens of a sequence.
            n_batch: tokens computed at once.
            callback: ``llama_context_params.cb_eval``.
            user_data: ``llama_context_params.cb_eval_user_data``.
        """
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        if os.path.exists("/proc/self/statm"):
            os.environ["LLAMA_CLEX_NO_PREFETCH"] = "1"
            _keep_out(path)
        # Another layout of the weights would take as much memory as they do, for the sake of one pass or a few.
        parameters.use_extra_bufts = False
        self.model: Any = llama_cpp.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self.model:
            raise SystemExit(1)
        self.vocabulary: Any = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocabulary)
        self.original_context = llama_clex.original_context(self.model) or llama_cpp.llama_model_n_ctx_train(self.model)
        self.n_ctx = min(n_ctx, self.original_context)
        self.n_batch = min(n_batch, self.n_ctx)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = self.n_ctx, self.n_batch, self.n_batch
        options.n_threads = options.n_threads_batch = default_threads()
        if callback is not None:
            options.cb_eval = ctypes.cast(callback, llama_cpp.ggml_backend_sched_eval_callback)
            options.cb_eval_user_data = user_data
        self.context: Any = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise SystemExit(1)
        self._batch = llama_cpp.llama_batch_init(self.n_batch, 0, 1)

    def tokenize(self, text: bytes) -> npt.NDArray[np.int32]:
        """Token ids of a text, with the token that a text begins with where the model wants one."""
        tokens = (llama_cpp.llama_token * (len(text) + 2))()
        count = llama_cpp.llama_tokenize(self.vocabulary, text, len(text), tokens, len(tokens), True, False)
        if count <= 0:
            raise SystemExit("llama.cpp cannot tokenize with this vocabulary")
        return np.array(tokens[:count], np.int32)

    @property
    def bos(self) -> int | None:
        """The token that a text begins with, for a model that wants one."""
        wanted = llama_cpp.llama_vocab_get_add_bos(self.vocabulary)
        return int(llama_cpp.llama_vocab_bos(self.vocabulary)) if wanted else None

    def clear(self) -> None:
        """Forgets the sequence."""
        memory: Any = llama_cpp.llama_get_memory(self.context)
        llama_cpp.llama_memory_clear(memory, True)

    def decode(self, tokens: npt.NDArray[np.int32], position: int) -> npt.NDArray[np.float32]:
        """Logits of one batch, [tokens, n_vocab]: a view that the next batch overwrites.

        Raises:
            NotFinite: those of the last token are no numbers; the others are not looked at.
        """
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = int(token)
            batch.pos[i] = position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = True
        status = llama_cpp.llama_decode(self.context, batch)
        if status:
            stop = NotFinite if status == NOT_FINITE else SystemExit
            raise stop(f"cannot compute {len(tokens)} tokens: {decode_failure(status)}")
        logits = ctypes.cast(llama_cpp.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(logits, (len(tokens), self.n_vocab))
