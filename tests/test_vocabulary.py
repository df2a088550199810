"""Tokens and their text: none is lost for its length, and numbers that are no tokens are one error."""

from __future__ import annotations

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaDraftModel

from clex_local import ClexError, Llama
from clex_local.runtime.vocabulary import TokenError
from clex_local.session.session import Session
from helpers.gguf_maker import gguf_bytes
from helpers.random_gguf import N_VOCAB, model_parts

pytestmark = pytest.mark.runtime

LENGTHS = (31, 32, 33, 48, 63, 64, 65, 128, 1000)
FIRST = 259  # of the letters in the vocabulary


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A model in whose vocabulary letters are replaced by long tokens."""
    keys, tensors = model_parts()
    for i, length in enumerate(LENGTHS):
        keys["tokenizer.ggml.tokens"][FIRST + i] = chr(ord("A") + i) * length
    target = tmp_path_factory.mktemp("vocabulary") / "model.gguf"
    target.write_bytes(gguf_bytes(keys, tensors))
    return target


@pytest.fixture
def llm(path):
    with Llama(path, n_ctx=256, n_threads=1, logits_all=True, verbose=False) as model:
        yield model


def test_long_tokens_are_whole(llm):
    pieces = [chr(ord("A") + i) * length for i, length in enumerate(LENGTHS)]
    tokens = list(range(FIRST, FIRST + len(LENGTHS)))
    session = Session(llm)
    for token, piece in zip(tokens, pieces, strict=True):
        assert llm.detokenize([token]) == session.piece(token) == piece.encode()
        assert llm.detokenize([token], special=True) == piece.encode()
        assert llm.tokenizer().detokenize([token]) == piece.encode()
    assert llm.detokenize(tokens) == "".join(pieces).encode()
    assert llm.detokenize(np.array(tokens)) == "".join(pieces).encode()
    assert llm.detokenize([]) == b""


@pytest.mark.parametrize("name", ["SmolLM2 distilled from Phi-3", "my-phi3", "Modern-BERT"])
def test_name_of_another_models_vocabulary_is_no_matter(tmp_path, name):
    """llama.cpp marks tokens by the name of the model, whether they are there or not."""
    keys, tensors = model_parts()
    texts = []
    for title in ("tiny", name):
        tokens = [token.replace("</s>", "<end>") for token in keys["tokenizer.ggml.tokens"]]
        changes = {"general.name": title, "tokenizer.ggml.tokens": tokens}
        path = tmp_path / "model.gguf"
        path.write_bytes(gguf_bytes({**keys, **changes}, tensors))
        with Llama(path, n_ctx=64, n_threads=1, verbose=False) as llm:
            texts.append(llm.tokenize(b"some text"))
    assert texts[0] == texts[1]


def test_text_and_tokens_are_each_other_in_a_real_vocabulary(smollm):
    """47 of its tokens are longer than 32 bytes."""
    with Llama(smollm, vocab_only=True, verbose=False) as llm:
        buffer = bytearray(512)
        array = (llama_cpp.ctypes.c_char * 512).from_buffer(buffer)
        long = 0
        for token in range(llm.n_vocab()):
            size = llama_cpp.llama_token_to_piece(llm._model.vocab, token, array, 512, 0, True)
            assert llm.detokenize([token], special=True) == bytes(buffer[:size])
            long += size > 32
        assert long == 47
        for text in (character * n + "X" for character in " -=\n*#_\té" for n in (1, 31, 32, 33, 64, 80, 128)):
            assert llm.detokenize(llm.tokenize(text.encode(), add_bos=False)).decode() == text
        assert llm.tokenize(b"", add_bos=False) == []


@pytest.mark.parametrize("stream", [False, True])
def test_long_tokens_are_in_completions(llm, stream):
    token = FIRST + LENGTHS.index(48)
    answer = llm.create_completion("ab", max_tokens=3, temperature=0, logit_bias={token: 1e4}, stream=stream)
    text = "".join(part["choices"][0]["text"] for part in answer) if stream else answer["choices"][0]["text"]
    assert text == "D" * 48 * 3


WRONG = [-1, -(2**31), N_VOCAB, 2**31 - 1, 2**32 + 5, 2**70]


@pytest.mark.parametrize("token", WRONG)
def test_number_that_is_no_token_is_one_error(llm, token):
    llm.eval([5, 6, 7])
    calls = {
        "detokenize": lambda: llm.detokenize([5, token]),
        "decode": lambda: llm.tokenizer().decode([token]),
        "eval": lambda: llm.eval([5, token]),
        "generate": lambda: next(llm.generate([5, token])),
        "create_completion": lambda: llm.create_completion([5, token], max_tokens=1),
        "stream": lambda: list(llm.create_completion([5, token], max_tokens=1, stream=True)),
        "logit_bias": lambda: llm.create_completion("a", max_tokens=1, logit_bias={token: 1.0}),
        "logit_bias, stream": lambda: list(llm.create_completion("a", logit_bias={str(token): 1.0}, stream=True)),
        "__call__": lambda: llm("a", max_tokens=1, logit_bias={token: 1.0}),
        "chat": lambda: llm.create_chat_completion([{"role": "user", "content": "a"}], logit_bias={token: 1.0}),
    }
    for name, call in calls.items():
        with pytest.raises(TokenError) as caught:
            call()
        assert str(caught.value) == f"{llm.model_path}: {token} is no token; its vocabulary has the numbers 0 to 287", (
            name
        )
    llm.eval([8])


@pytest.mark.parametrize("token", ["a", 1.5, None, [1]])
def test_what_is_no_number_is_no_token(llm, token):
    with pytest.raises(TokenError, match="is no token"):
        llm.eval([token])
    with pytest.raises(TokenError, match="is no token"):
        llm.detokenize([token])


def test_draft_that_is_no_token_is_one_error(path):
    class Wrong(LlamaDraftModel):
        def __call__(self, input_ids, /, **kwargs):
            return np.array([N_VOCAB], np.intc)

    with Llama(path, draft_model=Wrong(), n_threads=1, verbose=False) as llm:
        stream = llm.generate([5, 6])
        next(stream)
        with pytest.raises(ClexError, match="288 is no token"):
            next(stream)


def test_tokenizer_of_the_caller_is_kept(path):
    class Letters(llama_cpp.llama_tokenizer.BaseLlamaTokenizer):
        def tokenize(self, text, add_bos=True, special=True):
            return list(text)

        def detokenize(self, tokens, prev_tokens=None, special=False):
            return bytes(tokens)

    with Llama(path, tokenizer=Letters(), verbose=False) as llm:
        assert llm.detokenize(llm.tokenize(b"ab")) == b"ab"
