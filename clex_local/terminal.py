"""The conversation at a terminal: editing, progress, notes, commands."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from clex_local.errors import ClexError, escaped, shown
from clex_local.text_input import join, read_text

if TYPE_CHECKING:
    from clex_local.llama import ClexState, Llama
    from clex_local.session import Answer, Session

HELP = """\
/file PATH   put a text file in front of your next message
/reset       forget the conversation
/stats       tokens, buckets, speed, memory, settings
/quit        leave (Ctrl-D too)
Enter sends. Alt-Enter, or a backslash at the end of a line, starts a new line.
Ctrl-C stops an answer and keeps what was written. A space before a slash makes it text."""


CONTROLS = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """An answer without the characters that control a terminal, where one would see them; a pipe gets all of it.

    They are taken out one by one, so that a sequence of them does nothing however it is cut into pieces.
    """
    return text.translate(CONTROLS) if sys.stdout.isatty() else text


def json_line(value: Any) -> str:
    """A line of JSON that controls no terminal either."""
    text = json.dumps(value, ensure_ascii=False)
    # JSON itself escapes only the first 32 of them.
    return text.translate({code: f"\\u{code:04x}" for code in range(127, 160)}) + "\n"


class PrefillBar:
    """A progress bar for a prompt that takes more than a moment; gone without a trace when the answer begins."""

    def __init__(self, console: Console):
        self._progress = Progress(
            TextColumn("[dim]reading {task.fields[tokens]}[/]"),
            BarColumn(30, style="bright_black", complete_style="cyan", finished_style="cyan", pulse_style="cyan"),
            TextColumn("[dim]{task.fields[speed]}[/]"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID = self._progress.add_task("", total=None, tokens="the prompt", speed="")
        self._lock = threading.Lock()
        self._over = False
        # Short prompts are read before a bar could be looked at.
        self._timer = threading.Timer(0.4, self._start)
        self._timer.daemon = True

    def _start(self) -> None:
        with self._lock:
            if not self._over:
                self._progress.start()

    def update(self, done: int, total: int) -> None:
        """Take the model's count: ``done`` of ``total`` tokens."""
        elapsed = self._progress.tasks[0].elapsed
        speed = f"{done / elapsed:,.0f} tok/s" if done and elapsed else ""
        self._progress.update(self._task, completed=done, total=total, tokens=f"{total:,} tokens", speed=speed)

    def __enter__(self) -> PrefillBar:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            self._over = True
        self._progress.stop()


class BucketWatch:
    """Notices when the model went over to another table."""

    def __init__(self, llm: Llama):
        self._llm = llm
        self._seen = self._state()

    def _state(self) -> tuple[int, int, float]:
        clex = self._llm.clex
        return (clex.bucket or 0, clex.rerotated_cells, clex.rerotation_ms) if clex else (0, 0, 0.0)

    def change(self) -> str | None:
        """One line about a switch since the last call, or None."""
        before, now = self._seen, self._state()
        self._seen = now
        clex = self._llm.clex
        if clex is None or now[0] == before[0]:
            return None
        line = describe_bucket(clex, now[0])
        if cells := now[1] - before[1]:
            line += f"; {cells:,} keys re-rotated in {now[2] - before[2]:.0f} ms"
        return line


def describe_bucket(clex: ClexState, bucket: int) -> str:
    """A bucket in words, counted from 1."""
    t = clex.buckets[bucket]
    covered = int(t * clex.original_context)
    return f"bucket {bucket + 1} of {len(clex.buckets)} (t = {t:g}, up to {covered:,} tokens)"


class Terminal:
    """What both ways of use share: notes on stderr, and an answer as it comes on stdout."""

    def __init__(self, session: Session, max_tokens: int | None = None, quiet: bool = False):
        self.session = session
        self.max_tokens = max_tokens
        self.notes = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
        self._buckets = BucketWatch(session.llm)

    def note(self, text: str, style: str = "dim") -> None:
        """Say something that is not the answer."""
        sys.stdout.flush()
        self.notes.print(Text(shown(text), style=style))

    def answer(self, text: str, write: Callable[[str], object]) -> Answer:
        """Send a message and write the answer piece by piece.

        Raises:
            ClexError: the message could not be sent; the conversation is unchanged.
            KeyboardInterrupt: Ctrl-C; ``session.last`` tells what there is.
        """
        try:
            stream = self.session.send(text, self.max_tokens)
        except ClexError as error:
            raise self._advised(error) from error
        first = ""
        with closing(stream):
            with PrefillBar(self.notes) as bar:
                self.session.llm.on_prefill = bar.update
                try:
                    first = next(stream, "")
                finally:
                    self.session.llm.on_prefill = None
            self._note_bucket()
            write(first)
            for piece in stream:
                write(piece)
        assert self.session.last is not None
        return self.session.last

    def end_of_answer(self, answer: Answer) -> None:
        """Say why an answer ended, if it was not the model that ended it."""
        if answer.completion_tokens or answer.finish_reason != "interrupted":
            self._note_bucket()
        if answer.finish_reason == "length":
            self.note(f"[stopped after {answer.completion_tokens:,} tokens, the limit of --max-tokens]")
        elif answer.finish_reason == "interrupted" and answer.completion_tokens:
            self.note(f"[stopped after {answer.completion_tokens:,} tokens]")
        elif answer.finish_reason == "stop" and not answer.text:
            self.note("[the model had nothing to say]")
        elif answer.finish_reason == "context":
            total = answer.prompt_tokens + answer.completion_tokens
            self.note(f"[stopped: {total:,} tokens fill the context of {self.session.capacity:,}]")

    def _note_bucket(self) -> None:
        if line := self._buckets.change():
            self.note(line)

    def _advised(self, error: ClexError) -> ClexError:
        from clex_local.session import PromptTooLong
        from clex_local.templates import TemplateError

        if isinstance(error, TemplateError):
            return with_advice(error)
        if not isinstance(error, PromptTooLong):
            return error
        llm = self.session.llm
        covered = llm._model.n_ctx_train()
        wanted = -(-(error.tokens + 512) // 1024) * 1024  # with room for an answer
        if self.session.used:
            rest = "/reset starts over"
        elif error.tokens >= covered:
            rest = f"the model covers {covered:,}: shorten it"
        else:
            rest = f"pass --ctx {min(wanted, covered)} or shorten it"
        return ClexError(f"{error}; {rest}")


def with_advice(error: ClexError) -> ClexError:
    """What is wrong with a chat template, and what one can do about it here."""
    return ClexError(f"{error}; --chat-template chatml, or plain, does without it")


@dataclass
class Attachment:
    """A file that waits for the next message."""

    name: str
    text: str
    tokens: int


class Chat:
    """The conversation at a terminal.

    Args:
        terminal: where it takes place.
        name: of the model, for ``/stats``.
        memory: of the cache, in words.
    """

    def __init__(self, terminal: Terminal, name: str, memory: str):
        self.terminal = terminal
        self.session = terminal.session
        self.name = name
        self.memory = memory
        self.attachments: list[Attachment] = []
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self.terminal.note(HELP),
            "/file": self.attach,
            "/reset": self.reset,
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
        try:
            with no_echo():
                answer = self.terminal.answer(message, self.write)
        except KeyboardInterrupt:
            answer = self.session.last
        if answer is None:  # interrupted before anything began
            return
        if answer.text and not answer.text.endswith("\n"):
            self.write("\n")
        self.terminal.end_of_answer(answer)
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
        self.attachments.append(Attachment(name, text, self.session.count(text)))
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
        self.terminal.note("the conversation is forgotten")

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
            lines.append(f"prompt     {totals.prefill_tokens:,} tokens read, {totals.prefill_speed:,.1f} tok/s")
            lines.append(f"answers    {totals.completion_tokens:,} tokens written, {totals.decode_speed:,.1f} tok/s")
        return "\n".join(lines)

    def status(self) -> str:
        """The state in one line."""
        session, clex = self.session, self.session.llm.clex
        parts = [f"{session.used:,} of {session.capacity:,} tokens"]
        if clex:
            parts.append(describe_bucket(clex, current_bucket(session)))
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


def line_editor(chat: Chat) -> Callable[[], str]:
    """A function that lets the user edit one message: history, several lines, completion, a status line.

    It raises EOFError for Ctrl-D and KeyboardInterrupt for Ctrl-C, each where nothing was typed.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.styles import Style

    class History(FileHistory):
        """A history file that is a convenience: where it cannot be used, there is none."""

        def load_history_strings(self) -> Iterable[str]:
            try:
                return list(super().load_history_strings())
            except (OSError, UnicodeError):
                return []

        def store_string(self, string: str) -> None:
            with suppress(OSError, UnicodeError):
                path = history_file()
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch(mode=0o600)  # what one asks is nobody else's business
                super().store_string(string)

    class Commands(Completer):
        """The commands, and paths after ``/file``."""

        paths = PathCompleter(expanduser=True)

        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            line = document.text_before_cursor
            if line.startswith("/file "):
                yield from self.paths.get_completions(Document(line[len("/file ") :].lstrip()), complete_event)
            elif line.startswith("/") and " " not in line:
                for name in chat.commands:
                    if name.startswith(line):
                        yield Completion(name, start_position=-len(line))

    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)

    @keys.add("enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c", filter=typing)
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    editor: PromptSession[str] = PromptSession(
        "> ",
        history=History(history_file()),
        multiline=True,
        prompt_continuation="  ",
        key_bindings=keys,
        completer=Commands(),
        complete_while_typing=False,
        bottom_toolbar=chat.status,
        style=Style.from_dict({"bottom-toolbar": "noreverse ansibrightblack"}),
    )
    return editor.prompt


@contextmanager
def no_echo() -> Iterator[None]:
    """Keep what is typed during an answer off the screen; the next prompt gets it."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    try:
        before = termios.tcgetattr(sys.stdin)
    except termios.error:
        yield
        return
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def plain_lines() -> str:
    """Read one line without an editor, for terminals that cannot have one."""
    sys.stderr.write("> ")
    sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def history_file() -> Path:
    """Where the messages that were typed are kept, in the platform's place for state."""
    if sys.platform == "win32":
        state = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        state = Path.home() / "Library" / "Application Support"
    else:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return state / "clex-local" / "chat_history"
