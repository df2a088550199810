"""clex-serve through programs that people use it with: each a client of OpenAI's API of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from clex_local import Server, serve

pytestmark = pytest.mark.serve

QUESTION = "What is the capital of France?"


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
