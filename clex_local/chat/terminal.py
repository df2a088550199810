"""What is shown at a terminal: answers as they come, progress, notes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from clex_local.chat.answer_view import AnswerView, answer_view
from clex_local.chat.reading_time import ReadingTime, readable_time, reading_time
from clex_local.commands.line_breaks import window_width, wrapped
from clex_local.errors import ClexError, shown
from clex_local.session.full_context import make_room

if TYPE_CHECKING:
    from clex_local.runtime.clex_state import ClexState
    from clex_local.runtime.llama import Llama
    from clex_local.session.answer import Answer
    from clex_local.session.session import Session

_BESIDE_BAR = 54  # columns of what stands beside a bar
LONG = 60.0  # seconds of reading that are announced
UNMEASURED = 4096  # tokens of a prompt that is announced where no speed is known
MEASURED = 32  # tokens of a prompt whose speed says something


class TimeLeft(ProgressColumn):
    """The time that the rest of a prompt takes."""

    def __init__(self, left: Callable[[], float | None]) -> None:
        super().__init__()
        self._left = left

    def render(self, task: Task) -> Text:
        """The column's text."""
        left = self._left()
        return Text(f"{readable_time(left)} left" if left else "", style="dim")


class PrefillBar:
    """A progress bar for a prompt that takes more than a moment; gone without a trace when the answer begins.

    Args:
        console: where.
        left: the seconds that it still takes, None where they are not known.
    """

    def __init__(self, console: Console, left: Callable[[], float | None]):
        bar = BarColumn(
            max(4, min(30, console.width - _BESIDE_BAR)), style="bright_black", complete_style="cyan",
            finished_style="cyan", pulse_style="cyan",
        )  # fmt: skip
        # What a narrow window has no room for is what is least missed.
        speed = [TextColumn("[dim]{task.fields[speed]}[/]")] if console.width > _BESIDE_BAR else []
        self._progress = Progress(
            TextColumn("[dim]{task.fields[what]}[/]"),
            bar,
            *speed,
            TimeLeft(left),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID = self._progress.add_task("", total=None, what="reading the prompt", speed="")
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
        # Until the answer is shown there are its first tokens to compute, which may have no text.
        what = f"reading {total:,} tokens" if done < total else f"{total:,} tokens read, now writing"
        self._progress.update(self._task, completed=done, total=total, what=what, speed=speed)

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
    """What both ways of use share: notes on stderr, and an answer as it comes on stdout.

    Args:
        session: the conversation.
        max_tokens: of an answer; None lets the model end it.
        quiet: nothing but answers.
        plain: answers as they are, and not as Markdown.
        on_full: what to do where a message does not fit, see ``full_context``.
        talks: somebody is there, who can give commands.
    """

    def __init__(
        self,
        session: Session,
        max_tokens: int | None = None,
        quiet: bool = False,
        plain: bool = False,
        on_full: str = "refuse",
        talks: bool = False,
    ):
        self.session = session
        self.max_tokens = max_tokens
        self.plain = plain
        self.on_full = on_full
        self.talks = talks
        self.notes = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
        self._buckets = BucketWatch(session.llm)
        self._reading: ReadingTime | None = None  # made for the first long prompt

    def note(self, text: str, style: str = "dim") -> None:
        """Say something that is not the answer."""
        sys.stdout.flush()
        text = shown(text)
        self.notes.print(Text(wrapped(text, self.width) if self.notes.is_terminal else text, style=style))

    @property
    def width(self) -> int:
        """Columns of the window where notes go."""
        return window_width(sys.stderr) or self.notes.width

    def tell(self, text: str, failed: bool = False) -> None:
        """Say something that is not the answer; a failure in red."""
        self.note(text, "red" if failed else "dim")

    def view(self) -> AnswerView:
        """Where the next answer is shown."""
        return answer_view(self.plain, lambda: self.session.opens_thought)

    def answer(self, text: str, write: Callable[[str], object]) -> Answer:
        """Send a message and write the answer piece by piece.

        Raises:
            ClexError: the message could not be sent; the conversation is unchanged.
            KeyboardInterrupt: Ctrl-C; ``session.last`` tells what there is.
        """
        try:
            lines = make_room(self.session, self.on_full, text)
            while line := self._read(lines):  # to sum up is to read too
                self.note(line)
            stream = self.session.send(text, self.max_tokens)
        except ClexError as error:
            raise self._advised(error, text) from error
        first = ""
        with closing(stream):
            first = self._read(stream)
            self._note_bucket()
            write(first)
            for piece in stream:
                write(piece)
        assert self.session.last is not None
        return self.session.last

    def _read(self, stream: Iterator[str]) -> str:
        """Have the prompt read, and return the first piece of the answer."""
        llm, said = self.session.llm, False
        with PrefillBar(self.notes, lambda: self._reading and self._reading.left()) as bar:

            def update(done: int, total: int) -> None:
                nonlocal said
                bar.update(done, total)
                reading = self._reading = self._reading or reading_time(llm)
                if reading is None:
                    return
                reading.update(done, total)
                left = reading.left() if reading.known else None
                if left is None and done == 0 and total >= UNMEASURED:
                    self.note(f"{self._what_is_read(reading.start, total)}; how long that takes is measured first")
                if not said and left is not None and left > LONG:
                    said = True
                    more = " more" if done else ""
                    self.note(f"{self._what_is_read(reading.start, total)}: about {readable_time(left)}{more}")

            llm.on_prefill = update
            try:
                return next(stream, "")
            finally:
                llm.on_prefill = None
                if self._reading:
                    self._reading.remember()

    def _what_is_read(self, start: int, total: int) -> str:
        """The beginning of a line about a prompt that takes long."""
        clex = self.session.llm.clex
        line = f"reading {total:,} tokens"
        if start:
            line += f" after {start:,}"
        if clex:
            line += f" in {describe_bucket(clex, clex.bucket_of(start + total))}"
        return line

    def end_of_answer(self, answer: Answer) -> None:
        """Say why an answer ended, if it was not the model that ended it."""
        if answer.completion_tokens or answer.finish_reason != "interrupted":
            self._note_bucket()
        if answer.finish_reason == "length":
            more = "; /set max_tokens none lifts it" if self.talks else ""
            self.note(f"[stopped after {answer.completion_tokens:,} tokens, the limit of --max-tokens{more}]")
        elif answer.finish_reason == "interrupted" and answer.completion_tokens:
            self.note(f"[stopped after {answer.completion_tokens:,} tokens]")
        elif answer.finish_reason == "repetition":
            self.note("[stopped: it says the same again and again; /set repeat_penalty 1.1 and /regenerate may help]")
        elif answer.finish_reason == "stop" and not answer.text:
            self.note("[the model had nothing to say]")
        elif answer.finish_reason == "context":
            total = answer.prompt_tokens + answer.completion_tokens
            self.note(f"[stopped: {total:,} tokens fill the context of {self.session.capacity:,}]")
        if answer.completion_tokens and (self.notes.is_terminal or self.session.llm.verbose):
            self.note(f"[{self.summary(answer)}]")

    def read_so_far(self, answer: Answer) -> str:
        """What is left of reading that was stopped, in words behind a semicolon; nothing where there is nothing."""
        llm, stored = self.session.llm, self.session.llm.stored_tokens or 0
        read = min(llm.n_tokens if self.talks else stored, answer.prompt_tokens)
        if read <= answer.prompt_tokens - answer.prefill_tokens:
            return ""
        where = " on disk" if not self.talks else " on disk too" if stored else ""
        return f"; {read:,} of its {answer.prompt_tokens:,} tokens are read and kept{where}"

    def summary(self, answer: Answer) -> str:
        """A line about what an answer cost, and what the context has left."""
        parts = []
        if answer.prefill_seconds:
            parts.append(f"read {answer.prefill_tokens:,} token{'s' * (answer.prefill_tokens != 1)}")
            if answer.prefill_tokens >= MEASURED:
                parts[-1] += f" at {answer.prefill_speed:,.0f} tok/s"
        if answer.restored_tokens:
            parts.append(f"{answer.restored_tokens:,} from disk")
        if answer.completion_tokens:
            parts.append(f"wrote {answer.completion_tokens:,}")
            if answer.decode_steps:
                parts[-1] += f" at {answer.decode_speed:,.1f} tok/s"
        parts.append(f"{self.session.used:,} of {self.session.capacity:,} in the context")
        return " · ".join(parts)

    def _note_bucket(self) -> None:
        if line := self._buckets.change():
            self.note(line)

    def _advised(self, error: ClexError, text: str) -> ClexError:
        from clex_local.session.session import PromptTooLong
        from clex_local.templates.chat_template import TemplateError

        if isinstance(error, TemplateError):
            return with_advice(error)
        if not isinstance(error, PromptTooLong):
            return error
        llm = self.session.llm
        covered = llm._model.n_ctx_train()
        wanted = -(-(error.tokens + 512) // 1024) * 1024  # with room for an answer
        room = "/set on_full" if self.talks else "--on-full"
        room += " drop-oldest, or summarize, makes room"
        # Without what was said before it may still not fit.
        makes_room = self.session.used and len(self.session.prompt(text)) < self.session.capacity
        if error.tokens >= covered:
            rest = room if makes_room else f"the model covers {covered:,}: shorten it"
        elif makes_room:
            rest = f"{room}, --ctx {min(wanted, covered)} holds it"
        else:
            rest = f"pass --ctx {min(wanted, covered)} or shorten it"
        return ClexError(f"{error}; {rest}")


def with_advice(error: ClexError) -> ClexError:
    """What is wrong with a chat template, and what one can do about it here."""
    return ClexError(f"{error}; --chat-template chatml, or plain, does without it")
