"""From the constructor to the end of a process: every failure is one error, and nothing reads freed memory."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from clex_local import ClexError, Llama
from clex_local.errors import ModelError
from clex_local.runtime.lifetime import ClosedError
from clex_local.session.session import Session
from helpers.gguf_maker import gguf_bytes
from helpers.random_gguf import make_model, model_parts

pytestmark = pytest.mark.runtime

CHAT = [{"role": "user", "content": "a"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("lifetime") / "model.gguf")


def load(path, **options) -> Llama:
    return Llama(path, **{"n_ctx": 256, "n_threads": 1, "verbose": False, **options})


def run(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The end of a process of its own; a model is loaded as `Llama(P, ...)`."""
    code = f"import sys\nfrom clex_local import Llama\nP = sys.argv[1]\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


CALLS = {
    "__call__": lambda llm: llm("a", max_tokens=1),
    "__call__, stream": lambda llm: list(llm("a", max_tokens=1, stream=True)),
    "clex": lambda llm: llm.clex,
    "control_tokens": lambda llm: llm.control_tokens,
    "create_chat_completion": lambda llm: llm.create_chat_completion(CHAT, max_tokens=1),
    "create_completion": lambda llm: llm.create_completion("a", max_tokens=1),
    "create_embedding": lambda llm: llm.create_embedding("a"),
    "ctx": lambda llm: llm.ctx,
    "detokenize": lambda llm: llm.detokenize([5]),
    "embed": lambda llm: llm.embed("a"),
    "eval": lambda llm: llm.eval([5]),
    "generate": lambda llm: next(llm.generate([5])),
    "load_state": lambda llm: llm.load_state(STATE),
    "model": lambda llm: llm.model,
    "n_ctx": lambda llm: llm.n_ctx(),
    "n_embd": lambda llm: llm.n_embd(),
    "n_vocab": lambda llm: llm.n_vocab(),
    "pooling_type": lambda llm: llm.pooling_type(),
    "reset": lambda llm: llm.reset(),
    "sample": lambda llm: llm.sample(),
    "save_state": lambda llm: llm.save_state(),
    "token_bos": lambda llm: llm.token_bos(),
    "token_eos": lambda llm: llm.token_eos(),
    "token_nl": lambda llm: llm.token_nl(),
    "token_text": lambda llm: llm.token_text(5),
    "tokenize": lambda llm: llm.tokenize(b"a"),
    "tokenizer": lambda llm: llm.tokenizer().tokenize(b"a"),
}
# These say what was asked for, compute without a model, or load another.
HARMLESS = {
    "accepted_tokens",
    "cache",
    "close",
    "draft_model",
    "drafted_tokens",
    "eval_logits",
    "eval_tokens",
    "from_pretrained",
    "logits_to_logprobs",
}
HARMLESS |= {"longest_token_prefix", "metadata", "model_params", "restored_tokens", "set_cache", "set_seed", "settings"}
HARMLESS |= {"stored_tokens"}
HARMLESS |= {"create_chat_completion_openai_v1"}  # needs another package, and calls create_chat_completion
STATE = llama_cpp.llama.LlamaState(np.zeros(0, np.intc), np.zeros((0, 0), np.single), 0, b"", 0, 0)


def test_every_method_is_known_here():
    public = {name for name, _ in inspect.getmembers(Llama) if not name.startswith("_")}
    assert public == {name.split(",")[0] for name in CALLS if name[0] != "_"} | HARMLESS


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_use_after_close_is_one_error(path, call):
    llm = load(path)
    llm.eval([5, 6])
    llm.close()
    with pytest.raises(ClosedError) as caught:
        call(llm)
    assert str(caught.value) == f"{path}: this Llama was closed; make another one to go on"
    assert isinstance(caught.value, ClexError)
    llm.close()


def test_what_was_taken_from_a_model_before_it_was_closed(path):
    with load(path, logits_all=True) as llm:
        tokens, session, tokenizer = llm.generate([5, 6]), Session(llm), llm.tokenizer()
        text, answer = llm.create_completion("a", max_tokens=9, stream=True), session.send("a")
        next(tokens)
        assert llm.settings.n_threads == 1
    for use in (
        *(lambda: next(tokens), lambda: next(text), lambda: next(answer)),
        *(lambda: session.piece(5), lambda: session.count("a"), lambda: session.send("b")),
        *(lambda: tokenizer.encode("a"), lambda: tokenizer.decode([5])),
    ):
        with pytest.raises(ClexError, match=r"closed|another call has used"):
            use()
    with pytest.raises(ClosedError), llm:
        llm.eval([5])


def test_with_closes_after_an_error_too(path):
    with pytest.raises(ClexError, match="do not fit"), load(path) as llm:
        llm.eval([5] * 1000)
    with pytest.raises(ClosedError):
        llm.n_ctx()


def test_closed_model_can_be_pickled(path):
    llm = load(path)
    llm.close()
    with pickle.loads(pickle.dumps(llm)) as again:
        assert again.n_ctx() == 256


ENDS = {
    "no argument": "Llama()",
    "missing file": "Llama('missing.gguf')",
    "unknown keyword": "Llama(P, n_gpu=1)",
    "wrong policy": "Llama(P, policy='x')",
    "wrong type": "Llama(P, n_ctx='512', verbose=False)",
    "no adapter": "Llama(P, lora_path=P, verbose=False)",
    "no memory": "Llama(P, kv_overrides={'llama.block_count': 77}, verbose=False)",
    "at exit": "llm = Llama(P, verbose=False); llm('a', max_tokens=1)",
    "at exit, with others": "import numpy, torch\nllm = Llama(P, verbose=False); llm('a', max_tokens=1)",
    "at exit, in a cycle": "llm = Llama(P, verbose=False); llm.me = llm",
    "at exit, in a stream": "llm = Llama(P, verbose=False); stream = llm.generate([5]); next(stream)",
    "at exit, embedding": "llm = Llama(P, verbose=False, embedding=True); llm.embed('a')",
    "closed": "llm = Llama(P, verbose=False); llm.close(); llm.close()",
    "copied": "import copy\nllm = Llama(P, verbose=False); other = copy.deepcopy(llm); other('a', max_tokens=1)",
    "daemon": "import threading\nllm = Llama(P, n_ctx=256, verbose=False)\n"
    "def work():\n while True: llm('abc', max_tokens=200, temperature=0)\n"
    "threading.Thread(target=work, daemon=True).start()\nimport time; time.sleep(0.3)",
    "fork": "import os\nllm = Llama(P, verbose=False)\nchild = os.fork()\n"
    "if child: sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))",
}


@pytest.mark.parametrize("code", ENDS.values(), ids=ENDS)
def test_python_ends_without_ignored_exceptions(path, code):
    done = run(code, path)
    assert "Exception ignored" not in done.stderr
    assert done.returncode in (0, 1), done.stderr
    assert ("Error" in done.stderr) == (done.returncode == 1), done.stderr


def test_refused_model_leaves_no_memory_behind(path):
    """Freed at once, and not when the exception, which holds it, is forgotten."""
    for _ in range(3):
        with pytest.raises(ModelError) as caught:
            load(path, kv_overrides={"llama.attention.head_count": 7})
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("content", [None, b"", b"GGUF\3\0\0", b"x" * 9999, "cut", "tables", "folder"])
def test_file_that_is_no_model_is_a_model_error(path, tmp_path, content):
    """And a ValueError, as llama-cpp-python raises."""
    target = tmp_path / "model.gguf"
    if content == "cut":
        target.write_bytes(path.read_bytes()[:-1000])
    elif content == "tables":
        keys, tensors = model_parts()
        target.write_bytes(gguf_bytes(keys | {"clex.version": np.uint32(0)}, tensors))
    elif content == "folder":
        target.mkdir()
    elif content is not None:
        target.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        load(target)
    assert isinstance(caught.value, ValueError)
    assert str(target) in str(caught.value)


def test_paths_of_every_kind(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(path.parent))
    monkeypatch.setenv("USERPROFILE", str(path.parent))
    for given in (path, str(path), os.fsencode(path), f"~/{path.name}", Path("~") / path.name):
        with load(given) as llm:
            assert llm.model_path == str(path)
            answer = llm("a", max_tokens=1)
            assert json.loads(json.dumps(answer))["model"] == str(path)
            with pickle.loads(pickle.dumps(llm)) as again:
                assert again.model_path == str(path)
    monkeypatch.chdir(path.parent)
    with load(path.name) as llm:
        assert llm.model_path == path.name


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have names in Unicode only")
def test_name_that_is_no_unicode(path, tmp_path):
    target = os.fsencode(tmp_path) + b"/m\xff\xfe.gguf"
    Path(os.fsdecode(target)).write_bytes(path.read_bytes())
    with load(target) as llm:
        assert llm("a", max_tokens=1)["usage"]["completion_tokens"] == 1


def test_waiting_for_a_thread_that_is_inside(path):
    """Closing waits for the call of another thread instead of freeing what it computes with."""
    llm = load(path, n_batch=16)
    inside, seen = threading.Event(), []
    llm.on_prefill = lambda done, total: inside.set()

    def work():
        llm.eval(list(range(3, 250)))
        seen.append(llm.n_tokens)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(60)
    llm.close()
    thread.join(60)
    assert seen == [247]
