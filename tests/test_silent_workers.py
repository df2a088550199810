"""A worker that hangs: Ctrl-C and signals are heard all the same, and what is lost is said."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from clex_local import Llama, ServerError, WorkerError, serve
from helpers import chat_command
from helpers.random_gguf import make_model, random_tokens
from helpers.workers import Worker, workers

pytestmark = [
    pytest.mark.runtime,
    pytest.mark.serve,
    pytest.mark.chat,
    pytest.mark.skipif(sys.platform == "win32", reason="stops processes by signals"),
]

OPTIONS: dict[str, Any] = dict(n_ctx=256, n_batch=64, n_ubatch=64, n_threads=1, verbose=False)

# Ctrl-C comes once C is called in which it could be lost; the worker has been stopped before.
SCRIPT = """
import ctypes, os, signal, sys, threading, time
import llama_cpp
from clex_local import DecodeError, Llama
from clex_local.library import interrupt

path, address, worker = sys.argv[1], sys.argv[2], int(sys.argv[3])
options = dict(n_ctx=256, n_batch=64, n_ubatch=64, n_threads=1, verbose=False, rpc=[address])

def come():
    while not interrupt._waits.depth:
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGINT)

def hang():
    os.kill(worker, signal.SIGSTOP)
    threading.Thread(target=come, daemon=True).start()

@llama_cpp.llama_log_callback
def log(level, text, data):
    if b"load_tensors: loading" in text:
        hang()
"""
BEGIN = "llm = Llama(path, **options)\nllm.eval(list(range(60)))\nhang()\n"
USES = {
    "connecting": "hang()\nLlama(path, **options)",
    "loading": "llama_cpp.llama_log_set(log, ctypes.c_void_p(0))\nLlama(path, **options)",
    "reading": BEGIN + "llm.eval(list(range(100)))",
    "answering": BEGIN + "llm.eval([1])",
    "saving": BEGIN + "llm.save_state()",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("silent") / "model.gguf", n_layer=4)


@pytest.fixture
def worker() -> Iterator[Worker]:
    with workers(1) as (worker,):
        yield worker


def run(code: str, model: Path, worker: Worker) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT + code, str(model), worker.address, str(worker.process.pid)]
    # Without Ctrl-C it would be given up after 50 seconds.
    return subprocess.run(command, capture_output=True, text=True, timeout=45)


def indented(code: str) -> str:
    return "".join(f"    {line}\n" for line in code.splitlines())


@pytest.mark.parametrize("use", USES)
def test_ctrl_c_while_a_worker_hangs_is_raised(model, worker, use):
    code = f"try:\n{indented(USES[use])}except KeyboardInterrupt as error:\n    print(error)\n"
    done = run(code, model, worker)
    assert done.stdout.startswith(f"the worker at {worker.address} does not answer; what it computed is lost"), done
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    worker.process.send_signal(signal.SIGCONT)
    with closing(Llama(model, rpc=[worker.address], **OPTIONS)) as llm:
        llm.eval([1])


def test_what_is_computed_after_that_is_an_error_until_the_model_is_loaded_anew(model, worker):
    done = run(
        f"try:\n{indented(USES['reading'])}except KeyboardInterrupt:\n    pass\n"
        "for tokens in ([1], [1] * 100):\n"
        "    try:\n        llm.eval(tokens)\n    except DecodeError as error:\n        print('gone' in str(error))\n"
        "os.kill(worker, signal.SIGCONT)\n"
        "llm.close()\n"
        "llm = Llama(path, **options)\nllm.eval([1])\nprint(llm.n_tokens)\n",
        model,
        worker,
    )
    assert done.stdout == "True\nTrue\n1\n", done


def test_ctrl_c_while_a_worker_computes_costs_nothing(worker, tmp_path):
    """It lives, so its answer is waited for, however long it takes."""
    slow = make_model(tmp_path / "slow.gguf", n_layer=8, n_head=8, n_head_kv=8, n_buckets=1, original=4096)
    code = """
llm = Llama(path, **{**options, "n_ctx": 4096, "n_batch": 4096, "n_ubatch": 4096})
threading.Thread(target=come, daemon=True).start()
try:
    llm.eval([1] * 4000)
except KeyboardInterrupt as error:
    print(f"interrupted{error}")
llm.eval([1, 2])
"""
    done = run(code, slow, worker)
    assert (done.stdout, done.returncode) == ("interrupted\n", 0), done


def test_a_conversation_goes_back_to_its_prompt(smollm_ntk, worker, tmp_path, monkeypatch):
    pytest.importorskip("pexpect")
    monkeypatch.setenv("CLEX_SESSIONS", str(tmp_path))
    pty = chat_command.Pty(smollm_ntk, "--rpc", worker.address, "--ctx", "1024", "--batch", "32", "--max-tokens", "900")
    pty.prompt("of 1,024")
    pty.chat.send("Write a long story.\r")
    pty.expect(r"\n[^\x1b\r\n]{20,}")  # nothing but an answer is that long without colours
    worker.process.send_signal(signal.SIGSTOP)
    time.sleep(1)  # until it waits for a token
    pty.chat.sendintr()
    pty.expect(f"the worker at {worker.address} does not answer")
    pty.prompt("of 1,024")
    pty.chat.send("Go on.\r")
    pty.expect("is gone, with what it held")
    pty.prompt("of 1,024")
    pty.chat.sendeof()
    assert pty.close() == 0


def test_a_question_ends_with_a_line(model):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        command = [*chat_command.COMMAND, str(model), "--rpc", address, "--threads", "1", "-p", "Hello"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        with server.accept()[0]:
            process.send_signal(signal.SIGINT)
            out, errors = process.communicate(timeout=45)
    assert (out, process.returncode) == ("", 130)
    assert errors.startswith(f"clex-chat: error: interrupted; the worker at {address} does not answer")
    assert errors.count("\n") == 1


def test_a_server_ends(model, worker):
    options: dict[str, Any] = {"port": 0, "ctx": 0, "parallel": 1, "threads": 1, "batch": 64, "kv_type": "f32"}
    request = {"prompt": list(map(int, random_tokens(100))), "n_predict": 100_000, "ignore_eos": True, "stream": True}
    with (
        serve(model, rpc=(worker.address,), **options) as server,
        httpx.stream("POST", f"{server.url}/completion", json=request, timeout=60) as stream,
    ):
        lines = stream.iter_lines()  # which ends the stream when it goes
        next(lines)
        worker.process.send_signal(signal.SIGSTOP)
        assert server.close() == 0


def test_a_worker_that_serves_another_program_says_so(model, worker):
    script = "import sys, clex_local; llm = clex_local.Llama(sys.argv[1], rpc=[sys.argv[2]], n_ctx=64, verbose=False)"
    command = [sys.executable, "-c", f"{script}; print(flush=True); sys.stdin.read()", str(model), worker.address]
    busy = f"{worker.address}: this RPC server serves another program"
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        first.stdout.readline()
        with pytest.raises(WorkerError, match=f"^{busy}"):
            Llama(model, rpc=[worker.address], **OPTIONS)
        with pytest.raises(ServerError, match=busy):
            serve(model, rpc=(worker.address,), port=0, ctx=0, threads=1)
        assert first.stdin is not None
        first.stdin.close()
    with closing(Llama(model, rpc=[worker.address], **OPTIONS)) as llm:
        llm.eval([1])


def test_a_worker_is_given_once(model, worker):
    port = worker.address.split(":")[1]
    for other in (worker.address, f"localhost:{port}"):
        line = f"{worker.address} and {other} are one worker: give each of them once"
        for use in (Llama, serve):
            with pytest.raises(WorkerError, match=f"^{line}$"):
                use(model, rpc=(worker.address, other))
        done = chat_command.run(model, "-p", "x", "--rpc", f"{worker.address},{other}")
        assert (done.stderr, done.returncode) == (f"clex-chat: error: {line}\n", 1)


def test_a_worker_that_has_several_addresses_says_so(model):
    with workers(1, "--host", "0.0.0.0") as (worker,):
        other = worker.address.replace("127.0.0.1", "127.0.0.2")
        line = f"{other}: this RPC server serves another program, or this one under another address"
        with pytest.raises(WorkerError, match=f"^{line}"):
            Llama(model, rpc=[worker.address, other], **OPTIONS)
        with pytest.raises(ServerError, match=line):
            serve(model, rpc=(worker.address, other), port=0, ctx=0, threads=1)


def test_a_machine_that_is_not_known_is_named(model):
    with pytest.raises(WorkerError, match=r"^no-such-machine\.invalid:1: no machine of this name is found"):
        Llama(model, rpc=["no-such-machine.invalid:1"], **OPTIONS)
