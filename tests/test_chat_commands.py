"""The commands of a conversation: each does what it says, at a terminal of any size, and loses nothing."""

from __future__ import annotations

import io
import json
import os
import re
from contextlib import closing

import pytest
from rich.console import Console

from clex_local import ClexError, Sampling, Session, open_model
from clex_local.chat.answer_view import MarkdownView
from clex_local.chat.commands import COMMANDS, completions, do, find, help_text, path_in
from clex_local.chat.conversation import Chat
from clex_local.chat.terminal import Terminal
from clex_local.session.exchange import Exchange
from clex_local.session.transcript import without_thoughts
from clex_local.templates.builtin import CHATML
from helpers.chat_command import Pty, needs_terminal, sessions_folder
from helpers.random_gguf import make_model

pytestmark = pytest.mark.chat

folder = sessions_folder()


@pytest.fixture(scope="module")
def llm(small_buckets):
    with closing(open_model(small_buckets, ctx=1024, batch=64, threads=1, seed=0)) as llm:
        yield llm


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model that is there at once, and answers with any bytes."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny.gguf", original=1024, n_layer=1)


@pytest.fixture
def told():
    return []


@pytest.fixture
def chat(llm, told, monkeypatch, capsys):
    """A conversation; what is told besides answers is in `told`."""
    llm.reset()
    llm.set_seed(0)
    terminal = Terminal(Session(llm, sampling=Sampling(temp=0)), max_tokens=6, talks=True)
    monkeypatch.setattr(terminal, "note", lambda text, style="dim": told.append(text))
    chat = Chat(terminal, "name", "cache")
    yield chat
    chat.keeper.close()


def said(chat: Chat) -> list[str]:
    return [exchange.message for exchange in chat.session.exchanges]


def answers(chat: Chat) -> list[str]:
    return [exchange.answer for exchange in chat.session.exchanges]


# What was said


def test_regenerate_draws_another_answer_to_the_same_message(chat, told):
    with pytest.raises(ClexError, match="nothing has been said yet"):
        do(chat, "/regenerate")
    chat.turn("Tell me about the sea.")
    do(chat, "/regenerate")
    assert any("the likeliest words are taken again" in line for line in told)
    chat.session.sampling = Sampling(temp=1.5, min_p=0)
    found = set()
    for _ in range(4):
        do(chat, "/regenerate")
        found.add(answers(chat)[-1])
        assert said(chat) == ["Tell me about the sea."]
        assert chat.session.last.prefill_tokens <= 2  # the prompt is in the cache
    assert len(found) > 1  # also with a seed


def test_regenerate_that_is_stopped_keeps_the_answer_there_was(chat, monkeypatch):
    chat.turn("Hello")
    chat.turn("And now?")
    before = (chat.session.messages, chat.session._text, chat.session._tokens)

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.terminal, "_read", stopped)
    for command in ("/regenerate", "/edit Another question."):
        do(chat, command)
        assert (chat.session.messages, chat.session._text, chat.session._tokens) == before
    monkeypatch.undo()
    chat.terminal.on_full = "refuse"
    with pytest.raises(ClexError, match="tokens but the context holds"):
        do(chat, f"/edit {'word ' * 1100}")
    assert (chat.session.messages, chat.session._text, chat.session._tokens) == before


def test_undo_takes_back_turn_after_turn(chat, told, folder):
    do(chat, "/save s")
    states = []
    for text in ("One.", "Two."):
        states.append((chat.session.messages, chat.session._text, chat.session._tokens))
        chat.turn(text)
    for state, left in ((states[1], "1 turn left"), (states[0], "the conversation is empty")):
        do(chat, "/undo")
        assert (chat.session.messages, chat.session._text, chat.session._tokens) == state
        assert told[-1].endswith(left)
        assert len(json.loads((folder / "s.json").read_text())["turns"]) == len(chat.session.exchanges)
    with pytest.raises(ClexError, match="nothing has been said yet"):
        do(chat, "/undo")


def test_undo_says_which_files_are_taken_back_too(chat, told, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
        do(chat, f"/file {tmp_path}/{name}")
    chat.turn("Hello")
    do(chat, "/undo")
    assert told[-1] == "taken back: “Hello”, and with that a.txt, b.txt; the conversation is empty"


def test_edit_keeps_the_files_of_the_message(chat, told, tmp_path, folder):
    (tmp_path / "note.txt").write_text("The number is 4711.\n")
    do(chat, "/save s")
    do(chat, f"/file {tmp_path}/note.txt")
    chat.turn("Which colour?")
    with pytest.raises(ClexError, match="needs the new text"):
        do(chat, "/edit")
    do(chat, "/edit Which number?")
    assert said(chat) == ["File: note.txt\n\nThe number is 4711.\n\nWhich number?"]
    (turn,) = json.loads((folder / "s.json").read_text())["turns"]
    assert (turn["message"], turn["typed_from"], len(turn["files"])) == (said(chat)[0], 37, 1)
    assert chat.session.exchanges[0].typed == "Which number?"


def test_edit_in_the_line_editor(chat, told):
    chat.edits = True
    typed = iter(["Hi", "/edit", "Ho", "/edit", KeyboardInterrupt, "/edit", "Ho", "/edit", "/stats", "End"])
    seen = []

    def read(draft):
        seen.append(draft)
        line = next(typed, EOFError)
        if isinstance(line, str):
            return line
        raise line

    chat.run(read, do)
    assert seen == ["", "", "Hi", "", "Ho", "", "Ho", "", "Ho", "", ""]
    assert said(chat) == ["Ho", "End"]
    assert sum("stays as it was" in line for line in told) == 2


def test_system_message_changes_in_a_conversation(chat, told):
    do(chat, "/system")
    assert told[-1] == "no system message; /system TEXT sets one"
    chat.turn("Hello")
    do(chat, "/system Be brief.")
    assert re.fullmatch(r"another system message from now on; \d+ tokens behind it are read again .*", told[-1])
    assert chat.session.messages[0] == {"role": "system", "content": "Be brief."}
    chat.turn("And?")
    assert "Be brief." in chat.session._text
    do(chat, "/system")
    assert told[-1] == "Be brief."
    do(chat, "/system -")
    assert chat.session.messages[0]["role"] == "user"
    assert said(chat) == ["Hello", "And?"]


# Settings


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("temp 0.3", "temp", 0.3),
        ("temp=0.3", "temp", 0.3),
        ("--top-k 5", "top_k", 5),
        ("top_p 1", "top_p", 1.0),
        ("min_p 0.1", "min_p", 0.1),
        ("repeat_penalty 1.2", "repeat_penalty", 1.2),
        ("temperature 0.3", "temp", 0.3),
        ("Temperature=0.3", "temp", 0.3),
        ("--top-p 0.5", "top_p", 0.5),
        ("repetition-penalty 1.2", "repeat_penalty", 1.2),
        ("parameter top_k 5", "top_k", 5),
    ],
)
def test_every_sampling_value_can_be_set(chat, told, line, name, value):
    do(chat, f"/set {line}")
    assert getattr(chat.session.sampling, name) == value
    assert told[-1] == f"{name} = {value}"


def test_names_of_other_programs_and_what_is_chosen_before(chat, told):
    for name in ("max-tokens", "num_predict", "max_new_tokens"):
        do(chat, f"/set {name} 3")
        assert told[-1] == "max_tokens = 3"
    do(chat, "/set temperature")
    assert told[-1] == "temp = 0"
    keeps = "/save keeps the conversation, and clex-chat --session NAME goes on with it"
    for typed, problem in [
        ("ctx 4096", f"ctx is chosen when the model is loaded, by --ctx N: {keeps}"),
        ("num_ctx 4096", f"ctx is chosen when the model is loaded, by --ctx N: {keeps}"),
        ("kv-type q8_0", f"kv_type is chosen when the model is loaded, by --kv-type TYPE: {keeps}"),
        ("chat_template plain", f"chat_template is chosen when the model is loaded, by --chat-template NAME: {keeps}"),
        ("system Be brief.", "/system TEXT sets the system message"),
        ("tmep 1", "there is no setting tmep; did you mean temp? /set lists them"),
        ("temper 1", "there is no setting temper; did you mean temp? /set lists them"),
        ("penalty 1", "there is no setting penalty; did you mean repeat_penalty? /set lists them"),
        ("max_token 1", "there is no setting max_token; did you mean max_tokens? /set lists them"),
        ("mirostat 1", "there is no setting mirostat; there are temp, top_k, "),
    ]:
        with pytest.raises(ClexError, match=f"^{re.escape(problem)}"):
            do(chat, f"/set {typed}")


def test_other_settings(chat, told):
    for line, shown in [
        ("max_tokens 3", "3"),
        ("max_tokens none", "none"),
        ("on_full summarize", "summarize"),
        ("on_full drop-oldest", "drop-oldest"),
        ("seed 7", "7"),
        ("seed -1", "-1"),
        ("plain true", "true"),
    ]:
        do(chat, f"/set {line}")
        assert told[-1] == f"{line.split()[0]} = {shown}"
    assert (chat.terminal.max_tokens, chat.terminal.on_full, chat.terminal.plain) == (None, "drop-oldest", True)
    do(chat, "/set on_full Summarize")
    do(chat, "/set on_full drop_oldest")
    assert told[-2:] == ["on_full = summarize", "on_full = drop-oldest"]
    for line, shown in [("plain off", "false"), ("plain ON", "true"), ("max_tokens 5", "5"), ("max_tokens -1", "none"),
                        ("num_predict 5", "5"), ("max_tokens off", "none")]:  # fmt: skip
        do(chat, f"/set {line}")
        assert told[-1].endswith(f" = {shown}")
    do(chat, "/set temp")
    assert told[-1] == "temp = 0"
    do(chat, "/set")
    assert {"temp", "top_k", "max_tokens", "on_full"} <= {line.split()[0] for line in told[-1].splitlines()}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("temp hot", "temp must be a number of at least 0, not hot"),
        ("temp -1", "temp must be"),
        ("temp nan", "temp must"),
        ("temp inf", "temp must be"),
        ("top_k 1.5", "top_k must be a whole number"),
        ("top_p 2", "1 at most"),
        ("repeat_penalty 0", "a number above 0"),
        ("max_tokens -3", "max_tokens must be a whole number of at least 1, or none, not -3"),
        ("on_full never", "refuse or"),
        ("nothing 3", "there is no setting nothing; there are temp, "),
        ("\x1b]0;x\x07 3", "no setting"),
        ("seed x", "seed must be"),
        ("seed 9999999999", "a whole number of at least -1, 4,294,967,294 at most, not 9999999999"),
        ("plain maybe", "true or false"),
    ],
)
def test_settings_that_cannot_be(chat, line, problem):
    before = chat.session.sampling
    with pytest.raises(ClexError, match=re.escape(problem)) as error:
        do(chat, f"/set {line}")
    assert str(error.value).isprintable()
    assert chat.session.sampling == before


def test_template_arguments_reach_the_template_and_are_saved(llm, told, monkeypatch, folder):
    template = CHATML.replace("assistant\n", "assistant\n{% if enable_thinking is false %}<think></think>{% endif %}")
    llm.reset()
    terminal = Terminal(Session(llm, template=template, sampling=Sampling(temp=0)), max_tokens=2)
    monkeypatch.setattr(terminal, "note", lambda text, style="dim": told.append(text))
    chat = Chat(terminal, "name", "cache")
    do(chat, "/set")
    assert "enable_thinking" in told[-1]
    assert "reasoning_effort" not in told[-1]
    do(chat, "/save s")
    chat.turn("Hi")
    assert "<think></think>" not in chat.session._text
    do(chat, "/set enable_thinking false")
    assert told[-1] == "enable_thinking = false"
    chat.turn("Ho")
    assert chat.session._text.count("<think></think>") == 1
    assert json.loads((folder / "s.json").read_text())["template_arguments"] == {"enable_thinking": False}
    do(chat, "/reset")
    do(chat, "/set enable_thinking true")
    do(chat, "/load s")
    assert chat.session.template_arguments == {"enable_thinking": False}
    with pytest.raises(ClexError, match="there is no setting thinking_budget"):
        do(chat, "/set thinking_budget 5")
    chat.keeper.close()


def test_thoughts_are_shown_when_asked_and_left_out_as_the_template_says(llm, told, monkeypatch, capsys):
    strips = CHATML.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}")
    for template, left in ((strips, 0), (CHATML, 1), (strips.replace("assistant\n", "assistant\n<think>"), 0)):
        llm.reset()
        terminal = Terminal(Session(llm, template=template, sampling=Sampling(temp=0)), max_tokens=60)
        monkeypatch.setattr(terminal, "note", lambda text, style="dim": told.append(text))
        console = Console(file=io.StringIO(), width=60, force_terminal=True)
        view = MarkdownView(console, lambda session=terminal.session: session.opens_thought)
        monkeypatch.setattr(terminal, "view", lambda view=view: view)
        chat = Chat(terminal, "name", "cache")
        begin = "" if "<think>" in template else "<think>"
        tokens = llm.tokenize(f"{begin}Hm, seven.</think>Yes.".encode(), add_bos=False, special=False)
        with monkeypatch.context() as patch:
            patch.setattr(llm, "generate", lambda *_, tokens=tokens, **__: iter_of([*tokens, llm.token_eos()]))
            chat.turn("Is it?")
        assert console.file.getvalue().endswith("/think shows it]\x1b[0m\nYes.\n")
        do(chat, "/think")
        assert told[-1] == "Hm, seven."
        assert "Hm, seven." in chat.session.messages[-1]["content"]
        prompt, _ = chat.session._prompt(chat.session._with_message("And?"))
        assert prompt.count("Hm, seven.") == left
        stopped = llm.tokenize(f"{begin}Well, ei".encode(), add_bos=False, special=False)
        with monkeypatch.context() as patch:
            patch.setattr(llm, "generate", lambda *_, tokens=stopped, **__: iter_of([*tokens, llm.token_eos()]))
            chat.turn("And?")
        prompt, _ = chat.session._prompt(chat.session._with_message("Go on."))
        assert prompt.count("Well, ei") == left


def iter_of(tokens):
    yield from tokens


# What goes out of it


def test_export_is_a_page_that_overwrites_nothing(chat, told, tmp_path):
    page = tmp_path / "talk.md"
    with pytest.raises(ClexError, match="nothing has been said yet"):
        do(chat, f"/export {page}")
    (tmp_path / "a.txt").write_text("secret " * 50)
    do(chat, "/system Be brief.")
    do(chat, f"/file {tmp_path}/a.txt")
    chat.turn("What is it?")
    with pytest.raises(ClexError, match="needs the name of a file"):
        do(chat, "/export")
    do(chat, f"/export {page}")
    text = page.read_text()
    for part in (
        "# Conversation with name",
        "## System message\n\nBe brief.",
        "## You\n\nAttached: `",
        "What is it?",
        f"## Model\n\n{answers(chat)[0].strip()}",
        "*(ended: length)*",
    ):
        assert part in text
    assert "secret secret" not in text
    assert page.stat().st_mode & 0o077 == 0
    with pytest.raises(ClexError, match="there is such a file already"):
        do(chat, f"/export {page}")
    with pytest.raises(ClexError, match="not written: No such file"):
        do(chat, f"/export {tmp_path}/none/a.md")
    assert page.read_text() == text
    chat.keeper.unanswered = Exchange("Are you there?")
    do(chat, f"/export {tmp_path}/more.md")
    assert (tmp_path / "more.md").read_text() == f"{text}\n## You\n\nAre you there?\n\n*(not answered)*\n"


def test_thoughts_are_no_part_of_a_page():
    assert without_thoughts("<think>\nHm.\n</think>\n\nYes.") == "Yes."
    assert without_thoughts("Hm.</think>Yes.") == "Yes."
    assert without_thoughts("Write <think>a</think>.") == "Write <think>a</think>."
    assert without_thoughts("Plain.") == "Plain."


def test_copy_takes_the_desktops_tool(chat, told, tmp_path, monkeypatch):
    with pytest.raises(ClexError, match="there is no answer yet"):
        do(chat, "/copy")
    tool = tmp_path / "bin" / "xclip"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\ncat > {tmp_path}/copied\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("DISPLAY", ":9")
    for name in ("SSH_CONNECTION", "WAYLAND_DISPLAY", "WSL_DISTRO_NAME"):
        monkeypatch.delenv(name, raising=False)
    chat.turn("Hello")
    do(chat, "/copy")
    assert told[-1] == "copied by xclip"
    assert (tmp_path / "copied").read_text() == answers(chat)[-1]
    tool.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(ClexError, match="no clipboard can be reached"):  # and there is no terminal
        do(chat, "/copy")


# The table


def test_names_are_there_once_and_help_has_all():
    names = [name for command in COMMANDS for name in (command.name, *command.others)]
    assert len(set(names)) == len(names)
    assert all(command.usage in help_text() for command in COMMANDS)
    assert max(map(len, help_text().splitlines())) < 110


def test_words_that_leave_are_whole_lines():
    for line in ("/quit", "/bye", "/exit", "exit", "quit", "exit "):
        assert find(line)[0].name == "/quit"
    for line in ("/help", "help", "?", "/?"):
        assert find(line)[0].name == "/help"
    for line in ("exit now", "help me", " help", "? ?", " exit", "exits", "Exit strategies", " /quit"):
        assert find(line) is None
    with pytest.raises(ClexError, match="unknown command /quits"):
        find("/quits")


def test_completion(chat, tmp_path):
    assert completions(chat, "/se") == ["/set", "/sessions"]
    assert completions(chat, "Hello") == completions(chat, "") == []
    assert completions(chat, "/set te") == ["temp"]
    assert completions(chat, "/set on_full dr") == ["on_full drop-oldest"]
    chat.turn("Hello")
    for name in ("sea", "ocean"):
        do(chat, f"/save {name}")
    assert completions(chat, "/load o") == ["ocean"]
    (tmp_path / "a b.txt").write_text("text")
    do(chat, f"/file {tmp_path}/a b.txt")
    assert completions(chat, "/drop a ") == ["a b.txt"]
    assert path_in("/file ~/a") == "~/a"
    assert path_in("/export  b") == "b"
    assert path_in("/load a") is path_in("What /file a") is None


# At a terminal

STEPS = {
    "/help": ("/help", "/file PATH.*Ctrl-C stops an answer"),
    "/file": ("/file {tmp}/a.txt", r"a.txt: 10\d tokens, sent with"),
    "/drop": ("/drop a.txt", "a.txt: not sent"),
    "/url": ("/url http://127.0.0.1:1/page", "127.0.0.1:1/page:"),
    "message": ("Hello", r"wrote \d.*?context\]"),
    "/regenerate": ("/regenerate", r"wrote \d.*?context\]"),
    "/edit": ("/edit\r{wait}, world", r"wrote \d.*?context\]"),
    "/system": ("/system Be brief.", r"another system message from now"),
    "/set": ("/set temp 0.5", r"temp = 0\.5"),
    "/think": ("/think", "no thoughts in the last answer"),
    "/save": ("/save a", "saved as a, and after"),
    "/sessions": ("/sessions", r"\* a  \d{4}"),
    "/export": ("/export {tmp}/talk.md", r"written:.*?talk.md"),
    "/copy": ("/copy", r"\x1b\]52;c;[\w+/=]*\x07"),
    "/stats": ("/stats", "context +[1-9]"),
    "/undo": ("/undo", "taken back: “Hello, world”"),
    "/reset": ("/reset", r"the conversation is forgotten; session"),
    "/load": ("/load a", "session a: 0 turns"),
    "/quit": ("/bye", "$"),
}


@needs_terminal
@pytest.mark.parametrize("width", [40, 80, 200])
def test_every_command_at_a_terminal(tiny, tmp_path, width):
    assert STEPS.keys() - {"message"} == {command.name for command in COMMANDS}
    (tmp_path / "a.txt").write_text("word " * 20)
    options = ["--ctx", "1024", "--max-tokens", "5", "--chat-template", "chatml", "--no-store"]
    clean = {"SSH_CONNECTION": "x", "TMUX": ""}
    pty = Pty(tiny, *options, width=width, **clean)
    pty.prompt(" 0 of 1,024")
    for name, (text, answer) in STEPS.items():
        first, _, second = text.format(tmp=tmp_path, wait="").partition("\r")
        pty.chat.send(f"{first}\r")
        if second:
            pty.expect("leaves all as it is")
            pty.prompt("of 1,024")
            pty.chat.send(f"{second}\r")
        if name == "/quit":
            break
        pty.expect(answer)
        pty.prompt("of 1,024")
    assert pty.close() == 0
    assert "Hello, world" in (tmp_path / "talk.md").read_text()
