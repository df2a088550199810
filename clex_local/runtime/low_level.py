"""llama.cpp's own API as objects, for what ``Llama`` does not reach: a model, a context, its batch and its sequences.

It works with a library that is not patched too, which benchmarks compare with; there are no tables then.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from clex_local.errors import ClexError, ModelError
from clex_local.library.decoding import DecodeError
from clex_local.machine import default_threads
from clex_local.model_file.kv_types import KV_TYPES

if TYPE_CHECKING:
    from typing_extensions import Self

PATCHED = hasattr(llama_cpp.llama_cpp._lib, "llama_clex_n_buckets")
if PATCHED:
    from clex_local.library import llama_clex

Tokens = Sequence[int] | npt.NDArray[np.int32]
Item = tuple[int, int, Sequence[int], bool]  # of a batch: token, position, sequences, whether its logits are wanted


class Model:
    """A loaded model; close it after its contexts.

    Args:
        path: a GGUF file.
        n_gpu_layers: layers computed on a GPU, -1 for all.
        params: other fields of ``llama_model_params``.

    Attributes:
        pointer: ``llama_model *``.
        vocab: ``llama_vocab *``.
        n_vocab: tokens in the vocabulary.
        original_context: tokens covered at t = 1; 0 without tables.
        factors: scaling factor t of each bucket; empty without tables.

    Raises:
        ModelError: llama.cpp refuses the file; its log says why.
    """

    def __init__(self, path: str | os.PathLike[str], n_gpu_layers: int = 0, **params: Any) -> None:
        self.path = path
        wanted = llama_cpp.llama_model_default_params()
        for name, value in {"n_gpu_layers": n_gpu_layers, **params}.items():
            setattr(wanted, name, value)
        self.pointer: Any = llama_cpp.llama_model_load_from_file(os.fsencode(path), wanted)
        if not self.pointer:
            raise ModelError(f"{path}: llama.cpp cannot load it")
        self.vocab: Any = llama_cpp.llama_model_get_vocab(self.pointer)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.original_context: int = llama_clex.original_context(self.pointer) if PATCHED else 0
        buckets = llama_clex.n_buckets(self.pointer) if PATCHED else 0
        self.factors = [llama_clex.scaling_factor(self.pointer, i) for i in range(buckets)]

    @property
    def trained_context(self) -> int:
        """Tokens that the file says it was trained for."""
        return llama_cpp.llama_model_n_ctx_train(self.pointer)

    @property
    def n_bytes(self) -> int:
        """Size of all weights."""
        return llama_cpp.llama_model_size(self.pointer)

    @property
    def bos(self) -> int | None:
        """The token that a text begins with, for a model that wants one."""
        wanted = llama_cpp.llama_vocab_get_add_bos(self.vocab)
        return int(llama_cpp.llama_vocab_bos(self.vocab)) if wanted else None

    def tokenize(self, text: bytes, *, bos: bool = False) -> npt.NDArray[np.int32]:
        """Token ids of a text, with ``bos`` after that token where the model wants it; control tokens are text.

        Raises:
            ModelError: the vocabulary encodes no text.
        """
        tokens = (llama_cpp.llama_token * (len(text) + 2))()
        count = llama_cpp.llama_tokenize(self.vocab, text, len(text), tokens, len(tokens), bos, False)
        if count < 0 or (text and not count):
            raise ModelError(f"{self.path}: llama.cpp cannot tokenize with this vocabulary")
        return np.array(tokens[:count], np.int32)

    def close(self) -> None:
        """Free it."""
        llama_cpp.llama_model_free(self.pointer)


def context_params(
    n_ctx: int,
    *,
    n_batch: int = 512,
    n_ubatch: int | None = None,
    n_seq: int = 1,
    unified: bool = False,
    type_k: int | str = "f16",
    type_v: int | str = "f16",
    flash_attn: bool | None = None,
    threads: int | None = None,
) -> llama_cpp.llama_context_params:
    """Parameters of a context.

    Args:
        n_ctx: tokens it holds.
        n_batch: tokens that are given to it at once.
        n_ubatch: tokens that are computed at once; None: all of a batch.
        n_seq: sequences it holds.
        unified: they share all its cells.
        type_k, type_v: types of the cache: a name from ``kv_types.KV_TYPES`` or a ``ggml_type``.
        flash_attn: None lets llama.cpp decide.
        threads: None takes the physical cores.
    """
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_batch, n_batch if n_ubatch is None else n_ubatch
    params.n_seq_max, params.kv_unified = n_seq, unified
    params.type_k, params.type_v = (KV_TYPES[kind][0] if isinstance(kind, str) else kind for kind in (type_k, type_v))
    if flash_attn is not None:
        params.flash_attn_type = int(flash_attn)
    params.n_threads = params.n_threads_batch = threads or default_threads()
    return params


class Context:
    """A context of a model, with one batch; close it or use it in ``with``.

    Args:
        model: what computes.
        params: as ``context_params`` makes them.

    Attributes:
        pointer: ``llama_context *``.
        memory: its ``llama_memory_t``.
        n_batch: tokens of its batch.

    Raises:
        ClexError: llama.cpp cannot make it; its log says why.
    """

    def __init__(self, model: Model, params: llama_cpp.llama_context_params) -> None:
        pointer: Any = llama_cpp.llama_init_from_model(model.pointer, params)
        if not pointer:
            raise ClexError(f"{model.path}: llama.cpp cannot make a context of {params.n_ctx:,} tokens")
        self._attach(pointer, model.path, model.n_vocab, params.n_batch, params.n_seq_max)
        self._owns = True

    @classmethod
    def of(cls, llm: llama_cpp.Llama) -> Self:
        """The context of a ``Llama``, which it stays; what is computed in it the ``Llama`` does not know of."""
        context = cls.__new__(cls)
        context._attach(llm.ctx, llm.model_path, llm.n_vocab(), llm.n_batch, 1)
        context._owns = False
        return context

    def _attach(self, pointer: Any, name: object, n_vocab: int, n_batch: int, n_seq: int) -> None:
        self.pointer, self.n_batch = pointer, n_batch
        self.memory: Any = llama_cpp.llama_get_memory(pointer)
        self._name, self._n_vocab = name, n_vocab
        self._batch = llama_cpp.llama_batch_init(n_batch, 0, n_seq)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the batch, and the context if it is this object's own."""
        llama_cpp.llama_batch_free(self._batch)
        if self._owns:
            llama_cpp.llama_free(self.pointer)

    def try_decode(self, items: Iterable[Item]) -> int:
        """Compute a batch; gives what ``llama_decode`` returned, 0 if all went well."""
        self._fill(items)
        return llama_cpp.llama_decode(self.pointer, self._batch)

    def decode(self, items: Iterable[Item]) -> None:
        """Compute a batch.

        Raises:
            DecodeError: it could not be computed.
        """
        if status := self.try_decode(items):
            raise DecodeError(self._name, status)

    def decode_sequence(self, tokens: Tokens, position: int, *, first: int = 0, sequence: int = 0) -> None:
        """Compute tokens of one sequence in one batch, and logits of those from position ``first`` on.

        Raises:
            DecodeError: they could not be computed.
        """
        self.decode((token, place, (sequence,), place >= first) for place, token in enumerate(tokens, position))

    def _fill(self, items: Iterable[Item]) -> None:
        batch, count = self._batch, 0
        for i, (token, position, sequences, wanted) in enumerate(items):
            batch.token[i] = int(token)
            batch.pos[i] = position
            batch.n_seq_id[i] = len(sequences)
            for k, sequence in enumerate(sequences):
                batch.seq_id[i][k] = sequence
            batch.logits[i] = wanted
            count = i + 1
        batch.n_tokens = count

    def logits(self, index: int) -> npt.NDArray[np.float32]:
        """Logits of one token of the last batch, [n_vocab]: a copy."""
        pointer = llama_cpp.llama_get_logits_ith(self.pointer, index)
        return np.ctypeslib.as_array(pointer, shape=(self._n_vocab,)).copy()

    def all_logits(self, rows: int) -> npt.NDArray[np.float32]:
        """The logits of the last batch that were wanted, [rows, n_vocab]: a view that the next batch overwrites."""
        pointer = ctypes.cast(llama_cpp.llama_get_logits(self.pointer), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (rows, self._n_vocab))

    def declare(self, n_tokens: int, sequence: int = 0) -> None:
        """Announce how long a sequence will be, so that all of it uses one table; 0 takes it back.

        Raises:
            ClexError: the tables do not cover it, or there are none.
        """
        if not llama_clex.seq_reserve(self.pointer, sequence, n_tokens):
            raise ClexError(f"{self._name}: its tables do not cover {n_tokens:,} tokens")

    def bucket(self, sequence: int = 0) -> int:
        """Index of the bucket that a sequence uses, negative before its first token."""
        return llama_clex.seq_bucket(self.pointer, sequence)

    def clear(self, *, data: bool = True) -> None:
        """Forget all sequences; without ``data`` what they left in the cells stays there until it is overwritten."""
        llama_cpp.llama_memory_clear(self.memory, data)

    def truncate(self, n_tokens: int, sequence: int = 0) -> None:
        """Forget the tokens of a sequence from position n_tokens on."""
        llama_cpp.llama_memory_seq_rm(self.memory, sequence, n_tokens, -1)

    def last_position(self, sequence: int = 0) -> int:
        """Of the tokens of a sequence, -1 for one without."""
        return llama_cpp.llama_memory_seq_pos_max(self.memory, sequence)

    def sequence_size(self, sequence: int = 0) -> int:
        """Bytes of ``save_sequence``."""
        return llama_cpp.llama_state_seq_get_size(self.pointer, llama_cpp.llama_seq_id(sequence))

    def save_sequence(self, sequence: int = 0) -> bytes:
        """The state of a sequence."""
        data = (ctypes.c_uint8 * self.sequence_size(sequence))()
        size = llama_cpp.llama_state_seq_get_data(self.pointer, data, len(data), llama_cpp.llama_seq_id(sequence))
        return ctypes.string_at(data, size)

    def load_sequence(self, state: bytes, sequence: int = 0) -> bool:
        """Take back the state of a sequence; whether llama.cpp took it."""
        data: Any = ctypes.cast(ctypes.c_char_p(state), ctypes.POINTER(ctypes.c_uint8))
        return llama_cpp.llama_state_seq_set_data(self.pointer, data, len(state), llama_cpp.llama_seq_id(sequence)) > 0
