"""Outputs that are no numbers, memory that runs out, and processes that were forked: errors, of one line each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from clex_local import Llama
from clex_local.errors import ClexError
from clex_local.library.decoding import NOT_FINITE, DecodeError
from helpers.gguf_maker import gguf_bytes
from helpers.low_level import ERROR, Context, Model, logged
from helpers.random_gguf import model_parts, random_tokens
from helpers.sanitizers import skip_without_memory, skip_without_openmp

pytestmark = [pytest.mark.native, pytest.mark.sanitize]

POISON = 9  # the token whose embedding is no number
IDS = [token for token in random_tokens(40) if token != POISON]


def write_poisoned(path: Path, name: str, value: float, **options) -> Path:
    """A model with one value of a tensor replaced: that of a token, or one that every token meets."""
    keys, tensors = model_parts(**options)
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(len(tensors[name]), -1)[POISON] = value
    path.write_bytes(gguf_bytes(keys, tensors))
    return path


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory) -> Path:
    return write_poisoned(tmp_path_factory.mktemp("poison") / "m.gguf", "token_embd.weight", np.nan)


# 1e38 overflows where it is squared or summed.
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
@pytest.mark.parametrize(
    "name", ["output.weight", "output_norm.weight", "blk.0.attn_v.weight", "blk.1.ffn_down.weight"]
)
@pytest.mark.parametrize("tables", [True, False])
def test_outputs_that_are_no_numbers_fail_the_decode(tmp_path, name, value, tables):
    path = write_poisoned(tmp_path / "m.gguf", name, value, tables=tables)
    model = Model(path)
    with Context(model, n_ctx=256) as context, logged(ERROR) as lines:
        status = context.try_decode([(t, i, [0], i == 9) for i, t in enumerate(IDS[:10])])
        if status == 0:  # large, and yet a number
            assert value == 1e38
            assert np.isfinite(context.logits(9)).all()
        else:
            assert status == NOT_FINITE
            assert sum("are no numbers" in line for line in lines) == 1
    model.close()


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_batch_whose_outputs_nobody_asked_for_is_found_with_the_next(poisoned, wanted):
    model = Model(poisoned)
    with Context(model, n_ctx=256) as context:
        prompt = [(t, i, [0], bool(wanted) and i == 4) for i, t in enumerate([*IDS[:2], POISON, *IDS[2:4]])]
        assert context.try_decode(prompt) == (NOT_FINITE if wanted else 0)
        assert context.try_decode([(IDS[5], 5, [0], True)]) == NOT_FINITE
        # cleared with its data, the cache has nothing of it any more
        llama_cpp.llama_memory_clear(context.memory, True)
        again = context.feed(IDS[:10], 0)
    with Context(model, n_ctx=256) as context:
        np.testing.assert_array_equal(again, context.feed(IDS[:10], 0))
    model.close()


@pytest.mark.parametrize("logits_all", [False, True])
def test_llama_says_so_and_forgets_what_it_cached(poisoned, logits_all):
    with Llama(str(poisoned), n_ctx=256, n_threads=1, verbose=False, logits_all=logits_all) as llm:
        llm.eval(IDS[:10])
        wanted = llm.create_completion(IDS[:10], max_tokens=8, temperature=0)["choices"][0]["text"]
        with pytest.raises(DecodeError, match=r"outputs are no numbers \(NaN\)") as error:
            llm.create_completion([*IDS[:10], POISON], max_tokens=4)
        assert str(error.value).startswith(str(poisoned))
        assert isinstance(error.value, (ClexError, RuntimeError))
        assert llm.n_tokens == 0
        assert llm.create_completion(IDS[:10], max_tokens=8, temperature=0)["choices"][0]["text"] == wanted


@pytest.mark.parametrize("pooling", [llama_cpp.LLAMA_POOLING_TYPE_NONE, llama_cpp.LLAMA_POOLING_TYPE_MEAN])
def test_embeddings_that_are_no_numbers_are_an_error(tmp_path, pooling):
    path = write_poisoned(tmp_path / "m.gguf", "blk.0.attn_v.weight", np.nan)
    with (
        Llama(str(path), n_ctx=256, n_threads=1, verbose=False, embedding=True, pooling_type=pooling) as llm,
        pytest.raises(DecodeError, match="no numbers"),
    ):
        llm.embed("text")


def run(*command: object, **options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, **options}, timeout=120
    )


@pytest.mark.parametrize("command", ["chat", "eval", "convert"])
def test_commands_end_with_one_line(tmp_path, command):
    path = write_poisoned(tmp_path / "m.gguf", "blk.0.attn_v.weight", np.nan, tables=command != "convert")
    text = tmp_path / "text.txt"
    text.write_text("some words " * 60)
    arguments = {
        "chat": ["clex-chat", path, "-p", "hello", "--chat-template", "chatml"],
        "eval": ["clex-eval", "ppl", path, "--text", text, "--lengths", "64", "--threads", "1"],
        "convert": ["clex-convert", path, tmp_path / "n.gguf", "--method", "ntk", "--max-factor", "2"],
    }[command]
    done = run(Path(sys.executable).with_name(arguments[0]), *arguments[1:])
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    assert ("not finite" if command == "convert" else "no numbers") in last, done.stderr


LIMITED = """
import resource, sys
import llama_cpp
import numpy as np
from helpers.low_level import Context, Model

def limit(extra):
    pages = int(open("/proc/self/statm").read().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard if extra is None else pages * resource.getpagesize() + extra, hard))

model = Model(sys.argv[1])
tokens = list(range(3, 283))
with Context(model, n_ctx=1024, n_seq=4, unified=True) as context:
    wanted = context.feed(tokens, 0)
statuses = set()
for extra in (0, 1 << 14, 1 << 16, 1 << 18, 1 << 19, 1 << 20, 1 << 22, None):
    with Context(model, n_ctx=1024, n_seq=4, unified=True) as context:
        items = [(t, i, [0], True) for i, t in enumerate(tokens)]
        limit(extra)
        status = context.try_decode(items)
        limit(None)
        statuses.add(status)
        if status == 0:
            np.testing.assert_allclose(context.logits(len(tokens) - 1), wanted, atol=1e-5)
        else:
            assert context.last_position() == -1, context.last_position()
            np.testing.assert_allclose(context.feed(tokens, 0), wanted, atol=1e-5)
print(sorted(statuses))
"""

FULL_HEAP = """
import ctypes, resource, sys
import llama_cpp
from helpers.low_level import Context, Model

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
blocks = (ctypes.c_void_p * 1_000_000)()

def limit(extra):
    pages = int(open("/proc/self/statm").read().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard if extra is None else pages * resource.getpagesize() + extra, hard))

model = Model(sys.argv[1])
found = []
for kilobytes in range(0, 600, 12):
    with Context(model, n_ctx=1024, n_ubatch=64, n_seq=4, unified=True) as context:
        context._fill((3 + i % 200, i, [0], i == 511) for i in range(512))
        limit(0)
        n = 0
        while n < len(blocks) and (block := libc.malloc(1000)):
            blocks[n] = block
            n += 1
        for i in range(min(kilobytes, n)):
            libc.free(blocks[i])
        status = llama_cpp.llama_decode(context.pointer, context._batch)
        for i in range(min(kilobytes, n), n):
            libc.free(blocks[i])
        limit(None)
        found.append((status, context.last_position()))
print(found)
"""

HEADER = """
import resource, sys
from clex_local.errors import ClexError
from clex_local import Llama
from clex_local.model_file.gguf_file import GGUFFile

def limit(extra):
    pages = int(open("/proc/self/statm").read().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard if extra is None else pages * resource.getpagesize() + extra, hard))

for reader in (lambda: GGUFFile(sys.argv[1]).close(), lambda: Llama(sys.argv[1], n_ctx=256, verbose=False).close()):
    answers = []
    reader()  # what each thread and library sets up once, and ends the process without memory for it
    for megabytes in (0, 1, 2, 4, 8, 16, 32, 64, 128, 1024):
        limit(megabytes << 20)
        try:
            reader()
            answers.append("")
        except (ClexError, MemoryError) as error:
            answers.append(str(error) or "memory")
        finally:
            limit(None)
    print(repr(answers))
"""


def child(script: str, *arguments: object) -> list[str]:
    """The lines that a script prints; the tests' modules are there for it."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run(sys.executable, "-c", script, *arguments, PYTHONPATH=path, MALLOC_ARENA_MAX="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@skip_without_memory
def test_memory_that_runs_out_in_a_decode_is_a_status(tmp_path):
    """Whatever is allocated when it runs out; the cache is as before, and the next decode is right."""
    keys, tensors = model_parts(n_buckets=8)
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(keys, tensors))
    (statuses,) = child(LIMITED, tmp_path / "m.gguf")
    assert set(eval(statuses)) == {-2, 0}


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@skip_without_memory
def test_memory_that_runs_out_anywhere_before_a_batch_is_computed_leaves_the_cache_empty(tmp_path):
    """A heap that is full but for some kilobytes: they last until places for some of the tokens are found."""
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(*model_parts(tables=False, original=1024)))
    (line,) = child(FULL_HEAP, tmp_path / "m.gguf")
    assert {(status, last) for status, last in eval(line) if status != 0} == {(-2, -1)}


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@skip_without_memory
def test_memory_that_runs_out_while_a_file_is_read_is_no_damage(tmp_path):
    keys, tensors = model_parts()
    keys |= {f"test.list{i}": [f"element {j} of a list that takes memory" for j in range(20000)] for i in range(20)}
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(keys, tensors))
    for line in child(HEADER, tmp_path / "m.gguf"):
        answers = eval(line)
        assert answers[-1] == ""
        assert any(answers)
        for answer in filter(None, answers):
            assert "memory" in answer or "allocate" in answer, answers
            assert "damaged" not in answer


FORKED = """
import os, sys
from clex_local import Llama

path, used = sys.argv[1], sys.argv[2] == "used"

def answer(llm):
    return llm.create_completion(list(range(20, 60)), max_tokens=8, temperature=0)["choices"][0]["text"]

def make():
    return Llama(path, n_ctx=256, n_threads=2, verbose=False)

llm = make()
wanted = answer(make()) if not used else answer(llm)
if not used:
    llm = make()
if os.fork() == 0:
    ok = answer(llm) == wanted and answer(make()) == wanted
    os._exit(0 if ok else 3)
status = os.waitstatus_to_exitcode(os.wait()[1])
print(status, answer(llm) == wanted)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@skip_without_openmp
@pytest.mark.parametrize("used", ["used", "loaded"])
def test_a_forked_process_computes_with_one_thread_and_says_so(tmp_path, used):
    """GCC's OpenMP waits there for ever, for threads that are in the other process."""
    keys, tensors = model_parts()
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(keys, tensors))
    path = str(Path(__file__).parent)
    done = run(sys.executable, "-c", FORKED, tmp_path / "m.gguf", used, PYTHONPATH=path, GGML_CLEX_THREADS_FIXED="1")
    assert (done.returncode, done.stdout.split()) == (0, ["0", "True"]), done.stderr[-2000:]
    assert done.stderr.count("forked from one that computes with OpenMP threads") == 1
