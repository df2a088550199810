"""Nothing that comes out of a file, or out of a model, controls the terminal it is printed on."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from clex_local.chat.answer_view import printable
from clex_local.commands.command import json_line
from clex_local.errors import shown
from helpers.gguf_maker import MODEL, gguf_bytes, rewrite

pytestmark = [
    pytest.mark.chat,
    pytest.mark.inspect,
    pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal"),
]

# A title, a colour by one character instead of two, a line that is overwritten, a cursor that moves.
ATTACK = "\x1b]0;owned\x07\x9b31m\rred\x1b[2J\x08"


def on_a_terminal(module: str, *arguments: object) -> str:
    """What a command writes to a terminal."""
    import pexpect

    program = f"from {module} import main; main()"
    child = pexpect.spawn(
        sys.executable, ["-c", program, *map(str, arguments)], encoding="utf-8", timeout=60, dimensions=(40, 200)
    )
    child.expect(pexpect.EOF)
    child.close()
    return child.before


def is_harmless(text: str) -> bool:
    return not any(piece in text for piece in ("\x1b]", "\x07", "\x9b", "\x1b[2J", "\rred", "\x08"))


@pytest.mark.parametrize("keys", [{}, {"general.name": ATTACK}, {"general.architecture": ATTACK}, {ATTACK: ATTACK}])
def test_clex_inspect(tmp_path, keys):
    path = tmp_path / f"{ATTACK}.gguf"
    path.write_bytes(gguf_bytes(MODEL | keys, {ATTACK: np.zeros(32, np.float32)}))
    for options in ([], ["--json"]):
        text = on_a_terminal("clex_local.inspection.cli", path, *options)
        assert "owned" in text
        assert is_harmless(text)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("clex_local.chat.cli", [ATTACK, "-p", "Hi"]),
        ("clex_local.chat.cli", ["m", ATTACK]),
        ("clex_local.inspection.cli", [ATTACK]),
        ("clex_local.inspection.cli", [f"--{ATTACK}"]),
        ("clex_convert.cli", [ATTACK, "out.gguf"]),
        ("clex_convert.cli", ["m", "out.gguf", ATTACK]),
        ("clex_train.cli", ["m", "out", ATTACK]),
        ("clex_eval.cli", ["ppl", ATTACK, "--text", ATTACK]),
        ("clex_eval.cli", [ATTACK]),
    ],
)
def test_errors_of_every_command(module, arguments):
    text = on_a_terminal(module, *arguments)
    assert "error: " in text
    assert "owned" in text
    assert is_harmless(text)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
@pytest.mark.parametrize(
    "command",
    ["chat.cli {model} -p Hi --max-tokens 2 --ctx 64 --no-store", "chat.cli {model} -p Hi --json --max-tokens 2",
     "inspection.cli {model}", "chat.cli --help"],
)  # fmt: skip
def test_output_that_cannot_be_written_is_one_line(smollm, command, redirection):
    program = f"{shlex.quote(sys.executable)} -m clex_local.{command.format(model=shlex.quote(str(smollm)))}"
    done = subprocess.run(["sh", "-c", f"{program} {redirection}"], stdin=subprocess.DEVNULL, capture_output=True)
    why = "No space left on device" if "full" in redirection else "Bad file descriptor"
    assert re.fullmatch(rf"clex-\w+: error: standard output: {why}\n", done.stderr.decode().splitlines(True)[-1])
    assert b"Traceback" not in done.stderr
    assert done.returncode == 1


def test_a_conversion(smollm, tmp_path):
    text = on_a_terminal("clex_convert.cli", smollm, tmp_path / f"{ATTACK}[red].gguf", "--method", "ntk")
    assert "owned" in text
    assert "[red].gguf: " in text
    assert is_harmless(text)


def test_a_chat(smollm, tmp_path):
    import pexpect

    model = rewrite(smollm, tmp_path / f"{ATTACK}.gguf", {"general.name": f"{ATTACK}[red]:smile:"})
    typed = "\x1b]0;owned\x9b31m.txt"  # what a terminal in its own line mode lets through
    (tmp_path / typed).write_text("Hello")
    options = [str(model), "--ctx", "256", "--threads", "1", "--max-tokens", "1"]
    child = pexpect.spawn(
        sys.executable,
        ["-m", "clex_local.chat.cli", *options],
        encoding="utf-8",
        timeout=60,
        env={"TERM": "dumb"},
        echo=False,
    )
    child.logfile_read = io.StringIO()
    child.expect(r"red\S*\[red\]:smile: · 256 tokens of context.*\n> ")
    child.sendline("/stats")
    child.expect("model +.*owned.*\n.*?> ")
    child.sendline(f"/file {tmp_path}/{typed}")
    child.expect(r"owned\\x9b31m.txt: 1 tokens, sent with")
    child.sendline(f"/file {typed}")
    child.expect(r"owned\\x9b31m.txt: No such file")
    child.sendeof()
    child.expect(pexpect.EOF)
    assert is_harmless(child.logfile_read.getvalue().replace("\x1b[2K", ""))


def test_answers_on_a_terminal_and_in_a_pipe(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "".join(map(printable, ["a\x1b", "]0;owned\x07\n\tb\x9b1m\x7f", "\r\x08ü🫠"])) == "a]0;owned\n\tb1mü🫠"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert printable(ATTACK) == ATTACK


def test_json_of_an_answer_is_harmless():
    text = json_line({"text": ATTACK + "ü"})
    assert text[:-1].isprintable()
    assert json.loads(text) == {"text": ATTACK + "ü"}


def test_shown_text_keeps_its_lines():
    assert shown("a\tb\n\x1b[1mc\r\n") == "a\tb\n\\x1b[1mc\\r\n"
    assert json.loads(f'"{shown("plain ü 🫠")}"') == "plain ü 🫠"
