"""Ctrl-C, and whatever else a signal's handler raises, while llama.cpp loads a model."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.random_gguf import make_model

pytestmark = pytest.mark.runtime

# The log is read by Python, so a signal that comes with a line is handled in the middle of the load.
SIGNAL_AT = """
import ctypes, signal, sys
import clex_local, llama_cpp
from clex_local import Llama
path, wanted, number = sys.argv[1], sys.argv[2].encode(), int(sys.argv[3])
seen = []

@llama_cpp.llama_log_callback
def log(level, text, data):
    seen.append(text)
    if wanted in text and not any(wanted in line for line in seen[:-1]):
        signal.raise_signal(number)

llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SIGNAL_AT + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model.gguf")


@pytest.mark.parametrize("line", ["print_info: file format", "load_tensors: loading", "llama_context: n_ctx "])
def test_ctrl_c_while_a_model_loads_is_raised(model, line):
    code = """
try:
    Llama(path, n_ctx=64)
    print("loaded")
except KeyboardInterrupt:
    print("interrupted", any(b"llama_context:" in line for line in seen), len(clex_local.library.interrupt._kept))
Llama(path, n_ctx=64).eval([1, 2])
"""
    done = run(code, model, line, signal.SIGINT)
    # Before the tensors are there the load ends early.
    assert done.stdout == f"interrupted {line.startswith('llama_context')} 0\n"
    assert (done.stderr, done.returncode) == ("", 0)


USES = {"close": "llm.close()", "save": "llm.save_state()", "discard": "del llm"}


@pytest.mark.parametrize("use", USES)
def test_ctrl_c_while_a_model_is_saved_or_freed_is_raised(model, use):
    code = f"""
import time
llm = Llama(path, n_ctx=64)
llm.eval([1, 2])
try:
    {USES[use]}
    for _ in range(6000 if {use == "discard"} else 0):
        time.sleep(0.01)
    print("done")
except KeyboardInterrupt:
    print("interrupted", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
Llama(path, n_ctx=64).eval([1, 2])
"""
    line = "state_write_data: writing state" if use == "save" else "~llama_context: "
    done = run(code, model, line, signal.SIGINT)
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted True\n", "", 0)


def test_ctrl_c_while_a_state_is_loaded_leaves_one_text(model):
    code = """
llm = Llama(path, n_ctx=64)
llm.eval([1, 2])
state = llm.save_state()
llm.reset()
llm.eval([5, 6, 7])
try:
    llm.load_state(state)
except KeyboardInterrupt:
    tokens = llm.input_ids[: llm.n_tokens].tolist()
    print(tokens, llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(llm.ctx), 0) + 1)
"""
    done = run(code, model, "state_read_data: reading state", signal.SIGINT)
    assert (done.stdout, done.stderr) == ("[1, 2] 2\n", "")


def test_other_signals_whose_handlers_raise_are_raised_too(model):
    code = """
def stop(number, frame):
    sys.exit(143)

signal.signal(signal.SIGTERM, stop)
try:
    Llama(path)
finally:
    print(signal.getsignal(signal.SIGTERM) is stop)
"""
    done = run(code, model, "load_tensors: loading", signal.SIGTERM)
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 143)


def test_a_handler_that_raises_nothing_does_not_end_the_load(model):
    code = """
calls = []
signal.signal(signal.SIGINT, lambda *arguments: calls.append(arguments[0]))
Llama(path, n_ctx=64).eval([1])
print(len(calls))
"""
    assert run(code, model, "load_tensors: loading", signal.SIGINT).stdout == "1\n"


@pytest.mark.parametrize(
    "command",
    [
        "from clex_local.chat.cli import main; main([path, '-p', 'x', '--ctx', '64'])",
        "from clex_eval.cli import main; main(['ppl', path, '--text', text, '--tokens', '64'])",
    ],
)
def test_commands_end_with_one_line_and_130(model, tmp_path, command):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time. " * 40)
    done = run(f"text = {str(text)!r}\n{command}", model, "load_tensors: loading", signal.SIGINT)
    assert done.returncode == 130, done
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "error: interrupted" in done.stderr
