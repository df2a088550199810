"""LoRA adapters of a server: what was computed with one is never reused by a request with another, or with none."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from helpers.random_gguf import make_lora, random_tokens
from test_serve import complete, make, serving

pytestmark = pytest.mark.serve

OTHER = random_tokens(700, seed=1000)
SCALES = [None, 1.0, -1.0]  # of a request's adapter; None: what the server has for all, which is 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def files(folder):
    """A model with tables for 512, 1,024 ... tokens, and an adapter."""
    return make(folder / "tiny.gguf", original=512), make_lora(folder / "adapter.gguf")


@pytest.fixture(scope="module", params=["slot", "memory", "store"])
def place(request, files, tmp_path_factory) -> Iterator[tuple[str, httpx.Client]]:
    """Where a server, which has the adapter, is to find what it has read, and the server."""
    path, adapter = files
    memory = "0" if request.param == "store" else "100"
    args = ["--lora", str(adapter), "--lora-init-without-apply", "--cache-ram", memory]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLEX_CACHE", str(tmp_path_factory.mktemp("cache")))
        with serving(path, *args, parallel=1, batch=256, store=request.param == "store") as client:
            yield request.param, client


@pytest.mark.parametrize("first", SCALES)
@pytest.mark.parametrize("then", SCALES)
def test_text_that_was_read_with_another_adapter_is_not_reused(place, first, then):
    where, client = place
    asked = [{} if scale is None else {"lora": [{"id": 0, "scale": scale}]} for scale in (first, then)]
    prompt = random_tokens(700, seed=10 * SCALES.index(first) + SCALES.index(then))
    complete(client, prompt, **asked[0])
    if where != "slot":
        complete(client, OTHER, 1, **asked[0])
    answer = complete(client, prompt, **asked[1])
    reused = first == then and (then is None or where != "store")
    assert (answer["timings"]["cache_n"] > 0) == reused
    assert answer["tokens"] == complete(client, prompt, cache_prompt=False, **asked[1])["tokens"]


def test_text_that_was_read_before_the_adapters_of_all_changed_is_not_reused(place):
    _, client = place
    prompt = random_tokens(700, seed=100)
    answers = []
    for scale in (1.0, 0.0):
        assert client.post("/lora-adapters", json=[{"id": 0, "scale": scale}]).status_code == 200
        answers.append(complete(client, prompt))
    assert answers[1]["timings"]["cache_n"] == 0
    assert answers[1]["tokens"] == complete(client, prompt, cache_prompt=False)["tokens"] != answers[0]["tokens"]
