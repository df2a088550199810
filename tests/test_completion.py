"""Completions and chat completions of ``Llama``: what they say of the tokens, with BOS and without."""

from __future__ import annotations

import json
import re
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp import LlamaGrammar, LlamaRAMCache, LogitsProcessorList, StoppingCriteriaList

from clex_local import ClexError, Llama
from helpers.gguf_maker import gguf_bytes
from helpers.random_gguf import N_VOCAB, model_parts

pytestmark = pytest.mark.runtime

PROMPT = "ab cab"
BOS, EOS = 1, 2
CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A random model with sentencepiece's byte vocabulary and other keys than the usual."""
    folder = tmp_path_factory.mktemp("completion")
    open_models = []

    def load(changes: dict[str, Any] | None = None, **options: Any) -> Llama:
        keys, tensors = model_parts(original=512, n_buckets=1)
        path = folder / f"{len(open_models)}.gguf"
        path.write_bytes(gguf_bytes({**keys, **(changes or {})}, tensors))
        exact = {"flash_attn": False, "type_k": 0, "type_v": 0, "n_threads": 1}
        open_models.append(Llama(str(path), **{"n_ctx": 512, "logits_all": True, "verbose": False, **exact, **options}))
        return open_models[-1]

    yield load
    for model in open_models:
        model.close()


@pytest.fixture(scope="module", params=["bos", "no bos"])
def llm(request, make):
    return make({"tokenizer.ggml.add_bos_token": np.bool_(request.param == "bos"), "tokenizer.chat_template": CHAT})


def grammar(text: str) -> LlamaGrammar:
    return LlamaGrammar.from_string(f"root ::= {text}", verbose=False)


def literal(text: str) -> LlamaGrammar:
    return grammar(json.dumps(text, ensure_ascii=False))


def complete(llm: Llama, prompt: Any = PROMPT, **options: Any) -> dict[str, Any]:
    """A completion, after it was seen that the streamed one is the same."""
    options = {"temperature": 0, "max_tokens": 12, **options}
    llm.reset()  # logits differ in the last bits where a part of the prompt is cached
    whole: Any = llm.create_completion(prompt, **options)
    llm.reset()
    parts: Any = list(llm.create_completion(prompt, stream=True, **options))
    choice, choices = whole["choices"][0], [part["choices"][0] for part in parts]
    assert "".join(part["text"] for part in choices) == choice["text"]
    assert [part["finish_reason"] for part in choices] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
    assert choices[-1]["text"] == ""
    assert parts[-1]["usage"] == whole["usage"]
    assert len({part["id"] for part in parts}) == 1
    if options.get("logprobs") is not None:
        for key in ("tokens", "text_offset", "token_logprobs", "top_logprobs"):
            told = [entry for part in choices if part["logprobs"] for entry in part["logprobs"][key]]
            assert told == choice["logprobs"][key]
    return whole


def prompt_tokens(llm: Llama) -> list[int]:
    return [BOS] * llm._model.add_bos_token() + llm.tokenize(PROMPT.encode(), add_bos=False)


def logprobs_of(llm: Llama, tokens: list[int]) -> np.ndarray:
    """Of every token that follows each of `tokens`: float64 [len(tokens), n_vocab]."""
    llm.reset()
    llm.eval(tokens)
    logits = llm.scores[: len(tokens)].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def greedy(llm: Llama, count: int) -> tuple[list[int], np.ndarray]:
    """The likeliest tokens after the prompt, and the logprobs of the whole."""
    tokens = prompt_tokens(llm)
    for _ in range(count):
        tokens.append(int(logprobs_of(llm, tokens)[-1].argmax()))
    return tokens, logprobs_of(llm, tokens)


def name(llm: Llama, token: int) -> str:
    piece = llm.detokenize([token], special=True)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def check_tops(llm: Llama, top: dict[str, float], row: np.ndarray, token: int, n: int) -> None:
    shown = [*np.argsort(-row)[:n], token]
    best = {name(llm, int(i)): row[i] for i in sorted(shown, key=lambda i: row[i])}  # names are not unique
    assert set(top) == set(best)
    for text, value in top.items():
        assert value == pytest.approx(best[text], abs=1e-4)


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("as_list", [False, True])
def test_logprobs_are_those_of_the_logits(llm, n, echo, as_list):
    tokens, rows = greedy(llm, 6)
    start = len(prompt_tokens(llm))
    found = complete(llm, tokens[:start] if as_list else PROMPT, logprobs=n, echo=echo, max_tokens=6)
    choice, logprobs = found["choices"][0], found["choices"][0]["logprobs"]
    first = (1 if tokens[0] == BOS else 0) if echo else start
    assert logprobs["tokens"][-6:] == [name(llm, token) for token in tokens[start:]]
    assert len(logprobs["tokens"]) == len(tokens) - first
    for i, token in enumerate(tokens[first:]):
        value, top = logprobs["token_logprobs"][i], logprobs["top_logprobs"][i]
        if echo and i == 0:  # as OpenAI's API
            assert value is None
            assert top is None
            continue
        row = rows[first + i - 1]
        assert value == pytest.approx(row[token], abs=1e-4)
        check_tops(llm, top, row, token, n)
    # The texts of the tokens lie in the text where the offsets say.
    text = choice["text"] if echo else (" " * as_list) + PROMPT + choice["text"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert text[offset : offset + len(token)] == token
    assert found["usage"] == {"prompt_tokens": start, "completion_tokens": 6, "total_tokens": start + 6}


def test_logprobs_end_where_a_stop_string_begins(llm):
    found = complete(llm, grammar=literal("xy-stop-z"), stop="stop", logprobs=1, max_tokens=50)
    choice = found["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("xy-", "stop")
    assert "".join(choice["logprobs"]["tokens"]) == "xy-"
    assert choice["logprobs"]["text_offset"] == [len(PROMPT) + i for i in range(3)]


def test_logprobs_of_parts_of_characters(llm):
    choice = complete(llm, grammar=literal("ü€!"), logprobs=0, max_tokens=50)["choices"][0]
    assert choice["text"] == "ü€!"
    assert choice["logprobs"]["tokens"] == [*(f"bytes:\\x{byte:02x}" for byte in "ü€".encode()), "!"]
    assert choice["logprobs"]["text_offset"] == [len(PROMPT) + i for i in (0, 0, 1, 1, 1, 2)]
    assert [list(top) for top in choice["logprobs"]["top_logprobs"]] == [
        [name] for name in choice["logprobs"]["tokens"]
    ]


@pytest.mark.parametrize("text", ["Hello 👨‍👩‍👧‍👦 wörld 你好 🎉!", "naïve €100 ☕\nnext\tline", "العربية हिन्दी ไทย"])
def test_text_of_many_bytes_arrives_whole(llm, text):
    choice = complete(llm, grammar=literal(text), max_tokens=None)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")


def test_max_tokens_are_never_exceeded_also_inside_a_character(llm):
    text = "é🎉€"
    for count in range(1, 9):
        found = complete(llm, grammar=literal(text), max_tokens=count)
        assert found["usage"]["completion_tokens"] == count
        assert found["choices"][0]["finish_reason"] == "length"
        assert found["choices"][0]["text"] == text.encode()[:count].decode("utf-8", "ignore")


@pytest.mark.parametrize("unlimited", [None, 0, -1])
def test_completions_without_a_limit_end_with_the_context(make, unlimited):
    llm = make(n_ctx=256)
    bias = {EOS: float("-inf")}
    found = complete(llm, max_tokens=unlimited, logit_bias=bias)
    assert found["usage"]["total_tokens"] == 256
    assert found["choices"][0]["finish_reason"] == "length"
    assert complete(llm, max_tokens=9999, logit_bias=bias)["usage"] == found["usage"]
    with pytest.raises(ValueError, match="256"):
        llm.create_completion([5] * 256)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("STOP HERE", "alpha beta ü "),
        ("TOP HE", "alpha beta ü S"),
        ("ta", "alpha be"),
        (["zzz", "a ü"], "alpha bet"),
        (("HERE", "STOP"), "alpha beta ü "),
        (["b", "a"], ""),
        (["STOP HERE ü delta", "ü delt", "delta"], "alpha beta ü STOP HERE "),
        ("ü", "alpha beta "),
        (["", "beta"], "alpha "),
        ("", None),
        ([], None),
        (None, None),
        (["delta!", "alpha alpha"], None),
    ],
)
def test_stop_strings(llm, stop, expected):
    text = "alpha beta ü STOP HERE ü delta"
    choice = complete(llm, grammar=literal(text), stop=stop, max_tokens=None)["choices"][0]
    assert choice["text"] == (text if expected is None else expected)
    assert choice["finish_reason"] == "stop"


def test_what_may_become_a_stop_string_is_held_back_and_told_at_last(llm):
    options = {"grammar": literal("one two thr"), "stop": "three", "max_tokens": None, "temperature": 0}
    parts = [part["choices"][0]["text"] for part in llm.create_completion(PROMPT, stream=True, **options)]
    assert "".join(parts) == "one two thr"
    assert parts[-2:] == ["thr", ""]


def test_stopping_criteria_end_a_completion_once(llm):
    calls = []

    def third(tokens, logits):
        calls.append(len(tokens))
        return len(tokens) == len(prompt_tokens(llm)) + 2

    options = {"temperature": 0, "stopping_criteria": StoppingCriteriaList([third]), "logit_bias": {EOS: -100}}
    found: Any = llm.create_completion(PROMPT, **options)
    assert (found["usage"]["completion_tokens"], found["choices"][0]["finish_reason"]) == (2, "stop")
    assert len(calls) == 3


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_begins_with_bos(llm, prompt):
    rows = logprobs_of(llm, [BOS])
    found = complete(llm, prompt, logprobs=0, max_tokens=1)
    assert found["usage"] == {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    assert found["choices"][0]["logprobs"]["token_logprobs"][0] == pytest.approx(rows[-1].max(), abs=1e-4)
    # What sentencepiece puts before a text is none of it.
    assert complete(llm, prompt, grammar=grammar('" ab"'), max_tokens=1)["choices"][0]["text"] == ""


def test_bos_stands_once_before_a_prompt(llm):
    def seen(prompt):
        llm.create_completion(prompt, max_tokens=1)
        return llm.input_ids[: llm.n_tokens].tolist()

    plain = llm.tokenize(b"ab", add_bos=False)
    bos = [BOS] * llm._model.add_bos_token()
    assert seen("ab") == bos + plain
    assert seen("<s>ab") == [BOS, *llm.tokenize(b"<s>ab", add_bos=False, special=True)[1:]]
    assert seen(plain) == plain  # tokens are taken as they are
    assert seen([BOS, BOS, *plain]) == [BOS, BOS, *plain]


def test_eos_stands_after_a_prompt_where_the_vocabulary_says_so(make):
    llm = make({"tokenizer.ggml.add_eos_token": np.bool_(True)})
    llm.create_completion("ab", max_tokens=1)
    assert llm.input_ids[: llm.n_tokens].tolist() == [BOS, *llm.tokenize(b"ab", add_bos=False), EOS]


@pytest.mark.parametrize("template", [CHAT, "{{ bos_token }}" + CHAT, "{{ bos_token }}{{ bos_token }}" + CHAT])
@pytest.mark.parametrize("add", [True, False])
def test_bos_stands_once_before_a_chat(make, template, add):
    llm = make({"tokenizer.chat_template": template, "tokenizer.ggml.add_bos_token": np.bool_(add)})
    llm.create_chat_completion([{"role": "user", "content": "ab"}], max_tokens=1)
    tokens = llm.input_ids[: llm.n_tokens].tolist()
    assert tokens.count(BOS) == (1 if add else template.count("bos_token"))
    assert BOS not in tokens[tokens.count(BOS) :]


def test_echo_gives_the_prompt_also_of_tokens(llm):
    assert complete(llm, "a b", echo=True, grammar=literal("xyz"))["choices"][0]["text"] == "a bxyz"
    tokens = [BOS, *llm.tokenize(b"a b", add_bos=False)]
    assert complete(llm, tokens, echo=True, grammar=literal("xyz"))["choices"][0]["text"] == " a bxyz"


FIM = {
    f"tokenizer.ggml.fim_{part}_token_id": np.uint32(token)
    for part, token in (("pre", 270), ("suf", 271), ("mid", 272))
}


@pytest.mark.parametrize("spm", [False, True])
def test_a_suffix_is_infilled_with_the_vocabularys_own_tokens(make, spm):
    llm = make(FIM, spm_infill=spm)
    llm.create_completion("ab", suffix="c d", max_tokens=1)
    before = [270, *llm.tokenize(b"ab", add_bos=False)]
    after = [271, *llm.tokenize(b"c d", add_bos=False)[1:]]  # without the space before a text
    assert after[1:] == [llm.tokenize(b"c", add_bos=False)[-1], *llm.tokenize(b"d", add_bos=False)]
    assert llm.input_ids[: llm.n_tokens].tolist() == [BOS, *(after + before if spm else before + after), 272]
    assert complete(llm, "ab", suffix="c", grammar=literal("xyz"))["choices"][0]["text"] == "xyz"


def test_a_suffix_is_appended_without_such_tokens(llm):
    assert complete(llm, suffix=" end", grammar=literal("xyz"))["choices"][0]["text"] == "xyz end"
    assert complete(llm, suffix=" end", echo=True, grammar=literal("x"))["choices"][0]["text"] == f"{PROMPT}x end"


def draw(llm: Llama, **options: Any) -> str:
    found: Any = llm.create_completion(PROMPT, max_tokens=24, temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, **options)
    return found["choices"][0]["text"]


def test_a_seed_decides_the_text(llm):
    for seed in (0, 5, 2**32 - 2):
        llm.reset()
        text = draw(llm, seed=seed)
        llm.create_completion("zzz", max_tokens=3)
        assert draw(llm, seed=seed) == text
    for seed in (None, -1, llama_cpp.LLAMA_DEFAULT_SEED):
        assert len({draw(llm, seed=seed) for _ in range(3)}) == 3


@pytest.mark.parametrize("seed", [0, 7])
def test_the_seed_of_a_model_decides_all_its_texts(make, seed):
    first, again = make(seed=seed), make(seed=seed)
    texts = [draw(first) for _ in range(3)]
    assert len(set(texts)) == 3
    assert draw(again) == texts[0]
    draw(again, seed=123)  # a call with a seed of its own is none of the sequence
    assert [draw(again) for _ in range(2)] == texts[1:]
    again.set_seed(seed)
    assert [draw(again) for _ in range(3)] == texts


@pytest.mark.parametrize("options", [{}, {"seed": -1}])
def test_without_a_seed_texts_are_random(make, options):
    assert draw(make(**options)) != draw(make(**options))


def test_texts_stay_random_with_a_prompt_cache(make):
    llm = make()
    llm.set_cache(LlamaRAMCache())
    assert len({draw(llm) for _ in range(4)}) == 4
    found = [complete(llm, logprobs=2) for _ in range(2)]
    assert found[0]["choices"][0]["text"] == found[1]["choices"][0]["text"]


class Failure(Exception):
    pass


def fail_at(count: int, error: type[BaseException], *, is_criterion: bool = False):
    calls = []

    def callback(tokens: Any, logits: Any) -> Any:
        calls.append(tokens)
        if len(calls) == count:
            raise error
        return False if is_criterion else logits

    return callback


@pytest.mark.parametrize("error", [Failure, KeyboardInterrupt])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("stream", [False, True])
def test_exceptions_of_callbacks_arrive_and_leave_a_usable_model(llm, error, count, stream, capfd):
    expected = complete(llm)["choices"][0]["text"]
    llm.reset()
    for callback in (
        {"logits_processor": LogitsProcessorList([fail_at(count, error)])},
        {"stopping_criteria": StoppingCriteriaList([fail_at(count, error, is_criterion=True)])},
    ):

        def ask(callback=callback):
            found: Any = llm.create_completion(PROMPT, temperature=0, max_tokens=12, stream=stream, **callback)
            return list(found)

        with pytest.raises(error):
            ask()
        assert complete(llm)["choices"][0]["text"] == expected
    assert capfd.readouterr().err == ""


def test_exceptions_while_a_prompt_is_evaluated_leave_a_usable_model(make):
    llm = make(n_batch=8)
    expected = complete(llm, "a" * 40)["choices"][0]["text"]

    def fail(done, total):
        if done == 16:
            raise Failure

    llm.reset()
    llm.on_prefill = fail
    with pytest.raises(Failure):
        llm.create_completion("a" * 40, temperature=0)
    llm.on_prefill = None
    assert complete(llm, "a" * 40)["choices"][0]["text"] == expected


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (PROMPT, {"logit_bias": {"hello": 1}}, "logit_bias"),
        (PROMPT, {"logit_bias": {N_VOCAB: 1}}, str(N_VOCAB)),
        (PROMPT, {"logit_bias": {-1: 1}}, "-1"),
        (PROMPT, {"logit_bias": {5: "nan"}}, "NaN"),
        (PROMPT, {"logit_bias": {5: None}}, "logit_bias"),
        (PROMPT, {"stop": [5]}, "stop"),
        (PROMPT, {"stop": "\ud800"}, "Unicode"),
        ("bad \ud800", {}, "Unicode"),
        ([5, N_VOCAB], {}, str(N_VOCAB)),
        (PROMPT, {"tfs_z": 0.9}, "tfs_z"),
        (PROMPT, {"mirostat_mode": 9}, "mirostat"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_arguments_are_one_error(llm, prompt, options, message, stream):
    with pytest.raises(ClexError, match=message) as caught:
        list(llm.create_completion(prompt, stream=stream, **options))
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)
    complete(llm)


BAD_GRAMMARS = {
    "empty": "",
    "blank": " \n",
    "only a comment": "# nothing",
    "no root": 'start ::= "a"',
    "undefined rule": "root ::= nothing",
    "unfinished": 'root ::= "a',
    "left recursion": 'root ::= root "a" | "b"',
    "left recursion behind what is empty": 'root ::= a root "z" | "x"\na ::= b\nb ::= "" | "y"',
    "left recursion in a group": 'root ::= ((("a"?)) root "q")* "z"',
    "circle": "root ::= a\na ::= b\nb ::= a",
    "too many repetitions": 'root ::= "a"{100000}',
    "number too large": 'root ::= "a"{99999999999999999999999}',
    "too deep": "root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000,
    "too many rules": "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(100_000)) + 'r100000 ::= "a"',
    "null character": 'root ::= "a"\0',
    "no Unicode": 'root ::= "\ud800"',
    "unknown token": "root ::= <nothing>",
}


@pytest.mark.parametrize("text", BAD_GRAMMARS.values(), ids=BAD_GRAMMARS.keys())
def test_invalid_grammars_are_one_error(llm, text, capfd):
    for ask in (llm.create_completion, lambda prompt, **options: next(llm.generate([5], **options))):
        with pytest.raises(ClexError, match="grammar") as caught:
            ask(PROMPT, grammar=LlamaGrammar.from_string(text, verbose=False))
        assert isinstance(caught.value, ValueError)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
    complete(llm)


@pytest.mark.parametrize("wrong", ['root ::= "a"', 5, object()])
def test_what_is_no_grammar_is_one_error(llm, wrong):
    with pytest.raises(ClexError, match=r"LlamaGrammar\.from_string"):
        llm.create_completion(PROMPT, grammar=wrong)


def test_a_grammar_can_be_used_again(llm):
    numbers = grammar('"1" "2"* "3"')
    for _ in range(3):
        assert re.fullmatch("12*3?", complete(llm, grammar=numbers)["choices"][0]["text"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("root ::= nothing", "nothing"),
        ('root ::= root "a"', "left recursion"),
        ('start ::= "a"', "root"),
        ('root ::= "a', "end of input"),
    ],
)
def test_an_invalid_grammar_says_why(llm, text, reason):
    with pytest.raises(ClexError, match=f"grammar is not valid: .*{reason}"):
        llm.create_completion(PROMPT, grammar=LlamaGrammar.from_string(text, verbose=False))


QUESTION = [{"role": "user", "content": "ab"}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "y"]}, "n": {"$ref": "#/$defs/N"}},
    "required": ["a", "n"],
    "additionalProperties": False,
    "$defs": {"N": {"type": "boolean"}},
}


def chat(llm: Llama, **options: Any) -> dict[str, Any]:
    """A chat completion, after it was seen that the streamed one is the same."""
    options = {"temperature": 0, "max_tokens": 12, **options}
    llm.reset()
    whole: Any = llm.create_chat_completion(QUESTION, **options)
    llm.reset()
    parts: Any = list(llm.create_chat_completion(QUESTION, stream=True, **options))
    choice, deltas = whole["choices"][0], [part["choices"][0]["delta"] for part in parts]
    calls = [call for delta in deltas for call in delta.get("tool_calls") or ()]
    if choice["message"].get("tool_calls"):
        told = choice["message"]["tool_calls"][0]["function"]
        assert "".join(call["function"]["arguments"] for call in calls) == told["arguments"]
        assert {call["function"]["name"] for call in calls} == {told["name"]}
    else:
        assert "".join(delta.get("content") or "" for delta in deltas) == choice["message"]["content"]
    assert [part["choices"][0]["finish_reason"] for part in parts][-1] == choice["finish_reason"]
    assert parts[-1]["usage"] == whole["usage"]
    if options.get("logprobs"):
        told = [part["choices"][0]["logprobs"] for part in parts]
        assert [token for entry in told if entry for token in entry["content"]] == choice["logprobs"]["content"]
    return whole


@pytest.mark.parametrize("n", [None, 0, 3])
def test_logprobs_of_a_chat(llm, n):
    found = chat(llm, logprobs=True, top_logprobs=n, grammar=literal("aü"))["choices"][0]
    tokens = found["logprobs"]["content"]
    assert [token["token"] for token in tokens] == ["a", "bytes:\\xc3", "bytes:\\xbc"]
    assert bytes(byte for token in tokens for byte in token["bytes"]).decode() == "aü"
    computed = llm.input_ids[: llm.n_tokens].tolist()  # prompt and answer
    for token, row in zip(tokens, logprobs_of(llm, computed)[-4:], strict=False):
        assert len(token["top_logprobs"]) == (n or 0)
        best = [top["logprob"] for top in token["top_logprobs"]]
        assert best == sorted(best, reverse=True)
        if n:
            assert best[0] == pytest.approx(row.max(), abs=1e-4)
    assert chat(llm)["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("chat_format", [None, "chatml", "chatml-function-calling"])
@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
        {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
        {"type": "json_object", "schema": SCHEMA},
    ],
)
def test_a_schema_constrains_the_answer(make, chat_format, response_format):
    llm = make({"tokenizer.chat_template": CHAT}, chat_format=chat_format)
    text = chat(llm, response_format=response_format, max_tokens=200, logit_bias={"35": -50, "12": -50, "16": -50})
    answer = json.loads(text["choices"][0]["message"]["content"])
    assert set(answer) == {"a", "n"}
    assert answer["a"] in ("x", "y")
    assert isinstance(answer["n"], bool)


def test_json_of_any_kind_and_any_text(llm):
    choice = chat(llm, response_format={"type": "json_object"})["choices"][0]
    assert choice["message"]["content"].lstrip().startswith("{")
    free = chat(llm)["choices"][0]["message"]["content"]
    assert chat(llm, response_format={"type": "text"})["choices"][0]["message"]["content"] == free


@pytest.mark.parametrize(
    ("part", "expected"),
    [({}, r'\{"v":'), (True, r'\{"v":'), ({"title": "V"}, r'\{"v":'), ({"type": "array", "items": {}}, r'\{"v":\[')],
)
def test_values_of_any_kind_are_schemas_too(llm, part, expected):
    """As pydantic writes ``Any`` and ``list[Any]``."""
    schema = {"type": "object", "properties": {"v": part}, "required": ["v"]}
    request = {"type": "json_schema", "json_schema": {"schema": schema}}
    text = chat(llm, response_format=request, max_tokens=30)["choices"][0]["message"]["content"]
    assert re.match(expected, re.sub(r"\s", "", text))


@pytest.mark.parametrize(
    ("response_format", "message"),
    [
        ({"type": "xml"}, "xml"),
        ({}, "type"),
        ("json_object", "type"),
        ({"type": "json_schema"}, "schema"),
        ({"type": "json_schema", "json_schema": {"name": "n"}}, "schema"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "strange"}}}, "strange"),
        ({"type": "json_schema", "json_schema": {"schema": {"$ref": "#/$defs/no"}}}, "schema"),
        ({"type": "json_schema", "json_schema": {"schema": {"$ref": "https://example.com/s.json"}}}, "schema"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "(?=x)"}}}, "schema"),
        ({"type": "json_schema", "json_schema": {"schema": []}}, "schema"),
        ({"type": "json_object", "schema": {"type": "object", "properties": {"a": {"type": 5}}}}, "schema"),
        ({"type": "json_object", "schema": {"enum": [{1, 2}]}}, "schema"),
    ],
)
def test_formats_that_cannot_constrain_are_one_error(llm, response_format, message):
    with pytest.raises(ClexError, match=message) as caught:
        llm.create_chat_completion(QUESTION, response_format=response_format)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


NAN = float("nan")


@pytest.mark.parametrize(
    "arguments",
    [
        *({name: NAN} for name in ("temperature", "top_p", "min_p", "typical_p", "repeat_penalty")),
        *({name: NAN} for name in ("frequency_penalty", "presence_penalty", "mirostat_tau", "mirostat_eta")),
        *({"temperature": value} for value in ("0", None, float("inf"), [1])),
        *({"top_k": value} for value in ("a", 1.5, None, 2**32 + 1, True)),
        *({"max_tokens": value} for value in (2.5, "2", NAN)),
        *({"logprobs": value} for value in (-1, "1", 1.5)),
        *({"seed": value} for value in ("x", 1.5)),
        *({"stop": value} for value in (5, b"ab", [None], [5], {"a": 1})),
        *({"prompt": value} for value in (b"ab", bytearray(b"ab"), None, 5, ["a"], [[1, 2]], [1.5], [True, 2], {})),
    ],
    ids=str,
)
def test_an_argument_of_another_kind_is_one_error_at_once(llm, arguments):
    for stream in (False, True):
        with pytest.raises(ClexError, match=next(iter(arguments))) as caught:
            llm.create_completion(**{"prompt": PROMPT, "max_tokens": 2, "stream": stream, **arguments})
        assert isinstance(caught.value, ValueError)
        assert "\n" not in str(caught.value)


def test_numbers_of_numpy_are_numbers(llm):
    options = {"temperature": np.float32(0), "top_k": np.int64(3), "max_tokens": np.int32(2), "seed": np.uint32(5)}
    answer: Any = llm.create_completion(np.array(prompt_tokens(llm)), logprobs=np.int64(0), **options)
    assert answer["usage"]["completion_tokens"] == 2


def test_two_constraints_are_one_error(llm):
    with pytest.raises(ClexError, match="exclude"):
        llm.create_chat_completion(QUESTION, response_format={"type": "json_object"}, grammar=literal("a"))


TOOL = {"name": "look", "parameters": {"type": "object", "properties": {"q": {"enum": ["x"]}}, "required": ["q"]}}
TOOLS = {"tools": [{"type": "function", "function": TOOL}]}
CHOSEN = {"type": "function", "function": {"name": "look"}}


@pytest.mark.parametrize("chat_format", [None, "chatml-function-calling"])
@pytest.mark.parametrize(
    "request_",
    [
        {**TOOLS, "tool_choice": CHOSEN},
        {**TOOLS, "tool_choice": "required"},
        {"functions": [TOOL], "function_call": {"name": "look"}},
    ],
)
def test_a_chosen_tool_is_called(make, chat_format, request_):
    llm = make({"tokenizer.chat_template": CHAT}, chat_format=chat_format)
    found = chat(llm, max_tokens=60, logit_bias={"35": -50, "12": -50, "16": -50}, **request_)["choices"][0]
    assert found["finish_reason"] == "tool_calls"
    assert found["message"]["content"] is None
    (call,) = found["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "look")
    assert json.loads(call["function"]["arguments"]) == {"q": "x"}
    assert chat(llm, max_tokens=3, **request_)["choices"][0]["finish_reason"] == "length"  # cut off


def test_tools_without_parameters_and_tools_that_cannot_be_chosen(llm):
    bare = {"tools": [{"type": "function", "function": {"name": "look"}}], "tool_choice": CHOSEN}
    arguments = chat(llm, max_tokens=4, **bare)["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]
    assert arguments.lstrip().startswith("{")
    strange = {"name": "look", "parameters": {"type": "object", "properties": {"q": {"type": "strange"}}}}
    with pytest.raises(ClexError, match=r"look.*strange"):
        llm.create_chat_completion(QUESTION, tools=[{"type": "function", "function": strange}], tool_choice=CHOSEN)
    two = [{"type": "function", "function": {**TOOL, "name": name}} for name in ("look", "find")]
    with pytest.raises(ClexError, match="required"):
        llm.create_chat_completion(QUESTION, tools=two, tool_choice="required")


def test_seed_and_bias_reach_every_chat_format(make):
    llm = make({"tokenizer.chat_template": CHAT}, chat_format="chatml-function-calling")
    options = {"temperature": 2.0, "max_tokens": 20, "seed": 4}
    texts = {llm.create_chat_completion(QUESTION, **options)["choices"][0]["message"]["content"] for _ in range(3)}
    assert len(texts) == 1
    assert chat(llm, logit_bias={"262": 1000}, max_tokens=5)["choices"][0]["message"]["content"] == name(llm, 262) * 5


def test_a_chat_whose_prompt_ends_with_eos_is_answered(make):
    llm = make({"tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"})
    assert chat(llm, grammar=literal("xyz"))["choices"][0]["message"]["content"] == "xyz"


@pytest.mark.parametrize("stop", ["b", ["b"], ("b",), None])
def test_stops_of_a_chat(llm, stop):
    text = chat(llm, stop=stop, grammar=literal("aabaa"))["choices"][0]["message"]["content"]
    assert text == ("aabaa" if stop is None else "aa")


def test_a_model_without_bos_and_with_other_tokens_than_bytes(smollm):
    llm = Llama(str(smollm), n_ctx=256, logits_all=True, verbose=False, flash_attn=False, type_k=0, type_v=0)
    prompt = "The capital of France"
    tokens = llm.tokenize(prompt.encode(), add_bos=False)
    rows = logprobs_of(llm, tokens)
    found: Any = llm.create_completion(prompt, echo=True, logprobs=3, max_tokens=3, temperature=0)
    logprobs = found["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == found["choices"][0]["text"]
    values = rows[np.arange(len(tokens) - 1), tokens[1:]]
    assert logprobs["token_logprobs"][0] is None
    np.testing.assert_allclose(logprobs["token_logprobs"][1 : len(tokens)], values, atol=1e-3)
    for i, top in enumerate(logprobs["top_logprobs"][1 : len(tokens)]):
        check_tops(llm, top, rows[i], tokens[i + 1], 3)
    llm.close()
