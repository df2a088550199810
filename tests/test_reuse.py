"""Reused prefixes, drafts, policies, embeddings: what ``Llama`` makes of its cache, on a tiny random model."""

from __future__ import annotations

import pickle
from contextlib import contextmanager

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding

from clex_local import ClexError, Llama
from clex_local.library import llama_clex
from helpers.random_gguf import make_model, ntk_tables, random_tokens

pytestmark = [pytest.mark.runtime, pytest.mark.sanitize]

IDS = random_tokens(300)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def tiny_log_scale(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny") / "log.gguf", log_scale=True)


@pytest.fixture
def load():
    opened = []

    def open_model(path, **options):
        options = {
            "n_ctx": 0,
            "type_k": 0,
            "type_v": 0,
            "verbose": False,
            "n_threads": 1,
            "n_threads_batch": 1,
            **options,
        }
        opened.append(Llama(str(path), **options))
        return opened[-1]

    yield open_model
    for llm in opened:
        llm.close()


def logits(llm):
    pointer = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    return np.ctypeslib.as_array(pointer, shape=(llm.n_vocab(),)).copy()


@contextmanager
def batches(llm):
    """Tokens in the cache before each batch that is computed inside the block, and tokens in the batch."""
    seen = []
    decode = llm._ctx.decode

    def count(batch):
        seen.append((llm.n_tokens, batch.n_tokens()))
        decode(batch)

    llm._ctx.decode = count
    yield seen
    llm._ctx.decode = decode


def generated(llm, prompt, count):
    return [token for token, _ in zip(llm.generate(prompt, temp=0), range(count), strict=False)]


def first(llm, prompt):
    """Logits with which a completion of the prompt begins."""
    stream = llm.generate(list(prompt), temp=0)
    next(stream)
    stream.close()
    return logits(llm)


def test_tables_are_described(load, tiny, tiny_log_scale):
    model = load(tiny).model
    assert (llama_clex.method(model), llama_clex.log_scale(model)) == ("ntk", False)
    np.testing.assert_array_equal(np.stack([llama_clex.inv_freq(model, i) for i in range(4)]), ntk_tables(4, 32))
    assert (llama_clex.inv_freq(model, 4).size, llama_clex.inv_freq(model, -1).size) == (0, 0)
    assert [llama_clex.attn_scale(model, i) for i in (-1, 0, 3, 4)] == [0, 1, 1, 0]
    assert llama_clex.log_scale(load(tiny_log_scale).model)


@pytest.mark.parametrize("name", ["tiny", "tiny_log_scale"])
def test_exact_reuse_gives_the_logits_of_the_prompt_alone(load, request, name):
    path = request.getfixturevalue(name)
    reuse = load(path, prefix_reuse="exact")
    fast = load(path)
    errors = []
    # grown inside a bucket and across, cut, grown again after generated tokens crossed a boundary, repeated
    for length in (40, 55, 70, 100, 60, 64, 65, 130, 130, 129, 220):
        alone = first(load(path), IDS[:length])
        np.testing.assert_allclose(first(reuse, IDS[:length]), alone, atol=2e-5, rtol=0)
        errors.append(np.abs(first(fast, IDS[:length]) - alone).max())
        for llm in (reuse, fast):
            list(zip(range(8), llm.generate(IDS[:length], temp=0), strict=False))
    assert max(errors) > 0.05


def test_exact_reuse_keeps_what_it_can(load, tiny):
    llm = load(tiny, prefix_reuse="exact")
    with batches(llm) as fed:
        for length in (40, 60, 100, 110, 80):
            first(llm, IDS[:length])
    # 80 is in the bucket of 100: only its last token is needed again
    assert [n for _, n in fed] == [40, 20, 100, 10, 1]


def test_exact_reuse_survives_a_saved_state(load, tiny):
    llm = load(tiny, prefix_reuse="exact")
    llm.eval(IDS[:40])
    state = pickle.loads(pickle.dumps(llm.save_state()))
    llm.reset()
    llm.eval(IDS[100:190])
    llm.load_state(state)
    np.testing.assert_allclose(first(llm, IDS[:50]), first(load(tiny), IDS[:50]), atol=2e-5, rtol=0)
    llm.load_state(state)
    np.testing.assert_allclose(first(llm, IDS[:90]), first(load(tiny), IDS[:90]), atol=2e-5, rtol=0)


@pytest.mark.parametrize("options", [{"prefix_reuse": "slow"}, {"policy": "by length"}])
def test_unknown_option_is_named(tiny, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Llama(str(tiny), **options)


class Oracle(LlamaDraftModel):
    """Knows what will be generated, so that every draft is accepted: drafts then do reach boundaries."""

    def __init__(self, sequence, wrong_every=0):
        self.sequence, self.wrong_every, self.sizes = sequence, wrong_every, []

    def __call__(self, input_ids, /, **kwargs):
        done = len(input_ids)
        draft = np.array(self.sequence[done : done + 10], np.intc)
        if self.wrong_every and done % self.wrong_every == 0:
            draft[2:] = 5
        return draft


@pytest.mark.parametrize("name", ["tiny", "tiny_log_scale"])
@pytest.mark.parametrize("draft", ["oracle", "half wrong", "lookup"])
def test_drafts_change_nothing(load, request, name, draft):
    path = request.getfixturevalue(name)
    prompt = (IDS[:9] * 5)[:40]
    count = 150
    plain = generated(load(path), prompt, count)
    models = {
        "oracle": Oracle(prompt + plain),
        "half wrong": Oracle(prompt + plain, wrong_every=2),
        "lookup": LlamaPromptLookupDecoding(num_pred_tokens=10),
    }
    llm = load(path, draft_model=models[draft])
    with batches(llm) as seen:
        drafted = generated(llm, prompt, count)
    assert drafted == plain
    assert {n // 64 for n, _ in seen} == {0, 1, 2}
    if name == "tiny":
        assert draft == "lookup" or len(seen) < count / 2
        # a batch of more than one token stays in the table of its first
        assert all(n // 64 == (n + k - 1) // 64 for n, k in seen[1:])
    else:
        assert all(k == 1 for _, k in seen[1:])


@pytest.mark.parametrize("tables", [True, False])
@pytest.mark.parametrize("logits_all", [True, False])
@pytest.mark.parametrize("n_batch", [8, 33, 256])
def test_drafts_after_a_prompt_longer_than_a_batch(load, tmp_path, tables, logits_all, n_batch):
    """Guesses may be as many as a batch holds, or more."""
    path = make_model(tmp_path / "model.gguf", tables=tables, original=64 if tables else 256)
    prompt, count = (IDS[:9] * 20)[:100], 100
    options = {"n_ctx": 256, "n_batch": n_batch, "logits_all": logits_all}
    plain = generated(load(path, **options), prompt, count)
    for model in (Oracle(prompt + plain), Oracle(prompt + plain, wrong_every=3), LlamaPromptLookupDecoding(2, 40)):
        llm = load(path, draft_model=model, **options)
        with batches(llm) as seen:
            found = generated(llm, prompt, count)
        assert found == plain
        assert len(seen) < count / 2 + 100 / n_batch or isinstance(model, LlamaPromptLookupDecoding)
        answer = llm.create_completion(prompt[:40], max_tokens=8, temperature=0, logprobs=2 if logits_all else None)
        assert answer["usage"]["completion_tokens"] > 0
        if logits_all:
            fresh = load(path, **options)
            fresh.eval(found[:60])
            llm.reset()
            llm.eval(found[:60])
            np.testing.assert_allclose(llm.scores[:60], fresh.scores[:60], atol=5e-5, rtol=0)


def test_draft_model_can_be_replaced(load, tiny):
    llm = load(tiny, logits_all=True)
    assert llm.draft_model is None
    llm.draft_model = Oracle(IDS)
    assert list(llm.draft_model(np.array(IDS[:60], np.intc))) == IDS[60:64]
    llm.draft_model = None
    assert llm.draft_model is None


def test_fixed_policy_uses_the_table_of_the_context(load, tiny):
    fixed = load(tiny, policy="fixed", n_ctx=256, logits_all=True)
    for i in range(0, 100, 10):
        fixed.eval(IDS[i : i + 10])
    assert (fixed.clex.bucket, fixed.clex.rerotations) == (3, 0)
    grown = fixed.scores[99].copy()
    fixed.reset()
    fixed.eval(IDS[:100])
    np.testing.assert_allclose(grown, fixed.scores[99], atol=2e-5, rtol=0)
    # the same as declaring the context's size
    llm = load(tiny)
    llama_clex.seq_reserve(llm.ctx, 0, 256)
    llama_cpp.Llama.eval.__wrapped__(llm, IDS[:100])  # which declares nothing
    np.testing.assert_allclose(logits(llm), grown, atol=2e-5, rtol=0)


def test_clamp_uses_the_last_table_beyond_it(load, tiny, tmp_path):
    with pytest.raises(ClexError, match="do not fit"):
        load(tiny, n_ctx=512).eval(IDS)
    clamped = load(tiny, n_ctx=512, clamp=True)
    assert clamped.n_ctx() == 512
    clamped.eval(IDS)
    assert clamped.clex.bucket == 3
    # tables whose last bucket reaches further but holds the same frequencies
    from helpers.gguf_maker import rewrite

    factors = np.array([1, 2, 3, 8], np.float32)
    longer = load(rewrite(tiny, tmp_path / "longer.gguf", {"clex.scaling_factors": factors}))
    longer.eval(IDS)
    np.testing.assert_array_equal(logits(clamped), logits(longer))
    clamped.eval(IDS[:10])


def test_policy_can_change_with_a_full_cache(load, tiny):
    llm = load(tiny)
    llm.eval(IDS[:50])
    assert llama_clex.set_policy(llm.ctx, llama_clex.Policy.FIXED, False)
    llm.eval(IDS[50:51])
    assert (llm.clex.bucket, llm.clex.rerotated_cells) == (3, 50)
    assert llama_clex.set_policy(llm.ctx, llama_clex.Policy.BY_LENGTH, False)
    llm.eval(IDS[51:52])
    assert (llm.clex.bucket, llm.clex.rerotated_cells) == (0, 101)
    assert not llama_clex.set_policy(llm.ctx, 2, False)
    assert llm.clex.bucket == 0


def test_model_without_tables_has_no_policy(load, tmp_path):
    llm = load(make_model(tmp_path / "plain.gguf", tables=False), prefix_reuse="exact")
    assert (llm.clex, llama_clex.method(llm.model)) == (None, "")
    assert not llama_clex.set_policy(llm.ctx, llama_clex.Policy.FIXED, False)
    first(llm, IDS[:30])
    first(llm, IDS[:40])


def test_all_logits_are_those_of_single_steps(load, tiny):
    whole = load(tiny, logits_all=True)
    whole.eval(IDS[:60])
    steps = load(tiny, logits_all=True)
    for token in IDS[:60]:
        steps.eval([token])
    np.testing.assert_allclose(whole.scores[:60], steps.scores[:60], atol=5e-5, rtol=0)
    answer = whole.create_completion("abc " * 25, max_tokens=60, temperature=0, logprobs=2)
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == answer["usage"]["completion_tokens"]
    assert whole.clex.rerotations > 0


def test_embeddings_of_texts_in_several_buckets_equal_each_alone(load, tiny):
    llm = load(tiny, embedding=True, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN)
    texts = ["a" * 20, "bc" * 40, "d" * 5, "efg" * 30]
    together = [item["embedding"] for item in llm.create_embedding(texts)["data"]]
    rows = load(tiny, embedding=True, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_NONE)
    for text, pooled in zip(texts, together, strict=True):
        np.testing.assert_allclose(pooled, llm.create_embedding(text)["data"][0]["embedding"], atol=1e-5, rtol=0)
        np.testing.assert_allclose(pooled, np.mean(rows.embed(text), axis=0), atol=1e-5, rtol=0)


def test_pickled_model_keeps_its_options(tiny, load):
    copy = pickle.loads(pickle.dumps(load(tiny, prefix_reuse="exact", policy="fixed")))
    assert (copy._options["prefix_reuse"], copy._options["policy"]) == ("exact", "fixed")
    copy.close()
