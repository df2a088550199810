"""Tokens drawn by ``Llama``, compared with numpy's computation of the chain of samplers from the same logits."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, cast

import llama_cpp
import numpy as np
import pytest
from llama_cpp import LlamaGrammar
from llama_cpp.llama_speculative import LlamaDraftModel

from clex_local import ClexError, Llama
from helpers.gguf_maker import gguf_bytes
from helpers.random_gguf import N_VOCAB, model_parts

pytestmark = pytest.mark.runtime

PROMPT = [5, 100, 100, 7, 265, 270, 100, 8]
STEPS = 24


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A random model with flat logits, so that every cut leaves something to draw from."""
    keys, tensors = model_parts(original=256, n_buckets=1)
    tensors["output.weight"] *= np.float32(2)
    target = tmp_path_factory.mktemp("sampler") / "tiny.gguf"
    target.write_bytes(gguf_bytes(keys, tensors))
    return target


@pytest.fixture(scope="module")
def llm(path):
    model = Llama(str(path), n_ctx=256, logits_all=True, verbose=False)
    yield model
    model.close()


class Draws:
    """One of llama.cpp's last samplers, which alone has a generator of random numbers."""

    def __init__(self, *samplers: Any) -> None:
        self.samplers = samplers

    def __call__(self, ids: np.ndarray, logits: np.ndarray) -> int:
        data = (llama_cpp.llama_token_data * len(ids))(
            *zip(ids.tolist(), logits.tolist(), [0.0] * len(ids), strict=True)
        )
        array = llama_cpp.llama_token_data_array(data=data, size=len(ids), selected=-1, sorted=False)
        for sampler in self.samplers:
            llama_cpp.llama_sampler_apply(sampler, cast(Any, ctypes.byref(array)))
        return array.data[array.selected].id


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max())
    return p / p.sum()


def penalized(logits: np.ndarray, recent: Sequence[int], repeat=1.0, frequency=0.0, presence=0.0) -> np.ndarray:
    """Repetition penalty of Keskar et al. as llama.cpp has it, then those of OpenAI's API."""
    counts = np.bincount(recent, minlength=len(logits)) if len(recent) else np.zeros(len(logits))
    seen = counts > 0
    scaled = np.where(logits > 0, logits / repeat, logits * repeat)
    return np.where(seen, scaled, logits) - counts * frequency - seen * presence


def cut(
    logits: np.ndarray, *, top_k=40, top_p=0.95, min_p=0.05, typical_p=1.0, temp=0.8
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and logits of the candidates that are left, in llama.cpp's order."""
    ids = np.flatnonzero(logits > -np.inf)
    if top_k > 0:
        ids = ids[np.argsort(-logits[ids], kind="stable")][:top_k]
    if typical_p < 1:
        ids = ids[np.argsort(-logits[ids], kind="stable")]
        p = softmax(logits[ids])
        surprise = -np.log(p)
        order = np.argsort(np.abs(surprise - (p * surprise).sum()), kind="stable")
        ids = ids[order[: np.searchsorted(np.cumsum(p[order]), typical_p, side="right") + 1]]
    if top_p < 1:
        ids = ids[np.argsort(-logits[ids], kind="stable")]
        ids = ids[: np.searchsorted(np.cumsum(softmax(logits[ids])), top_p) + 1]
    if min_p > 0:
        ids = ids[logits[ids] >= logits[ids].max() + np.log(min_p)]
    return ids, logits[ids] / temp


def expected(llm: Llama, tokens: Sequence[int], choose: Callable[[np.ndarray, Sequence[int]], Any]) -> list[int]:
    """The tokens after ``PROMPT`` that `choose` draws from the logits which led to `tokens`."""
    whole = [*PROMPT, *tokens]
    return [
        choose(llm.scores[i - 1].astype(np.float64), whole[:i]) for i in range(len(PROMPT), len(PROMPT) + len(tokens))
    ]


def drawn(llm: Llama, seed: int = 11, **options: Any) -> list[int]:
    llm.reset()
    llm.set_seed(seed)
    stream = llm.generate(PROMPT, **options)
    tokens = [next(stream) for _ in range(STEPS)]
    stream.close()
    llm.eval(tokens[-1:])
    return tokens


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"top_k": 5},
        {"top_k": 0, "top_p": 0.5},
        {"top_k": 0, "top_p": 1.0, "min_p": 0.3},
        {"top_k": 0, "typical_p": 0.5, "top_p": 1.0, "min_p": 0.0},
        {"typical_p": 0.7},
        {"temp": 1.7, "top_p": 1.0},
        {"top_k": -1, "min_p": 0.1, "temp": 0.5},
    ],
)
@pytest.mark.parametrize("seed", [0, 3])
def test_cuts_and_draws(llm, options, seed):
    tokens = drawn(llm, seed, **options)
    draw = Draws(llama_cpp.llama_sampler_init_dist(seed))
    assert tokens == expected(llm, tokens, lambda logits, _: draw(*cut(logits, **options)))
    assert len(set(tokens)) > 3


@pytest.mark.parametrize("last_n", [0, 4, 64, -1])
@pytest.mark.parametrize(
    "penalties",
    [
        {"repeat_penalty": 1.8},
        {"frequency_penalty": 0.9},
        {"presence_penalty": 2.0},
        {"repeat_penalty": 1.2, "frequency_penalty": 0.4, "presence_penalty": -0.5},
    ],
)
def test_penalties_look_back_at_prompt_and_answer(llm, penalties, last_n, monkeypatch):
    monkeypatch.setattr(llm, "last_n_tokens_size", last_n)
    tokens = drawn(llm, temp=0, **penalties)
    names = {name.removesuffix("_penalty"): value for name, value in penalties.items()}

    def choose(logits, before):
        return penalized(logits, before if last_n < 0 else before[len(before) - last_n :], **names).argmax()

    assert tokens == expected(llm, tokens, choose)


@pytest.mark.parametrize("temp", [0.0, -1.0])
def test_without_temperature_the_likeliest_is_taken(llm, temp):
    tokens = drawn(llm, temp=temp)
    assert tokens == expected(llm, tokens, lambda logits, _: logits.argmax())


@pytest.mark.parametrize("mode", [1, 2])
@pytest.mark.parametrize("temp", [0.6, 1.5])
def test_mirostat_has_a_temperature(llm, mode, temp):
    tokens = drawn(llm, mirostat_mode=mode, mirostat_tau=3.0, mirostat_eta=0.2, temp=temp)
    samplers = {
        1: lambda: llama_cpp.llama_sampler_init_mirostat(N_VOCAB, 11, 3.0, 0.2, 100),
        2: lambda: llama_cpp.llama_sampler_init_mirostat_v2(11, 3.0, 0.2),
    }
    draw = Draws(samplers[mode]())
    ids = np.arange(N_VOCAB)
    assert tokens == expected(llm, tokens, lambda logits, _: draw(ids, logits / temp))


def test_logits_processors_and_biases_come_before_everything_else(llm):
    calls = []

    def double(tokens, logits):
        calls.append(tokens.tolist())
        return logits * 2

    def shift(tokens, logits):
        logits[: N_VOCAB // 2] -= 3
        return logits

    processors = llama_cpp.LogitsProcessorList([double, shift])
    bias = {"100": 4.0, 265: -100, "270": float("-inf")}
    options = {"temperature": 0.7, "repeat_penalty": 1.3, "seed": 5, "max_tokens": STEPS}
    streamed = llm.create_completion(PROMPT, logit_bias=bias, logits_processor=processors, stream=True, **options)
    list(streamed)
    tokens = llm.input_ids[len(PROMPT) : llm.n_tokens].tolist()
    draw = Draws(llama_cpp.llama_sampler_init_dist(5))

    def choose(logits, before):
        logits = 2 * logits
        logits[: N_VOCAB // 2] -= 3
        for token, value in bias.items():
            logits[int(token)] += value
        return draw(*cut(penalized(logits, before[-64:], 1.3), temp=0.7))

    assert tokens == expected(llm, tokens, choose)
    assert calls == [[*PROMPT, *tokens[:i]] for i in range(len(calls))]
    assert processors == [double, shift]  # the caller's list is as it was


def test_a_processor_may_stand_alone_and_force_a_token(llm):
    def force(tokens, logits):
        logits[42] = np.inf
        return logits

    for temp in (0, 1.0):
        assert set(drawn(llm, temp=temp, logits_processor=force)) == {42}


def test_draft_tokens_are_not_shown_to_processors_and_change_nothing(path):
    seen = []

    class Repeats(LlamaDraftModel):
        def __call__(self, input_ids, /, **kwargs):
            return np.array([input_ids[-1]] * 3, np.intc)

    def note(tokens, logits):
        seen.append(len(tokens))
        return logits

    options = {"temp": 0, "repeat_penalty": 1.01, "logits_processor": note}
    found = []
    for draft in (None, Repeats()):
        llm = Llama(
            str(path), n_ctx=256, n_batch=256, logits_all=True, draft_model=draft, flash_attn=False, verbose=False
        )
        seen.clear()
        found.append(drawn(llm, **options))
        assert seen == list(range(len(PROMPT), len(PROMPT) + STEPS))
        llm.close()
    assert found[0] == found[1]


def test_stopping_criteria_see_the_logits_that_were_drawn_from(llm):
    rows = []

    def fourth(tokens, logits):
        rows.append((len(tokens), logits.copy()))
        return len(tokens) == len(PROMPT) + 3

    llm.reset()
    tokens = list(llm.generate(PROMPT, temp=0, stopping_criteria=llama_cpp.StoppingCriteriaList([fourth])))
    assert len(tokens) == 3
    assert [length for length, _ in rows] == [len(PROMPT) + i for i in range(4)]
    for length, row in rows:
        np.testing.assert_array_equal(row, llm.scores[length - 1])


def test_single_samples(llm):
    llm.reset()
    with pytest.raises(ClexError, match="evaluate"):
        llm.sample()
    llm.eval(PROMPT)
    row = llm.scores[len(PROMPT) - 1].astype(np.float64)
    assert llm.sample(temp=0) == row.argmax()
    # Not with what the last generation sampled with, and not with the same random number each time.
    next(llm.generate(PROMPT, temp=0, logits_processor=lambda tokens, logits: logits * -1))
    assert llm.sample(temp=0) == row.argmax()
    llm.set_seed(1)
    first = [llm.sample(top_k=0, top_p=1.0, min_p=0.0, temp=2.0) for _ in range(400)]
    llm.set_seed(1)
    assert first == [llm.sample(top_k=0, top_p=1.0, min_p=0.0, temp=2.0) for _ in range(400)]
    likely = np.argsort(row)[-20:]
    share = np.isin(first, likely).mean()
    assert share == pytest.approx(softmax(row / 2)[likely].sum(), abs=0.1)
    assert llm.sample(temp=0, repeat_penalty=3.0) == penalized(row, PROMPT, 3.0).argmax()
    assert llm.sample(temp=0, idx=2) == llm.scores[2].argmax()
    np.testing.assert_array_equal(llm.eval_logits, llm.scores[: len(PROMPT)])
    for index in (-1, len(PROMPT), 10**6):
        with pytest.raises(ClexError, match="logits"):
            llm.sample(idx=index)


def test_only_kept_logits_can_be_sampled(path):
    llm = Llama(str(path), n_ctx=256, verbose=False)
    llm.eval(PROMPT)
    assert isinstance(llm.sample(idx=len(PROMPT) - 1), int)
    with pytest.raises(ClexError, match="logits_all"):
        llm.sample(idx=1)
    (row,) = llm.eval_logits
    assert llm.sample(temp=0) == np.argmax(row)
    llm.reset()
    assert not llm.eval_logits
    llm.close()


def test_tokens_sent_to_the_generator_are_continued(llm):
    llm.reset()
    stream = llm.generate(PROMPT, temp=0)
    first = next(stream)
    second = stream.send([50, 51])
    llm.reset()
    llm.eval([*PROMPT, first, 50, 51])
    assert second == llm.scores[llm.n_tokens - 1].argmax()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tfs_z": 0.5}, "tfs_z"),
        ({"penalize_nl": False}, "penalize_nl"),
        ({"mirostat_mode": 3}, "mirostat_mode"),
        ({"logits_processor": [lambda tokens, logits: logits[:-1]]}, "shape"),
        ({"logits_processor": [lambda tokens, logits: logits * np.nan]}, "NaN"),
        ({"logits_processor": [lambda tokens, logits: logits - np.inf]}, "no token is left"),
        ({"repeat_penalty": 0.0}, "repeat_penalty"),
    ],
)
def test_what_cannot_be_sampled_is_one_error(llm, options, message):
    with pytest.raises(ClexError, match=message) as caught:
        drawn(llm, **options)
    assert "\n" not in str(caught.value)
    assert len(drawn(llm)) == STEPS


@pytest.mark.parametrize("options", [{}, {"typical_p": 0.5}, {"mirostat_mode": 1}, {"mirostat_mode": 2}, {"temp": 0}])
def test_what_a_grammar_excludes_is_never_drawn(llm, options):
    """Also not by samplers that take logarithms of probabilities."""
    grammar = LlamaGrammar.from_string('root ::= ("a" | "b" | "z")*', verbose=False)
    stream = llm.generate(
        PROMPT, grammar=grammar, logits_processor=lambda tokens, logits: logits - 5 * tokens[-1], **options
    )
    text = b""
    for token, _ in zip(stream, range(STEPS), strict=False):
        if llama_cpp.llama_vocab_is_eog(llm._model.vocab, token):
            break
        text += llm.detokenize([token])
    assert not set(text) - set(b"abz")


def test_a_grammar_that_a_bias_leaves_no_token_ends_with_an_error(llm):
    grammar = LlamaGrammar.from_string('root ::= "ab"', verbose=False)
    ban = {token: float("-inf") for token in range(N_VOCAB) if llm.detokenize([token]) in (b"a", b"b")}
    with pytest.raises(ClexError, match="no token is left"):
        llm.create_completion(PROMPT, grammar=grammar, logit_bias=ban)
    assert llm.create_completion(PROMPT, grammar=grammar, max_tokens=9)["choices"][0]["text"] == "ab"
