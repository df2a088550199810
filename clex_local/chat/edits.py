"""Commands that change what was said: an answer once more, a turn taken back or edited, another system message."""

from __future__ import annotations

from clex_local.chat.conversation import Chat
from clex_local.errors import ClexError, escaped
from clex_local.session.exchange import Exchange, file_names

NONE = "-"  # stands for no system message


def _last(chat: Chat) -> Exchange:
    """The last message: one that was saved and has no answer yet comes behind all that have."""
    if chat.keeper.unanswered:
        return chat.keeper.unanswered
    if not chat.session.exchanges:
        raise ClexError("nothing has been said yet")
    return chat.session.exchanges[-1]


def regenerate(chat: Chat, _: str) -> None:
    """Have the last message answered once more, by other draws."""
    last = _last(chat)
    if chat.keeper.unanswered:
        chat.send_again()
        return
    if chat.session.sampling.temp == 0:
        chat.terminal.note("with temp = 0 the likeliest words are taken again: /set temp 0.8 draws others")
    if chat.seed >= 0:  # the same draws again would be the same answer
        chat.session.llm.set_seed((chat.seed + 1) % (2**32 - 1))
    chat.answer(last.message, last.files, last.typed_from, replaces=True)


def undo(chat: Chat, _: str) -> None:
    """Take back the last message and its answer."""
    last = _last(chat)
    if chat.keeper.unanswered:
        chat.keeper.unanswered = None
    else:
        chat.session.undo()
    chat.keeper.changed()
    turns = len(chat.session.exchanges)
    left = f"{turns} turn{'s' * (turns != 1)} left" if turns else "the conversation is empty"
    files = f", and with that {', '.join(names)}" if (names := file_names([last])) else ""
    chat.terminal.note(f"taken back: “{escaped(' '.join(last.typed.split()), 60)}”{files}; {left}")


def edit(chat: Chat, text: str) -> None:
    """Replace the last message: by this text, or in the line editor."""
    last = _last(chat)
    if text:
        chat.replace(text)
    elif chat.edits:
        chat.draft, chat.editing = last.typed, True
        chat.terminal.note("Enter sends it in place of your last message, Ctrl-C leaves all as it is")
    else:
        raise ClexError("/edit needs the new text: there is no line editor here")


def system(chat: Chat, text: str) -> None:
    """Show the system message, or go on with another one."""
    session = chat.session
    if not text:
        shown = session.system if session.system is not None else "no system message; /system TEXT sets one"
        chat.terminal.note(shown)
        return
    message = None if text == NONE else text
    if message == session.system:
        chat.terminal.note("the system message is that already")
        return
    used = session.used
    session.change(system=message)
    chat.keeper.changed()
    again = f"; {used:,} tokens behind it are read again with your next message" if used else ""
    chat.terminal.note(f"{'no system message' if message is None else 'another system message'} from now on{again}")
