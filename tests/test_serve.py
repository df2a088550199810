"""clex-serve: real clients, conversations of different lengths at once, what is too long or wrong, and what is kept."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from clex_local import ClexError, Llama, serve
from clex_local.server.options import ServeOptions
from clex_local.server.plan import plan_service
from clex_local.server.process import Server, ServerError
from clex_local.store.documents import store_folder
from helpers.gguf_maker import gguf_bytes
from helpers.random_gguf import model_parts, random_tokens

pytestmark = pytest.mark.serve

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LENGTH = 64  # tokens of the first of four buckets
# SmolLM2's own template knows no tools.
TOOLS = ("--chat-template-file", str(Path(__file__).parent / "data" / "tools.jinja"))
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}


def make(path: Path, template: str = CHATML, **options: Any) -> Path:
    keys, tensors = model_parts(**{"original": LENGTH, **options})
    # F32 throughout, so that results do not depend on what is computed beside them.
    path.write_bytes(gguf_bytes({**keys, "tokenizer.chat_template": template}, tensors))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def tiny(folder) -> Path:
    """Tables for 64, 128, 192 and 256 tokens."""
    return make(folder / "tiny.gguf")


@pytest.fixture(scope="module")
def big(folder) -> Path:
    """Tables for 4,096 and 8,192 tokens, each of which takes about a millisecond."""
    return make(folder / "big.gguf", n_layer=8, n_head=8, n_head_kv=8, original=4096, n_buckets=2)


@contextmanager
def serving(model: Path | list[Path], *server_args: str, **options: Any) -> Iterator[httpx.Client]:
    given = {"port": 0, "ctx": 0, "parallel": 4, "threads": 1, "batch": 32, "kv_type": "f32", **options}
    with (
        serve(model, server_args=("--no-warmup", *server_args), **given) as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def client(tiny, folder) -> Iterator[httpx.Client]:
    (folder / "slots").mkdir()
    with serving(tiny, "--slot-save-path", f"{folder / 'slots'}{os.sep}") as client:
        yield client


def complete(client: httpx.Client, prompt: list[int], n_predict: int = 8, **more: Any) -> dict[str, Any]:
    """A completion at temperature 0, by the server's own API."""
    asked = {"prompt": prompt, "n_predict": n_predict, "temperature": 0, "return_tokens": True, "ignore_eos": True}
    answer = client.post("/completion", json={**asked, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def erase(client: httpx.Client, slots: int = 4) -> None:
    for slot in range(slots):
        assert client.post(f"/slots/{slot}?action=erase", json={}).status_code == 200


def refused(client: httpx.Client, path: str, **request: Any) -> tuple[int, str]:
    """Status and message of a request that fails; the server answers others after it."""
    answer = client.post(path, **request)
    assert client.get("/health").json() == {"status": "ok"}
    return answer.status_code, answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def alone(tiny):
    """What the bindings answer, each prompt in an empty context: the tables are those of its own length."""
    llm = Llama(tiny, n_ctx=0, type_k=0, type_v=0, n_threads=1, n_batch=32, verbose=False)

    def answer(prompt: list[int], count: int = 8) -> list[int]:
        llm.reset()
        steps = llm.generate(prompt, temp=0)
        return [next(steps) for _ in range(count)]

    yield answer
    llm.close()


#
# lengths
#


@pytest.mark.parametrize("length", [20, 70, 150, 220])
def test_prompt_is_read_with_the_table_of_its_length(client, alone, length):
    erase(client)
    prompt = random_tokens(length, seed=length)
    answer = complete(client, prompt)
    assert answer["tokens"] == alone(prompt)
    clex = answer["timings"]["clex"]
    assert (clex["bucket"], clex["t"], clex["covers"]) == (length // 64, length // 64 + 1, 64 * (length // 64 + 1))
    assert clex["rerotations"] == 0  # the whole prompt's table was taken from its first batch of 32 on


def test_conversations_of_four_lengths_at_once(client, alone):
    erase(client)
    prompts = [random_tokens(length, seed=length) for length in (30, 80, 150, 200)]
    for _ in range(2):  # once read, once reused
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda prompt: complete(client, prompt, 24), prompts))
        assert [answer["tokens"] for answer in answers] == [alone(prompt, 24) for prompt in prompts]
        assert [answer["timings"]["clex"]["bucket"] for answer in answers] == [0, 1, 2, 3]


def test_several_answers_to_one_prompt(client, alone):
    erase(client)
    prompt = random_tokens(100, seed=5)
    answers = client.post(
        "/completion", json={"prompt": prompt, "n": 3, "n_predict": 40, "temperature": 0, "return_tokens": True}
    ).json()
    assert [answer["tokens"] for answer in answers] == [alone(prompt, 40)] * 3
    assert {answer["timings"]["clex"]["bucket"] for answer in answers} == {2}


def test_answer_that_outgrows_its_table(client, alone):
    erase(client)
    prompt = random_tokens(50, seed=9)
    before = metric(client, "clex_rerotations_total")
    answer = complete(client, prompt, 100)
    assert answer["tokens"] == alone(prompt, 100)
    assert answer["timings"]["clex"]["bucket"] == 2
    assert answer["timings"]["clex"]["rerotations"] == 2
    assert answer["timings"]["clex"]["rerotated_cells"] == 64 + 128
    assert metric(client, "clex_rerotations_total") == before + 2
    assert metric(client, "clex_rerotated_cells_total") >= 64 + 128
    assert metric(client, "clex_rerotation_seconds_total") > 0


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"llamacpp:{name} ")))


def test_tables_are_shown(client):
    erase(client)
    assert client.get("/props").json()["clex"] == {
        "method": "ntk",
        "original_context": 64,
        "max_context": 256,
        "scaling_factors": [1, 2, 3, 4],
        "buckets": [64, 128, 192, 256],
        "log_scale": False,
    }
    assert not any("clex" in slot for slot in client.get("/slots").json())
    complete(client, random_tokens(100), id_slot=2)
    shown = [slot.get("clex", {}).get("bucket") for slot in client.get("/slots").json()]
    assert shown == [None, None, 1, None]


def test_table_is_shown_while_a_text_is_read_and_written(client):
    erase(client)
    asked = {"prompt": random_tokens(100), "n_predict": 40, "ignore_eos": True, "stream": True}
    with client.stream(
        "POST", "/completion", json={**asked, "return_progress": True, "timings_per_token": True}
    ) as stream:
        chunks = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
    read = [chunk for chunk in chunks if "prompt_progress" in chunk]
    assert read[0]["prompt_progress"]["processed"] == 0
    assert {chunk["timings"]["clex"]["bucket"] for chunk in read} == {1}
    written = [chunk["timings"]["clex"]["covers"] for chunk in chunks if "prompt_progress" not in chunk]
    assert sorted(set(written)) == [128, 192]
    assert written == sorted(written)


def test_context_shift_keeps_its_table(tiny):
    with serving(tiny, "--context-shift", parallel=1) as client:
        answer = complete(client, random_tokens(40), 700, n_keep=4)
        assert answer["timings"]["predicted_n"] == 700
        assert answer["truncated"] is True
        assert answer["timings"]["clex"]["bucket"] == 3
        assert answer["timings"]["clex"]["rerotations"] == 3  # once into each table, none for shifts
        # The next conversation is as long as it is.
        assert complete(client, random_tokens(30, seed=2))["timings"]["clex"]["bucket"] == 0


NGRAMS = ("--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "2", "--spec-ngram-simple-size-m", "9")


@pytest.mark.parametrize("drafts", ["of the text", "of the model", "of another model"])
def test_drafts_end_with_the_table(tiny, folder, drafts):
    prompt = random_tokens(8, seed=1) * 6
    other = make(folder / "draft.gguf", seed=1)
    model = {"of the model": tiny, "of another model": other}.get(drafts)
    options = ("--model-draft", str(model), "--spec-type", "draft-simple", "--spec-draft-n-max", "9")
    with serving(tiny, *(options if model else NGRAMS), parallel=1) as client:
        answer = complete(client, prompt, 180)
        assert answer["timings"]["draft_n"] > 0
        assert answer["timings"]["clex"]["rerotations"] == 3
    with serving(tiny, parallel=1) as client:
        assert answer["tokens"] == complete(client, prompt, 180)["tokens"]


def test_prompt_lookup_guesses_and_changes_no_answer(tiny):
    prompt = random_tokens(8, seed=1) * 6
    found = []
    for lookup in (False, True):
        with serving(tiny, parallel=1, prompt_lookup=lookup) as client:
            found.append(complete(client, prompt, 100))
    assert found[0]["tokens"] == found[1]["tokens"]
    assert "draft_n" not in found[0]["timings"]
    assert found[1]["timings"]["draft_n"] > 0


def test_length_of_the_text_scales_queries_without_drafts(folder):
    model = make(folder / "log-scale.gguf", log_scale=True)
    prompt = random_tokens(8, seed=1) * 12
    with serving(model, *NGRAMS, parallel=1) as client:
        answer = complete(client, prompt, 20)
        assert "draft_n" not in answer["timings"]
    with Llama(model, n_ctx=0, type_k=0, type_v=0, n_threads=1, n_batch=32, verbose=False) as llm:
        steps = llm.generate(prompt, temp=0)
        assert answer["tokens"] == [next(steps) for _ in range(20)]


def test_model_without_tables(folder):
    model = make(folder / "plain.gguf", tables=False, original=256)
    prompt = random_tokens(150)
    with serving(model) as client:
        answer = complete(client, prompt)
        assert "clex" not in answer["timings"]
        assert "clex" not in client.get("/props").json()
        assert not any("clex" in slot for slot in client.get("/slots").json())
    with Llama(model, n_ctx=256, type_k=0, type_v=0, n_threads=1, n_batch=32, verbose=False) as llm:
        steps = llm.generate(prompt, temp=0)
        assert answer["tokens"] == [next(steps) for _ in range(8)]


#
# what is reused
#


@pytest.mark.parametrize("kept", [{}, {"log_scale": True}], ids=["buckets", "log scale"])
def test_exact_reuse(folder, kept):
    model = make(folder / f"exact-{len(kept)}.gguf", **kept)
    short, more = random_tokens(40, seed=1), random_tokens(60, seed=2)
    with serving(model, parallel=1, prefix_reuse="exact") as client, ExitStack() as stack:
        llm = stack.enter_context(Llama(model, n_ctx=0, type_k=0, type_v=0, n_threads=1, n_batch=32, verbose=False))

        def check(prompt: list[int]) -> int:
            answer = complete(client, prompt)
            llm.reset()
            steps = llm.generate(prompt, temp=0)
            assert answer["tokens"] == [next(steps) for _ in range(8)]
            return answer["timings"]["cache_n"]

        assert check(short) == 0
        assert check(short) == 39  # as it was: the last token is computed again
        assert check([*short, *more[:10]]) == (0 if kept else 40)  # of the same bucket
        assert check([*short, *more]) == 0  # of another one
        assert check(short) == 0


def test_fast_reuse(client):
    erase(client)
    short, more = random_tokens(40, seed=1), random_tokens(60, seed=2)
    assert complete(client, short, 1)["timings"]["cache_n"] == 0
    answer = complete(client, [*short, *more], 1)
    assert answer["timings"]["cache_n"] == 40
    assert answer["timings"]["clex"]["rerotations"] == 1


def test_text_that_was_read_is_kept_when_the_client_goes(big):
    prompt = random_tokens(6000)
    with serving(big, parallel=1) as client:
        asked = {"prompt": prompt, "n_predict": 1, "stream": True, "return_progress": True}
        with client.stream("POST", "/completion", json=asked) as stream:
            for line in stream.iter_lines():
                if "prompt_progress" in line and json.loads(line[6:])["prompt_progress"]["processed"] >= 640:
                    break
        answer = complete(client, prompt[:1000], 1)
        assert answer["timings"]["cache_n"] >= 640


def test_slots_are_saved_and_restored_by_another_server(client, tiny, folder, alone):
    erase(client)
    prompt = random_tokens(150, seed=3)
    complete(client, prompt, 1, id_slot=1)
    saved = client.post("/slots/1?action=save", json={"filename": "slot.bin"}).json()
    assert saved["n_saved"] == 150
    for reuse in ("fast", "exact"):
        with serving(tiny, "--slot-save-path", f"{folder / 'slots'}{os.sep}", prefix_reuse=reuse) as other:
            restored = other.post("/slots/0?action=restore", json={"filename": "slot.bin"}).json()
            assert restored["n_restored"] == 150
            answer = complete(other, prompt, id_slot=0)
            assert answer["timings"]["cache_n"] == 149
            assert answer["tokens"] == alone(prompt)
            # A shorter text in it is as long as it is, whatever length came with the state.
            again = complete(other, prompt[:40], id_slot=0)
            assert again["timings"]["clex"]["bucket"] == 0
            assert again["timings"]["cache_n"] == (39 if reuse == "fast" else 0)


def test_slot_of_another_model_is_refused(client, folder):
    erase(client)
    complete(client, random_tokens(50), id_slot=0)
    client.post("/slots/0?action=save", json={"filename": "other.bin"})
    with serving(make(folder / "other.gguf", seed=1), "--slot-save-path", f"{folder / 'slots'}{os.sep}") as other:
        status, message = refused(other, "/slots/0?action=restore", json={"filename": "other.bin"})
        assert status == 400
        assert "Unable to restore slot" in message
        complete(other, random_tokens(50), id_slot=0)


def test_requests_behind_the_saving_of_a_busy_slot_are_answered(big, folder):
    asked = {"prompt": random_tokens(20), "n_predict": 8000, "ignore_eos": True, "stream": True}
    with serving(big, "--slot-save-path", f"{folder}{os.sep}", parallel=1) as client, ThreadPoolExecutor(2) as pool:
        with client.stream("POST", "/completion", json=asked) as stream:
            lines = stream.iter_lines()
            next(lines)
            save = pool.submit(client.post, "/slots/0?action=save", json={"filename": "busy.bin"})
            wait_for_deferred(client, 1)
            other = pool.submit(complete, client, random_tokens(10))
            wait_for_deferred(client, 2)
        assert save.result().json()["n_saved"] > 20
        assert other.result()["timings"]["predicted_n"] == 8


def test_a_request_that_names_a_busy_slot_changes_nothing_in_it(big):
    """Also where the server has in memory what that request begins with."""
    prompt, other = random_tokens(400, seed=1), random_tokens(100, seed=2)
    asked = {"prompt": prompt, "n_predict": 7000, "ignore_eos": True, "stream": True}
    with serving(big, parallel=1) as client, ThreadPoolExecutor(1) as pool:
        complete(client, other)
        with client.stream("POST", "/completion", json=asked) as stream:
            lines = stream.iter_lines()  # which ends the stream when it goes
            next(lines)
            answer = pool.submit(complete, client, other, id_slot=0)
            wait_for_deferred(client, 1)
            (slot,) = client.get("/slots").json()
            assert slot["is_processing"]
            assert slot["n_prompt_tokens"] >= len(prompt) + slot["next_token"][0]["n_decoded"] - 1
        assert answer.result()["timings"]["predicted_n"] == 8


def wait_for_deferred(client: httpx.Client, count: int) -> None:
    """Until so many requests wait for a slot."""
    for _ in range(1000):
        if metric(client, "requests_deferred") == count:
            return
        time.sleep(0.01)
    pytest.fail("the requests do not wait for the slot")


#
# what is too long, or wrong
#


def test_overflow_is_refused_with_both_numbers_and_ends_nothing_else(client, alone):
    erase(client)
    prompt = random_tokens(30, seed=4)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(complete, client, prompt, 200)
        status, message = refused(client, "/completion", json={"prompt": random_tokens(300)})
        assert status == 400
        assert "300 tokens" in message
        assert "256 tokens" in message
        assert other.result()["tokens"] == alone(prompt, 200)


def test_full_shared_cache_ends_the_longest_conversation_alone(big, folder):
    short, long = random_tokens(20, seed=6), random_tokens(300, seed=7)
    asked = {"temperature": 0, "ignore_eos": True, "n_predict": 250}
    options = ("--kv-unified", "--ctx-size", "512", "--slot-save-path", f"{folder}{os.sep}")
    with serving(big, *options, parallel=2) as client, ThreadPoolExecutor(1) as pool:
        expected = complete(client, short, 250)["tokens"]
        errors: list[dict[str, Any]] = []
        while not errors:  # on a busy machine the long one may end before the short one begins
            erase(client, 2)
            with client.stream("POST", "/completion", json={"prompt": long, "stream": True, **asked}) as stream:
                lines = stream.iter_lines()
                next(lines)
                kept = pool.submit(complete, client, short, 250)
                errors = [json.loads(line[6:])["error"] for line in lines if '"error"' in line]
            answer = kept.result()["tokens"]
        (error,) = errors
        assert error["type"] == "exceed_context_size_error"
        assert "512 tokens" in error["message"]
        assert answer == expected
        assert complete(client, long)["timings"]["cache_n"] == 0


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"content": b'{"prompt": '}, 400, "parse"),
        ({"content": b"\xff\xfe"}, 400, "parse"),
        ({"content": b"[]"}, 400, ""),
        ({"json": {}}, 400, "prompt"),
        ({"json": {"prompt": "a", "n": 10**6}}, 400, "n"),
        ({"json": {"prompt": "a", "n": 0}}, 400, "n"),
        ({"json": {"prompt": "a", "n_predict": -5}}, 400, "n_predict"),
        ({"json": {"prompt": "a", "repeat_last_n": -5}}, 400, "repeat_last_n"),
        ({"json": {"prompt": [-1]}}, 400, "token"),
        ({"json": {"prompt": [10**6]}}, 400, "token"),
        ({"json": {"prompt": {"a": 1}}}, 400, "prompt"),
        ({"json": {"prompt": "a", "grammar": "root ::= ("}}, 400, "grammar"),
    ],
    ids=lambda value: json.dumps(value, default=repr)[:40] if isinstance(value, dict) else "",
)
def test_wrong_request(client, request_, status, message):
    got, said = refused(client, "/completion", **request_)
    assert got == status
    assert message in said.lower()


def test_body_that_is_too_large(client):
    status, message = refused(client, "/completion", content=b"{" * (100 * 2**20 + 1))
    assert status == 413
    assert "larger than the server takes" in message


def test_half_open_connections(client):
    url = httpx.URL(client.base_url)
    with ExitStack() as stack:
        for number in range(300):
            connection = stack.enter_context(socket.create_connection((url.host, url.port), timeout=30))
            if number % 2:
                connection.sendall(b"POST /completion HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        assert complete(client, random_tokens(10))["timings"]["predicted_n"] == 8


def test_wrong_key(tiny):
    with serving(tiny, api_key="secret") as client:
        assert client.get("/health").status_code == 200
        assert refused(client, "/completion", json={"prompt": "a"}) == (401, "Invalid API Key")
        given = {"Authorization": "Bearer secret"}
        assert client.post("/completion", json={"prompt": "a", "n_predict": 1}, headers=given).status_code == 200


def test_mixed_requests(client, alone):
    """Long and short ones, of which some are too long, given up, cancelled, or saved meanwhile."""
    erase(client)
    prompts = [random_tokens(length, seed=length) for length in (10, 60, 70, 120, 140, 190, 200, 230)]
    expected = [alone(prompt) for prompt in prompts]

    def ask(number: int) -> None:
        kind, which = number % 10, number % len(prompts)
        if kind == 1:  # cancelled by its name
            asked, name = {"prompt": prompts[which], "stream": True, "n_predict": 200}, f"conversation {number}"
            with client.stream("POST", "/completion", json=asked, headers={"X-Conversation-Id": name}) as stream:
                next(stream.iter_lines())
                assert client.delete("/v1/stream", params={"conv_id": name}).status_code == 204
        elif kind == 3:
            assert client.post("/completion", json={"prompt": random_tokens(256)}).status_code == 400
        elif kind == 5:  # the client goes while it is answered, or before
            with client.stream("POST", "/completion", json={"prompt": prompts[which], "stream": True}) as stream:
                next(stream.iter_lines())
        elif kind == 9:
            with suppress(httpx.ReadTimeout):
                client.post("/completion", json={"prompt": prompts[which]}, timeout=0.01)
        elif kind == 7:
            client.post(f"/slots/{number % 4}?action=save", json={"filename": f"{number}.bin"})
            client.post(f"/slots/{number % 4}?action=restore", json={"filename": f"{number}.bin"})
        else:
            assert complete(client, prompts[which], cache_prompt=number % 2 == 0)["tokens"] == expected[which]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(200)))


#
# clients
#


@pytest.fixture(scope="module")
def chat(smollm_small_tables) -> Iterator[Server]:
    options = {"port": 0, "ctx": 1024, "parallel": 2, "threads": 1, "batch": 128, "seed": 1}
    with serve(smollm_small_tables, server_args=("--no-warmup", "--temp", "0", *TOOLS), **options) as server:
        yield server


@pytest.fixture(scope="module")
def smollm_small_tables(smollm, folder) -> Path:
    """SmolLM2 with tables for 128, 256, ... 1024 tokens."""
    from clex_convert import convert

    target = folder / "smollm.gguf"
    convert(smollm, target, method="ntk", original_context=128, max_factor=8)
    return target


@pytest.fixture(scope="module")
def openai_client(chat):
    import openai

    with openai.OpenAI(base_url=f"{chat.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def anthropic_client(chat):
    import anthropic

    with anthropic.Anthropic(base_url=chat.url, api_key="none", max_retries=0) as client:
        yield client


QUESTION: list[Any] = [{"role": "user", "content": "Name the capital of France."}]
TOOL_NAME = "get_weather"


def test_openai_chat(openai_client):
    asked: dict[str, Any] = {"model": "any", "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    answer = openai_client.chat.completions.create(**asked)
    text = answer.choices[0].message.content
    assert "Paris" in text
    assert answer.usage.completion_tokens <= 12
    chunks = list(openai_client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text


def test_openai_json_schema(openai_client):
    schema = {"name": "weather", "schema": WEATHER, "strict": True}
    answer = openai_client.chat.completions.create(
        model="any",
        messages=[{"role": "user", "content": "A city in France, as JSON."}],
        max_tokens=40,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": schema},
    )
    assert list(json.loads(answer.choices[0].message.content)) == ["city"]


def test_openai_tool_call(openai_client):
    function = {"name": TOOL_NAME, "description": "The weather in a city.", "parameters": WEATHER}

    def called(city: str) -> dict[str, Any]:
        call = {"name": TOOL_NAME, "arguments": json.dumps({"city": city})}
        return {"role": "assistant", "content": "", "tool_calls": [{"id": city, "type": "function", "function": call}]}

    messages: list[Any] = []
    for city in ("Rome", "Berlin"):
        answer = {"role": "tool", "tool_call_id": city, "content": "Sun."}
        messages += [{"role": "user", "content": f"What is the weather in {city}?"}, called(city), answer]
    answer = openai_client.chat.completions.create(
        model="any",
        messages=[*messages, {"role": "user", "content": "What is the weather in Paris?"}],
        max_tokens=60,
        temperature=0,
        tools=[{"type": "function", "function": function}],
        tool_choice="required",
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == TOOL_NAME
    assert list(json.loads(call.function.arguments)) == ["city"]
    assert answer.choices[0].finish_reason == "tool_calls"


def test_openai_responses(openai_client):
    answer = openai_client.responses.create(
        model="any", input="Name the capital of France.", max_output_tokens=12, temperature=0
    )
    assert "Paris" in answer.output_text


def test_openai_error(openai_client):
    import openai

    with pytest.raises(openai.BadRequestError, match="1024 tokens"):
        openai_client.completions.create(model="any", prompt="word " * 1200, max_tokens=1)


def test_anthropic_messages(anthropic_client):
    asked: dict[str, Any] = {"model": "any", "messages": QUESTION, "max_tokens": 12}
    answer = anthropic_client.messages.create(**asked)
    assert "Paris" in answer.content[0].text
    with anthropic_client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == answer.content[0].text
    assert anthropic_client.messages.count_tokens(model="any", messages=QUESTION).input_tokens > 5


def test_anthropic_tool_call(anthropic_client):
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]
    for city, following in (("Rome", "Berlin"), ("Berlin", "Paris")):
        call = {"type": "tool_use", "id": city, "name": TOOL_NAME, "input": {"city": city}}
        answer = {"type": "tool_result", "tool_use_id": city, "content": "Sun."}
        question = {"type": "text", "text": f"What is the weather in {following}?"}
        messages += [{"role": "assistant", "content": [call]}, {"role": "user", "content": [answer, question]}]
    answer = anthropic_client.messages.create(
        model="any",
        messages=messages,
        max_tokens=60,
        tools=[{"name": TOOL_NAME, "description": "The weather in a city.", "input_schema": WEATHER}],
        tool_choice={"type": "any"},
    )
    (call,) = [part for part in answer.content if part.type == "tool_use"]
    assert (call.name, list(call.input)) == (TOOL_NAME, ["city"])
    assert answer.stop_reason == "tool_use"


def test_openai_embeddings(tiny):
    import openai

    with serving(tiny, "--embeddings", "--pooling", "mean", batch=256) as client:
        embedder = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
        texts = ["a b c", "a" * 40, "a" * 150]
        rows = [item.embedding for item in embedder.embeddings.create(model="any", input=texts).data]
    assert np.shape(rows) == (3, 64)
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=1e-3)
    # Each with the table of its own length.
    with Llama(tiny, n_ctx=0, embedding=True, pooling_type=1, type_k=0, type_v=0, n_threads=1, verbose=False) as llm:
        assert np.allclose(rows, llm.embed(texts, normalize=True), atol=1e-4)


#
# several models
#


def test_models_of_a_folder(tmp_path, alone):
    make(tmp_path / "one.gguf")
    make(tmp_path / "two.gguf", seed=1)
    prompt = random_tokens(100)
    with serving(tmp_path) as client:
        names = {model["id"] for model in client.get("/v1/models").json()["data"]}
        assert names == {"one", "two"}
        one, two, again = (complete(client, prompt, model=name)["tokens"] for name in ("one", "two", "one"))
        assert one == again == alone(prompt)
        assert two != one
        status, message = refused(client, "/completion", json={"model": "three", "prompt": "a"})
        assert status in (400, 404)
        assert "three" in message


def test_models_of_one_name_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        make(tmp_path / name / "model.gguf")
    with pytest.raises(ClexError, match="models of one name cannot be told apart"):
        serve([tmp_path / "a", tmp_path / "b"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ClexError, match="there are no GGUF files in this folder"):
        serve(tmp_path / "empty")


#
# the command
#

COMMAND = [sys.executable, "-m", "clex_local.server.cli"]


def run(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, **more)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_serves_until_a_signal(tiny, number):
    arguments = [*COMMAND, str(tiny), "--port", "0", "--threads", "1", "--ctx", "128", "--parallel", "2"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = [process.stderr.readline() for _ in range(4)]
        assert lines[0] == "one conversation: 128 tokens (ntk tables by length, the model covers 256)\n"
        assert lines[1].startswith("at once: 2, in ")
        assert lines[2] == f"what is read is kept in {store_folder()}: clex-cache shows it, --no-store keeps nothing\n"
        url = lines[3].split("API: ")[1].strip().removesuffix("/v1")
        assert httpx.get(f"{url}/props").json()["default_generation_settings"]["n_ctx"] == 128
        process.send_signal(number)
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_command_errors_are_one_line(tiny, tmp_path):
    def error(*arguments: object, **more: Any) -> str:
        result = run(*arguments, **more)
        assert result.returncode == 1
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("clex-serve: error: ")
        return result.stderr

    assert "there are no GGUF files in this folder" in error(tmp_path)
    assert "covers 256 tokens" in error(tiny, "--ctx", 1000)
    assert "pass --api-key" in error(tiny, "--host", "0.0.0.0")
    assert "--log-disable: the log says" in error(tiny, "--port", 0, "--", "--log-disable")
    assert "invalid argument: --no-such" in error(tiny, "--port", 0, "--", "--no-such")
    (tmp_path / "broken.gguf").write_bytes(tiny.read_bytes()[:-1000])
    assert "broken.gguf" in error(tmp_path / "broken.gguf", "--port", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "couldn't bind" in error(tiny, "--port", taken.getsockname()[1])
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(tmp_path)}
    assert "built without its server" in error(tiny, env=environment)


def test_options_of_llama_server_are_listed():
    result = run("model.gguf", "--", "--help")
    assert result.returncode == 0
    assert "--ctx-size" in result.stdout


def test_server_that_ends_while_it_is_used(tiny):
    with serve(tiny, port=0, ctx=0, threads=1) as server:
        os.kill(server.pid, signal.SIGKILL)
        assert server.wait() == 128 + signal.SIGKILL
        assert server.close() == 128 + signal.SIGKILL


#
# the plan
#


def test_context_is_that_of_one_conversation(smollm_ntk):
    gib = 2**30
    plan = plan_service(smollm_ntk, ServeOptions(ctx=8192, parallel=3), available=8 * gib)
    one = plan_service(smollm_ntk, ServeOptions(ctx=8192, parallel=1), available=8 * gib)
    assert (plan.context.n_ctx, plan.parallel, plan.context.kv) == (8192, 3, 3 * one.context.kv)
    assert 0 < plan.prompt_cache < one.prompt_cache


def test_conversations_at_once_are_as_many_as_fit(smollm_ntk):
    gib = 2**30
    for available, parallel in [(64 * gib, 4), (2 * gib, 1)]:
        plan = plan_service(smollm_ntk, ServeOptions(), available=available)
        assert plan.parallel == parallel
        assert plan.context.needed + plan.prompt_cache + smollm_ntk.stat().st_size <= available
    with pytest.raises(ClexError, match=r"needs .* of memory .* are available"):
        plan_service(smollm_ntk, ServeOptions(ctx=0, parallel=64), available=3 * gib)


def test_server_that_is_missing(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    with pytest.raises(ServerError, match="built without its server"):
        serve(tiny)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "localhost,0.0.0.0", "example.org"])
def test_others_need_a_key(tiny, host):
    with pytest.raises(ClexError, match="pass `api_key`"):
        serve(tiny, host=host)
