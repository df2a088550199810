"""One question, from a script or with ``-p``: what is asked, its answer on stdout, and the answer as JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from clex_local.chat.answer_view import PlainView
from clex_local.chat.terminal import Terminal
from clex_local.chat.text_input import Piped, join
from clex_local.commands.command import INTERRUPTED, json_line, say
from clex_local.documents.attachments import Attachment, attach, texts, without_twice
from clex_local.documents.files import STANDARD_INPUT
from clex_local.errors import ClexError, escaped
from clex_local.session.exchange import AttachedFile
from clex_local.session.keeper import SessionKeeper

if TYPE_CHECKING:
    from clex_local.session.answer import Answer
    from clex_local.session.session import Session


def asks_once(prompt: str | None, files: Sequence[str], as_json: bool) -> bool:
    """Whether something is asked once, and nobody is there to talk to or wants to."""
    if prompt is not None or as_json or STANDARD_INPUT in files:
        return True
    if sys.stdin is None or not sys.stdin.isatty():
        return True
    return bool(files) and not sys.stdout.isatty()


class Question:
    """What is asked once, and not in a conversation: files and a prompt, with what comes from a pipe before them."""

    def __init__(self, message: str, piped: Piped | None, files: list[AttachedFile]) -> None:
        self.files = files
        self._message = message
        self._piped = piped

    @classmethod
    def read(cls, prompt: str | None, attachments: list[Attachment], stdin: bool) -> Question:
        """Put together what is asked.

        Args:
            prompt: behind everything else.
            attachments: before it; without it and them, it is standard input.
            stdin: whether that was read for the attachments.

        Raises:
            ClexError: there is nothing in all of it.
        """
        piped = None
        if prompt is None and not attachments:
            attachments = [attach(STANDARD_INPUT)]
        elif not stdin:
            piped = Piped()
        known: list[AttachedFile] = []
        documents = []
        for attachment in attachments:
            for note in attachment.notes:
                say(f"[{note}]", err=True)
            once, twice = without_twice(attachment, known)
            for name in twice:
                say(f"[{escaped(name, 60)}: given twice, and sent once]", err=True)
            documents += once.documents
            known += once.files
        several = sum(bool(document.name) for document in documents) > 1
        message = join([*texts(documents, named=several), prompt or ""])
        if not message and not (piped and piped.text().strip()):
            raise ClexError("the prompt is empty")
        return cls(message, piped, known)

    def text(self) -> str:
        """All of it, as soon as the pipe has ended."""
        if self._piped is None:
            return self._message
        text = join([self._piped.text(), self._message])
        for note in self._piped.notes:
            say(f"[{note}]", err=True)
        if self._piped.unread:
            say(f"[{self._piped.unread}: answered without it; -f - reads it]", err=True)
        return text


def answer_once(
    terminal: Terminal,
    text: str,
    as_json: bool = False,
    keeper: SessionKeeper | None = None,
    files: Sequence[AttachedFile] = (),
) -> int:
    """Ask one thing and write the answer to stdout; returns the exit code.

    Args:
        terminal: where notes go.
        text: what is asked.
        as_json: write one JSON object.
        keeper: of the conversation's file.
        files: what the text was made of.

    Raises:
        ClexError: the prompt cannot be answered, or what was said cannot be saved.
        BrokenPipeError: nobody reads stdout any more.
    """
    code, silent, view = 0, "", PlainView(lambda piece: None) if as_json else terminal.view()
    keeper = keeper or SessionKeeper(terminal.session, terminal.tell)
    try:
        with keeper.turn(text, files):
            terminal.answer(text, view.write)
    except KeyboardInterrupt as interrupt:
        code, silent = INTERRUPTED, str(interrupt)  # of a worker
    finally:
        view.end()
    if silent:
        terminal.tell(silent, failed=True)
    answer = terminal.session.last
    if answer is None:  # interrupted before anything began
        return code
    if as_json:
        sys.stdout.write(json_line(report(terminal.session, answer) | {"session": keeper.name}))
    sys.stdout.flush()
    terminal.end_of_answer(answer)
    if answer.finish_reason == "interrupted" and not answer.completion_tokens:
        terminal.note(f"[stopped while reading{terminal.read_so_far(answer)}]")
    if keeper.failure:
        raise keeper.failure
    return code


def report(session: Session, answer: Answer) -> dict[str, Any]:
    """What ``--json`` prints: the answer, why it ended, tokens, settings, times, speeds, and the tables' state."""
    clex = session.llm.clex
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "prefill_tokens": answer.prefill_tokens,
        "restored_tokens": answer.restored_tokens,
        "completion_tokens": answer.completion_tokens,
        "drafted_tokens": answer.drafted_tokens,
        "accepted_tokens": answer.accepted_tokens,
        "context": session.capacity,
        "settings": asdict(session.llm.settings),
        "timings": {
            "prefill_seconds": round(answer.prefill_seconds, 4),
            "prefill_tokens_per_second": round(answer.prefill_speed, 2),
            "decode_seconds": round(answer.decode_seconds, 4),
            "decode_tokens_per_second": round(answer.decode_speed, 2),
        },
        "clex": clex
        and {
            "method": clex.method,
            "original_context": clex.original_context,
            "max_context": clex.max_context,
            "buckets": list(clex.buckets),
            "bucket": clex.bucket,
            "rerotations": clex.rerotations,
            "rerotated_cells": clex.rerotated_cells,
            "rerotation_ms": round(clex.rerotation_ms, 3),
        },
    }
