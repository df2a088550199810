"""clex-chat at a pseudo-terminal: long and pasted lines, any script, windows that change, Ctrl-C and Ctrl-Z."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from helpers.chat_command import COMMAND, Pty, needs_terminal, sessions_folder
from helpers.random_gguf import make_model

pytestmark = [pytest.mark.chat, needs_terminal]

folder = sessions_folder()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model that is there at once, and answers with any bytes."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny.gguf", original=32768, n_layer=1, n_buckets=2)


def start(model, *options: str, **more) -> Pty:
    return Pty(model, "--ctx", "65536", "--chat-template", "chatml", "--no-store", *options, **more)


def messages(folder) -> list[str]:
    return [turn["message"] for turn in json.loads((folder / "s.json").read_text("utf-8"))["turns"]]


def paste(pty: Pty, text: str) -> None:
    pty.chat.send(f"\x1b[200~{text}\x1b[201~")


@pytest.mark.parametrize("width", [40, 200])
def test_whatever_is_typed_or_pasted_arrives(tiny, folder, width):
    lines = "\n".join(f"line {i} of what was pasted" for i in range(300))
    long = "".join(random.Random(0).choices("abcdefghij klmno", k=20_000)).strip()
    scripts = "🫠👩‍👩‍👧 emoji, שלום עולם, مرحبا بالعالم, 你好, e\u0301, \u202eabc"
    pty = start(tiny, "--session", "s", "--max-tokens", "2", width=width)
    pty.prompt(" 0 of 65,536")
    for text in (lines, long, scripts):
        paste(pty, text)
        pty.chat.send("\r")
        pty.expect("in the context")
        pty.prompt("of 65,536")
    pty.chat.send("exit\r")
    assert pty.close() == 0
    assert messages(folder) == [lines, long, scripts]


def test_window_that_changes_while_it_answers(tiny, folder):
    pty = start(tiny, "--session", "s", "--max-tokens", "600", "--temp", "1", width=120)
    pty.prompt(" 0 of 65,536")
    pty.chat.send("Hello\r")
    for width in (40, 200, 20, 80):
        pty.expect(r"\S")
        pty.chat.setwinsize(30, width)
        time.sleep(0.05)
    pty.expect(r"(wrote \d|nothing to say)")
    pty.prompt("of 65,536")
    pty.chat.send("Again\r")
    pty.expect(r"(wrote \d|nothing to say)")
    pty.prompt("of 65,536")
    pty.chat.sendeof()
    assert pty.close() == 0
    assert messages(folder) == ["Hello", "Again"]


def test_tab_completes_commands_values_and_paths(tiny, tmp_path):
    (tmp_path / "a report.txt").write_text("word")
    pty = start(tiny)
    pty.prompt(" 0 of 65,536")
    for typed, answer in [
        ("/syst\t", "no system message"),
        ("/set on_full dr\t", "on_full = drop-oldest"),
        (f"/file {tmp_path}/a rep\t", r"a report.txt: \d+ tokens, sent"),
        ("/drop a \t", "not sent"),
    ]:
        pty.chat.send(typed)
        time.sleep(0.3)
        pty.chat.send("\r")
        pty.expect(answer)
        pty.prompt("of 65,536")
    pty.chat.send("/bye\r")
    assert pty.close() == 0


def test_edit_begins_with_the_message_and_can_be_left(tiny, folder):
    pty = start(tiny, "--session", "s", "--max-tokens", "2")
    pty.prompt(" 0 of 65,536")
    pty.chat.send("First\r")
    pty.prompt("of 65,536")
    pty.chat.send("/edit\r")
    pty.expect("Ctrl-C leaves all as it is")
    pty.prompt("of 65,536")
    pty.chat.sendintr()  # empties the line
    pty.chat.sendintr()
    pty.expect("your message stays as it was")
    pty.prompt("of 65,536")
    pty.chat.send("/edit\r")
    pty.prompt("of 65,536")
    pty.chat.send(" and last\r")
    pty.expect("in the context")
    pty.prompt("of 65,536")
    pty.chat.sendeof()
    assert pty.close() == 0
    assert messages(folder) == ["First and last"]


def test_ctrl_z_suspends(tiny):
    """In a shell, which goes on meanwhile."""
    import pexpect

    command = [*COMMAND, str(tiny), "--ctx", "1024", "--threads", "1", "--chat-template", "chatml", "--max-tokens", "2"]
    shell = pexpect.spawn(
        "/bin/bash",
        ["--norc", "-i"],
        env=os.environ | {"TERM": "xterm", "PS1": "$ "},
        timeout=60,
        encoding="utf-8",
        dimensions=(40, 100),
    )
    shell.sendline(" ".join(command))
    shell.expect_exact("\x1b[6n")
    shell.send("\x1b[1;1R")
    shell.expect("0 of 1,024")
    shell.send("\x1a")
    shell.expect("Stopped")
    shell.sendline("echo wh''ile")
    shell.expect("while")
    shell.sendline("fg")
    shell.expect_exact("\x1b[6n")
    shell.send("\x1b[1;1R")
    shell.expect("0 of 1,024")
    shell.send("/bye\r")
    shell.sendline("echo ex''it $?")
    shell.expect("exit 0")
    shell.close(force=True)


# Ctrl-C


START = "from clex_local.start import clex_chat; clex_chat()"


def test_ctrl_c_where_python_drops_it_comes_again():
    code = """
import signal, time
from clex_local import start
start.clex_inspect

class Thing:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        for _ in range(1000):
            pass

try:
    Thing()
    time.sleep(50)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted\n", "", 0)


@pytest.mark.parametrize(
    ("module", "name"),
    [("chat", "clex-chat"), ("inspection", "clex-inspect"), ("server", "clex-serve"), ("store", "clex-cache")],
)
def test_ctrl_c_while_a_module_is_run_as_a_program(module, name):
    """As ``python -m`` does it, which imports before anything of the module is run."""
    command = [sys.executable, "-X", "importtime", "-m", f"clex_local.{module}.cli", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.rstrip().endswith(" click"):  # the first of what takes long
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=60)
    assert [line for line in errors.splitlines() if not line.startswith("import time:")] == [
        f"{name}: error: interrupted"
    ]
    assert process.returncode == 130


def test_ctrl_c_at_any_time_ends_with_a_line(tiny):
    """While Python imports, the model loads, the prompt is read and the answer is written."""
    arguments = [str(tiny), "-p", "word " * 2000, "--ctx", "65536", "--threads", "1", "--chat-template", "chatml"]
    draw, seen = random.Random(0), set()
    for wait in [0.0, *(draw.uniform(0, 4) for _ in range(9))]:
        process = subprocess.Popen(
            [sys.executable, "-c", f"print(flush=True)\n{START}", *arguments, "--no-store"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        # What is imported first is `clex_local` itself, in a few milliseconds.
        time.sleep(0.3 + wait)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        text = errors.decode()
        assert "Traceback" not in text, text
        assert "Exception ignored" not in text, text
        assert process.returncode in (0, 130, -signal.SIGINT), text  # the last: Python was ending
        seen.add(process.returncode)
    assert 130 in seen


def test_ctrl_c_ends_a_batch_that_takes_long(smollm_ntk, tmp_path):
    """Within the batch: all of the prompt is one."""
    (tmp_path / "long.txt").write_text("word " * 7000)
    options = ("--ctx", "8192", "--batch", "8192", "--no-store", "--max-tokens", "8")
    pty = Pty(smollm_ntk, *options, XDG_STATE_HOME=str(tmp_path))
    pty.prompt(" 0 of 8,192")
    pty.chat.send(f"/file {tmp_path}/long.txt\r")
    pty.prompt("long.txt")
    pty.chat.send("Well?\r")
    time.sleep(3)
    pty.chat.sendintr()
    pty.expect("stopped while reading: the message was not sent; the file still waits")  # whole, it takes minutes
    pty.prompt(r" 0 of 8,192.*long.txt")
    pty.chat.send("/drop\r")
    pty.prompt(" 0 of 8,192")
    pty.chat.send("Hello\r")
    pty.prompt(r" [1-9]\d* of 8,192")
    pty.chat.sendeof()
    assert pty.close() == 0


def test_batch_that_was_stopped_leaves_a_model_that_answers_as_ever(tiny):
    """The interrupt comes while a batch is computed, at a random step of it."""
    code = """
import os, signal, sys, threading, time
from clex_local import open_model
llm = open_model(sys.argv[1], ctx=16384, batch=4096, threads=1, store=False)
tokens = [5 + i % 200 for i in range(8192)]
def answer():
    drawn = llm.generate(tokens[:3000], temp=0)
    found = [next(drawn) for _ in range(8)]
    drawn.close()
    return found
expected = answer()
stopped = 0
for wait in (0.02, 0.1, 0.3, 0.5):
    llm.reset()
    timer = threading.Timer(wait, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        llm.eval(tokens)
        time.sleep(2)
    except KeyboardInterrupt:
        stopped += llm.n_tokens < len(tokens)
        assert llm.n_tokens % 4096 == 0
    assert answer() == expected, wait
print(stopped)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tiny)], capture_output=True, text=True, timeout=120)
    assert (done.stderr, done.returncode) == ("", 0)
    assert int(done.stdout) > 0
