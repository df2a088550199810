"""Documents in a conversation: what the model is given of them, what waits, and what the command does with -f."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing

import pytest

from clex_local import ClexError, open_model
from clex_local.chat.conversation import Chat
from clex_local.chat.terminal import Terminal
from clex_local.documents.document import DocumentError
from clex_local.session.session import Session
from helpers.chat_command import COMMAND, Pty
from helpers.made_up_documents import docx, paragraph, pdf
from helpers.random_gguf import make_model

pytestmark = pytest.mark.chat


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("attachments") / "tiny.gguf", original=512)


@pytest.fixture(scope="module")
def llm(model):
    with closing(open_model(model, ctx=1024, threads=1, store=False)) as llm:
        yield llm


@pytest.fixture
def chat(llm, monkeypatch):
    """A conversation at no terminal; ``notes`` are what it says, ``sent`` its messages."""
    llm.reset()
    chat = Chat(Terminal(Session(llm), 1, quiet=True), "name", "cache")
    chat.notes, chat.sent = [], []
    monkeypatch.setattr(chat.terminal, "note", lambda text, style="": chat.notes.append(text))
    send = chat.session.send
    monkeypatch.setattr(chat.session, "send", lambda text, *rest: (chat.sent.append(text), send(text, *rest))[1])
    return chat


def test_documents_are_sent_with_their_names(chat, tmp_path):
    (tmp_path / "My Report.txt").write_text("one\n")
    (tmp_path / "a.docx").write_bytes(docx(paragraph("two")))
    chat.attach(str(tmp_path / "My Report.txt"))
    chat.attach(f"{tmp_path}/a.docx {tmp_path}/My\\ Report.txt")
    assert [note.partition(":")[0] for note in chat.notes] == ["My Report.txt", "a.docx", "My Report.txt"]
    assert chat.notes[-1] == "My Report.txt: attached already; it is sent once"
    chat.turn("Which is longer?")
    assert chat.sent == ["File: My Report.txt\n\none\n\nFile: a.docx\n\ntwo\n\nWhich is longer?"]
    assert [file.path for file in chat.session.exchanges[0].files] == [
        str(tmp_path / "My Report.txt"),
        str(tmp_path / "a.docx"),
    ]
    assert not chat.attachments
    chat.attach(str(tmp_path / "a.docx"))
    assert chat.notes[-1] == "a.docx: attached already; it is sent once"
    assert not chat.attachments
    (tmp_path / "a.docx").write_bytes(docx(paragraph("three")))
    chat.attach(str(tmp_path / "a.docx"))
    assert [attachment.name for attachment in chat.attachments] == ["a.docx"]
    chat.reset("")
    chat.attach(str(tmp_path / "My Report.txt"))
    assert len(chat.attachments) == 1


def test_one_thing_that_cannot_be_read_leaves_the_others(chat, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DocumentError, match="No such file"):
        chat.attach(f"{tmp_path}/a.txt {tmp_path}/none")
    assert [attachment.name for attachment in chat.attachments] == ["a.txt"]
    for command in (chat.attach, chat.fetch):
        with pytest.raises(ClexError, match="needs a"):
            command("")


def ask(model, *arguments: str, stdin: bytes = b"", cwd=None) -> tuple[int, int, str]:
    """Exit code, tokens of the prompt, and standard error."""
    options = [
        "--threads",
        "1",
        "--max-tokens",
        "1",
        "--chat-template",
        "plain",
        "--json",
        "--no-store",
        "--ctx",
        "1024",
    ]
    command = [*COMMAND, str(model), *options, *arguments]
    result = subprocess.run(command, input=stdin, capture_output=True, cwd=cwd, timeout=60)
    answer = json.loads(result.stdout) if result.stdout else {}
    return result.returncode, answer.get("prompt_tokens", 0), result.stderr.decode()


def test_files_and_a_pipe_beside_a_question(model, tmp_path):
    for name, data in {"a.txt": b"alpha", "b.pdf": pdf("beta"), "c.txt": "größe\n".encode("cp1252") * 20}.items():
        (tmp_path / name).write_bytes(data)
    both = ask(model, "-p", "File: a.txt\n\nalpha\n\nFile: b.pdf\n\nbeta\n\nWhich?")
    assert ask(model, "-f", "a.txt", "-f", "b.pdf", "-p", "Which?", cwd=tmp_path) == both
    again = ask(model, "-f", "a.txt", "-f", "[ab].*", "-p", "Which?", cwd=tmp_path)
    assert again == (*both[:2], "[a.txt: given twice, and sent once]\n")
    piped = ask(model, "-p", "gamma\n\nalpha\n\nWhich?")
    assert ask(model, "-f", "a.txt", "-p", "Which?", stdin=b"gamma", cwd=tmp_path) == piped
    assert ask(model, "-p", "Which?", stdin=pdf("gamma")) == ask(model, "-p", "gamma\n\nWhich?")
    code, tokens, notes = ask(model, "-f", "c.txt", cwd=tmp_path)
    assert (code, tokens) == ask(model, "-p", "größe\n" * 20)[:2]
    assert notes == "[c.txt: not UTF-8, read as cp1252]\n"
    # Of a script whose variable is empty: no more than was meant is read.
    assert ask(model, "-f", "", "-p", "Which?", cwd=tmp_path)[::2] == (
        1,
        "clex-chat: error: the name of a file is empty\n",
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pdf(None), "a PDF of 1 scanned page without text"),
        (pdf("x", encrypted=True), "an encrypted PDF"),
        (b"\0", "a binary file, not text"),
    ],
)
def test_a_document_that_cannot_be_read_is_one_line(model, tmp_path, data, message):
    (tmp_path / "file").write_bytes(data)
    code, _, errors = ask(model, "-f", "file", "-p", "x", cwd=tmp_path)
    assert code == 1
    assert errors.startswith(f"clex-chat: error: file: {message}")
    assert errors.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_file_in_a_terminal_waits_for_a_message(model, tmp_path):
    (tmp_path / "a.txt").write_text("what\x1b]0;title\x07is")
    state = {"XDG_STATE_HOME": str(tmp_path / "state")}
    pty = Pty(model, "--ctx", "512", "--max-tokens", "2", "-f", f"{tmp_path}/a.txt", "--no-store", **state)
    pty.expect(r"a.txt: \d+ tokens, sent with your next message")
    pty.prompt(r" 0 of 512 tokens .*a.txt \(\d+ tokens\)")
    pty.chat.send("Hi\r")
    pty.prompt(r" [1-9]\d* of 512 tokens")
    assert "\x1b]0;title" not in pty.chat.before
    pty.chat.send("/quit\r")
    assert pty.close() == 0
