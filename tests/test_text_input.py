"""What clex-chat reads beside a question: pipes, files, and standard inputs that have nothing to say."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from clex_local.chat import text_input

pytestmark = pytest.mark.chat

NOTE = b"The secret number is 4711.\n"


@pytest.fixture
def ask(smollm, tmp_path):
    """Runs clex-chat and gives (exit code, prompt tokens, standard error); a file or a pipe is its standard input."""
    (tmp_path / "note.txt").write_bytes(NOTE)

    def run(*arguments: str, **stdin) -> tuple[int, int | None, str]:
        command = [sys.executable, "-m", "clex_local.chat.cli", str(smollm), "--ctx", "256", "--threads", "1"]
        options = ["--max-tokens", "1", "--temp", "0", "--json", "--chat-template", "plain"]
        result = subprocess.run(
            [*command, *options, *arguments], capture_output=True, cwd=tmp_path, timeout=60, **stdin
        )
        answer = json.loads(result.stdout) if result.stdout else {}
        return result.returncode, answer.get("prompt_tokens"), result.stderr.decode()

    return run


def test_a_pipe_is_put_in_front_of_the_question(ask):
    both = ask("-p", f"{NOTE.decode()}\nWhich number?", input=b"")
    assert both[0] == 0
    assert ask("-p", "Which number?", input=NOTE) == both
    assert ask("-p", "Which number?", "-f", "-", input=NOTE) == both
    assert ask("-p", "Which number?", "-f", "note.txt", stdin=subprocess.DEVNULL) == both
    three = ask("-p", f"One.\n\n{NOTE.decode()}\nWhich number?", input=b"")
    assert ask("-p", "Which number?", "-f", "note.txt", input=b"One.\n") == three
    assert ask("-p", "", input=NOTE) == ask("-f", "note.txt", input=b"") == ask(input=NOTE)


def test_a_redirected_file_is_read_if_nobody_else_reads_it(ask, tmp_path):
    both = ask("-p", "Which number?", input=NOTE)
    with open(tmp_path / "note.txt", "rb") as file:
        assert ask("-p", "Which number?", stdin=file) == both
    # The loop of a shell over the lines of a file.
    with open(tmp_path / "note.txt", "rb", buffering=0) as file:
        file.seek(4)
        found = ask("-p", "Which number?", stdin=file)
        assert file.tell() == 4
    assert found[:2] == ask("-p", "Which number?", input=b"")[:2]
    assert found[2].startswith("[standard input is a file that another program has begun to read: ")


def test_an_input_that_says_nothing_is_given_up(smollm, tmp_path):
    program = (
        "import sys; from clex_local.chat import text_input; text_input.FIRST_BYTE_TIMEOUT = 0.2; "
        "from clex_local.chat.cli import main; main(sys.argv[1:])"
    )
    reading, writing = os.pipe()
    options = ["--ctx", "256", "--threads", "1", "--max-tokens", "1", "-p", "Hi"]
    try:
        command = [sys.executable, "-c", program, str(smollm), *options]
        result = subprocess.run(command, stdin=reading, capture_output=True, text=True, timeout=60)
    finally:
        os.close(reading)
        os.close(writing)
    assert result.returncode == 0
    assert result.stdout.count("\n") == 1
    assert "[standard input is open, but nothing came: answered without it; -f - reads it]\n" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
@pytest.mark.parametrize("redirection", ["<&-", "</dev/null"])
def test_no_input_is_no_text(smollm, redirection):
    line = f'"$0" -m clex_local.chat.cli "$1" --ctx 256 --threads 1 --max-tokens 1 -p Hi {redirection}'
    result = subprocess.run(["sh", "-c", line, sys.executable, str(smollm)], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout.count("\n")) == (0, 1)
    alone = line.replace("-p Hi", "")
    result = subprocess.run(
        ["sh", "-c", alone, sys.executable, str(smollm)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert result.stderr in ("clex-chat: error: standard input: closed\n", "clex-chat: error: the prompt is empty\n")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\0b", "standard input: a binary file, not text"),
        (b"\x89PNG\r\n\x1a\n", "standard input: a picture, not text"),
    ],
)
@pytest.mark.parametrize("arguments", [[], ["-p", "Hi"], ["-f", "-", "-p", "Hi"]])
def test_a_pipe_that_is_no_text(ask, arguments, data, message):
    code, _, errors = ask(*arguments, input=data)
    assert code == 1
    assert errors.startswith(f"clex-chat: error: {message}")
    assert errors.count("\n") == 1


def test_a_pipe_that_has_begun_is_read_to_its_end(monkeypatch):
    monkeypatch.setattr(text_input, "FIRST_BYTE_TIMEOUT", 0.0)
    reading, writing = os.pipe()
    with open(reading) as stdin, open(writing, "wb", buffering=0) as pipe:
        monkeypatch.setattr(sys, "stdin", stdin)
        pipe.write(b"begun")
        piped = text_input.Piped()
        piped._begun.wait()
        pipe.write(b" and ended")
        pipe.close()
        assert piped.text() == "begun and ended"
        assert piped.unread is None
