"""clex-serve behind nginx, with the lines of docs/serve.md."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from helpers.random_gguf import random_tokens
from helpers.workers import free_port
from test_serve import complete, make, metric, serving

pytestmark = pytest.mark.serve

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin")
PAGE = Path(__file__).parent.parent / "docs" / "serve.md"
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
LONG = random_tokens(6000)  # more than a second


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[httpx.Client]:
    """A server whose model takes about a millisecond for a token."""
    path = tmp_path_factory.mktemp("nginx") / "model.gguf"
    make(path, n_layer=8, n_head=8, n_head_kv=8, original=4096, n_buckets=2)
    with serving(path, parallel=1, store=False) as client:
        yield client


@contextmanager
def proxied(server: httpx.Client, folder: Path, **changes: str) -> Iterator[httpx.Client]:
    """nginx in front of the server, with the page's lines, of which some may have another value."""
    if NGINX is None:
        pytest.skip("nginx is not installed (Debian: apt install nginx-light)")
    (location,) = re.findall(r"```nginx\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for name, value in {"proxy_pass": f"http://{server.base_url.netloc.decode()}", **changes}.items():
        location, count = re.subn(rf"{name} [^;]*;", f"{name} {value};", location)
        assert count == 1
    port = free_port()
    paths = "".join(f"{name}_temp_path {folder}/{name}; " for name in TEMPORARY)
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/errors; events {{}}\n"
        f"http {{ access_log off; {paths} server {{ listen 127.0.0.1:{port};\n{location}}} }}\n"
    )
    log = folder / "errors"
    process = subprocess.Popen([NGINX, "-p", folder, "-e", log, "-c", folder / "nginx.conf"])
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            while True:
                try:
                    client.get("/health")
                    break
                except httpx.ConnectError:
                    assert process.poll() is None, log.read_text()
                    time.sleep(0.02)
            yield client
    finally:
        process.terminate()
        process.wait()


def test_text_arrives_while_it_is_written(client, tmp_path):
    asked = {"prompt": random_tokens(20), "n_predict": 4000, "ignore_eos": True, "stream": True}
    with proxied(client, tmp_path) as proxy, proxy.stream("POST", "/completion", json=asked) as stream:
        lines = (line for line in stream.iter_lines() if line)
        first = json.loads(next(lines)[6:])
        assert first["stop"] is False
        assert metric(client, "requests_processing") == 1


def test_text_that_takes_long_to_read_is_answered(client, tmp_path):
    with proxied(client, tmp_path) as proxy:
        assert complete(proxy, LONG, 1, cache_prompt=False)["timings"]["prompt_n"] == 6000


def test_without_its_line_it_would_not_be(client, tmp_path):
    with proxied(client, tmp_path, proxy_read_timeout="1s") as proxy:
        asked = {"prompt": LONG, "n_predict": 1, "cache_prompt": False}
        assert proxy.post("/completion", json=asked).status_code == 504


def test_body_is_as_large_as_the_server_takes(client, tmp_path):
    with proxied(client, tmp_path) as proxy:
        complete(proxy, [5, 6, 7], unread="a" * 2 * 2**20)  # nginx takes 1 MiB by itself
