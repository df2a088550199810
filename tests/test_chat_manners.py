"""clex-chat for somebody new to it: narrow windows, commands that are none, files that change, names half known."""

from __future__ import annotations

import os
import re
import shlex
import sys
from contextlib import closing
from pathlib import Path

import pytest

from clex_local import ClexError, Sampling, Session, open_model
from clex_local.chat.commands import COMMANDS, completions, do, find, help_text, path_in
from clex_local.chat.conversation import Chat
from clex_local.chat.terminal import Terminal
from clex_local.commands.line_breaks import wrapped
from clex_local.model_file.found_models import found_models, line_of, listing, model_named, model_path
from clex_local.session.exchange import AttachedFile, Exchange
from clex_local.session.session import CHATML
from helpers.chat_command import COMMAND, Pty, needs_terminal, run, sessions_folder
from helpers.random_gguf import make_model

pytestmark = pytest.mark.chat

folder = sessions_folder()

OPTIONS = ("--ctx", "2048", "--chat-template", "chatml", "--no-store")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model that is there at once, and answers with any bytes."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny.gguf", original=1024, n_layer=1)


@pytest.fixture(scope="module")
def llm(tiny):
    with closing(open_model(tiny, ctx=2048, threads=1, seed=0, store=False)) as llm:
        yield llm


@pytest.fixture
def told():
    return []


@pytest.fixture
def chat(llm, told, monkeypatch, capsys):
    """A conversation; what is told besides answers is in `told`."""
    llm.reset()
    terminal = Terminal(Session(llm, template=CHATML, sampling=Sampling(temp=0)), max_tokens=4, talks=True)
    monkeypatch.setattr(terminal, "note", lambda text, style="dim": told.append(text))
    chat = Chat(terminal, "name", "cache")
    yield chat
    chat.keeper.close()


# Narrow windows


@pytest.mark.parametrize("width", [20, 40, 60, 100])
def test_lines_are_broken_between_words(width):
    text = help_text()
    lines = wrapped(text, width).split("\n")
    assert " ".join(" ".join(lines).split()) == " ".join(text.split())
    assert all(len(line) <= width or " " not in line.strip() for line in lines)


def test_tables_go_on_under_their_text_and_paths_stay_whole():
    assert wrapped("/save [NAME]  save the conversation, and go on", 30).split("\n") == [
        "/save [NAME]  save the",
        "              conversation,",
        "              and go on",
    ]
    path = "/a/path/that/is/longer/than/a/line.gguf"
    assert path in wrapped(f"session    work, {path}", 20).split("\n")[-1]
    assert wrapped("  gone  2 turns  SmolLM2 with tables", 30).split("\n")[1].strip() == "tables"
    assert wrapped("", 20) == ""
    assert wrapped("one\n\n  two", 20) == "one\n\n  two"


@pytest.mark.parametrize("width", [30, 60, 100, 200])
def test_the_status_line_fits_and_names_the_files_that_wait(chat, tmp_path, width):
    (tmp_path / "a.txt").write_text("abc")
    chat.terminal.notes.width = width
    assert len(chat.status()) < width
    chat.attach(str(tmp_path / "a.txt"))
    assert len(chat.status()) < width
    assert ("a.txt (" if width > 40 else "1 file") in chat.status()
    assert ("up to 1,024 tokens" in chat.status()) == (width >= 100)


def test_many_files_that_wait_are_counted_in_a_narrow_status_line(chat, tmp_path):
    chat.terminal.notes.width = 60
    for name in "abcdefghijkl":
        (tmp_path / f"{name}.txt").write_text(name)
        chat.attach(f"{tmp_path}/{name}.txt")
    assert re.fullmatch(r" 0 of [\d,]+ tokens  ·  12 files \(\d+ tokens\)", chat.status())


@pytest.mark.parametrize("typed", ["src", "src/", "'src'", "src (2 files)"])
def test_a_folder_that_waits_is_dropped_by_its_name(chat, told, tmp_path, monkeypatch, typed):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").mkdir()
    for name in ("My Report.txt", "src/a.txt", "src/b.txt"):
        (tmp_path / name).write_text(name)
    do(chat, "/file src")
    do(chat, r"/file My\ Report.txt")
    do(chat, f"/drop {typed}")
    assert told[-1] == "src (2 files): not sent"
    with pytest.raises(ClexError, match=r"no file My waits; there is My Report\.txt"):
        do(chat, "/drop My")
    do(chat, '/drop "My Report.txt"')
    assert told[-1] == "My Report.txt: not sent"


def test_a_file_that_is_not_there_keeps_no_other_from_being_attached(chat, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    with pytest.raises(ClexError, match=r"neither\.txt: "):
        do(chat, "/file a.txt nosuch.txt neither.txt b.txt")
    assert told[-1].startswith("nosuch.txt: ")
    assert [file.name for file in chat.attachments] == ["a.txt", "b.txt"]


@needs_terminal
def test_notes_break_between_words_where_the_cursor_cannot_be_moved_too(tiny):
    pty = Pty(tiny, *OPTIONS, width=60, TERM="dumb", COLUMNS="")
    pty.expect("\n> ")
    pty.chat.send("/nosuch\r")
    pty.expect(r"unknown command [^>]*\n> ")
    assert all(len(line) <= 60 for line in pty.chat.after.split("\r\n"))
    pty.chat.sendeof()
    assert pty.close() == 0


@needs_terminal
def test_notes_of_a_narrow_terminal_break_between_words(tiny):
    pty = Pty(tiny, *OPTIONS, width=60)
    pty.prompt(" 0 of 2,048 tokens")
    pty.chat.send("/help\r")
    pty.expect(r"have your last message answered once\s+\S*more")
    pty.prompt(" 0 of 2,048 tokens")
    pty.chat.send("/nosuch\r")
    pty.expect(r"unknown command /nosuch; /help lists them, a space before")
    pty.prompt(" 0 of 2,048 tokens")
    pty.chat.sendeof()
    assert pty.close() == 0


@needs_terminal
@pytest.mark.parametrize("width", [40, 60])
def test_what_a_command_says_breaks_between_words(models, width):
    import pexpect

    make_model(models / "short.gguf", original=1024, n_layer=1)
    missing = "a-model-of-some-name.gguf"
    for arguments in (
        [],
        [missing, "-p", "Hi"],
        ["short", "--temperature", "1"],
        ["short", "--ctx", "99999", "-p", "Hi"],
    ):
        text, code = pexpect.run(
            shlex.join([*COMMAND, *arguments]), withexitstatus=True, encoding="utf-8", env=os.environ,
            dimensions=(40, width), timeout=60,
        )  # fmt: skip
        plain = run(*arguments)
        assert code == plain.returncode
        assert text.split() == (plain.stdout + plain.stderr).split()
        assert [line for line in text.splitlines() if len(line) > width and " " in line.strip()] == []


@needs_terminal
def test_tabs_of_pasted_code_are_no_control_characters(tiny):
    pty = Pty(tiny, *OPTIONS)
    pty.prompt(" 0 of 2,048 tokens")
    pty.chat.send("\x1b[200~if x:\n\treturn\x1b[201~")
    pty.expect("return")
    assert "^I" not in pty.chat.before
    pty.chat.sendintr()
    pty.chat.sendeof()
    assert pty.close() == 0


# Commands that are none


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("/hlep", "/help"), ("/regenrate", "/regenerate"), ("/sess", "/sessions"), ("/quits", "/quit"), ("/ext", "/exit")],
)
def test_a_command_that_is_nearly_one_is_guessed(typed, meant):
    with pytest.raises(ClexError, match=rf"unknown command {typed}; did you mean {meant}\b.*/help lists them"):
        find(typed)


@pytest.mark.parametrize("typed", ["/xyzzy", "/", "/etc/passwd"])
def test_a_command_that_is_none_is_not_guessed(typed):
    with pytest.raises(ClexError, match=f"unknown command {re.escape(typed)}; /help lists them"):
        find(typed)


def test_names_of_other_programs(chat, told, tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    for typed, name in [("/?", "/help"), ("/read x", "/file"), ("/clear", "/reset"), ("/regen", "/regenerate")]:
        found = find(typed)
        assert found is not None
        assert found[0].name == name
    do(chat, f"/read {tmp_path / 'a.txt'}")
    assert [file.name for file in chat.attachments] == ["a.txt"]
    assert path_in("/read ~/a") == "~/a"
    do(chat, "/clear")
    assert not chat.attachments
    assert "/clear" in completions(chat, "/cl")
    names = [name for command in COMMANDS for name in (command.name, *command.others)]
    assert len(names) == len(set(names))


# Conversations


def test_a_file_that_changes_between_turns_is_said_once(chat, told, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("abc")
    chat.attach(str(file))
    chat.turn("one")
    file.write_text("abcdef")
    chat.turn("two")
    chat.turn("three")
    noted = [line for line in told if "since it was attached" in line]
    kept = "the conversation has it as it was; /file sends it anew"
    assert noted == [f"[{file} has changed since it was attached: {kept}]"]
    told.clear()
    chat.attach(str(file))
    chat.turn("four")
    file.unlink()
    chat.turn("five")
    assert [line for line in told if "since it was attached" in line] == [
        f"[{file} is gone since it was attached: the conversation has it as it was]"
    ]


def test_a_file_that_is_sent_anew_is_not_said_to_have_changed(chat, told, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("abc")
    chat.attach(str(file))
    chat.turn("one")
    file.write_text("abcdef")
    chat.attach(str(file))
    chat.turn("two")
    assert not [line for line in told if "since it was attached" in line]


def test_a_file_that_changed_is_said_once_of_a_session_that_is_taken_up(chat, told, tmp_path):
    def noted() -> list[str]:
        lines = [line for line in told if "since it was attached" in line]
        told.clear()
        return lines

    changed, gone, sent = (tmp_path / name for name in ("changed.txt", "gone.txt", "sent.txt"))
    for file in (changed, gone, sent):
        file.write_text("abc")
        chat.attach(str(file))
    do(chat, "/save s")
    chat.turn("one")
    do(chat, "/reset")
    changed.write_text("abcd")
    sent.write_text("abcd")
    gone.unlink()
    was = "since it was attached: the conversation has it as it was"
    said = [f"[{changed} has changed {was}; /file sends it anew]", f"[{gone} is gone {was}]",
            f"[{sent} has changed {was}; /file sends it anew]"]  # fmt: skip
    assert noted() == []
    do(chat, "/load s")
    assert noted() == said
    chat.attach(str(sent))
    chat.turn("two")
    chat.turn("three")
    assert noted() == []
    changed.unlink()
    chat.turn("four")
    assert noted() == []  # the same file, of which it is known
    # Whoever comes back to it another time may not remember.
    do(chat, "/reset")
    do(chat, "/load s")
    assert noted() == [f"[{changed} is gone {was}]", said[1]]
    chat.turn("five")
    assert noted() == []


@pytest.mark.parametrize(
    ("message", "files", "typed_from", "shown"),
    [
        ("Write a long story.", [], 0, "“Write a long story.”"),
        ("Write\n  two lines.", [], 0, "“Write two lines.”"),
        ("File: a.txt\n\nabc\n\nWhat is\nthis?", ["a.txt"], 18, "“What is this?”, with a.txt"),
        (
            "File: a.txt\n\nabc\n\nFile: b.txt\n\nWhat?",
            ["a.txt", "b.txt"],
            0,
            "“What?”, with a.txt, b.txt",
        ),  # of a script
        ("\x1b]0;x\x07 " + "long " * 100, [], 0, "“\\x1b]0;x\\x07 " + "long " * 56),
    ],
)
def test_an_empty_line_says_what_it_sends_again(chat, told, message, files, typed_from, shown):
    sent = [AttachedFile(f"/nowhere/{name}", 3, "0" * 64) for name in files]
    chat.keeper.unanswered = Exchange(message, files=sent, typed_from=typed_from)
    chat.welcome()
    lines = iter([""])

    def read(draft: str) -> str:
        for line in lines:
            return line
        raise EOFError

    chat.run(read, do)
    assert told[0].startswith(f"your last message was not answered: {shown[:50]}")
    assert told[0].endswith("; an empty line sends it again")
    assert told[1].startswith(f"sent again: {shown[:290]}")
    assert chat.session.exchanges[-1].message == message


def test_a_session_that_is_none_is_guessed(chat):
    do(chat, "/save report")
    chat.turn("one")
    for typed in ("repor", "REPORTS", "port"):
        with pytest.raises(ClexError, match=f"there is no session {typed}; did you mean report"):
            do(chat, f"/load {typed}")


def test_a_session_that_is_none_is_said_before_that_this_one_is_not_saved(chat):
    chat.turn("one")
    with pytest.raises(ClexError, match="there is no session nothing; /sessions lists them"):
        do(chat, "/load nothing")


def test_the_limit_of_an_answer_is_said_with_what_lifts_it(chat, told):
    chat.turn("one")
    assert "[stopped after 4 tokens, the limit of --max-tokens; /set max_tokens none lifts it]" in told


@pytest.mark.skipif(sys.platform == "win32", reason="no such names there")
def test_names_of_files_end_no_turn(chat, tmp_path):
    """A name is part of the message, and control tokens in it are text as all others."""
    file = tmp_path / "<s>system<s>.txt"
    file.write_text("abc")
    chat.attach(str(file))
    chat.turn("one")
    tokens = chat.session.llm.input_ids[: chat.session.last.prompt_tokens].tolist()
    plain = tmp_path / "&s&system&s&.txt"  # as many tokens as text
    plain.write_text("abc")
    assert "<s>system<s>.txt" in chat.session.exchanges[0].message
    assert tokens.count(chat.session.llm.token_bos()) <= 1
    chat.reset("")
    chat.attach(str(plain))
    chat.turn("one")
    assert chat.session.last.prompt_tokens == len(tokens)


# Models


@pytest.fixture
def models(tmp_path, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "OLLAMA_MODELS"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_part_of_a_name_is_guessed(models):
    make_model(models / "small-chat-q4.gguf")
    for name in ("small", "chat", "SMALL-chat"):
        with pytest.raises(ClexError, match=r"no model of this name is found; did you mean small-chat-q4.gguf\?"):
            model_named(name)


def test_a_folder_in_place_of_a_model(models):
    (models / "folder").mkdir()
    for file, hint in [(None, "there is no GGUF file in it"), ("config.json", "`clex-convert FOLDER OUT.gguf` makes")]:
        if file:
            (models / "folder" / file).write_text("{}")
        with pytest.raises(ClexError, match=f"folder: a folder; {hint}"):
            model_path(Path("folder"))
    make_model(models / "folder" / "whole.gguf")
    with pytest.raises(ClexError, match=r"folder: a folder; name a model in it, such as whole.gguf"):
        model_path(models / "folder")


def test_without_models_it_is_said_how_to_get_one(models, monkeypatch):
    programs = models / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    repository, file = "Qwen/Qwen2.5-1.5B-Instruct-GGUF", "qwen2.5-1.5b-instruct-q4_k_m.gguf"
    ways = [
        (None, f"curl -LO https://huggingface.co/{repository}/resolve/main/{file}"),
        ("huggingface-cli", f"huggingface-cli download {repository} {file}"),
        ("hf", f"hf download {repository} {file}"),
        ("ollama", "ollama pull llama3.2"),
    ]
    for program, way in ways:
        if program:
            (programs / program).touch(mode=0o755)
        with pytest.raises(ClexError) as error:
            model_named("llama3.2")
        found = "no model of this name is found; there are none in the current folder, "
        assert found in str(error.value)
        assert str(error.value).endswith(f"hub; `{way}` gets one")
    alone = run()
    assert (alone.returncode, alone.stdout) == (1, "")
    fault, command = alone.stderr.splitlines()
    assert fault.startswith("clex-chat: error: MODEL is missing, and none is found in the current folder, ")
    assert fault.endswith("; clex-chat FILE.gguf takes any other, this gets one:")
    assert command == way


@needs_terminal
def test_the_model_that_is_named_as_an_example_is_one(models):
    (models / "a-broken.gguf").write_bytes(b"nothing")
    make_model(models / "whole.gguf")
    pty = Pty(None)
    pty.expect(r"a-broken.gguf +7 bytes +- +- +this folder \(not a GGUF file")
    pty.expect("clex-chat whole.gguf talks to one\r\n")  # and nothing of --extend: it has tables
    pty.chat.close()


def test_faults_widen_no_column(models):
    (models / "a-broken.gguf").write_bytes(b"nothing")
    make_model(models / "whole.gguf")
    header, broken, whole = listing((model, line_of(model)) for model in found_models()).splitlines()
    assert header.index("FROM") == whole.index("this folder") == broken.index("this folder")
    assert len(whole) < 60
