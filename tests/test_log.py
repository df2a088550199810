"""What llama.cpp logs: who sees it, and that threads do not get in each other's way."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.gguf_maker import rewrite
from helpers.random_gguf import make_model

pytestmark = pytest.mark.runtime


def run(code: str, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own, the log belongs to a process."""
    command = [sys.executable, "-X", "faulthandler", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=120)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model.gguf")


LOAD = "import sys; from clex_local import Llama; Llama(sys.argv[1], n_threads=1, verbose={verbose}).close()"


def test_nothing_is_logged_unless_asked(model):
    done = run(
        "import sys; from clex_local import Llama; llm = Llama(sys.argv[1]); llm.eval([1, 2]); print('!')", model
    )
    assert (done.stdout, done.stderr) == ("!\n", "")


def test_the_example_of_the_readme_prints_the_answer_and_no_log(tmp_path):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    example = next(part for part in readme.split("```python\n")[1:] if "report.txt" in part).split("```")[0]
    make_model(tmp_path / "long.gguf", original=128)
    (tmp_path / "report.txt").write_text("Nothing happened.")
    done = run(f"import os; os.chdir({str(tmp_path)!r})\n{example}", PYTHONIOENCODING="utf-8:replace")
    assert (done.returncode, done.stderr) == (0, "")
    settings, *answer, state = done.stdout.rstrip("\n").split("\n")
    assert "tokens at once" in settings
    assert state.startswith("ClexState(")
    assert "".join(answer).strip()


def test_verbose_shows_information_but_no_debug_lines(model):
    shown = run(LOAD.format(verbose=True), model)
    assert "print_info: " in shown.stderr
    assert "llama_kv_cache: size = " in shown.stderr
    assert "create_tensor: loading tensor" not in shown.stderr  # a debug line
    assert shown.stdout == ""
    debug = run(LOAD.format(verbose=True), model, LLAMA_CLEX_LOG_DEBUG="1")
    assert "create_tensor: loading tensor" in debug.stderr


def test_commands_show_no_debug_lines(model, tmp_path):
    chat = "clex_local.chat.cli", [model, "-p", "x", "--max-tokens", "1", "--ctx", "64"]
    converter = "clex_convert.cli", [model, tmp_path / "out.gguf", "--method", "linear", "--outtype", "q8_0"]
    for module, arguments in (chat, converter):
        done = run(f"import sys; from {module} import main; main(sys.argv[1:])", *arguments, "-v")
        assert "llama_model_loader: loaded meta data" in done.stderr, done
        assert "create_tensor: loading tensor" not in done.stderr


def test_escape_sequences_in_a_file_do_not_reach_the_terminal(model, tmp_path):
    path = rewrite(model, tmp_path / "named.gguf", {"general.name": "a\x1b]0;title\x07b"})
    shown = run(LOAD.format(verbose=True), path).stderr
    assert "\x1b" not in shown
    assert "\x07" not in shown


# Loads, refusals and states in several threads at once, some of them with the log shown.
STRESS = """
import sys, threading
from clex_local import ClexError, Llama
model, damaged = sys.argv[1:]
failed, barrier = [], threading.Barrier(4)

def work(number):
    try:
        for _ in range(8):
            barrier.wait()
            llm = Llama(model, n_ctx=64, n_threads=1, verbose=number == 0)
            llm.eval([1, 2, 3])
            state = llm.save_state()
            barrier.wait()
            llm.load_state(state)
            llm.close()
            barrier.wait()
            try:
                Llama(damaged, verbose=number == 0)
                failed.append("a damaged file was loaded")
            except ClexError as error:
                if "clex.version is 2" not in str(error):
                    failed.append(str(error))
    except BaseException as error:
        barrier.abort()
        failed.append(repr(error))

threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print("whole", sorted(set(failed)))
print("and stderr", file=sys.stderr)
"""


def test_threads_that_load_at_once_do_not_disturb_each_other(golden_gguf, tmp_path):
    import numpy as np

    source = golden_gguf("llama")
    damaged = rewrite(source, tmp_path / "damaged.gguf", {"clex.version": np.uint32(2)})
    for _ in range(2):
        done = run(STRESS, source, damaged)
        assert done.returncode == 0, done.stderr[-2000:]
        # Neither stream is lost, and every thread got the reason of its own refusal.
        assert done.stdout == "whole []\n"
        assert done.stderr.endswith("and stderr\n")


def test_a_callback_of_the_application_keeps_getting_every_line(model):
    code = """
import sys, ctypes, llama_cpp
from clex_local import ClexError, Llama
lines = []
callback = llama_cpp.llama_log_callback(lambda level, text, data: lines.append(text))
llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
Llama(sys.argv[1], n_ctx=64, n_threads=1, verbose=True).close()
print(any(b"print_info" in line for line in lines))
"""
    done = run("import clex_local" + code, model)
    assert done.stdout == "True\n", done.stderr
    assert "print_info" not in done.stderr


@pytest.mark.parametrize("environment", [{}, {"GGML_CLEX_TILES": "software"}, {"GGML_CLEX_MATMUL_DISABLE": "1"}])
def test_verbose_says_once_what_computes_batches_with_each_type_of_weights(tmp_path, environment):
    """That is what the library's information says of the units."""
    from clex_convert import convert

    path = tmp_path / "q8_0.gguf"
    convert(make_model(tmp_path / "f32.gguf", head=128), path, outtype="q8_0")
    code = """import sys, llama_cpp; from clex_local import Llama
llm = Llama(sys.argv[1], n_ctx=512, n_threads=1, verbose=True)
for _ in range(2):
    llm.reset()
    llm.eval([1 + i * 37 % 280 for i in range(100)])
print(llama_cpp.llama_print_system_info().decode())"""
    done = run(code, path, **environment)
    features = dict(part.split(" = ") for part in done.stdout.partition(": ")[2].split(" | ") if " = " in part)
    units = features["CLEX_PRODUCTS"]
    said = [line for line in done.stderr.splitlines() if "batches with weights of type q8_0" in line]
    if "GGML_CLEX_MATMUL_DISABLE" in environment:
        assert (units, said) == ("ggml", [])
    else:
        assert said == [f"ggml_clex_matmul: batches with weights of type q8_0: {units}"]
    if "GGML_CLEX_TILES" in environment and sys.platform == "linux" and platform.machine() == "x86_64":
        assert units == "software tiles"
