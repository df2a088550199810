"""A model whose layers other processes compute: the same answers, and a worker that goes is an error."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import numpy as np
import pytest

import clex_local
from clex_local import DecodeError, Llama, StateError, WorkerError, serve
from clex_local.library.devices import addresses
from helpers import chat_command
from helpers.random_gguf import make_model, random_tokens
from helpers.workers import Worker, free_port, workers

pytestmark = [pytest.mark.runtime, pytest.mark.serve]

TOKENS = random_tokens(200)
OPTIONS = dict(n_ctx=256, n_batch=64, n_ubatch=64, n_threads=1, verbose=False)
CACHES = {"f32": dict(type_k=0, type_v=0, flash_attn=False), "q8_0": dict(type_k=8, type_v=8, flash_attn=True)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, tables for 64, 128, 192 and 256 tokens."""
    return make_model(tmp_path_factory.mktemp("rpc") / "model.gguf", n_layer=4)


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Worker]]:
    with workers() as started:
        yield started


def addresses_of(started: list[Worker]) -> list[str]:
    return [worker.address for worker in started]


def crossing(llm: Llama) -> np.ndarray:
    """Logits of a prompt, and of single tokens through two boundaries."""
    llm.reset()
    assert llm.clex is not None
    before = llm.clex.rerotated_cells
    llm.eval(TOKENS[:60])
    out = [logits(llm)]
    for token in TOKENS[60:135]:
        llm.eval([token])
        out.append(logits(llm))
    assert llm.clex.rerotated_cells - before == 64 + 128
    return np.stack(out)


def logits(llm: Llama) -> np.ndarray:
    import llama_cpp

    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).copy()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("layers", [-1, 3])
def test_layers_of_other_processes_give_the_same_logits_across_tables(model, pair, cache, layers):
    options = {**OPTIONS, **CACHES[cache]}
    with closing(Llama(model, **options)) as local:
        expected = crossing(local)
    with closing(Llama(model, rpc=addresses_of(pair), n_gpu_layers=layers, **options)) as spread:
        np.testing.assert_allclose(crossing(spread), expected, atol=1e-4 if cache == "f32" else 2e-2, rtol=0)


def test_a_model_without_workers_is_computed_here_while_another_has_them(model, pair):
    with (
        closing(Llama(model, rpc=addresses_of(pair), **OPTIONS)) as spread,
        closing(Llama(model, n_gpu_layers=-1, **OPTIONS)) as local,
    ):
        assert crossing(spread).shape == crossing(local).shape
        with workers(1) as (third,), closing(Llama(model, rpc=[third.address], **OPTIONS)):
            third.kill()
            crossing(local)


@pytest.mark.parametrize(("saved_by_workers", "kind"), [(True, "f32"), (False, "f32"), (True, "q8_0")])
def test_a_state_goes_from_workers_to_this_machine_and_back(model, pair, saved_by_workers, kind):
    options = {**OPTIONS, **CACHES[kind]}
    rpc = addresses_of(pair)
    with closing(Llama(model, rpc=rpc if saved_by_workers else (), **options)) as first:
        first.eval(TOKENS[:100])
        state = first.save_state()
        first.eval(TOKENS[100:140])
        expected = logits(first)
    with closing(Llama(model, rpc=() if saved_by_workers else rpc, **options)) as second:
        second.load_state(state)
        second.eval(TOKENS[100:140])
        np.testing.assert_allclose(logits(second), expected, atol=1e-4 if kind == "f32" else 2e-2, rtol=0)


def test_nothing_of_it_is_kept_on_disk(model, pair, tmp_path):
    with closing(Llama(model, rpc=addresses_of(pair), store=tmp_path / "store", **{**OPTIONS, "n_ctx": 0})) as llm:
        llm.eval(TOKENS)
    assert not list((tmp_path / "store").rglob("*.kv*"))


def test_a_worker_that_is_killed_is_an_error_and_the_other_serves_on(model):
    with workers() as (first, second):
        rpc = [first.address, second.address]
        with closing(Llama(model, rpc=rpc, **OPTIONS)) as llm:
            llm.eval(TOKENS[:60])
            state = llm.save_state()
            second.kill()
            for _ in range(2):
                with pytest.raises(DecodeError, match=r"a worker of `rpc` is gone") as caught:
                    llm.eval(TOKENS[60:100])
                assert "\n" not in str(caught.value)
            with pytest.raises(StateError, match=f"cannot save the state: {second.address}: the connection"):
                llm.save_state()
            with pytest.raises(StateError, match="cannot load the saved state"):
                llm.load_state(state)
            llm.reset()
            with pytest.raises(DecodeError):
                llm.eval(TOKENS[:10])
            with pytest.raises(WorkerError, match=f"{second.address}: the connection to this RPC server was lost"):
                Llama(model, rpc=[second.address], **OPTIONS)
        with pytest.raises(WorkerError, match=f"{second.address}: cannot connect"):
            Llama(model, rpc=[second.address], **OPTIONS)
        assert first.lives
        with closing(Llama(model, rpc=[first.address], **OPTIONS)) as llm, closing(Llama(model, **OPTIONS)) as local:
            np.testing.assert_allclose(crossing(llm), crossing(local), atol=1e-1, rtol=0)


def test_a_worker_whose_program_goes_serves_the_next(model):
    script = "import os, sys, clex_local; clex_local.Llama(sys.argv[1], rpc=[sys.argv[2]], n_ctx=64); os._exit(9)"
    with workers(1) as (worker,):
        subprocess.run([sys.executable, "-c", script, str(model), worker.address])
        with closing(Llama(model, rpc=[worker.address], **OPTIONS)) as llm:
            crossing(llm)
        assert worker.lives


def test_what_is_no_worker_is_named(model):
    nobody = f"127.0.0.1:{free_port()}"
    with pytest.raises(WorkerError, match=f"^{nobody}: cannot connect, no RPC server listens there$"):
        Llama(model, rpc=[nobody], **OPTIONS)
    with pytest.raises(WorkerError, match=r"host:port, and commas between several, not 'nobody'"):
        Llama(model, rpc=["nobody"], **OPTIONS)
    with socket.create_server(("127.0.0.1", 0)) as server:  # speaks something else
        address = f"127.0.0.1:{server.getsockname()[1]}"
        thread = threading.Thread(target=lambda: server.accept()[0].close())
        thread.start()
        with pytest.raises(WorkerError, match=f"^{address}: no answer of an RPC server"):
            Llama(model, rpc=[address], **OPTIONS)
        thread.join()


@pytest.mark.parametrize("text", ["", "a", "a:", ":1", "a:0", "a:65536", "a:1,,b:2", "a:1 b:2", "http://a:1", "a:x"])
def test_addresses_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="must be host:port"):
        addresses(text)


def test_addresses_of_a_command():
    assert addresses("a:1") == ("a:1",)
    assert addresses("10.0.0.1:50052, b.local:2") == ("10.0.0.1:50052", "b.local:2")


def test_clex_chat_has_the_workers_compute(smollm_ntk, pair):
    asked = [smollm_ntk, "-p", "What colour is the sky?", "--temp", "0", "--max-tokens", "4", "--ctx", "512"]
    asked.append("--no-store")
    local = chat_command.run(*asked)
    done = chat_command.run(*asked, "--rpc", ",".join(addresses_of(pair)))
    assert (done.returncode, done.stdout) == (0, local.stdout), done.stderr
    nobody = f"127.0.0.1:{free_port()}"
    done = chat_command.run(*asked, "--rpc", nobody)
    assert done.stderr == f"clex-chat: error: {nobody}: cannot connect, no RPC server listens there\n"
    assert done.returncode == 1


def test_clex_serve_has_the_workers_compute_and_says_when_one_is_gone(model):
    options = {"port": 0, "ctx": 0, "parallel": 1, "threads": 1, "batch": 64, "kv_type": "f32"}
    request = {"prompt": list(map(int, TOKENS[:100])), "n_predict": 8, "temperature": 0, "return_tokens": True}
    with serve(model, **options) as server:
        expected = httpx.post(f"{server.url}/completion", json=request, timeout=60).json()["tokens"]
    with workers() as started:
        with serve(model, rpc=tuple(addresses_of(started)), **options) as server:
            answer = httpx.post(f"{server.url}/completion", json=request, timeout=60).json()
            assert answer["tokens"] == expected
            started[1].kill()
            for _ in range(2):
                answer = httpx.post(f"{server.url}/completion", json={**request, "cache_prompt": False}, timeout=60)
                assert answer.status_code == 500
                assert "A machine that computes layers of the model is gone" in answer.json()["error"]["message"]
        assert started[0].lives
        with pytest.raises(clex_local.ServerError, match=f"{started[1].address}.*cannot"):
            serve(model, rpc=(started[1].address,), **options)


def test_a_worker_that_cannot_listen_ends_with_an_error(pair):
    port = pair[0].address.split(":")[1]
    command = [sys.executable, "-m", "clex_local.server.worker_cli", "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Failed to create server socket" in done.stderr
