"""The commands of a conversation at a terminal: one table, of which help, completion and the page are made."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from clex_local.chat import edits, settings
from clex_local.chat.clipboard import copy
from clex_local.chat.conversation import Chat
from clex_local.errors import ClexError, escaped
from clex_local.session.folder import listed_sessions
from clex_local.session.transcript import export, without_thoughts

KEYS = """\
Enter sends. Alt-Enter, or a backslash at the end of a line, starts a new line.
Tab completes commands, names, values and paths. Ctrl-Z suspends.
Ctrl-C stops an answer and keeps what was written. A space before a slash makes it text."""


@dataclass(frozen=True)
class ChatCommand:
    """A command.

    Attributes:
        name: with its slash.
        help: what it does, in a line.
        run: does it; the text is what stands behind the name.
        argument: what may stand there, for help.
        words: what there is to stand there.
        takes_path: what stands there is a path.
        others: names for the same, with a slash or without; without one it is the whole line.
    """

    name: str
    help: str
    run: Callable[[Chat, str], object]
    argument: str = ""
    words: Callable[[Chat], Iterable[str]] | None = None
    takes_path: bool = False
    others: Sequence[str] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All that it is called."""
        return (self.name, *self.others)

    @property
    def usage(self) -> str:
        """Its name and what may stand behind it."""
        return f"{self.name} {self.argument}".rstrip()


def _sessions(chat: Chat) -> Iterator[str]:
    for item in listed_sessions():
        if item.session is not None:
            yield item.name


def _attached(chat: Chat) -> list[str]:
    return [file.name for file in chat.attachments] + ["all"]


def _note(text: Callable[[Chat], str]) -> Callable[[Chat, str], None]:
    return lambda chat, _: chat.terminal.note(text(chat))


def _export(chat: Chat, path: str) -> None:
    if not path:
        raise ClexError("/export needs the name of a file, such as conversation.md")
    file = export(chat.session, chat.name, path, chat.keeper.unanswered)
    chat.terminal.note(f"written: {file}")


def _copy(chat: Chat, _: str) -> None:
    if not chat.session.exchanges:
        raise ClexError("there is no answer yet")
    chat.terminal.note(copy(without_thoughts(chat.session.exchanges[-1].answer)))


COMMANDS: tuple[ChatCommand, ...] = (
    ChatCommand("/help", "list the commands", lambda chat, _: chat.terminal.note(help_text()),
                others=("/?", "help", "?")),
    ChatCommand("/file", "put files in front of your next message: text, PDF, DOCX, HTML, folders, src/**/*.py",
                Chat.attach, "PATH", takes_path=True, others=("/read",)),
    ChatCommand("/url", "put a page of the web, fetched now, in front of your next message", Chat.fetch, "URL"),
    ChatCommand("/drop", "take back a file that waits", Chat.drop, "NAME|all", _attached),
    ChatCommand("/regenerate", "have your last message answered once more", edits.regenerate,
                others=("/regen",)),
    ChatCommand("/undo", "take back your last message and its answer", edits.undo),
    ChatCommand("/edit", "change your last message, and have it answered", edits.edit, "[TEXT]"),
    ChatCommand("/system", "show the system message, or set another; - for none", edits.system, "[TEXT]"),
    ChatCommand("/set", "show or change temp, top_k, max_tokens and others", settings.put, "[NAME VALUE]",
                settings.words),
    ChatCommand("/think", "what the model thought before its last answer",
                _note(lambda chat: chat.thoughts or "no thoughts in the last answer")),
    ChatCommand("/save", "save the conversation, and go on saving it after every answer",
                lambda chat, name: chat.keeper.save(name), "[NAME]"),
    ChatCommand("/load", "go on with a saved conversation", Chat.load, "NAME", _sessions),
    ChatCommand("/sessions", "the conversations that are saved", _note(lambda chat: chat.keeper.listing())),
    ChatCommand("/reset", "forget the conversation; a saved one stays as it was saved", Chat.reset,
                others=("/clear",)),
    ChatCommand("/export", "write the conversation as Markdown", _export, "FILE.md", takes_path=True),
    ChatCommand("/copy", "put the last answer on the clipboard", _copy),
    ChatCommand("/stats", "tokens, buckets, speed, memory, settings", _note(Chat.stats)),
    ChatCommand("/quit", "leave (Ctrl-D too)", Chat.quit, others=("/bye", "/exit", "exit", "quit")),
)  # fmt: skip


def find(line: str) -> tuple[ChatCommand, str] | None:
    """The command that a line is, with what stands behind its name; None for a message.

    Raises:
        ClexError: it begins with a slash, and is none.
    """
    name, _, rest = line.strip().partition(" ")
    for command in COMMANDS:
        if line.startswith("/") and name in command.names:
            return command, rest.strip()
        if line.strip() in command.others and not line.startswith((" ", "/")):
            return command, ""
    if line.startswith("/"):
        hint = f"{_meant(name)}/help lists them, a space before the slash makes it text"
        raise ClexError(f"unknown command {escaped(name, 40)}; {hint}")
    return None


def _with_slash() -> list[str]:
    """All names of commands that begin with a slash."""
    return [name for command in COMMANDS for name in command.names if name[0] == "/"]


def _meant(name: str) -> str:
    """A question for what somebody may have meant; nothing where that is far from all there is."""
    names = _with_slash()
    begun = [other for other in names if len(name) > 1 and other.startswith(name)]
    close = begun[:2] or (difflib.get_close_matches(name, names, n=1) if len(name) > 2 else [])
    return f"did you mean {' or '.join(close)}? " if close else ""


def do(chat: Chat, line: str) -> bool:
    """Do what a line says, if it is a command; whether it is one.

    Raises:
        ClexError: there is no such command, or it cannot be done.
        EOFError: it ends the conversation.
    """
    found = find(line)
    if found is None:
        return False
    command, argument = found
    command.run(chat, argument)
    return True


def help_text() -> str:
    """Every command in a line, and the keys."""
    width = max(len(command.usage) for command in COMMANDS) + 2
    return "\n".join([*(f"{command.usage:{width}}{command.help}" for command in COMMANDS), KEYS])


def page_table() -> str:
    """The commands as a table of Markdown, for ``docs/chat.md``."""
    rows = ["| command | meaning |", "| --- | --- |"]
    for command in COMMANDS:
        names = ", ".join(f"`{name}`" for name in (command.usage, *command.others))
        rows.append(f"| {names.replace('|', chr(92) + '|')} | {command.help} |")
    return "\n".join(rows)


def completions(chat: Chat, line: str) -> list[str]:
    """What the first word of a line can become, or all that stands behind it. Of paths, see `path_in`."""
    name, space, rest = line.partition(" ")
    if not space:
        return [other for other in _with_slash() if other.startswith(name)] if name.startswith("/") else []
    for command in COMMANDS:
        if name in command.names and command.words:
            return [word for word in command.words(chat) if word.startswith(rest)]
    return []


def path_in(line: str) -> str | None:
    """The beginning of a path that a line ends with, None where it ends with none."""
    name, space, rest = line.partition(" ")
    if space and any(command.takes_path for command in COMMANDS if name in command.names):
        return rest.lstrip()
    return None
