"""A conversation that goes on in other processes and in a server says what it says in one process."""

from __future__ import annotations

import json

import pytest

from clex_local import Llama
from clex_local.store.documents import store_folder
from helpers.processes import run
from helpers.random_gguf import random_tokens
from test_serve import complete, make, serving

pytestmark = pytest.mark.serve

TURNS, ANSWER = 20, 12
QUESTIONS = [random_tokens(70, seed=seed) for seed in range(TURNS)]
BATCH = 256


def converse(llm: Llama, text: list[int], turns: range) -> list[int]:
    """The text with these questions, each with its answer."""
    for turn in turns:
        text = [*text, *QUESTIONS[turn]]
        steps = llm.generate(text, temp=0)
        text += [next(steps) for _ in range(ANSWER)]
        steps.close()
    return text


def open_llama(path, store: bool, **options) -> Llama:
    return Llama(
        str(path), n_ctx=0, n_batch=BATCH, n_ubatch=BATCH, n_threads=1, type_k=0, type_v=0, store=store, **options
    )


PROCESS = """
import json, sys
from test_stored_conversation import converse, open_llama
path, reuse, text, begin, end = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
with open_llama(path, True, prefix_reuse=reuse) as llm:
    first = converse(llm, text, range(begin, begin + 1))
    restored = llm.restored_tokens
    print(json.dumps([restored, converse(llm, first, range(begin + 1, end))]))
"""


@pytest.mark.parametrize(("tables", "reuse"), [(False, "fast"), (True, "exact")])
def test_twenty_turns_in_three_processes_and_a_server(tmp_path, monkeypatch, tables, reuse):
    """With tables by length in the way that does not depend on what was read before."""
    monkeypatch.setenv("CLEX_CACHE", str(tmp_path / "cache"))
    original = 512 if tables else 2048
    path = make(tmp_path / "tiny.gguf", original=original, n_buckets=4, tables=tables)
    with open_llama(path, False, prefix_reuse=reuse) as llm:
        expected = converse(llm, [], range(TURNS))
    assert not store_folder().exists()

    def in_process(text: list[int], begin: int, end: int) -> tuple[int, list[int]]:
        with run(PROCESS, path, reuse, json.dumps(text), begin, end) as process:
            said, _ = process.communicate()
        assert process.returncode == 0
        return tuple(json.loads(said))

    restored, text = in_process([], 0, 6)
    assert restored == 0
    restored, text = in_process(text, 6, 10)
    assert restored or tables
    with serving(path, parallel=1, batch=BATCH, prefix_reuse=reuse) as client:
        for turn in range(10, 16):
            text = [*text, *QUESTIONS[turn]]
            answer = complete(client, text, ANSWER)
            # what another process has computed is not computed again
            assert turn > 10 or tables or answer["timings"]["restored_n"] >= len(text) - ANSWER - 70 - 2 * BATCH
            text += answer["tokens"]
    restored, text = in_process(text, 16, TURNS)
    assert restored or tables
    assert text == expected
