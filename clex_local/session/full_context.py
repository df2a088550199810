"""What to do when a conversation fills the context: refuse, leave out the oldest turns, or sum them up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from clex_local.errors import ClexError, escaped
from clex_local.session.exchange import file_names
from clex_local.session.thoughts import Thoughts

if TYPE_CHECKING:
    from clex_local.session.exchange import Exchange
    from clex_local.session.session import Session

POLICIES = ("refuse", "drop-oldest", "summarize")
_ANSWER, _SUMMARY = 512, 256  # tokens; an eighth of a small context
_THOUGHTS = 1024  # tokens before a summary, where the model thinks; a quarter of a small context
_AROUND = 16  # tokens that a template writes around a message and its answer
ASKED = (
    "Sum up our conversation until now for yourself, in a few sentences: what I want, names, numbers, what was found "
    "and decided. Write the summary alone."
)


def make_room(session: Session, policy: str, text: str) -> Iterator[str]:
    """Make room for a message and an answer by leaving out the oldest turns, where that is needed and wanted.

    The turns stay in ``session.exchanges``, and in the file of a conversation that is saved. Where not even the message
    alone fits, nothing is changed; sending it will say so.

    Args:
        session: the conversation.
        policy: one of `POLICIES`.
        text: the message.

    Yields:
        What somebody should know, in lines.

    Raises:
        ClexError: the template refuses what is left.
    """
    if policy == "refuse":
        return
    answer = min(_ANSWER, session.capacity // 8)
    room = session.capacity - answer
    size = session.size_with(text)
    if size <= room or len(session.prompt(text)) >= session.capacity:
        return
    before = session.left_out
    if before == len(session.exchanges):
        return
    if policy == "summarize":
        room -= min(_SUMMARY, session.capacity // 8)
    count = _to_leave_out(session, size - room)
    dropped = session.exchanges[before:count]
    summary = session.summary
    if policy == "summarize":
        yield f"[the context is full: summing up {_turns(dropped)} ...]"
        summary = _summed_up(session, count)
        if not summary:
            why = "there is no room to sum them up" if summary is None else "the model came to no summary of them"
            yield f"[{why}: they are left out]"
            summary = ""
    while True:
        session.change(left_out=count, summary=summary)
        if session.size_with(text) <= room or count == len(session.exchanges):
            break
        count += 1
    yield _told(session.exchanges[before:count], bool(summary))


def _to_leave_out(session: Session, tokens: int) -> int:
    """How many exchanges there are at the beginning that have so many tokens together."""
    count = session.left_out
    while tokens > 0 and count < len(session.exchanges):
        exchange = session.exchanges[count]
        tokens -= session.count(exchange.message) + len(exchange.tokens) + _AROUND
        count += 1
    return count


def _summed_up(session: Session, count: int) -> str | None:
    """What the model makes of the turns before one, of as many of the last of them as fit; None where none does."""
    most = min(_SUMMARY, session.capacity // 8)
    thoughts = min(_THOUGHTS, session.capacity // 4) if session.may_think else 0
    exchanges = session.exchanges[session.left_out : count]
    question = f"{session.summary}\n\n{ASKED}" if session.summary else ASKED
    for first in range(len(exchanges)):
        try:
            with closing(session.aside(exchanges[first:], question, most + thoughts)) as stream:
                return _without_thoughts(session, stream, most)
        except ClexError:
            continue
        finally:
            session.last = None  # it was no turn
    return None


def _without_thoughts(session: Session, stream: Iterator[str], most: int) -> str:
    """What a model answers, in so many pieces at most, without what it thinks before it."""
    answer, pieces, parts = "", 0, None
    for piece in stream:
        parts = parts or Thoughts(session.opens_thought)  # known once the answer has begun
        if said := "".join(text for thought, text in parts.feed(piece) if not thought):
            answer, pieces = answer + said, pieces + 1
        if pieces == most:
            break
    if parts:
        answer += "".join(text for thought, text in parts.feed("", last=True) if not thought)
    return answer.strip()


def _turns(exchanges: Sequence[Exchange]) -> str:
    number = len(exchanges)
    return f"the oldest {number} turns" if number > 1 else "the oldest turn"


def _told(dropped: Sequence[Exchange], has_summary: bool) -> str:
    """A line about what is no part of prompts any more."""
    first = escaped(" ".join(dropped[0].typed.split()), 40)
    line = f"[left out to make room: {_turns(dropped)}, from “{first}”"
    if names := file_names(dropped):
        line += f", and with that {', '.join(names)}"
    return line + ("; a summary stands for it]" if has_summary else "]")
