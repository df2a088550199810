"""clex-serve and the document store: what a server or a program has read, the next server does not read again."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from clex_local import Llama
from clex_local.store.cli import main as cache_command
from clex_local.store.documents import DocumentStore, store_folder
from helpers.random_gguf import make_lora, random_tokens
from helpers.stored_texts import block_files
from test_serve import complete, make, serving

pytestmark = pytest.mark.serve

IDS = random_tokens(1400)
OPTIONS = {"parallel": 2, "batch": 256}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make(tmp_path_factory.mktemp("served") / "tiny.gguf", original=512)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CLEX_CACHE", str(tmp_path))
    return store_folder()


def test_next_server_has_it(path, folder):
    with serving(path, **OPTIONS) as client:
        first = complete(client, IDS[:1300])
        assert "restored_n" not in first["timings"]
        # once more is from the slot, and not from disk
        assert "restored_n" not in complete(client, IDS[:1300])["timings"]
    assert len(block_files(folder)) >= 5
    with serving(path, **OPTIONS) as client:
        again = complete(client, IDS[:1300])
        assert again["tokens"] == first["tokens"]
        assert (again["timings"]["restored_n"], again["timings"]["cache_n"]) == (1280, 1280)
        assert again["timings"]["prompt_n"] == 20
        usage = client.post("/v1/completions", json={"prompt": [*IDS[:1280], 7, 8], "max_tokens": 1}).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 1280
        assert "clex_restored_tokens_total 1280" in client.get("/metrics").text.replace(".0", "")


def test_programs_and_servers_share_it(path, folder):
    with Llama(path, n_ctx=0, type_k=0, type_v=0, n_batch=256, n_ubatch=256, n_threads=1, store=True) as llm:
        tokens = [next(llm.generate(IDS[:900], temp=0))]
    with serving(path, **OPTIONS) as client:
        answer = complete(client, IDS[:900], 1)
        assert (answer["tokens"], answer["timings"]["restored_n"]) == (tokens, 768)


def test_exact_takes_the_prompts_own_table(path, folder):
    with serving(path, **OPTIONS) as client:
        complete(client, IDS[:400])
    with serving(path, **OPTIONS, prefix_reuse="exact") as client:
        assert "restored_n" not in complete(client, IDS[:1300])["timings"]
    with serving(path, **OPTIONS, prefix_reuse="exact") as client:
        assert complete(client, IDS[:1300])["timings"]["restored_n"] == 1280


def test_conversation_that_was_moved_out_of_its_slot_is_stored_on(path, folder):
    with serving(path, **OPTIONS | {"parallel": 1}) as client:
        complete(client, IDS[:600])
        complete(client, IDS[700:1300])  # the first one goes to the memory of the server
        complete(client, IDS[:1300])  # and comes back
    with DocumentStore(folder) as store:
        assert max(document.tokens for document in store.documents()) >= 1280


def test_what_was_removed_under_a_server_is_stored_again(path, folder):
    with serving(path, **OPTIONS) as client:
        first = complete(client, IDS[:1300])
        assert CliRunner().invoke(cache_command, ["clear", "--yes"]).exit_code == 0
        assert not block_files(folder)
        again = complete(client, IDS[:1300])
        assert again["tokens"] == first["tokens"]
    with serving(path, **OPTIONS) as client:
        assert complete(client, IDS[:1300])["timings"]["restored_n"] == 1280


def test_what_an_adapter_changes_is_not_stored(path, folder, tmp_path):
    adapter = make_lora(tmp_path / "lora.gguf", width=64)
    with serving(path, "--lora", str(adapter), **OPTIONS) as client:
        adapted = complete(client, IDS[:1300])
        assert not block_files(folder)
        plain = complete(client, IDS[:1300], lora=[{"id": 0, "scale": 0.0}])
        assert plain["tokens"] != adapted["tokens"]
    assert len(block_files(folder)) >= 5
    with serving(path, "--lora", str(adapter), **OPTIONS) as client:
        again = complete(client, IDS[:1300])
        assert "restored_n" not in again["timings"]
        assert again["tokens"] == adapted["tokens"]
        again = complete(client, IDS[:1300], lora=[{"id": 0, "scale": 0.0}])
        assert again["timings"]["restored_n"] == 1280
        assert again["tokens"] == plain["tokens"]


def test_off(path, folder):
    with serving(path, **OPTIONS, store=False) as client:
        complete(client, IDS[:600])
    assert not folder.exists()
