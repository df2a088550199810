"""Tokens guessed from the text so far: which are, when, and that no answer is another for it."""

from __future__ import annotations

import itertools
import json
import pickle

import llama_cpp
import numpy as np
import pytest
from click.testing import CliRunner
from llama_cpp import LlamaGrammar
from llama_cpp.llama_speculative import LlamaDraftModel

from clex_local import Llama, open_model
from clex_local.chat.cli import main
from clex_local.chat.conversation import Chat
from clex_local.chat.terminal import Terminal
from clex_local.runtime.prompt_lookup import PromptLookup
from clex_local.session.session import Session
from helpers.random_architectures import make_architecture
from helpers.random_gguf import make_model, random_tokens

pytestmark = pytest.mark.runtime

PROMPT = random_tokens(12, seed=3) * 3


def ids(tokens):
    return np.array(tokens, np.intc)


def unlike(count, start=1000):
    """Tokens that never repeat."""
    return list(range(start, start + count))


def guesses(text, **options):
    return PromptLookup(**options)(ids(text)).tolist()


def drafts(text, start, lookup=None):
    """The guesses before each token of a text from `start` on, where every token is drawn alone."""
    lookup = lookup or PromptLookup()
    return [lookup(ids(text[:end])).tolist() for end in range(start, len(text))]


def test_the_text_goes_on_as_it_did():
    text = unlike(40)
    assert guesses([*text, 5, *text[10:16]]) == text[16:23]
    assert guesses(text) == []
    assert guesses([]) == guesses([7]) == guesses([7, 8]) == []


def test_the_place_that_agrees_longest_is_taken_and_of_several_the_latest():
    end = unlike(6)
    text = [*unlike(10, 100), *end, *unlike(10, 200), 1, *end, *unlike(10, 300), 1, *end[2:], *unlike(10, 400), 1, *end]
    assert guesses(text) == unlike(7, 300)
    text = [*end, *unlike(10, 200), *end, *unlike(10, 300), *end]
    assert guesses(text) == unlike(7, 300)


def test_guesses_and_the_token_before_them_lie_in_one_block():
    """The bits of attention depend on how many blocks of 64 positions the tokens of a batch see."""
    for length in range(140, 280):
        text = (unlike(70) * 4)[:length]
        found = guesses(text)
        assert len(found) in (0, *range(3, 8))
        assert (length - 1) // 64 == (length - 1 + len(found)) // 64
        assert len(found) == min(7, 64 - length % 64 if length % 64 else 0) or len(found) == 0


def test_wrong_guesses_are_not_gone_on_with_and_right_ones_begin_them_again():
    rng = np.random.default_rng(0)
    phrases = [unlike(8, 100 * i) for i in range(1, 9)]
    # phrases return, but what follows them never does
    text = list(itertools.chain(*([*phrases[rng.integers(8)][:6], *unlike(4, 10_000 + 4 * i)] for i in range(300))))
    lookup = PromptLookup()
    found = [len(tokens) for tokens in drafts(text, 100, lookup)]
    assert sum(found) < 0.03 * len(found)
    text += text[500:600]
    assert sum(len(tokens) for tokens in drafts(text, len(text) - 80, lookup)) > 300


def test_what_batches_cost_decides():
    text = [*unlike(40), 5, *unlike(3, 1010)]
    assert guesses(text) == []
    assert guesses(text, cost=2) == unlike(7, 1013)


def test_a_text_that_is_taken_back_leaves_nothing():
    rng = np.random.default_rng(1)
    lookup = PromptLookup(cost=1.5)
    for _ in range(60):
        text = rng.integers(0, 3, rng.integers(0, 200)).tolist()
        for end in (len(text) // 2, len(text)):
            found = lookup(ids(text[:end])).tolist()
        lookup(ids([9]))  # with it all that was counted
        lookup(ids(text))
        fresh = PromptLookup(cost=1.5)
        fresh(ids([9]))
        assert lookup(ids(text)).tolist() == fresh(ids(text)).tolist() == guesses(text, cost=1.5)
        del found


def test_what_stands_for_an_image_is_not_guessed():
    text = [*unlike(30), -7, *unlike(5, 2000), *unlike(30)[20:27]]
    assert guesses(text, cost=2) == unlike(3, 1027)


def test_a_long_text_is_taken_in_once():
    """Work grows with the text, not with its square."""

    class Counted(PromptLookup):
        added = 0

        def _add(self, token):
            self.added += 1
            super()._add(token)

    text = np.random.default_rng(0).integers(0, 50_000, 100_000).astype(np.intc)
    lookup = Counted()
    for end in range(99_900, 100_000):
        lookup(text[:end])
    assert lookup.added == 99


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("lookup") / "model.gguf")


@pytest.fixture
def load():
    opened = []

    def open_model(path, **options):
        exact = {"n_ctx": 0, "type_k": 0, "type_v": 0, "n_threads": 1, "verbose": False}
        opened.append(Llama(path, **{**exact, **options}))
        return opened[-1]

    yield open_model
    for llm in opened:
        llm.close()


class Oracle(LlamaDraftModel):
    """Knows the text, and is wrong now and then."""

    def __init__(self, text, wrong_every=0):
        self.text, self.wrong_every = text, wrong_every

    def __call__(self, input_ids, /, **kwargs):
        draft = ids(self.text[len(input_ids) : len(input_ids) + 5])
        if self.wrong_every and len(input_ids) % self.wrong_every == 0:
            draft[2:] = 5
        return draft


def answers(llm, **options):
    """An answer without guesses, and with many."""
    plain = list(itertools.islice(llm.generate(PROMPT, **options), 150))
    llm.reset()
    llm.draft_model = Oracle(PROMPT + plain, wrong_every=3)
    return plain, list(itertools.islice(llm.generate(PROMPT, **options), 150))


DRAWN = {
    "likeliest": {"temp": 0},
    "drawn": {"temp": 0.7, "top_k": 5},
    "penalties": {"temp": 0.5, "repeat_penalty": 1.02, "frequency_penalty": 0.01},
    "mirostat": {"temp": 0.5, "mirostat_mode": 2, "mirostat_tau": 1.0},
    "grammar": {"temp": 0.5, "grammar": LlamaGrammar.from_string('root ::= ("abc" | "d")*', verbose=False)},
    "processor": {"temp": 0, "logits_processor": lambda tokens, logits: logits * (1 + 0.01 * (len(tokens) % 2))},
}


@pytest.mark.parametrize("drawn", DRAWN.values(), ids=DRAWN)
def test_answers_are_the_same(load, path, drawn):
    """Across the ends of tables too."""
    llm = load(path, seed=5)
    plain, guessed = answers(llm, **drawn)
    assert plain == guessed
    assert llm.clex.rerotations > 0
    assert 50 < llm.accepted_tokens < llm.drafted_tokens


@pytest.mark.parametrize(("name", "guesses"), [("gemma2", True), ("deepseek2", True), ("lfm2", False)])
def test_other_caches(load, tmp_path, name, guesses):
    """Windows, latent attention; a hybrid, which cannot forget, guesses nothing."""
    path = make_architecture(tmp_path / "model.gguf", name, tables=False, original=256)
    llm = load(path, n_ctx=256, swa_full=False)
    plain, guessed = answers(llm, temp=0)
    assert plain == guessed
    assert (llm.drafted_tokens > 0) == guesses


def test_no_guesses_where_the_length_scales_queries(load, tmp_path):
    llm = load(make_model(tmp_path / "model.gguf", log_scale=True))
    plain, guessed = answers(llm, temp=0)
    assert (plain, llm.drafted_tokens) == (guessed, 0)


class Eager(PromptLookup):
    """Guesses wherever it can, so that short texts do."""

    def __init__(self):
        super().__init__(cost=1)


def test_completions_tell_the_same(load, path):
    for options in ({"logprobs": 2}, {"stop": "b"}, {"stream": True}, {"max_tokens": 7}, {"max_tokens": None}):
        texts = []
        for draft in (None, Eager()):
            llm = load(path, logits_all=True, draft_model=draft, flash_attn=False)
            found = llm.create_completion(PROMPT, **{"max_tokens": 60, "temperature": 0.3, "seed": 3, **options})
            parts = list(found) if options.get("stream") else [found]
            for part in parts:
                del part["id"], part["created"]
            texts.append(parts)
            if options in ({"logprobs": 2}, {"max_tokens": None}):
                assert (llm.drafted_tokens > 0) == (draft is not None)
        if options == {"logprobs": 2}:
            rows = [part[0]["choices"][0].pop("logprobs") for part in texts]
            assert rows[0]["tokens"] == rows[1]["tokens"]
            np.testing.assert_allclose(rows[0]["token_logprobs"], rows[1]["token_logprobs"], atol=1e-4)
        assert texts[0] == texts[1]


def logits(llm):
    return llm._logits(llm.n_tokens - 1).copy()


def test_between_two_tokens_there_are_no_guesses(load, path):
    """Who stops a stream in the middle goes on from what it has said, and not from what was guessed."""
    plain = load(path)
    sequence = [*PROMPT, *itertools.islice(plain.generate(PROMPT, temp=0), 40)]
    llm = load(path, draft_model=Oracle(sequence))
    for count in range(1, 14):
        seen = []
        for model in (plain, llm):
            model.reset()
            stream = model.generate(PROMPT, temp=0)
            for _ in range(count):
                next(stream)
            state = model.save_state()
            seen.append([model.n_tokens, state.n_tokens, model.sample(temp=0), logits(model)])
            stream.close()
            stream = model.generate(model.input_ids[: model.n_tokens].tolist(), temp=0)
            seen[-1].append([next(stream), next(stream)])
            stream.close()
            model.load_state(state)
            model.eval([5, 6])
            seen[-1].append(logits(model))
        for one, other in zip(*seen, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)
    assert llm.accepted_tokens > 0


def test_tokens_that_are_sent_take_the_place_of_guesses(load, path):
    found = []
    plain = load(path)
    sequence = [*PROMPT, *itertools.islice(plain.generate(PROMPT, temp=0), 40)]
    for model in (plain, load(path, draft_model=Oracle(sequence))):
        model.reset()
        stream = model.generate(PROMPT, temp=0)
        tokens = [next(stream) for _ in range(3)]
        tokens += [stream.send([7, 8, 9]), *(next(stream) for _ in range(5))]
        found.append(tokens)
    assert found[0] == found[1]


def test_an_interrupt_in_the_middle_of_guesses_leaves_what_was_said(load, path):
    plain = load(path)
    sequence = [*PROMPT, *itertools.islice(plain.generate(PROMPT, temp=0), 40)]
    llm = load(path, draft_model=Oracle(sequence))

    def interrupt(tokens, logits):
        if len(tokens) == len(PROMPT) + 9:
            raise KeyboardInterrupt
        return logits

    said = []
    with pytest.raises(KeyboardInterrupt):
        said.extend(llm.generate(PROMPT, temp=0, logits_processor=interrupt))
    assert llm.n_tokens == len(PROMPT) + 9
    again = list(itertools.islice(llm.generate(sequence[: llm.n_tokens], temp=0), 10))
    assert again == sequence[len(PROMPT) + 9 :][:10]


def test_options_of_llama(load, path):
    assert load(path).draft_model is None
    llm = load(path, prompt_lookup=True)
    assert llm.draft_model is not None
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.draft_model is not None
    copy.close()
    with pytest.raises(ValueError, match="prompt_lookup and draft_model exclude each other"):
        load(path, prompt_lookup=True, draft_model=PromptLookup())


QUOTE = "The old lighthouse keeper wrote in his book that a storm had come from the north-west at four in the morning."


def test_a_small_model_repeats_a_text_the_same_and_is_counted(smollm):
    """Quantized weights, where each token of a batch must have the bits that it has alone: chance decides otherwise."""
    answers = []
    for lookup in (False, True):
        with open_model(smollm, ctx=1024, kv_type="f16", seed=1, prompt_lookup=lookup) as llm:
            session = Session(llm)
            text = "".join(session.send(f"Repeat this text word by word:\n\n{QUOTE}", max_tokens=60))
            answers.append((text, session.last, session.totals))
            stats = Chat(Terminal(session), "model", "cache").stats()
            assert ("guesses were right" in stats) == lookup
    assert answers[0][0] == answers[1][0]
    plain, guessed = answers[0][1], answers[1][1]
    assert (plain.drafted_tokens, plain.accepted_tokens) == (0, 0)
    assert 0 < guessed.accepted_tokens <= guessed.drafted_tokens
    assert answers[1][2].accepted_tokens == guessed.accepted_tokens


def test_command_reports_guesses(smollm):
    question = ["-p", f"Repeat this text word by word:\n\n{QUOTE}", "--temp", "0", "--max-tokens", "40", "--ctx", "512"]
    found = []
    for lookup in (["--prompt-lookup"], []):
        result = CliRunner().invoke(main, [str(smollm), *question, *lookup, "--json"], catch_exceptions=False)
        found.append(json.loads(result.stdout))
    assert found[0]["text"] == found[1]["text"]
    assert 0 < found[0]["accepted_tokens"] <= found[0]["drafted_tokens"]
    assert found[1]["drafted_tokens"] == found[1]["accepted_tokens"] == 0


def test_a_batch_within_a_block_has_the_bits_of_single_tokens(smollm):
    """On a CPU, for weights whose products ggml does not compute otherwise for several tokens."""
    with Llama(str(smollm), n_ctx=512, flash_attn=True, n_threads=2, n_gpu_layers=0, verbose=False) as llm:
        tokens = llm.tokenize(QUOTE.encode() * 6)
        llm._logits_all = False
        for start in (64, 100, 120):
            alone, together = [], []
            for rows, sizes in ((alone, [1] * 8), (together, [8])):
                llm.n_tokens = 0
                llm.eval(tokens[:start])
                for size in sizes:
                    llm._decode(tokens[llm.n_tokens : llm.n_tokens + size], True)
                    rows += [
                        np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, i), (llm.n_vocab(),)).copy()
                        for i in range(size)
                    ]
            np.testing.assert_array_equal(alone, together)
