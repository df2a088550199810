"""clex-serve through programs that people use it with: each a client of OpenAI's API of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from clex_local import Server, ServerError, serve

pytestmark = pytest.mark.serve

QUESTION = "Name the capital of France."
PAGE = Path(__file__).parent.parent / "docs" / "serve.md"


@pytest.fixture(scope="module")
def server(smollm) -> Iterator[Server]:
    with serve(smollm, port=0, ctx=512, parallel=1, threads=1, server_args=("--no-warmup",)) as server:
        yield server


def test_langchain(server):
    pytest.importorskip("langchain_openai")
    from langchain_openai import ChatOpenAI

    llm = ChatOpenAI(model="any", base_url=f"{server.url}/v1", api_key="none", temperature=0, max_tokens=12)
    assert "Paris" in llm.invoke(QUESTION).content
    assert "Paris" in "".join(chunk.content for chunk in llm.stream(QUESTION))


def test_llama_index(server):
    if find_spec("llama_index") is None or find_spec("llama_index.llms.openai_like") is None:
        pytest.skip("llama-index-llms-openai-like is not installed")
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    llm = OpenAILike(
        model="any", api_base=f"{server.url}/v1", api_key="none", is_chat_model=True, temperature=0, max_tokens=12
    )
    assert "Paris" in str(llm.chat([ChatMessage(content=QUESTION)]))
    assert "Paris" in [*llm.stream_complete(QUESTION)][-1].text


def test_llm(server, tmp_path):
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: served\n  model_name: any\n  api_base: {server.url}/v1\n"
    )
    command = [
        sys.executable,
        "-m",
        "llm",
        "-m",
        "served",
        "-o",
        "temperature",
        "0",
        "-o",
        "max_tokens",
        "12",
        QUESTION,
    ]
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert "Paris" in result.stdout, result.stderr


def curl(line: str, url: str) -> dict[str, Any]:
    """The JSON that a line of the docs gets from a server."""
    command = line.replace("http://127.0.0.1:8080", url).replace("https://127.0.0.1:8080", url)
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server):
    lines = re.findall(r"^curl (?:.*\\\n)*.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    chat, props = (curl(line, server.url) for line in lines if "https:" not in line)
    assert chat["choices"][0]["message"]["content"]
    assert props["default_generation_settings"]["n_ctx"] == 512


@pytest.mark.skipif(None in map(shutil.which, ("curl", "openssl")), reason="curl or openssl is not installed")
def test_tls(smollm, tmp_path):
    page = PAGE.read_text(encoding="utf-8")
    line, make = (re.findall(rf"^{start}.*$", page, re.MULTILINE)[0] for start in ("curl --cacert", "openssl"))
    subprocess.run(["sh", "-c", make], cwd=tmp_path, check=True, capture_output=True)
    given = ("--no-warmup", "--ssl-key-file", str(tmp_path / "key.pem"), "--ssl-cert-file", str(tmp_path / "cert.pem"))
    try:
        server = serve(smollm, port=0, ctx=512, parallel=1, threads=1, server_args=given)
    except ServerError as error:
        if "built without SSL support" not in str(error):
            raise
        pytest.skip("this build knows no TLS: the headers of OpenSSL 3 were not there")
    with server:
        assert server.url.startswith("https://")
        assert curl(line.replace("cert.pem", str(tmp_path / "cert.pem")), server.url) == {"status": "ok"}
