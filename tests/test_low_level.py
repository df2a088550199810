"""llama.cpp's own API as objects gives what `Llama` gives, and says what is wrong."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest

from clex_local import ClexError, DecodeError, Llama, ModelError
from clex_local.runtime.low_level import Context, Model, context_params
from helpers.random_gguf import make_model

pytestmark = pytest.mark.runtime

TOKENS = np.arange(3, 103, dtype=np.int32)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("low-level") / "model.gguf")


@pytest.fixture(scope="module")
def expected(path):
    """Logits of every token, of one prompt."""
    with Llama(path, n_ctx=256, n_threads=1, logits_all=True) as llm:
        llm.eval(TOKENS.tolist())
        return llm.scores[: len(TOKENS)].copy()


def test_a_sequence_in_batches_has_the_logits_of_one_prompt(path, expected):
    with closing(Model(path)) as model, Context(model, context_params(256, n_batch=64, threads=1)) as context:
        context.declare(len(TOKENS))
        context.decode_sequence(TOKENS[:64], 0)
        first = context.all_logits(64).copy()
        context.decode_sequence(TOKENS[64:], 64, first=90)
        np.testing.assert_allclose(first, expected[:64], atol=2e-3)
        np.testing.assert_allclose(context.all_logits(10), expected[90:], atol=2e-3)
        np.testing.assert_array_equal(context.logits(35), context.all_logits(10)[-1])
        assert (context.last_position(), model.factors[context.bucket()]) == (99, 2.0)


def test_a_sequence_is_saved_and_taken_back(path):
    params = context_params(256, n_seq=2, unified=True, threads=1)
    with closing(Model(path)) as model, Context(model, params) as context:
        context.decode_sequence(TOKENS[:20], 0, first=19)
        state = context.save_sequence()
        assert len(state) == context.sequence_size()
        assert context.load_sequence(state, 1)
        context.truncate(5)
        assert (context.last_position(), context.last_position(1)) == (4, 19)
        assert not context.load_sequence(state[:-1], 1)
        context.clear()
        assert context.last_position(1) == -1


def test_the_context_of_a_llama_stays_its_own(path, expected):
    with Llama(path, n_ctx=256, n_threads=1) as llm:
        with Context.of(llm) as context:
            context.declare(len(TOKENS))
            context.decode_sequence(TOKENS, 0)
            np.testing.assert_allclose(context.all_logits(len(TOKENS)), expected, atol=2e-3)
            context.clear()
        llm.reset()
        llm.eval([5])


def test_what_cannot_be_is_one_error(path, tmp_path):
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"no.gguf: llama.cpp cannot load it$"):
        Model(tmp_path / "no.gguf")
    with closing(Model(path)) as model, Context(model, context_params(256, n_batch=64, threads=1)) as context:
        with pytest.raises(ClexError, match=r"model.gguf: its tables do not cover 257 tokens$"):
            context.declare(257)
        with pytest.raises(DecodeError, match=r"model.gguf: llama.cpp failed to compute it .*-1"):
            context.decode([(10**6, 0, [0], True)])
        with pytest.raises(ClexError, match=r"cannot make a context of 256 tokens$"):
            Context(model, context_params(256, type_v="q8_0", flash_attn=False))
