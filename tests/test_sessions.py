"""Conversations that go on in another process: what is said again, what has changed, what a killed process loses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from clex_local import ClexError, Sampling, Session, SessionError, open_model
from clex_local.chat.commands import do
from clex_local.chat.conversation import Chat
from clex_local.chat.terminal import Terminal
from clex_local.session.exchange import AttachedFile, Exchange
from clex_local.session.keeper import SessionKeeper
from clex_local.templates.builtin import CHATML
from helpers.chat_command import COMMAND, Pty, needs_terminal, run, sessions_folder
from helpers.random_gguf import make_model

pytestmark = pytest.mark.chat

folder = sessions_folder()

QUESTIONS = ["Tell me about the sea.", "And what is above it?", "Say that shorter."]
OPTIONS = ["--temp", "0", "--ctx", "1024", "--max-tokens", "12"]


@pytest.fixture(scope="module")
def other(smollm, tmp_path_factory):
    """The same model in another file, which cuts texts into the same tokens."""
    from clex_convert import convert

    target = tmp_path_factory.mktemp("other") / "other.gguf"
    convert(smollm, target, method="ntk", original_context=512, max_factor=4)
    return target


@pytest.fixture(scope="module")
def llm(small_buckets):
    with closing(open_model(small_buckets, ctx=1024, batch=64, threads=1, seed=0)) as llm:
        yield llm


@pytest.fixture
def session(llm):
    llm.reset()
    return Session(llm, sampling=Sampling(temp=0))


def keep(session: Session) -> tuple[SessionKeeper, list[str]]:
    """A keeper, and what it tells."""
    told: list[str] = []
    return SessionKeeper(session, lambda line, failed: told.append(line)), told


def say(keeper: SessionKeeper, text: str, max_tokens: int = 12) -> str:
    with keeper.turn(text, []):
        return "".join(keeper.session.send(text, max_tokens))


def saved(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text("utf-8"))


def answers(folder: Path, name: str) -> list[str]:
    return [turn["answer"] for turn in saved(folder, name)["turns"]]


def error_of(*arguments: object, code: int = 1) -> str:
    result = run(*arguments)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (code, "", 1)
    return result.stderr


# What is said


def test_three_processes_say_what_one_says(small_buckets, session, folder):
    keeper, _ = keep(session)
    expected = [say(keeper, question) for question in QUESTIONS]
    first = run(small_buckets, "--session", "sea", "-p", QUESTIONS[0], *OPTIONS)
    assert first.returncode == 0
    # The model, the sampling and the size of the context are those of the conversation.
    second = run("--session", "SEA", "-p", QUESTIONS[1], "--max-tokens", 12)
    third = run("--session", "sea", "-p", QUESTIONS[2], "--max-tokens", 12, "--json")
    found = [first.stdout.rstrip("\n"), second.stdout.rstrip("\n"), json.loads(third.stdout)["text"]]
    assert found == expected
    assert json.loads(third.stdout)["session"] == "sea"
    assert json.loads(third.stdout)["context"] == 1024
    assert second.stderr == "[stopped after 12 tokens, the limit of --max-tokens]\n"
    assert answers(folder, "sea") == expected
    assert [turn["message"] for turn in saved(folder, "sea")["turns"]] == QUESTIONS


def test_tokens_are_those_that_were_generated(session, monkeypatch):
    """Also where the text would be cut otherwise: only then is the prompt the one that was computed."""
    letters = [session.llm.tokenize(letter.encode(), add_bos=False)[0] for letter in "sea"]

    def drawn(*_, **__):
        yield from letters

    with monkeypatch.context() as patch:
        patch.setattr(session.llm, "generate", drawn)
        assert "".join(session.send("Say sea", 3)) == "sea"
    keeper, _ = keep(session)
    keeper.save("sea")
    keeper.close()
    before = (session.messages, session._text, session._tokens)
    session.reset()
    keeper.load("sea")
    assert (session.messages, session._text, session._tokens) == before
    assert session._tokens[-3:] == letters
    keeper.close()


def test_tokens_of_another_vocabulary_or_text_do_not_count(session):
    text = "The sea."
    tokens = session.llm.tokenize(text.encode(), add_bos=False, special=False)
    for wrong in ([], tokens[:-1], [*tokens, 5000], [session.llm.n_vocab()], [2**31 - 1] * 3):
        session.resume([Exchange("What?", text, wrong)])
        assert session._tokens[-len(tokens) :] == tokens
        assert session.messages[-1]["content"] == text
    session.resume([Exchange("What?", "<|im_end|>", [])])
    assert session.llm.control_tokens.controls(session._text)[-1] != "<|im_end|>"
    session.resume([Exchange("What?", "", [])])
    assert "".join(session.send("Tell me about the sea.", 3))


def test_conversation_that_a_template_refuses_leaves_the_one_there_is(llm):
    template = "{% if messages | length > 2 %}{{ raise_exception('no') }}{% endif %}" + CHATML
    llm.reset()
    session = Session(llm, system="Be brief.", template=template.replace("> 2", "> 3"), sampling=Sampling(temp=0))
    assert "".join(session.send("Hi", 3))
    before = (session.system, session.messages, session._text, session._tokens, session.exchanges)
    with pytest.raises(ClexError, match="refused the conversation: no"):
        session.resume([Exchange("a", "b"), Exchange("c", "d")], "Other.")
    assert (session.system, session.messages, session._text, session._tokens, session.exchanges) == before


def test_date_of_a_template_is_that_of_the_beginning(llm, folder):
    """Another date in front of a document would have all of it read again."""
    template = "{{ strftime_now('%d %b %Y %H:%M:%S') }}\n" + CHATML
    llm.reset()
    session = Session(llm, template=template, sampling=Sampling(temp=0))
    session.resume([], began="2025-12-31T23:59:59")
    keeper, _ = keep(session)
    keeper.save("old")
    say(keeper, "Hi", 3)
    keeper.close()
    assert session._text.startswith("31 Dec 2025 23:59:59\n")
    later = Session(llm, template=template, sampling=Sampling(temp=0))
    assert not later._prompt([])[0].startswith("31 Dec 2025")
    keeper, _ = keep(later)
    keeper.load("old")
    say(keeper, "And?", 3)
    assert later._text.startswith("31 Dec 2025 23:59:59\n")
    assert later.last.prefill_tokens < later.last.prompt_tokens / 2
    later.reset()
    assert not later._prompt([])[0].startswith("31 Dec 2025")
    keeper.close()


# What has changed since


def test_another_model_file_reads_again_and_says_so(small_buckets, other, folder):
    assert run(small_buckets, "--session", "s", "-p", QUESTIONS[0], *OPTIONS).returncode == 0
    used = len(saved(folder, "s")["turns"][0]["tokens"])
    result = run(other, "--session", "s", "-p", QUESTIONS[1], "--max-tokens", 3)
    line, *_ = result.stderr.splitlines()
    assert re.fullmatch(rf"\[s: until now with .* \({small_buckets}\): its \d+ tokens are read again\]", line)
    assert used < int(re.search(r"its (\d+) tokens", line)[1])
    assert result.returncode == 0
    assert saved(folder, "s")["model"]["path"] == str(other)
    assert run("--session", "s", "-p", "Go on.", "--max-tokens", 3).stderr.count("\n") == 1


def test_the_models_file_changed_or_went(other, folder, tmp_path):
    model = tmp_path / "model.gguf"
    model.write_bytes(other.read_bytes())
    assert run(model, "--session", "s", "-p", "Hi", *OPTIONS).returncode == 0
    data = saved(folder, "s")
    data["model"]["identity"] = "0" * 16
    (folder / "s.json").write_text(json.dumps(data))
    result = run("--session", "s", "-p", "Go on.", "--max-tokens", 3)
    assert re.match(
        r"\[s: the model or its tables are not as they were: its \d+ tokens are read again\]\n",
        result.stderr,
    )
    model.unlink()
    assert error_of("--session", "s", "-p", "x").endswith(f"is gone: {model}; name another before --session\n")
    assert run(other, "--session", "s", "-p", "Go on.", "--max-tokens", 3).returncode == 0


def test_an_attached_file_that_changed(small_buckets, folder, tmp_path):
    note, gone = tmp_path / "note.txt", tmp_path / "gone.txt"
    note.write_text("The number is 4711.\n")
    gone.write_text("The color is red.\n")
    options = ["--session", "s", "--max-tokens", 3, "--ctx", 512]
    assert run(small_buckets, "-f", note, "-f", gone, "-p", "Which?", *options, stdin="piped").returncode == 0
    turn = saved(folder, "s")["turns"][0]
    assert [(Path(file["path"]).name, file["size"]) for file in turn["files"]] == [("note.txt", 20), ("gone.txt", 18)]
    assert turn["message"] == (
        "piped\n\nFile: note.txt\n\nThe number is 4711.\n\nFile: gone.txt\n\nThe color is red.\n\nWhich?"
    )
    assert "since" not in run("--session", "s", "-p", "Go on.", "--max-tokens", 3).stderr
    note.write_text("The number is 4712.\n")
    gone.unlink()
    lines = run("--session", "s", "-p", "Go on.", "--max-tokens", 3).stderr.splitlines()
    assert lines[:2] == [
        f"[{note} has changed since it was attached: the conversation has it as it was]",
        f"[{gone} is gone since it was attached: the conversation has it as it was]",
    ]
    assert "4711" in saved(folder, "s")["turns"][0]["message"]


def test_options_that_are_given_count_and_others_are_as_before(small_buckets, folder):
    first = ["--system", "Be brief.", "--temp", 0.25, "--top-k", 5, "--ctx", 512, "--kv-type", "q8_0"]
    assert run(small_buckets, "--session", "s", "-p", "Hi", "--max-tokens", 2, *first).returncode == 0
    result = run("--session", "s", "-p", "Go on.", "--top-k", 7, "--ctx", 768, "--max-tokens", 2, "--json")
    report, kept = json.loads(result.stdout), saved(folder, "s")
    assert (report["context"], report["settings"]["type_k"]) == (768, "q8_0")
    assert (kept["sampling"]["temp"], kept["sampling"]["top_k"], kept["system"]) == (0.25, 7, "Be brief.")
    assert kept["run"] == {"ctx": 768, "kv_type": "q8_0", "flash_attn": None, "extend": None}
    assert run("--session", "s", "-p", "x", "--system", "Be brief.", "--max-tokens", 2).returncode == 0
    assert "has another system message: leave out --system" in error_of("--session", "s", "-p", "x", "--system", "No.")
    assert "needs --chat-template model" in error_of("--session", "s", "-p", "x", "--chat-template", "chatml")
    plain = ["--chat-template", "plain", "--max-tokens", 2]
    assert run(small_buckets, "--session", "t", "-p", "Once upon", *plain).returncode == 0
    assert run("--session", "t", "-p", "Go on.", "--max-tokens", 2).returncode == 0
    assert saved(folder, "t")["chat_template"] == "plain"


def test_options_with_which_nothing_was_answered_are_not_kept(small_buckets, folder):
    assert run(small_buckets, "--session", "s", "-p", "Hi", "--ctx", 512, "--max-tokens", 2).returncode == 0
    assert "the context holds 8" in error_of("--session", "s", "-p", "Go on.", "--ctx", 8)
    assert saved(folder, "s")["run"]["ctx"] == 512
    assert run("--session", "s", "-p", "Go on.", "--max-tokens", 2).returncode == 0


# What is refused


def test_what_cannot_be_gone_on_with(small_buckets, folder):
    assert "there is no session s yet: MODEL is missing" in error_of("--session", "s", "-p", "x", code=2)
    assert "Missing argument" in error_of("-p", "x", code=2)
    assert "'a/b' is no name for a session" in error_of(small_buckets, "--session", "a/b", "-p", "x")
    (folder / "s.json").write_text("{}")
    assert error_of(small_buckets, "--session", "s", "-p", "x").endswith("s.json: no session of clex-local\n")
    assert (folder / "s.json").read_text() == "{}"


def test_a_conversation_that_cannot_be_saved_is_answered_and_fails(small_buckets, tmp_path):
    """As on a full disk: nothing can be written behind the first bytes of a file."""
    limit = "import resource, signal, runpy, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); sys.argv = sys.argv[1:];"
    limit += "runpy.run_module('clex_local.chat.cli', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", limit, "clex-chat", str(small_buckets), "--session", "s", "-p", "Hi", *OPTIONS]
    for more in ([], ["--json"]):
        command += ["--threads", "1", *more]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert result.returncode == 1
        assert result.stdout.strip()
        line = result.stderr.splitlines()[-1]
        assert re.fullmatch(r"clex-chat: error: .*s\.json: not saved: File too large", line)
        assert "Traceback" not in result.stderr
    assert not list((tmp_path / "sessions").iterdir())


def test_unanswerable_message_is_not_kept(session, folder):
    keeper, _ = keep(session)
    keeper.save("s")
    say(keeper, "Hi", 2)
    with pytest.raises(ClexError, match="the prompt has"):
        say(keeper, "word " * 2000)
    assert (len(saved(folder, "s")["turns"]), saved(folder, "s")["unanswered"]) == (1, None)
    keeper.close()


def test_nothing_is_left_of_what_was_not_there(session, folder, small_buckets):
    keeper, told = keep(session)
    with pytest.raises(SessionError, match="there is no session none"):
        keeper.load("none")
    assert not folder.exists()
    keeper.save("s")
    assert told == ["there is nothing to save yet: it will be s, from the first message on"]
    assert [path.name for path in folder.iterdir()] == [".s.lock"]
    with pytest.raises(ClexError, match="the prompt has"):
        say(keeper, "word " * 2000)
    assert [path.name for path in folder.iterdir()] == [".s.lock"]
    say(keeper, "Hi", 2)
    keeper.close()
    assert [path.name for path in folder.iterdir()] == ["s.json"]
    assert "the prompt has" in error_of(small_buckets, "--session", "t", "-p", "word " * 900, "--ctx", 256)
    assert [path.name for path in folder.iterdir()] == ["s.json"]


def test_lock_that_is_removed_is_still_one(folder):
    """Who waited for it while it was removed has the file that everybody sees, and not the old one."""
    folder.mkdir()
    rounds = """
import sys, time
from pathlib import Path
from clex_local.file_lock import FileLock, InUse
folder, end, got = Path(sys.argv[1]), time.monotonic() + 1.5, 0
while time.monotonic() < end:
    try:
        lock = FileLock(folder / "lock")
    except InUse:
        continue
    mine = folder / "mine"
    mine.touch(exist_ok=False)
    mine.unlink()
    lock.close()
    got += 1
print(got)
"""
    command = [sys.executable, "-c", rounds, str(folder)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in started:
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
        assert int(output) > 0
    assert not list(folder.iterdir())


# What a killed process loses


def test_a_killed_process_loses_the_answer_under_way_alone(small_buckets, folder):
    assert run(small_buckets, "--session", "s", "-p", "Hi", *OPTIONS).returncode == 0
    command = [*COMMAND, "--session", "s", "-p", "Write a very long story.", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout.read(10)
        process.kill()
    assert len(answers(folder, "s")) == 1
    assert saved(folder, "s")["unanswered"]["message"] == "Write a very long story."
    assert run("--session", "s", "-p", "Be brief.", "--max-tokens", 3).returncode == 0
    assert [turn["message"] for turn in saved(folder, "s")["turns"]] == ["Hi", "Be brief."]
    assert saved(folder, "s")["unanswered"] is None


def lines(*typed: str) -> Callable[[str], str]:
    """What reads these lines, and then the end."""
    left = iter(typed)

    def read(_: str) -> str:
        for line in left:
            return line
        raise EOFError

    return read


@contextmanager
def stopped(chat: Chat, how: type[BaseException]) -> Iterator[None]:
    """For as long as this lasts, whatever is sent ends before its answer."""

    def stop(*_: object) -> None:
        raise how("no room")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat.terminal, "_read", stop)
        yield


def left_alone(session: Session) -> Chat:
    """A conversation whose last message, which a file belongs to, was saved and never answered."""
    chat = Chat(Terminal(session, max_tokens=4, talks=True), "name", "cache")
    chat.turn("Hello")
    sent = [AttachedFile("/nowhere/a.txt", 3, "0" * 64)]
    chat.keeper.unanswered = Exchange("File: a.txt\n\nabc\n\nWhat is this?", files=sent, typed_from=18)
    do(chat, "/save s")
    return chat


@pytest.mark.parametrize("how", [KeyboardInterrupt, ClexError])
@pytest.mark.parametrize("line", ["", "/regenerate", "Something else.", "/edit Another."])
def test_a_message_without_an_answer_is_lost_by_an_answer_only(session, folder, capsys, line, how):
    chat = left_alone(session)
    waiting = saved(folder, "s")["unanswered"]
    with stopped(chat, how):
        chat.run(lines(line), do)
    if line.startswith("/edit"):  # which changed it
        waiting["message"] = waiting["message"].replace("What is this?", "Another.")
    assert saved(folder, "s")["unanswered"] == waiting
    assert len(answers(folder, "s")) == 1
    if how is KeyboardInterrupt and not line.startswith("Some"):
        assert "message was not sent; an empty line sends it again" in capsys.readouterr().err
    chat.run(lines(""), do)
    turns = saved(folder, "s")["turns"]
    assert [turn["message"] for turn in turns] == ["Hello", waiting["message"]]
    assert turns[1]["files"] == waiting["files"]
    assert saved(folder, "s")["unanswered"] is None
    chat.keeper.close()
    capsys.readouterr()


def test_commands_take_a_message_without_an_answer_for_the_last_one(session, folder, tmp_path, capsys):
    (tmp_path / "b.txt").write_text("word")
    for line, last, waits in [
        ("/regenerate", "What is this?", True),
        ("/edit Who wrote it?", "Who wrote it?", True),
        ("/edit What is this?", None, True),
        ("/undo", None, True),
        ("Something else.", "Something else.", False),
    ]:
        chat = left_alone(session)
        do(chat, f"/file {tmp_path / 'b.txt'}")
        capsys.readouterr()
        chat.run(lines(line), do)
        said = " ".join(capsys.readouterr().err.split())
        assert [exchange.message for exchange in session.exchanges][:1] == ["Hello"]
        assert [exchange.typed for exchange in session.exchanges[1:]] == [last] * bool(last)
        assert bool(chat.attachments) == waits  # sent with a message that is typed, and with no other
        assert (saved(folder, "s")["unanswered"] is None) == (line != "/edit What is this?")
        if line[0] != "/":
            assert "[not answered until now: “What is this?”, with a.txt; left out once this" in said
        if line == "/undo":
            assert "taken back: “What is this?”, and with that a.txt; 1 turn left" in said
        chat.keeper.close()
        session.reset()
        (folder / "s.json").unlink()


def test_ctrl_c_keeps_what_was_written(small_buckets, folder):
    command = [*COMMAND, str(small_buckets), "--session", "s", "-p", "Write a very long story.", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        begun = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    (kept,) = answers(folder, "s")
    assert kept.startswith((begun + rest).removesuffix("\n"))  # Ctrl-C may come before the last token is written
    assert saved(folder, "s")["turns"][0]["finish_reason"] == "interrupted"


def test_processes_at_once_lose_nothing_of_each_other(folder, tmp_path):
    model = make_model(tmp_path / "tiny.gguf", original=512, n_layer=1)
    options = [str(model), "--session", "s", "--chat-template", "plain", "--max-tokens", "2", "--threads", "1"]
    started = [
        subprocess.Popen([*COMMAND, *options, "-p", name], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for name in "abc"
    ]
    answered = []
    for name, process in zip("abc", started, strict=True):
        _, errors = process.communicate(timeout=120)
        if process.returncode == 0:
            answered.append(name)
        else:
            assert "the session s is open in another process" in errors
    assert answered
    assert sorted(turn["message"] for turn in saved(folder, "s")["turns"]) == answered


# In the conversation


def chat_of(session: Session) -> Chat:
    return Chat(Terminal(session, max_tokens=4, quiet=True), "name", "cache")


def test_nothing_is_lost_by_a_command(session, folder, capsys):
    chat = chat_of(session)
    chat.turn("Hello")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "old.json").write_text("whatever")
    with pytest.raises(SessionError, match="this conversation is not saved: /save NAME keeps it, /reset forgets it"):
        do(chat, "/load old")
    do(chat, "/save a")
    chat.turn("And now?")
    assert (len(answers(folder, "a")), chat.status().split("  ")[0]) == (2, " a")
    assert f"session    a, {folder}/a.json" in chat.stats()
    do(chat, "/save b")  # goes on as b
    chat.turn("Again?")
    assert (len(answers(folder, "a")), len(answers(folder, "b"))) == (2, 3)
    with pytest.raises(SessionError, match="there is a session a already: /load a goes on with it"):
        do(chat, "/save A")
    (folder / "c.json").write_text("damaged")
    for command in ("/save c", "/load c"):
        with pytest.raises(SessionError, match="a damaged session"):
            do(chat, command)
    assert (folder / "c.json").read_text() == "damaged"
    for command, reason in [("/load", "needs the name"), ("/load none", "no session none"), ("/load B", "this is the")]:
        with pytest.raises(SessionError, match=reason):
            do(chat, command)
    assert chat.keeper.name == "b"
    do(chat, "/load a")
    assert (chat.keeper.name, len(session.exchanges)) == ("a", 2)
    do(chat, "/reset")
    assert (chat.keeper.name, session.exchanges, len(answers(folder, "a"))) == (None, [], 2)
    chat.turn("Hello")
    assert len(answers(folder, "a")) == 2
    do(chat, "/save")  # a name is made
    assert len(list(folder.glob("2*.json"))) == 1
    chat.keeper.close()
    capsys.readouterr()


@contextmanager
def away(folder: Path) -> Iterator[None]:
    """For as long as this lasts, nothing can be written there: as on a disk that is full for a while."""
    aside = folder.with_name("aside")
    folder.rename(aside)
    folder.write_text("in its place")
    try:
        yield
    finally:
        folder.unlink()
        aside.rename(folder)


def test_a_conversation_that_was_saved_after_all_can_be_left(session, folder, capsys):
    chat = chat_of(session)
    do(chat, "/save b")
    chat.turn("Hello")
    do(chat, "/save a")
    for saves in ("/save", "/system Be brief.", "/undo"):
        with away(folder):
            chat.turn("Hello")
            assert chat.keeper.failure
            with pytest.raises(SessionError, match="sessions cannot be kept there"):
                do(chat, "/save c")
        assert (chat.keeper.name, bool(chat.keeper.failure)) == ("a", True)
        with pytest.raises(SessionError, match="this conversation is not saved"):
            do(chat, "/load b")
        do(chat, saves)
        assert chat.keeper.failure is None
        assert len(answers(folder, "a")) == len(session.exchanges)
        do(chat, "/load b")
        do(chat, "/load a")
    # A change that was not saved is one that would be lost too, and what is forgotten is none.
    with away(folder):
        do(chat, "/system Be kind.")
    with pytest.raises(SessionError, match="this conversation is not saved"):
        do(chat, "/load b")
    do(chat, "/reset")
    do(chat, "/load a")
    do(chat, "/load b")
    chat.keeper.close()
    capsys.readouterr()


def test_sampling_and_system_message_come_with_a_session(llm, folder, capsys):
    llm.reset()
    session = Session(llm, system="Be brief.", sampling=Sampling(temp=0, top_k=3))
    chat = chat_of(session)
    chat.turn("Hello")
    do(chat, "/save a")
    chat.keeper.close()
    fresh = Session(llm, sampling=Sampling(temp=1))
    chat = chat_of(fresh)
    do(chat, "/load a")
    assert (fresh.system, fresh.sampling) == ("Be brief.", Sampling(temp=0, top_k=3))
    assert (fresh.messages, fresh._tokens) == (session.messages, session._tokens)
    chat.turn("Go on.")
    assert fresh.last.prefill_tokens < fresh.last.prompt_tokens - 10  # the cache still has it
    chat.keeper.close()
    capsys.readouterr()


def test_listed_sessions_stand_in_columns(session, folder):
    keeper, _ = keep(session)
    for name in ("a", "a-long-name"):
        keeper.save(name)
        say(keeper, QUESTIONS[0], 2)
    (folder / "torn.json").write_text("{")
    lines = sorted(keeper.listing().splitlines(), key=lambda line: line[2:])
    assert [line[:15] for line in lines] == ["  a            ", "* a-long-name  ", "  torn         "]
    assert "  1 turn    Smollm2" in lines[0]
    assert "  2 turns   Smollm2" in lines[1]
    assert lines[2].startswith("(", 15)
    keeper.close()


@needs_terminal
def test_sessions_in_a_terminal(small_buckets, folder, tmp_path):
    def start(*arguments):
        return Pty(*arguments, XDG_STATE_HOME=str(tmp_path))

    pty = start(small_buckets, "--ctx", "1024", "--max-tokens", "150", "--session", "sea")
    pty.expect("a new session: sea")
    pty.prompt(" sea  ·  0 of 1,024 tokens")
    pty.chat.send("Say hello.\r")
    pty.prompt(r" sea  ·  [1-9]\d* of 1,024 tokens")
    assert "open in another process" in error_of("--session", "SEA", "-p", "x")
    pty.chat.send("/sessions\r")
    pty.expect(r"\* sea  \d{4}-\d\d-\d\d \d\d:\d\d  1 turn    Smollm2")
    pty.prompt(" sea ")
    # Killed in the middle of an answer.
    pty.chat.send("Write a long story.\r")
    pty.expect(r"\n[^\x1b\r\n]{20,}")  # nothing but an answer is that long without colours
    pty.chat.kill(signal.SIGKILL)
    pty.chat.wait()

    pty = start(None, "--session", "sea", "--max-tokens", "8")
    pty.expect(r"session sea: 1 turn, [1-9]\d* tokens, saved \d{4}")
    pty.expect("your last message was not answered: “Write a long story.”; an empty line sends it again")
    pty.prompt(r" sea  ·  [1-9]\d* of 1,024 tokens")
    pty.chat.send("\r")
    pty.expect("sent again: “Write a long story.”")
    pty.expect("limit of --max-tokens")
    pty.prompt(" sea ")
    pty.chat.send("/save ocean\r")
    pty.expect("saved as ocean, and after every answer from now on")
    pty.prompt(" ocean ")
    pty.chat.send("/load nothing\r")
    pty.expect("there is no session nothing; /sessions lists them")
    pty.prompt(" ocean ")
    pty.chat.send("/load sea\r")
    pty.expect(r"session sea: 2 turns, [1-9]\d* tokens")
    pty.prompt(" sea ")
    pty.chat.send("/reset\r")
    pty.expect("the conversation is forgotten; session sea stays as it was saved, /load sea goes on with it")
    pty.prompt(" 0 of 1,024")
    pty.chat.sendeof()
    assert pty.close() == 0
    assert answers(folder, "sea") == answers(folder, "ocean")
    assert len(answers(folder, "sea")) == 2
    assert os.listdir(folder)


@needs_terminal
def test_file_that_does_not_fit_is_dropped(small_buckets, tmp_path):
    for name, words in [("a.txt", 20), ("big file.txt", 900)]:
        (tmp_path / name).write_text("word " * words)
    pty = Pty(small_buckets, "--ctx", "512", "--max-tokens", "3", XDG_STATE_HOME=str(tmp_path))
    pty.prompt(" 0 of 512")
    for command, answer, status in [
        ("/drop", "no file waits for your next message", " 0 of 512"),
        (f"/file {tmp_path}/a.txt", "a.txt: 21 tokens, sent with", r"a.txt \(21 tokens\)"),
        (f"/file {tmp_path}/big file.txt", "that will not fit: 922 tokens of files, 512 left in the context; "
         "/drop big file.txt takes it back", r"a.txt \+ big file.txt \(922 tokens\)"),
        ("Well?", "tokens but the context holds 512", r"a.txt \+ big file.txt \(922 tokens\)"),
        ("/drop", "/drop needs a name, or all: a.txt, big file.txt", "big file.txt"),
        ("/drop c", "no file c waits; there are a.txt, big file.txt", "big file.txt"),
        ("/drop big file.txt", "big file.txt: not sent", r"a.txt \(21 tokens\)"),
        ("/drop all", "a.txt: not sent", r" 0 of 512 tokens  ·  bucket 1 of 8 \(t = 1, up to 256 tokens\)"),
    ]:  # fmt: skip
        pty.chat.send(f"{command}\r")
        pty.expect(answer)
        pty.prompt(status)
    pty.chat.sendeof()
    assert pty.close() == 0


# With the document store


def test_who_makes_the_store_is_told_where_it_is(small_buckets, tmp_path):
    for expected in ("what is read is kept in .*documents", "/help"):  # the second time there is one
        pty = Pty(small_buckets, "--ctx", "512", CLEX_CACHE=str(tmp_path / "cache"))
        pty.expect(expected)
        pty.prompt(" 0 of 512")
        pty.chat.sendeof()
        assert pty.close() == 0
    assert (tmp_path / "cache" / "documents").is_dir()


def test_session_goes_on_from_what_is_kept_on_disk(small_buckets, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CLEX_CACHE", str(tmp_path / "cache"))
    document = tmp_path / "report.txt"
    document.write_text("".join(f"Line {i} of the report.\n" for i in range(90)))
    # Computed in other batches, a prompt rounds otherwise; with an F32 cache too little for another answer.
    options = ["--ctx", "2048", "--batch", "128", "--temp", "0", "--max-tokens", "8", "--kv-type", "f32"]
    with closing(open_model(small_buckets, ctx=2048, kv_type="f32", batch=128, threads=1, store=False)) as llm:
        session = Session(llm, sampling=Sampling(temp=0))
        asked = [f"{document.read_text()}\nWhat is this?", *QUESTIONS[1:]]
        expected = ["".join(session.send(text, 8)) for text in asked]
    first = ["-f", str(document), "-p", "What is this?", str(small_buckets), *options]
    reports = []
    for arguments in (first, ["-p", QUESTIONS[1], "--max-tokens", 8], ["-p", QUESTIONS[2], "--max-tokens", 8]):
        result = run(*arguments, "--session", "report", "--batch", 128, "--json")
        assert result.returncode == 0, result.stderr
        reports.append(json.loads(result.stdout))
    assert [report["text"] for report in reports] == expected
    assert [report["restored_tokens"] > 0 for report in reports] == [False, True, True]
    for report in reports[1:]:
        assert report["prefill_tokens"] + report["restored_tokens"] == report["prompt_tokens"]
        assert report["restored_tokens"] >= 512
        assert report["prefill_tokens"] < 256 + 128


def test_session_goes_on_without_the_store(small_buckets, folder, tmp_path, monkeypatch):
    """It may be deleted, or turned off, at any time."""
    monkeypatch.setenv("CLEX_CACHE", str(tmp_path / "cache"))
    options = [*OPTIONS, "--no-store"]
    assert run(small_buckets, "--session", "s", "-p", QUESTIONS[0], *options).returncode == 0
    report = json.loads(run("--session", "s", "-p", QUESTIONS[1], "--max-tokens", 3, "--json").stdout)
    assert report["restored_tokens"] == 0
    assert report["prefill_tokens"] == report["prompt_tokens"]


@needs_terminal
def test_it_is_said_what_comes_from_disk_and_what_is_kept(small_buckets, tmp_path, monkeypatch):
    monkeypatch.setenv("CLEX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "report.txt").write_text("".join(f"Line {i} of the report.\n" for i in range(150)))
    options = ["--ctx", "2048", "--batch", "128", "--max-tokens", "3", "-f", str(tmp_path / "report.txt")]
    pty = Pty(small_buckets, *options, "-p", "What is this?")
    pty.expect(r"reading 1,\d+ tokens")
    while not list((tmp_path / "cache" / "documents").glob("*/??/*")):
        time.sleep(0.01)
    pty.chat.sendintr()
    pty.expect(r"stopped while reading; [1-9][\d,]* of its 1,\d+ tokens are read and kept on disk")
    assert pty.close() == 130
    pty = Pty(small_buckets, *options, "-p", "What is this?")
    pty.expect(
        r"\[read [\d,]+ tokens at [\d,]+ tok/s · [1-9][\d,]* from disk · wrote 3 at .* of 2,048 in the context\]"
    )
    assert pty.close() == 0
    # A pipe is told only where it asks for that.
    arguments = [small_buckets, *options, "-p", "What is this?"]
    assert "from disk" not in run(*arguments).stderr
    assert re.search(r"\n\[read \d+ tokens .* from disk · wrote 3 ", run(*arguments, "--verbose").stderr)


@needs_terminal
def test_file_behind_a_conversation_is_read_anew_and_says_so(small_buckets, tmp_path, monkeypatch):
    monkeypatch.setenv("CLEX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "report.txt").write_text("word " * 600)
    for store, line in [
        ([], "read here anew: from disk comes only what a conversation begins with, as after /reset"),
        (["--no-store"], r"next message\S*\r"),
    ]:
        pty = Pty(small_buckets, "--ctx", "2048", "--max-tokens", "3", *store, XDG_STATE_HOME=str(tmp_path))
        pty.prompt(" 0 of 2,048")
        pty.chat.send(f"/file {tmp_path}/report.txt\r")
        pty.expect(r"601 tokens, sent with your next message\S*\r")
        pty.prompt("report.txt")
        pty.chat.send("/drop\r")
        pty.prompt(" 0 of 2,048")
        pty.chat.send("Hello\r")
        pty.prompt(r" [1-9]\d* of 2,048")
        pty.chat.send(f"/file {tmp_path}/report.txt\r")
        pty.expect(line)
        pty.prompt("report.txt")
        pty.chat.sendeof()
        assert pty.close() == 0
