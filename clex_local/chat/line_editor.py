"""Typing a message at a terminal: with an editor where there can be one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent


def line_editor(
    words: Callable[[str], Iterable[str]], path: Callable[[str], str | None], status: Callable[[], str]
) -> Callable[[str], str]:
    """A function that lets the user edit a text to one message: history, several lines, completion, a status line.

    It raises EOFError for Ctrl-D and KeyboardInterrupt for Ctrl-C, each where nothing was typed.

    Args:
        words: gives what the first word of a line can become, or where a space follows it, all that stands behind that.
        path: gives the beginning of a path that a line ends with, None where it ends with none.
        status: what the line below says.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.layout.processors import TabsProcessor
    from prompt_toolkit.styles import Style

    editor: PromptSession[str] = PromptSession(
        "> ",
        history=_history(history_file()),
        multiline=True,
        prompt_continuation="  ",
        key_bindings=_keys(),
        completer=_completer(words, path),
        complete_while_typing=False,
        bottom_toolbar=status,
        enable_suspend=True,
        input_processors=[TabsProcessor(char1=" ", char2=" ")],  # of code that was pasted
        style=Style.from_dict({"bottom-toolbar": "noreverse ansibrightblack"}),
    )
    return lambda text: editor.prompt(default=text)


def _history(file: Path | None) -> History:
    """A history file that is a convenience: where it cannot be used, there is none."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    if file is None:
        return InMemoryHistory()

    class History(FileHistory):
        def load_history_strings(self) -> Iterable[str]:
            try:
                return list(super().load_history_strings())
            except (OSError, UnicodeError):
                return []

        def store_string(self, string: str) -> None:
            with suppress(OSError, UnicodeError):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch(mode=0o600)  # what one asks is nobody else's business
                super().store_string(string)

    return History(file)


def _completer(words: Callable[[str], Iterable[str]], path: Callable[[str], str | None]) -> Completer:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    class Commands(Completer):
        paths = PathCompleter(expanduser=True)

        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            line = document.text_before_cursor
            if "\n" in line:
                return
            if (begun := path(line)) is not None:
                yield from self.paths.get_completions(Document(begun), complete_event)
            last = line.partition(" ")[2] if " " in line else line
            for word in words(line):
                yield Completion(word, start_position=-len(last))

    return Commands()


def _keys() -> KeyBindings:
    """Enter sends, Alt-Enter and a backslash before Enter start a line, Ctrl-C forgets what was typed or leaves."""
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings

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

    return keys


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
    except (termios.error, ValueError):  # no terminal, or no file at all
        yield
        return
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def plain_lines(text: str = "") -> str:
    """Read one line without an editor, for terminals that cannot have one; there is no text to begin with then."""
    sys.stderr.write("> ")
    sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def history_file() -> Path | None:
    """Where the messages that were typed are kept, in the platform's place for state; None without a home folder."""
    with suppress(RuntimeError):
        return _state() / "clex-local" / "chat_history"
    return None


def _state() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
