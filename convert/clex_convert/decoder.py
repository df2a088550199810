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

from clex_local.errors import ClexError
from clex_local.library.decoding import NOT_FINITE, DecodeError, decode_failure
from clex_local.runtime.low_level import Context, Model, context_params

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


class NotFiniteLogits(SystemExit):
    """The model computes values that are no numbers."""


class Decoder:
    """One model of a file and one context; the process ends soon, so neither is freed.

    Attributes:
        model: ``llama_model *``.
        n_vocab: tokens in its vocabulary.
        bos: the token that a text begins with, for a model that wants one.
        original_context: tokens that it covers without scaling.
        n_ctx, n_batch: tokens of a sequence and of a batch, no more than that.
    """

    def __init__(self, path: Path, n_ctx: int, *, n_batch: int, callback: Any = None, user_data: Any = None) -> None:
        """Loads the model and makes a context of at most what its tables, or else its training, cover.

        Args:
            path: GGUF file.
            n_ctx: tokens of a sequence.
            n_batch: tokens computed at once.
            callback: ``llama_context_params.cb_eval``.
            user_data: ``llama_context_params.cb_eval_user_data``.
        """
        if os.path.exists("/proc/self/statm"):
            os.environ["LLAMA_CLEX_NO_PREFETCH"] = "1"
            _keep_out(path)
        try:
            # Another layout of the weights would take as much memory as they do, for the sake of one pass or a few.
            self._model = Model(path, use_extra_bufts=False)
            self.original_context = self._model.original_context or self._model.trained_context
            self.n_ctx = min(n_ctx, self.original_context)
            self.n_batch = min(n_batch, self.n_ctx)
            params = context_params(self.n_ctx, n_batch=self.n_batch)
            if callback is not None:
                params.cb_eval = ctypes.cast(callback, llama_cpp.ggml_backend_sched_eval_callback)
                params.cb_eval_user_data = user_data
            self._context = Context(self._model, params)
        except ClexError:  # the log says why
            raise SystemExit(1) from None
        self.model, self.n_vocab, self.bos = self._model.pointer, self._model.n_vocab, self._model.bos

    def tokenize(self, text: bytes) -> npt.NDArray[np.int32]:
        """Token ids of a text, with the token that a text begins with where the model wants one."""
        try:
            return self._model.tokenize(text, bos=True)
        except ClexError as error:
            raise SystemExit(str(error)) from None

    def clear(self) -> None:
        """Forgets the sequence."""
        self._context.clear()

    def decode(self, tokens: npt.NDArray[np.int32], position: int) -> npt.NDArray[np.float32]:
        """Logits of one batch, [tokens, n_vocab]: a view that the next batch overwrites.

        Raises:
            NotFiniteLogits: those of the last token are no numbers; the others are not looked at.
        """
        try:
            self._context.decode_sequence(tokens, position)
        except DecodeError as error:
            stop = NotFiniteLogits if error.status == NOT_FINITE else SystemExit
            raise stop(f"cannot compute {len(tokens)} tokens: {decode_failure(error.status)}") from None
        return self._context.all_logits(len(tokens))
