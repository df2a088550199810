"""A conversation that fills its context goes on, by what is left out or summed up, and none that was said is lost."""

from __future__ import annotations

import json
import re
from contextlib import closing

import pytest

from clex_local import ClexError, Sampling, Session, open_model
from clex_local.chat.commands import do
from clex_local.chat.conversation import Chat
from clex_local.chat.terminal import Terminal
from clex_local.session import full_context
from clex_local.session.exchange import AttachedFile, Exchange
from clex_local.session.repetition import is_stuck
from clex_local.session.session import SUMMARY
from clex_local.templates.builtin import CHATML
from helpers.chat_command import run, sessions_folder

pytestmark = pytest.mark.chat

folder = sessions_folder()


@pytest.fixture(scope="module")
def llm(small_buckets):
    with closing(open_model(small_buckets, ctx=512, batch=64, threads=1, seed=0)) as llm:
        yield llm


def talk(llm, monkeypatch, policy: str, session: Session | None = None) -> tuple[Chat, list[str]]:
    """A conversation of four turns that has no room for a fifth."""
    llm.reset()
    session = session or Session(llm, system="Be brief.", sampling=Sampling(temp=0))
    terminal = Terminal(session, max_tokens=8, on_full=policy)
    told: list[str] = []
    monkeypatch.setattr(terminal, "note", lambda text, style="dim": told.append(text))
    chat = Chat(terminal, "name", "cache")
    turns = [Exchange(f"Question {i}: " + "word " * 85, f"Answer {i}.", [], "stop") for i in range(4)]
    turns[0].files.append(AttachedFile("/tmp/report.txt", 5, "0" * 64))
    chat.session.resume(turns, "Be brief.")
    assert chat.session.used > 400
    return chat, told


LONG = "And now? " + "word " * 110


def test_refused_by_default_with_the_ways_out(llm, monkeypatch, capsys):
    chat, _ = talk(llm, monkeypatch, "refuse")
    chat.terminal.talks = True
    used = chat.session.used
    with pytest.raises(ClexError, match=r"/set on_full drop-oldest, or summarize, makes room, --ctx \d+ holds it"):
        chat.turn(LONG)
    assert (chat.session.used, len(chat.session.exchanges)) == (used, 4)
    assert "nearly full: " in chat.status()
    chat.terminal.talks = False
    with pytest.raises(ClexError, match=r"; --on-full drop-oldest, or summarize, makes room"):
        chat.turn(LONG)


def test_what_makes_no_room_is_not_advised(llm, monkeypatch, capsys):
    for policy in ("refuse", "drop-oldest"):
        chat, _ = talk(llm, monkeypatch, policy)
        chat.terminal.talks = True
        with pytest.raises(ClexError, match=r"context holds 512; pass --ctx \d+ or shorten it$"):
            chat.turn("word " * 600)


def test_oldest_turns_are_left_out_and_named(llm, monkeypatch, folder, capsys, tmp_path):
    chat, told = talk(llm, monkeypatch, "drop-oldest")
    do(chat, "/save s")
    chat.turn(LONG)
    assert any(line.startswith("[left out to make room: the oldest ") and "from “Question 0: word" in line
               and "and with that report.txt]" in line for line in told)  # fmt: skip
    session = chat.session
    assert len(session.exchanges) == 5
    assert 1 <= session.left_out <= 2
    assert "Question 0" not in session._text
    assert "Question 3" in session._text
    assert session.messages[0]["content"] == "Be brief."
    assert session.used <= 512 - 512 // 8 + 8
    saved = json.loads((folder / "s.json").read_text())
    assert (len(saved["turns"]), saved["left_out"]) == (5, session.left_out)
    assert f"the oldest {chat.session.left_out} turn{'s' * (chat.session.left_out > 1)} left out" in chat.stats()
    # A file that was left out can be attached again.
    page = tmp_path / "report.txt"
    page.write_text("report")
    session.exchanges[0].files[:] = [AttachedFile.of(page)]
    do(chat, f"/file {page}")
    assert "sent with your next message" in told[-1]
    do(chat, "/drop")
    # It goes on so in another process, and what was left out can come back to a larger context.
    before = (session.messages, session._text, session._tokens, session.left_out)
    do(chat, "/reset")
    do(chat, "/load s")
    assert (session.messages, session._text, session._tokens, session.left_out) == before
    for _ in range(5):
        do(chat, "/undo")
    assert (session.exchanges, session.left_out) == ([], 0)
    chat.keeper.close()


def test_oldest_turns_are_summed_up(llm, monkeypatch, capsys):
    chat, told = talk(llm, monkeypatch, "summarize")
    chat.turn(LONG)
    session = chat.session
    assert any("summing up the oldest" in line for line in told)
    assert any(re.search(r"(oldest turn, .* for it|oldest \d turns, .* for them)]$", line) for line in told)
    assert session.summary
    first = session.messages[1]["content"]
    assert first.startswith(f"{SUMMARY}\n{session.summary}\n\n")
    assert session.exchanges[-1].message.startswith("And now?")  # as it was said
    assert session.last.completion_tokens
    chat.turn("Go on.")
    assert session.last.prefill_tokens < 40
    # What it tells of is not told any more when that is taken back.
    while len(session.exchanges) > session.left_out:
        do(chat, "/undo")
    assert session.summary
    do(chat, "/undo")
    assert (session.summary, session.left_out) == ("", 0)
    assert SUMMARY not in str(session.messages)
    while session.exchanges:
        do(chat, "/undo")
    chat.turn("Hello.")
    assert [message["content"] for message in session.messages[:2]] == ["Be brief.", "Hello."]


@pytest.mark.parametrize(
    ("opened", "generated", "summary"),
    [
        (True, "Hm, the user wants</think>\n\nA summary.", "A summary."),
        (True, "Hm, the user wants", ""),  # without end
        (False, "<think>Hm, the user wants</think>A summary.", "A summary."),
        (False, "<think>Hm, the user wants", ""),
        (False, "A <think> in a summary.", "A <think> in a summary."),
    ],
)
def test_thoughts_are_no_part_of_a_summary(llm, monkeypatch, capsys, opened, generated, summary):
    opens = "assistant\n<think>\n" if opened else "assistant\n{# strips what is before </think> #}"
    session = Session(llm, template=CHATML.replace("assistant\n", opens), sampling=Sampling(temp=0))
    chat, told = talk(llm, monkeypatch, "summarize", session)
    tokens = llm.tokenize(generated.encode(), add_bos=False, special=False)
    prompts = []

    def generate(prompt, *_, **__):
        prompts.append(prompt)
        yield from [*tokens, llm.token_eos()]

    monkeypatch.setattr(llm, "generate", generate)
    chat.turn(LONG)
    assert len(prompts) == 2
    assert session.summary == summary
    first = session.messages[1]["content"]
    assert first.startswith(f"{SUMMARY}\n{summary}\n\n" if summary else "Question")
    assert "the user wants" not in first
    assert ("[the model came to no summary of them: they are left out]" in told) == (not summary)


@pytest.mark.parametrize("words", [60, 110, 150, 210, 260, 310])
def test_summary_is_of_all_that_is_left_out(llm, monkeypatch, capsys, words):
    chat, told = talk(llm, monkeypatch, "summarize")
    prompts, tokens = [], llm.tokenize(b" sea" * 200, add_bos=False)

    def generate(prompt, *_, **__):
        prompts.append(llm.detokenize(prompt).decode())
        yield from tokens  # as much as it may be

    monkeypatch.setattr(llm, "generate", generate)
    message = "And now? " + "word " * words
    chat.turn(message)
    session = chat.session
    summing, answering = prompts
    out = session.left_out
    summed = [f"Question {i}" in summing for i in range(4)]
    assert summed == [i < out and (i > 0 or out < 4) for i in range(4)]  # all four have no room beside the question
    assert [f"Question {i}" in answering for i in range(4)] == [i >= out for i in range(4)]
    turns = f"the oldest {out} turns" if out > 1 else "the oldest turn"
    assert f"[the context is full: summing up {turns} ...]" in told
    (said,) = (line for line in told if line.startswith(f"[left out to make room: {turns}, from"))
    all_of_it = "them" if out > 1 else "it"
    assert said.endswith(f"; a summary stands for {all_of_it if sum(summed) == out else '3 of them'}]")
    # No more than has to be, with a summary of the longest.
    chat.session.undo()
    assert session.size_with(message, left_out=out - 1, summary="a " * 64) > 512 - 512 // 8 or out == 1


def test_summary_of_a_part_is_said_to_be_one(llm, monkeypatch, capsys):
    chat, told = talk(llm, monkeypatch, "summarize")
    chat.session.resume([Exchange("Question: " + "word " * 160, "Yes.", [], "stop") for _ in range(2)])
    # Both of them do not fit beside what asks for the summary.
    monkeypatch.setattr(full_context, "ASKED", full_context.ASKED + " word" * 150)
    tokens = llm.tokenize(b"A summary.", add_bos=False)
    monkeypatch.setattr(llm, "generate", lambda *_, **__: iter_of([*tokens, llm.token_eos()]))
    chat.turn("And now? " + "word " * 330)
    assert chat.session.left_out == 2
    assert any(line.endswith("; a summary stands for 1 of them]") for line in told)


def iter_of(tokens):
    yield from tokens


def test_sizes_are_told_without_a_change(llm, monkeypatch):
    chat, _ = talk(llm, monkeypatch, "summarize")
    session = chat.session
    state = [session.messages, session.exchanges, session._text, session._tokens, session.system, session.began]
    sizes = [session.size_with("Hi", left_out=count, summary="So it was.") for count in range(1, 5)]
    assert sizes == sorted(sizes, reverse=True)
    assert [session.messages, session.exchanges, session._text, session._tokens, session.system,
            session.began] == state  # fmt: skip
    session.change(left_out=2, summary="So it was.")
    assert session.size_with("Hi") == sizes[1]


def test_model_that_need_not_think_sums_up_at_once(llm, monkeypatch, capsys):
    begin = "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    session = Session(llm, template=CHATML.replace("assistant\n", begin), sampling=Sampling(temp=0))
    chat, _ = talk(llm, monkeypatch, "summarize", session)
    prompts, tokens = [], llm.tokenize(b"A summary.", add_bos=False)

    def generate(prompt, *_, **__):
        prompts.append(llm.detokenize(prompt).decode())
        yield from [*tokens, llm.token_eos()]

    monkeypatch.setattr(llm, "generate", generate)
    chat.turn(LONG)
    assert ["<think></think>" in prompt for prompt in prompts] == [True, False]
    assert (session.summary, session.template_arguments) == ("A summary.", {})


def test_message_that_fits_nowhere_changes_nothing(llm, monkeypatch, capsys):
    for policy in ("drop-oldest", "summarize"):
        chat, _ = talk(llm, monkeypatch, policy)
        with pytest.raises(ClexError, match="tokens but the context holds 512"):
            chat.turn("word " * 600)
        assert len(chat.session.exchanges) == 4


def test_script_with_a_session_drops_the_oldest(small_buckets, folder):
    options = ["--session", "s", "--ctx", 256, "--max-tokens", 4, "--temp", 0]
    for i in range(4):
        result = run(small_buckets, *options, "-p", f"Question {i}: " + "word " * 60, "--on-full", "drop-oldest")
        assert result.returncode == 0, result.stderr
    assert "[left out to make room: " in result.stderr
    assert len(json.loads((folder / "s.json").read_text())["turns"]) == 4
    result = run(small_buckets, *options, "-p", "word " * 120)
    assert "--on-full drop-oldest, or summarize, makes room" in result.stderr
    assert result.returncode == 1


# Repetition


def test_what_goes_nowhere_is_noticed():
    for period in (1, 2, 7, 30, 128):
        tokens = list(range(1000, 1100))
        while not is_stuck(tokens):
            tokens.append(len(tokens) % period)
            assert len(tokens) < 1100
        assert len(tokens) - 100 >= max(256, 6 * period) - period


def test_lists_and_tables_are_no_repetition():
    rows = [token for i in range(200) for token in (5, 6, 7, 8, 1000 + i, 9)]
    for end in range(len(rows)):
        assert not is_stuck(rows[:end])
    assert not is_stuck([7] * 250)


def test_answer_that_repeats_itself_is_stopped(llm, monkeypatch, capsys):
    llm.reset()
    session = Session(llm, sampling=Sampling(temp=0), stops_repetition=True)
    token = llm.tokenize(b"sea", add_bos=False)[0]

    def drawn(*_, **__):
        while True:
            yield token

    monkeypatch.setattr(session.llm, "generate", drawn)
    terminal, told = Terminal(session), []
    monkeypatch.setattr(terminal, "note", lambda text, style="dim": told.append(text))
    chat = Chat(terminal, "name", "cache")
    chat.turn("Hi")
    assert session.last.finish_reason == "repetition"
    assert session.last.completion_tokens < 300
    assert any("the same again and again" in line for line in told)
    assert session.exchanges[0].finish_reason == "repetition"


def test_answer_to_a_script_has_a_limit_and_one_in_a_conversation_has_none(llm):
    from clex_local.chat.cli import _terminal
    from clex_local.chat.options import SCRIPT_TOKENS, ChatOptions
    from clex_local.chat.question import Question

    asked = Question("Hi", None, [])
    for given, question, limit in [(None, asked, SCRIPT_TOKENS), (None, None, None), (7, asked, 7), (0, asked, None)]:
        terminal = _terminal(llm, ChatOptions(max_tokens=given), Sampling(), question, False)
        assert terminal.max_tokens == limit
        assert terminal.session.stops_repetition
