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
    summary, summed, most = session.summary, 0, min(_SUMMARY, session.capacity // 8)
    stand_in = "a " * most if policy == "summarize" else summary
    count = _to_leave_out(session, text, room, size - room, stand_in)
    if policy == "summarize":
        dropped = session.exchanges[before:count]
        yield f"[the context is full: summing up {_turns(dropped)} ...]"
        found = _summed_up(session, count, most)
        summary, summed = found or ("", 0)
        if not summary:
            why = "the model came to no summary of them" if found else "there is no room to sum them up"
            yield f"[{why}: they are left out]"
    session.change(left_out=count, summary=summary)
    while session.size_with(text) > room and count < len(session.exchanges):  # more text than its tokens made expect
        count += 1
        session.change(left_out=count)
    yield _told(session.exchanges[before:count], summed if summary else 0)


def _to_leave_out(session: Session, text: str, room: int, over: int, summary: str) -> int:
    """How many exchanges at the beginning are to be left out, at least one more than are now.

    Args:
        session: the conversation.
        text: the message that needs room.
        room: tokens for it, and all that is before it.
        over: tokens that are too many.
        summary: what is to stand for those that are left out, or is as long.
    """

    def fits(count: int) -> bool:
        return session.size_with(text, left_out=count, summary=summary) <= room

    first = count = session.left_out + 1
    # Near to it by what each has by itself, as to try is to write and cut all of a conversation.
    over += session.count(summary)
    for exchange in session.exchanges[session.left_out :]:
        over -= session.count(exchange.message) + len(exchange.tokens) + _AROUND
        if over <= 0 or count == len(session.exchanges):
            break
        count += 1
    while count > first and fits(count - 1):
        count -= 1
    while count < len(session.exchanges) and not fits(count):
        count += 1
    return count


def _summed_up(session: Session, count: int, most: int) -> tuple[str, int] | None:
    """What the model makes of the turns before one, in so many tokens, and of how many of the last of them.

    None where not even one fits.
    """
    thoughts = min(_THOUGHTS, session.capacity // 4) if session.may_think else 0
    exchanges = session.exchanges[session.left_out : count]
    question = f"{session.summary}\n\n{ASKED}" if session.summary else ASKED
    for first in range(len(exchanges)):
        try:
            with closing(session.aside(exchanges[first:], question, most + thoughts)) as stream:
                return _without_thoughts(session, stream, most), len(exchanges) - first
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


def _told(dropped: Sequence[Exchange], summed: int) -> str:
    """A line about what is no part of prompts any more, with a summary of so many of these turns."""
    first = escaped(" ".join(dropped[0].typed.split()), 40)
    line = f"[left out to make room: {_turns(dropped)}, from “{first}”"
    if names := file_names(dropped):
        line += f", and with that {', '.join(names)}"
    if summed:
        all_of_it = "it" if len(dropped) == 1 else "them"
        line += f"; a summary stands for {all_of_it if summed >= len(dropped) else f'{summed} of them'}"
    return f"{line}]"
