"""Llama and a document store: what one process has read, the next one has."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from clex_local import Llama
from clex_local.store.documents import DocumentStore, StoreError, size_limit, store_folder
from helpers.random_gguf import make_model, random_tokens
from helpers.stored_texts import block_files

pytestmark = pytest.mark.runtime

IDS = random_tokens(1500)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("prompt") / "tiny.gguf", original=512, n_buckets=4)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "documents"


def open_llama(path, folder, **options):
    settings = {"n_ctx": 2048, "n_batch": 256, "n_ubatch": 256, "n_threads": 1}
    return Llama(path, store=folder, **{**settings, **options})


def answer(llm, ids, count=5):
    """Tokens that follow a text, and the logits of its last token."""
    stream = llm.generate(ids, temp=0.0)
    tokens = [next(stream)]
    logits = np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), shape=(llm.n_vocab(),)).copy()
    tokens += [next(stream) for _ in range(count - 1)]
    stream.close()
    return tokens, logits


def test_logits_of_all_tokens_are_there(path, folder):
    with open_llama(path, folder) as llm:
        answer(llm, IDS[:1000])
    with open_llama(path, False, logits_all=True) as llm:
        answer(llm, IDS[:1000])
        expected = llm.scores[:1000].copy()
    with open_llama(path, folder, logits_all=True) as llm:
        answer(llm, IDS[:1000])
        assert np.array_equal(llm.scores[:1000], expected)


def test_fixed_table_is_the_only_one(path, folder):
    with open_llama(path, folder) as llm:
        answer(llm, IDS[:400])
    with open_llama(path, False, policy="fixed") as llm:
        expected = answer(llm, IDS[:800])
    for restored in (0, 768):
        with open_llama(path, folder, policy="fixed") as llm:
            tokens, logits = answer(llm, IDS[:800])
            assert llm.restored_tokens == restored
            assert (tokens, list(logits)) == (expected[0], list(expected[1]))


def test_next_process_has_it(path, folder):
    with open_llama(path, folder) as llm:
        expected = answer(llm, IDS[:1400])
        assert llm.restored_tokens == 0
    with open_llama(path, folder) as llm:
        tokens, logits = answer(llm, IDS[:1400])
        assert llm.restored_tokens == 1280
        assert (tokens, list(logits)) == (expected[0], list(expected[1]))
    with open_llama(path, False) as llm:
        tokens, logits = answer(llm, IDS[:1400])
        assert llm.restored_tokens == 0
        assert (tokens, list(logits)) == (expected[0], list(expected[1]))


def test_only_what_is_longer_than_in_the_cache(path, folder):
    with open_llama(path, folder) as llm:
        answer(llm, IDS[:900])
        answer(llm, [*IDS[:880], *IDS[900:950]])
        assert llm.restored_tokens == 0
        answer(llm, IDS[900:1200])
        answer(llm, IDS[:900])
        assert llm.restored_tokens == 768
        assert llm.n_tokens == 904
        answer(llm, IDS[:900])
        assert llm.restored_tokens == 0


def test_interrupted_reading_goes_on_where_it_was(path, folder):
    class Stop(Exception):
        pass

    def stop(done, total):
        if done >= 768:
            raise Stop

    with open_llama(path, folder) as llm:
        llm.on_prefill = stop
        with pytest.raises(Stop):
            answer(llm, IDS[:1400])
    with open_llama(path, folder) as llm:
        found = answer(llm, IDS[:1400])
        assert llm.restored_tokens == 768
    with open_llama(path, False) as llm:
        assert np.array_equal(answer(llm, IDS[:1400])[1], found[1])


def test_what_was_removed_meanwhile_is_stored_again(path, folder):
    with open_llama(path, folder) as llm, DocumentStore(folder) as other:
        answer(llm, IDS[:900])
        llm._stored.store.flush()
        other.clear()
        answer(llm, IDS[:900])
    with open_llama(path, folder) as llm:
        answer(llm, IDS[:900])
        assert llm.restored_tokens == 768


def test_exact_takes_what_the_prompt_alone_gives(path, folder):
    with open_llama(path, folder) as llm:
        answer(llm, IDS[:500])
    with open_llama(path, folder, prefix_reuse="exact") as llm:
        found = answer(llm, IDS[:1400])
        assert llm.restored_tokens == 0
        answer(llm, IDS[1000:1500])
        answer(llm, IDS[:1400])
        assert llm.restored_tokens == 1280
        # and in the next prompt of the same table, from the cache
        answer(llm, [*IDS[:1400], *IDS[:5]])
        assert llm.restored_tokens == 0
    with open_llama(path, folder) as llm:
        answer(llm, IDS[:1400])
        assert llm.restored_tokens == 1280
    with open_llama(path, False) as llm:
        assert np.array_equal(answer(llm, IDS[:1400])[1], found[1])


def test_prompt_cache_of_the_bindings_beside_it(path, folder):
    from llama_cpp import LlamaRAMCache

    with open_llama(path, folder) as llm:
        llm.set_cache(LlamaRAMCache())
        text = "abcdefgh " * 80
        first = llm(text, max_tokens=5, temperature=0)
        llm("zyx " * 100, max_tokens=5, temperature=0)
        assert llm(text, max_tokens=5, temperature=0)["choices"] == first["choices"]


def test_off_unless_it_is_asked_for(path, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CLEX_CACHE", str(tmp_path / "cache"))
    with open_llama(path, False) as llm:
        answer(llm, IDS[:600])
    assert not store_folder().exists()
    monkeypatch.setenv("CLEX_STORE", "0")
    with open_llama(path, folder) as llm:
        answer(llm, IDS[:600])
    assert not folder.exists()


def test_folder_of_the_commands(path, tmp_path, monkeypatch):
    monkeypatch.setenv("CLEX_CACHE", str(tmp_path / "cache"))
    with open_llama(path, True) as llm:
        answer(llm, IDS[:600])
    assert len(block_files(tmp_path / "cache" / "documents")) == 2


def test_folder_that_cannot_be_used_is_an_error(path, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        open_llama(path, tmp_path / "file")


def test_size_of_the_environment(folder, monkeypatch):
    monkeypatch.setenv("CLEX_CACHE_SIZE", "1.5 GB")
    with DocumentStore(folder) as store:
        assert store.stats.limit == 1_500_000_000
    monkeypatch.setenv("CLEX_CACHE_SIZE", "much")
    with pytest.raises(StoreError, match="CLEX_CACHE_SIZE=much: must be a size such as 20GB"):
        size_limit()


def test_size_that_is_none_turns_the_default_store_off_and_says_so(path, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CLEX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CLEX_CACHE_SIZE", "much")
    with open_llama(path, True) as llm:
        llm.create_completion([1, 2, 3], max_tokens=1)
    said = "CLEX_CACHE_SIZE=much: must be a size such as 20GB; what is read is not kept\n"
    assert capfd.readouterr().err.endswith(said)
    assert not (tmp_path / "cache" / "documents").exists()


def test_models_that_cannot_be_stored_run_as_without(path, folder, capfd):
    with open_llama(path, folder, embedding=True, verbose=True) as llm:
        assert llm.restored_tokens == 0
        llm.eval(IDS[:300])
    assert "document store: it is not one that continues texts" in capfd.readouterr().err
    assert not block_files(folder)


def test_full_disk_is_said_once(path, folder):
    code = """
import resource, signal, sys
from test_stored_prompt import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with open_llama(sys.argv[1], sys.argv[2]) as llm:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    for count in (300, 600, 900, 1200):
        answer(llm, IDS[:count])
        llm._stored.store.flush()
"""
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", code, path, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no more is stored") == 1
    assert not block_files(folder)


def test_process_that_does_not_close_it_loses_nothing(path, folder):
    code = (
        "import sys; from test_stored_prompt import *; llm = open_llama(sys.argv[1], sys.argv[2]); llm.eval(IDS[:1400])"
    )
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", code, path, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(block_files(folder)) == 5


def test_children_of_multiprocessing_end(path, folder):
    code = """
import sys, multiprocessing
from test_stored_prompt import *
llm = open_llama(sys.argv[1], sys.argv[2])
llm.eval(IDS[:600])
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(abs, [-1, -2]) == [1, 2]
"""
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run(
        [sys.executable, "-c", code, path, folder], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert len(block_files(folder)) == 2


def test_real_model_as_the_commands_open_it(smollm):
    from clex_local import open_model

    text = "The quick brown fox jumps over the lazy dog. " * 60
    answers = []
    for _ in range(2):
        with open_model(smollm, ctx=1024, threads=1, batch=256) as llm:
            ids = llm.tokenize(text.encode())
            stream = llm.generate(ids, temp=0.0)
            answers.append(([next(stream) for _ in range(5)], llm.restored_tokens))
            stream.close()
    assert answers[0][0] == answers[1][0]
    assert answers[1][1] == len(ids) // 256 * 256
