"""The conversation at a terminal: messages and answers, the files that wait for a message, its state in words."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from rich.cells import cell_len

from clex_local.chat.line_editor import no_echo
from clex_local.chat.terminal import Terminal, describe_bucket
from clex_local.chat.text_input import join
from clex_local.documents.attachments import Attachment, attach, texts, without_twice
from clex_local.documents.typed_paths import typed_paths
from clex_local.errors import ClexError, escaped
from clex_local.library.interrupt import WorkerSilent
from clex_local.session.exchange import AttachedFile
from clex_local.session.keeper import SessionKeeper

if TYPE_CHECKING:
    from clex_local.chat.answer_view import AnswerView
    from clex_local.session.answer import Answer
    from clex_local.session.session import Session

_COUNTED = re.compile(r" \([\d,]+ files?\)$")  # behind the name of a folder
_NEARLY_FULL = 0.8  # of the context, from which on the status line warns
_LONG = 512  # tokens of a file that is worth finding on disk


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
        self.edits = False  # there is a line editor
        self.editing = False  # what comes next replaces the last message
        self.draft = ""  # what the line editor begins with
        self.thoughts = ""  # of the last answer

    @property
    def seed(self) -> int:
        """Of the sampler; -1 for a new one each time."""
        seed = self.session.llm._seed
        return -1 if seed == 2**32 - 1 else seed

    def run(self, read: Callable[[str], str], do: Callable[[Chat, str], bool]) -> None:
        """Read lines and answer them until the end of input or ``/quit``.

        Args:
            read: gives a line, which begins with a text that can be edited; raises EOFError at the end, and
                KeyboardInterrupt for Ctrl-C.
            do: does what a line says, if it is a command; whether it is one.
        """
        while True:
            draft, self.draft = self.draft, ""
            editing, self.editing = self.editing, False
            try:
                line = read(draft)
            except KeyboardInterrupt:
                self.terminal.note("your message stays as it was" if editing else "/quit or Ctrl-D leaves")
                continue
            except EOFError:
                return
            try:
                if do(self, line):
                    continue
                if editing:
                    self.replace(line)
                elif line.strip():
                    self.turn(line)
                elif self.attachments:
                    self.terminal.note("type a message to send with the file")
                elif self.keeper.unanswered:
                    self.send_again()
            except EOFError:
                return
            except (ClexError, WorkerSilent) as error:
                self.terminal.note(str(error), style="red")
            except KeyboardInterrupt:
                self.terminal.note("[stopped]")

    def turn(self, text: str) -> None:
        """Send a message, with the files that wait for it."""
        self.keeper.tell_changes({file.path for file in self.waiting_files})
        documents = [document for attachment in self.attachments for document in attachment.documents]
        message = join([*texts(documents, named=True), text])
        self.answer(message, self.waiting_files, len(message) - len(join([text])), attached=True)

    def send_again(self) -> None:
        """Have the message answered that was saved and has no answer."""
        waiting = self.keeper.unanswered
        assert waiting is not None
        self.terminal.note(f"sent again: {self.keeper.waiting(300)}")
        self.answer(waiting.message, waiting.files, waiting.typed_from)

    @property
    def waiting_files(self) -> list[AttachedFile]:
        """The files that wait for the next message."""
        return [file for attachment in self.attachments for file in attachment.files]

    def replace(self, text: str) -> None:
        """Send a text in place of what was typed last, with the files that were part of that."""
        waiting = self.keeper.unanswered
        last = waiting or self.session.exchanges[-1]
        message = last.message[: last.typed_from] + text.strip("\n")
        if not text.strip() or message == last.message:
            again = "an empty line sends it again" if waiting else "/regenerate has it answered once more"
            self.terminal.note(f"your message stays as it was; {again}")
        elif waiting:
            self.keeper.unanswered = dataclasses.replace(waiting, message=message)
            self.answer(message, last.files, last.typed_from)
        else:
            self.answer(message, last.files, last.typed_from, replaces=True)

    def answer(
        self,
        message: str,
        files: list[AttachedFile],
        typed_from: int = 0,
        replaces: bool = False,
        attached: bool = False,
    ) -> None:
        """Answer a message that was made of these files.

        Args:
            message: with the texts of the files.
            files: what is remembered of them.
            typed_from: where in the message what was typed begins.
            replaces: it takes the place of the last one, which is kept should there be no answer.
            attached: the files that wait are part of it.
        """
        view = self.terminal.view()
        self.session.last = None  # of the turn before: this one may be stopped before it is sent
        try:
            with no_echo(), self.keeper.turn(message, files, typed_from, replaces):
                answer = self._answered(message, view, replaces)
        except WorkerSilent:
            raise
        except KeyboardInterrupt:
            answer = self.session.last
        finally:
            view.end()
        self.thoughts = view.thoughts
        if answer is None:  # interrupted before it was read, such as while others were summed up
            self.terminal.note(f"[stopped: {self._stays(message, replaces, attached)}]")
            return
        self.terminal.end_of_answer(answer)
        if self.keeper.failure:
            self.terminal.tell(str(self.keeper.failure), failed=True)
        if answer.finish_reason == "interrupted" and not answer.completion_tokens:
            stays = self._stays(message, replaces, attached)
            self.terminal.note(f"[stopped while reading: {stays}{self.terminal.read_so_far(answer)}]")
        elif attached:
            self.attachments.clear()
        sys.stdout.write("\n")
        sys.stdout.flush()

    def _stays(self, message: str, replaces: bool, attached: bool) -> str:
        """What has become of a message that was stopped, in words. See `answer`."""
        if replaces:
            return "what was said stays as it was"
        if self.keeper.unanswered and self.keeper.unanswered.message == message:
            return "the message was not sent; an empty line sends it again"
        return "the message was not sent" + (
            "; the file still waits for your next message" if attached and self.attachments else ""
        )

    def _answered(self, message: str, view: AnswerView, replaces: bool) -> Answer:
        before = self.session.exchanges
        try:
            if replaces:
                self.session.undo()
            return self.terminal.answer(message, view.write)
        finally:
            if replaces and len(self.session.exchanges) < len(before):
                self.session.change(exchanges=before)

    def attach(self, line: str) -> None:
        """Put files in front of the next message."""
        if not line:
            raise ClexError("/file needs a path")
        failures: list[ClexError] = []
        for path in typed_paths(line):
            try:
                self.add(attach(path))
            except ClexError as error:  # keeps no other file from the message
                failures.append(error)
        for failure in failures[:-1]:
            self.terminal.tell(str(failure), failed=True)
        if failures:
            raise failures[-1]

    def fetch(self, address: str) -> None:
        """Put a page of the web in front of the next message."""
        if not address:
            raise ClexError("/url needs an address")
        self.add(attach(address, web=True))

    def add(self, attachment: Attachment) -> None:
        """Let something that was read wait for the next message; what is in the conversation already does not."""
        attachment, twice = without_twice(attachment, [*self.keeper.sent_files, *self.waiting_files])
        for name in twice:
            self.terminal.note(f"{escaped(name, 60)}: attached already; it is sent once")
        if not attachment.documents:
            return
        tokens = sum(self.session.count(document.text) for document in attachment.documents)
        self.attachments.append(dataclasses.replace(attachment, tokens=tokens))
        for note in attachment.notes:
            self.terminal.note(note)
        waiting = sum(attachment.tokens for attachment in self.attachments)
        left = self.session.capacity - self.session.used
        line = f"{attachment.name}: {tokens:,} tokens, sent with your next message"
        if waiting >= left:
            line += f"; that will not fit: {waiting:,} tokens of files, {left:,} left in the context"
            line += f"; /drop {attachment.name} takes it back"
        elif self.session.exchanges and tokens >= _LONG and self.session.llm.stored_tokens is not None:
            # A document is found again by all that is in front of it, and here that is a conversation.
            line += "; read here anew: from disk comes only what a conversation begins with, as after /reset"
        self.terminal.note(line)

    def drop(self, name: str) -> None:
        """Take back a file that waits for the next message, or all of them."""
        if not self.attachments:
            raise ClexError("no file waits for your next message; what was sent stays in the conversation")
        names = [attachment.name for attachment in self.attachments]
        if not name and len(names) > 1:
            raise ClexError(f"/drop needs a name, or all: {', '.join(names)}")
        if name and name != "all" and name not in names:
            name = self._name_of(name)
        if name in ("", "all"):
            self.attachments.clear()
        else:
            # Of several with one name, the last is the one that was attached by mistake.
            del self.attachments[-1 - names[::-1].index(name)]
            names = [name]
        self.terminal.note(f"{', '.join(names)}: not sent")

    def _name_of(self, typed: str) -> str:
        """What waits, named as for ``/file``: in quotes, or a folder without the number of its files."""
        names = [attachment.name for attachment in self.attachments]
        meant = [path.rstrip("/") for path in typed_paths(typed)]
        for name in reversed(names):
            if meant in ([name], [_COUNTED.sub("", name)]):
                return name
        are = "are" if len(names) > 1 else "is"
        raise ClexError(f"no file {escaped(typed, 60)} waits; there {are} {', '.join(names)}")

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
        if self.keeper.unanswered:
            waiting = self.keeper.waiting(60)
            self.terminal.note(f"your last message was not answered: {waiting}; an empty line sends it again")

    def quit(self, _: str) -> NoReturn:
        """Leave."""
        raise EOFError

    def stats(self) -> str:
        """The state in a few lines."""
        session, totals, clex = self.session, self.session.totals, self.session.llm.clex
        turns = f"turn{'s' * (session.left_out != 1)}"
        left_out = f", the oldest {session.left_out:,} {turns} left out" if session.left_out else ""
        lines = [
            f"model      {self.name}",
            f"context    {session.used:,} of {session.capacity:,} tokens{left_out}",
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
            lines.append(
                "tables     none: the model runs inside the context it was trained for; --extend 4x goes beyond it"
            )
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
        if session.used > _NEARLY_FULL * session.capacity:
            parts.append(f"nearly full: {session.capacity - session.used:,} left")
        if self.keeper.name:
            parts.insert(0, self.keeper.name)
        files, counted, number, restored = "", "", "", ""
        if self.attachments:
            tokens = f" ({sum(file.tokens for file in self.attachments):,} tokens)"
            files = " + ".join(file.name for file in self.attachments) + tokens
            number = f"{len(self.attachments)} file{'s' * (len(self.attachments) > 1)}"
            counted = number + tokens
        if session.last and session.last.restored_tokens:
            restored = f"{session.last.restored_tokens:,} of them from disk"
        bucket = describe_bucket(clex, current_bucket(session)) if clex else ""
        # In a narrow window what is least of a surprise goes first.
        table = bucket.partition(" (")[0]
        for rest in ([bucket, restored, files], [table, files], [files], [counted], [number], []):
            line = " " + "  ·  ".join([*parts, *filter(None, rest)])
            if cell_len(line) < self.terminal.width:
                return line
        return line


def current_bucket(session: Session) -> int:
    """The bucket that the conversation as it stands is in."""
    clex = session.llm.clex
    assert clex is not None
    return clex.bucket_of(max(session.used, 1))
