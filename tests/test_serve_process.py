"""clex-serve as a process: it ends with who started it, outlives connections that say nothing, and does not grow."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from clex_local import Server, ServerError, serve
from helpers.random_gguf import make_model, random_tokens

pytestmark = pytest.mark.serve

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits of another process")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Tables for 64, 128, 192 and 256 tokens."""
    return make_model(tmp_path_factory.mktemp("serve") / "tiny.gguf")


@contextmanager
def serving(model: Path, *server_args: str, **options: Any) -> Iterator[tuple[Server, httpx.Client]]:
    given = {"port": 0, "ctx": 0, "parallel": 2, "threads": 1, "batch": 32, **options}
    with (
        serve(model, server_args=("--no-warmup", *server_args), **given) as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):
        yield server, client


def complete(client: httpx.Client, prompt: list[int], n_predict: int = 8) -> dict[str, Any]:
    answer = client.post("/completion", json={"prompt": prompt, "n_predict": n_predict, "ignore_eos": True})
    assert answer.status_code == 200, answer.text
    assert answer.json()["timings"]["predicted_n"] == n_predict
    return answer.json()


#
# who started it
#

PARENTS = {
    "serve": "import clex_local, sys, time\n"
    "server = clex_local.serve(sys.argv[1:], port=0, ctx=0, threads=1)\n"
    "print('ready', flush=True)\n"
    "time.sleep(600)",
    "clex-serve": "from clex_local.server.cli import main; main()",
}


def started(tiny: Path, tmp_path: Path, kind: str, models: int) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A Python process that serves, and all that it started."""
    paths = [tiny]
    for number in range(1, models):
        paths.append(tmp_path / f"model-{number}.gguf")
        paths[-1].write_bytes(tiny.read_bytes())
    options = ["--port", "0", "--threads", "1", "--ctx", "0"] if kind == "clex-serve" else []
    command = [sys.executable, "-c", PARENTS[kind], *map(str, paths), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ready"):
            break
        if "API: " in line:
            if models > 1:  # one of them is loaded, by a process that the router starts
                url = line.split("API: ")[1].strip()
                httpx.post(
                    f"{url}/completions", json={"model": paths[-1].stem, "prompt": "a", "max_tokens": 1}, timeout=60
                )
            break
    return process, psutil.Process(process.pid).children(recursive=True)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("kind", "models"), [("serve", 1), ("clex-serve", 1), ("clex-serve", 2)])
def test_server_does_not_outlive_who_started_it(tiny, tmp_path, kind, models):
    process, servers = started(tiny, tmp_path, kind, models)
    try:
        assert len(servers) == models  # the router, and the one with the model
        process.send_signal(signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(servers, timeout=60)
        assert not alive
    finally:
        for server in servers:
            if server.is_running():
                server.kill()
        assert process.stdout is not None
        process.stdout.close()


def test_server_that_is_loading_does_not_outlive_who_started_it(tiny, tmp_path):
    """Also before it can end as it does for signals."""
    from clex_local.server.process import server_program

    os.mkfifo(tmp_path / "model.gguf")  # opening it takes until somebody writes
    process = subprocess.Popen(
        [str(server_program()), "--model", str(tmp_path / "model.gguf"), "--port", "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "LLAMA_CLEX_END_WITH_STDIN": "1"},
    )
    try:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) != 0
    finally:
        process.kill()
        process.wait()


#
# connections
#

ENDLESS = (
    b"",
    b"POST /completion HTTP/1.1\r\n",
    b"POST /completion HTTP/1.1\r\nContent-Length: 100\r\n\r\n{",
    b"POST /completion HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n64\r\n{",
)


@contextmanager
def half_open(url: str, count: int) -> Iterator[list[socket.socket]]:
    """Connections with nothing, a part of the head, or a part of the body."""
    place = httpx.URL(url)
    with ExitStack() as stack:
        connections = []
        for number in range(count):
            connection = stack.enter_context(socket.create_connection((place.host, place.port), timeout=60))
            connection.sendall(ENDLESS[number % len(ENDLESS)])
            connections.append(connection)
        yield connections


@contextmanager
def files(soft: int) -> Iterator[None]:
    """So many files at once for this process and those that it starts, which may have more."""
    resource = pytest.importorskip("resource")
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


def test_thousand_half_open_connections(tiny):
    with ExitStack() as stack:
        with files(256):
            server, client = stack.enter_context(serving(tiny))
        stack.enter_context(files(2048))
        resource = pytest.importorskip("resource")
        if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1200:
            pytest.skip("this process may not have 1,200 files open")
        with half_open(server.url, 1000), ThreadPoolExecutor(4) as pool:
            for answer in [pool.submit(complete, client, random_tokens(10 + n)) for n in range(4)]:
                answer.result()
            assert client.get("/health").json() == {"status": "ok"}
        complete(client, random_tokens(20))


def until_closed(connection: socket.socket) -> bytes:
    """What is received of a server that gets a byte now and then, each within the time that is given to one byte."""
    connection.settimeout(0.2)
    answer = b""
    for _ in range(500):
        try:
            received = connection.recv(4096)
            answer += received
            if not received:
                return answer
        except TimeoutError:
            try:
                connection.sendall(b"a")
            except OSError:  # closed
                return answer
        except OSError:  # reset, or in the middle of TLS
            return answer
    pytest.fail("the connection stays open")


@pytest.mark.parametrize("start", ENDLESS[1:], ids=["head", "body", "chunk"])
def test_request_that_never_ends_is_closed(tiny, capsys, start):
    with serving(tiny, "--timeout", "1") as (server, client):
        with half_open(server.url, 1) as (connection,):
            connection.sendall(start)
            head, _, body = until_closed(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408")
        assert json.loads(body)["error"]["message"] == "the request did not arrive in time"
        complete(client, random_tokens(10))
    assert "closed a connection from 127.0.0.1 whose request did not arrive in time" in capsys.readouterr().err


def test_request_that_waits_for_its_body_to_be_wanted(tiny):
    """The status line that asks for the body is no answer."""
    head = b"POST /completion HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 100\r\n\r\n"
    with serving(tiny, "--timeout", "1") as (server, _), half_open(server.url, 1) as (connection,):
        connection.sendall(head)
        answer = until_closed(connection)
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 408 Request Timeout\r\n")


def test_body_that_is_not_read_is_no_late_request(tiny, capsys):
    """Its answer is the one that it got, however long the rest takes to come."""
    head = b"POST /completion HTTP/1.1\r\nContent-Length: 100\r\n\r\n{"
    with (
        serving(tiny, "--timeout", "1", api_key="secret") as (server, _),
        half_open(server.url, 1) as (connection,),
    ):
        connection.sendall(head)
        answer = until_closed(connection)
    assert answer.startswith(b"HTTP/1.1 401")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert "did not arrive" not in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
@pytest.mark.parametrize("start", [None, *ENDLESS[1:]], ids=["handshake", "head", "body", "chunk"])
def test_request_over_tls_that_never_ends_is_closed(tiny, tmp_path, start):
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate]
    subprocess.run([*command, "-subj", "/CN=localhost"], check=True, capture_output=True)
    given = ("--no-warmup", "--timeout", "1", "--ssl-key-file", key, "--ssl-cert-file", certificate)
    try:
        server = serve(tiny, server_args=given, port=0, ctx=0, parallel=1, threads=1)
    except ServerError as error:
        if "built without SSL support" not in str(error):
            raise
        pytest.skip("this build knows no TLS: it was made without the headers of OpenSSL 3")
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    with server, httpx.Client(base_url=server.url, verify=False, timeout=60) as client:
        place = httpx.URL(server.url)
        with socket.create_connection((place.host, place.port), timeout=60) as connection:
            if start is None:
                until_closed(connection)
            else:
                with trusting.wrap_socket(connection) as wrapped:
                    wrapped.sendall(start)
                    assert until_closed(wrapped).startswith(b"HTTP/1.1 408")
        assert client.get("/health").json() == {"status": "ok"}


@LINUX
@pytest.mark.parametrize("limit", ["files", "memory for threads"])
def test_limits_of_the_system_end_nothing(tiny, capsys, limit):
    import resource

    with serving(tiny, "--timeout", "2") as (server, client):
        complete(client, random_tokens(10))
        process = psutil.Process(server.pid)
        if limit == "files":
            most = process.num_fds() + 20
            resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (most, most))
        else:
            most = process.memory_info().vms + 100 * 2**20  # a thread's stack has 8 MiB
            resource.prlimit(server.pid, resource.RLIMIT_AS, (most, most))
        with half_open(server.url, 200):
            complete(client, random_tokens(20))
        complete(client, random_tokens(30))
    said = capsys.readouterr().err
    assert ("no more files may be open" if limit == "files" else "no more threads can be started") in said


#
# memory
#


def test_memory_is_flat(tiny, tmp_path):
    """Over mixed requests: long and short ones, too long ones, given up, cancelled, saved and restored."""
    (tmp_path / "slots").mkdir()
    prompts = [random_tokens(length, seed=length) for length in (10, 60, 70, 120, 140, 190, 200, 230)]

    with serving(tiny, "--slot-save-path", f"{tmp_path / 'slots'}{os.sep}", parallel=4) as (server, client):

        def ask(number: int) -> None:
            kind, prompt = number % 5, prompts[number % len(prompts)]
            if kind == 0:
                assert client.post("/completion", json={"prompt": random_tokens(256)}).status_code == 400
            elif kind == 1:  # given up while it is answered
                with client.stream("POST", "/completion", json={"prompt": prompt, "stream": True}) as stream:
                    next(stream.iter_lines())
            elif kind == 2:
                slot = {"filename": f"{number % 4}.bin"}
                client.post(f"/slots/{number % 4}?action=save", json=slot)
                client.post(f"/slots/{number % 4}?action=restore", json=slot)
            else:
                complete(client, prompt)

        def resident() -> int:
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(ask, range(100)))
            return psutil.Process(server.pid).memory_info().rss

        resident()  # what is allocated once
        sizes = [resident() for _ in range(3)]
        assert max(sizes[1:]) < sizes[0] * 1.05
