"""Text to tokens and back, as llama-cpp-python's tokenizer does, without what it loses or does not check."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp.llama_tokenizer import LlamaTokenizer

from clex_local.errors import ClexError, ModelError
from clex_local.runtime.lifetime import ClosedError


class TokenError(ClexError, ValueError):
    """Numbers that are no tokens of the vocabulary."""


def check_tokens(tokens: Iterable[int], n_vocab: int, path: str) -> None:
    """Refuse what is no token: llama.cpp reads beside its vocabulary, or takes the lower 32 bits for another token.

    Raises:
        TokenError: one of them is no whole number from 0 to n_vocab - 1.
    """
    array = np.asarray(tokens if isinstance(tokens, (Sequence, np.ndarray)) else list(tokens))
    if not array.size:
        return
    if array.ndim == 1 and array.dtype.kind in "iu":
        wrong = array[(array < 0) | (array >= n_vocab)]
    else:  # also numbers beyond 64 bits
        wrong = [token for token in tokens if not isinstance(token, int) or not 0 <= token < n_vocab]
    if len(wrong):
        raise TokenError(f"{path}: {wrong[0]!s} is no token; its vocabulary has the numbers 0 to {n_vocab - 1:,}")


def common_prefix(text: npt.NDArray[np.intc], other: Sequence[int] | npt.NDArray[np.intc]) -> int:
    """How many tokens two texts have in common at their beginning."""
    count = min(len(text), len(other))
    different = np.flatnonzero(text[:count] != np.asarray(other[:count], dtype=text.dtype))
    return int(different[0]) if len(different) else count


class Tokenizer(LlamaTokenizer):
    """llama-cpp-python's tokenizer of a model, with every token whole and every number checked."""

    _model: Any  # llama_cpp._internals.LlamaModel; its vocabulary is gone once its model is None

    def __init__(self, llama: llama_cpp.Llama) -> None:
        super().__init__(llama)
        self._pieces: dict[tuple[int, bool], bytes] = {}

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        """Tokens of a text.

        Raises:
            ModelError: the vocabulary lacks what this text needs.
            ClosedError: the model was closed.
        """
        vocab = self._vocab()
        room = len(text) + 8  # a token has a byte at least, and a model adds few of its own
        while True:
            tokens = (llama_cpp.llama_token * room)()
            count = llama_cpp.llama_tokenize(vocab, text, len(text), tokens, room, add_bos, special)
            if count >= 0:
                return tokens[:count]
            if -count <= room:
                path = self._model.path_model
                raise ModelError(f"{path}: its vocabulary cannot encode the text; it is damaged")
            room = -count

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """The bytes that tokens stand for; a character may be spread over several.

        Raises:
            TokenError: a number is no token.
            ClosedError: the model was closed.
        """
        vocab = self._vocab()
        check_tokens(tokens, llama_cpp.llama_vocab_n_tokens(vocab), self._model.path_model)
        text = b"".join(self._piece(vocab, int(token), special) for token in tokens)
        # As llama-cpp-python: some models begin every text with a space, which is none of the text's.
        if text.startswith(b" ") and tokens[0] == llama_cpp.llama_vocab_bos(vocab):
            return text[1:]
        return text

    def _vocab(self) -> Any:
        if self._model.model is None:
            raise ClosedError(self._model.path_model)
        return self._model.vocab

    def _piece(self, vocab: Any, token: int, special: bool) -> bytes:
        piece = self._pieces.get((token, special))
        if piece is None:
            # LlamaModel.detokenize of llama-cpp-python has 32 bytes and loses longer tokens, such as runs of spaces.
            size = 64
            while True:
                buffer = ctypes.create_string_buffer(size)
                n = llama_cpp.llama_token_to_piece(vocab, token, buffer, size, 0, special)
                if n >= 0:
                    break
                size = -n
            piece = self._pieces[token, special] = buffer.raw[:n]
        return piece
