"""A context that is no multiple of 256, which llama.cpp rounds up to: what was asked for counts everywhere."""

from __future__ import annotations

import llama_cpp
import pytest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from clex_local import ClexError, Llama
from clex_local.model_file.tables import ContextError
from clex_local.session.session import Session
from helpers.random_gguf import make_model, random_tokens

pytestmark = pytest.mark.runtime

IDS = random_tokens(512)


@pytest.fixture(scope="module", params=["tables", "odd tables", "plain"])
def path(request, tmp_path_factory):
    """Tables that cover 256 or 300 tokens, or none and 1,000 trained tokens."""
    folder = tmp_path_factory.mktemp("context")
    if request.param == "plain":
        return make_model(folder / "model.gguf", tables=False, original=1000)
    return make_model(folder / "model.gguf", original=75 if request.param == "odd tables" else 64)


@pytest.fixture
def load(path):
    opened = []

    def get(n_ctx, **options):
        opened.append(Llama(str(path), n_ctx=n_ctx, type_k=0, type_v=0, verbose=False, n_threads=1, **options))
        return opened[-1]

    yield get
    for llm in opened:
        llm.close()


@pytest.mark.parametrize("n_ctx", [1, 100, 200, 255])
@pytest.mark.parametrize("logits_all", [False, True])
def test_every_size_is_the_one_that_was_asked_for(load, n_ctx, logits_all):
    llm = load(n_ctx, logits_all=logits_all)
    assert llm.n_ctx() == llm._n_ctx == len(llm.input_ids) == n_ctx
    if n_ctx > 20:
        assert Session(llm).capacity == n_ctx
    llm.eval(IDS[:n_ctx])
    before = llm.save_state().llama_state
    for beyond in ([5], IDS[:300]):
        with pytest.raises(ContextError, match=f"^{n_ctx + len(beyond):,} tokens do not fit in a context of {n_ctx}$"):
            llm.eval(beyond)
    assert llm.n_tokens == n_ctx
    assert llm.save_state().llama_state == before


def test_all_context_is_all_that_is_covered(load):
    llm = load(0)
    covered = {"tables": 256, "odd tables": 300, "plain": 1000}
    assert llm.n_ctx() == len(llm.input_ids)
    assert llm.n_ctx() in covered.values()
    llm.eval([1] * llm.n_ctx())
    with pytest.raises(ContextError):
        llm.eval([1])


@pytest.mark.parametrize("options", [{}, {"logits_all": True}, {"draft_model": LlamaPromptLookupDecoding()}])
def test_generation_ends_at_the_context_and_loses_nothing(load, options):
    llm = load(200, **options)
    out = []
    with pytest.raises(ContextError, match=r"^201 tokens do not fit in a context of 200$"):
        out.extend(llm.generate(IDS[:20], temp=0))
    assert len(out) == 181  # of the last one nothing was computed
    assert llm.n_tokens == 200
    assert llm.input_ids[:200].tolist() == IDS[:20] + out[:180]
    state = llm.save_state()
    larger = load(256)
    larger.load_state(state)
    assert larger.input_ids[:200].tolist() == IDS[:20] + out[:180]


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_beyond_the_context_is_refused_with_both_numbers(load, stream):
    llm = load(200)
    for length in (201, 220, 255, 256, 400):
        prompt = [1, *IDS[: length - 1]]
        with pytest.raises(
            ContextError, match=rf"^Requested tokens \({length}\) exceed context window of 200$"
        ) as caught:
            list(llm.create_completion(prompt, max_tokens=4, stream=stream))
        assert isinstance(caught.value, ClexError)
        assert isinstance(caught.value, ValueError)  # as llama-cpp-python raises
    assert llm.n_tokens == 0


@pytest.mark.parametrize("max_tokens", [None, -1, 100, 1000])
def test_completion_fills_the_context(load, max_tokens):
    llm = load(200)
    letter = 3 + ord("a")
    answer = llm.create_completion(IDS[:150], max_tokens=max_tokens, logit_bias={letter: 100})
    assert answer["choices"][0]["text"] == "a" * 50
    assert answer["usage"]["completion_tokens"] == 50
    assert answer["choices"][0]["finish_reason"] == "length"
    assert len(llm.eval_tokens) == llm.n_tokens <= 200


@pytest.mark.parametrize("stream", [False, True])
def test_completion_whose_last_character_does_not_end_is_no_error(load, stream):
    llm = load(200)
    answer = llm.create_completion(IDS[:150], max_tokens=None, logit_bias={3 + 0xE4: 100}, stream=stream)
    last = list(answer)[-1] if stream else answer
    assert last["choices"][0]["finish_reason"] == "length"
    assert llm.n_tokens in (199, 200)  # the last token that is drawn need not be computed


def test_prompt_cache_of_a_context_goes_on_in_another(load):
    cache = llama_cpp.LlamaRAMCache()
    answers = []
    for n_ctx in (200, 250, 90, 200):
        llm = load(n_ctx)
        llm.set_cache(cache)
        answers.append(llm.create_completion(IDS[:60], max_tokens=20, temperature=0, logit_bias={2: -100}))
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
