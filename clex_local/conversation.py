"""The conversation at a terminal: its commands, the files that wait for a message, its state in words."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from clex_local.errors import ClexError, escaped
from clex_local.exchange import AttachedFile
from clex_local.line_editor import no_echo
from clex_local.session_keeper import SessionKeeper
from clex_local.terminal import Terminal, describe_bucket, printable
from clex_local.text_input import join, read_text

if TYPE_CHECKING:
    from clex_local.session import Session

HELP = """\
/file PATH   put a text file in front of your next message
/reset       forget the conversation; a saved one stays as it was saved
/save [NAME] save the conversation, and go on saving it after every answer
/load NAME   go on with a saved conversation
/sessions    the conversations that are saved
/stats       tokens, buckets, speed, memory, settings
/quit        leave (Ctrl-D too)
Enter sends. Alt-Enter, or a backslash at the end of a line, starts a new line.
Ctrl-C stops an answer and keeps what was written. A space before a slash makes it text."""


@dataclass
class Attachment:
    """A file that waits for the next message; ``file`` is what is remembered of it."""

    name: str
    text: str
    tokens: int
    file: AttachedFile | None = None


class Chat:
    """The conversation at a terminal.

    Args:
        terminal: where it takes place.
        name: of the model, for ``/stats``.
        memory: of the cache, in words.
        keeper: of its file; None: it has none until ``/save``.
    """

    def __init__(self, terminal: Terminal, name: str, memory: str, keeper: SessionKeeper | None = None):
        self.terminal = terminal
        self.keeper = keeper or SessionKeeper(terminal.session, terminal.tell)
        self.session = terminal.session
        self.name = name
        self.memory = memory
        self.attachments: list[Attachment] = []
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self.terminal.note(HELP),
            "/file": self.attach,
            "/reset": self.reset,
            "/save": self.keeper.save,
            "/load": self.load,
            "/sessions": lambda _: self.terminal.note(self.keeper.listing()),
            "/stats": lambda _: self.terminal.note(self.stats()),
            "/quit": self.quit,
        }

    def run(self, read: Callable[[], str]) -> None:
        """Read lines and answer them until the end of input or ``/quit``."""
        while True:
            try:
                line = read()
            except KeyboardInterrupt:
                self.terminal.note("/quit or Ctrl-D leaves")
                continue
            except EOFError:
                return
            try:
                if line.startswith("/"):
                    self.command(line)
                elif line.strip():
                    self.turn(line)
                elif self.attachments:
                    self.terminal.note("type a message to send with the file")
                elif self.keeper.unanswered:
                    self.answer(self.keeper.unanswered.message, self.keeper.unanswered.files)
            except EOFError:
                return
            except ClexError as error:
                self.terminal.note(str(error), style="red")
            except KeyboardInterrupt:
                self.terminal.note("[stopped]")

    def command(self, line: str) -> None:
        """Do what a line with a slash says."""
        name, _, rest = line.strip().partition(" ")
        if name in self.commands:
            self.commands[name](rest.strip())
        else:
            raise ClexError(f"unknown command {name}; /help lists them, a space before the slash makes it text")

    def turn(self, text: str) -> None:
        """Send a message, with the files that wait for it."""
        message = join([file.text for file in self.attachments] + [text])
        self.answer(message, [waiting.file for waiting in self.attachments if waiting.file])

    def answer(self, message: str, files: list[AttachedFile]) -> None:
        """Answer a message that was made of these files."""
        try:
            with no_echo(), self.keeper.turn(message, files):
                answer = self.terminal.answer(message, self.write)
        except KeyboardInterrupt:
            answer = self.session.last
        if answer is None:  # interrupted before anything began
            return
        if answer.text and not answer.text.endswith("\n"):
            self.write("\n")
        self.terminal.end_of_answer(answer)
        if self.keeper.failure:
            self.terminal.tell(str(self.keeper.failure), failed=True)
        if answer.finish_reason == "interrupted" and not answer.completion_tokens:
            waiting = "; the file still waits for your next message" if self.attachments else ""
            self.terminal.note(f"[stopped while reading: the message was not sent{waiting}]")
        else:
            self.attachments.clear()
        self.write("\n")

    @staticmethod
    def write(piece: str) -> None:
        """Write a piece of an answer."""
        sys.stdout.write(printable(piece))
        sys.stdout.flush()

    def attach(self, path: str) -> None:
        """Put a file in front of the next message."""
        if not path:
            raise ClexError("/file needs a path")
        if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
            path = path[1:-1]
        file = Path(path).expanduser()
        text = read_text(file)
        if not text.strip():
            raise ClexError(f"{path}: an empty file")
        name = escaped(file.name, 60)
        self.attachments.append(Attachment(name, text, self.session.count(text), AttachedFile.of(file)))
        waiting = sum(attachment.tokens for attachment in self.attachments)
        left = self.session.capacity - self.session.used
        line = f"{name}: {self.attachments[-1].tokens:,} tokens, sent with your next message"
        if waiting >= left:
            line += f"; that will not fit: {waiting:,} tokens of files, {left:,} left in the context"
        self.terminal.note(line)

    def reset(self, _: str) -> None:
        """Forget the conversation and the files that wait."""
        self.session.reset()
        self.attachments.clear()
        self.terminal.note(f"the conversation is forgotten{self.keeper.forget()}")

    def load(self, name: str) -> None:
        """Go on with a saved conversation."""
        self.keeper.load(name)
        self.welcome()

    def welcome(self) -> None:
        """Say what of a saved conversation waits for an answer."""
        if waiting := self.keeper.unanswered:
            text = escaped(waiting.message.strip().rpartition("\n")[2], 60)
            self.terminal.note(f"your last message was not answered: “{text}”; an empty line sends it again")

    def quit(self, _: str) -> NoReturn:
        """Leave."""
        raise EOFError

    def stats(self) -> str:
        """The state in a few lines."""
        session, totals, clex = self.session, self.session.totals, self.session.llm.clex
        lines = [
            f"model      {self.name}",
            f"context    {session.used:,} of {session.capacity:,} tokens",
            f"cache      {self.memory}",
            f"settings   {session.llm.settings}",
        ]
        if self.keeper.kept:
            lines.append(f"session    {self.keeper.name}, {self.keeper.kept.path}")
        if clex:
            covers = ", ".join(f"t = {t:g}: {int(t * clex.original_context):,}" for t in clex.buckets)
            lines += [
                f"tables     {clex.method}; {covers}",
                f"in use     {describe_bucket(clex, current_bucket(session))}",
                f"switches   {clex.rerotations:,}; {clex.rerotated_cells:,} keys re-rotated in "
                f"{clex.rerotation_ms:.0f} ms",
            ]
        else:
            lines.append("tables     none: the model runs inside the context it was trained for")
        if totals.prefill_seconds:
            restored = f", {totals.restored_tokens:,} more from disk" if totals.restored_tokens else ""
            lines.append(
                f"prompt     {totals.prefill_tokens:,} tokens read, {totals.prefill_speed:,.1f} tok/s{restored}"
            )
            lines.append(f"answers    {totals.completion_tokens:,} tokens written, {totals.decode_speed:,.1f} tok/s")
        if totals.drafted_tokens:
            lines.append(f"lookup     {totals.accepted_tokens:,} of {totals.drafted_tokens:,} guesses were right")
        return "\n".join(lines)

    def status(self) -> str:
        """The state in one line."""
        session, clex = self.session, self.session.llm.clex
        parts = [f"{session.used:,} of {session.capacity:,} tokens"]
        if self.keeper.name:
            parts.insert(0, self.keeper.name)
        if clex:
            parts.append(describe_bucket(clex, current_bucket(session)))
        if session.last and session.last.restored_tokens:
            parts.append(f"{session.last.restored_tokens:,} of them from disk")
        if self.attachments:
            parts.append(
                " + ".join(file.name for file in self.attachments)
                + f" ({sum(file.tokens for file in self.attachments):,} tokens)"
            )
        return " " + "  ·  ".join(parts)


def current_bucket(session: Session) -> int:
    """The bucket that the conversation as it stands is in."""
    clex = session.llm.clex
    assert clex is not None
    return clex.bucket_of(max(session.used, 1))
