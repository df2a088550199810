"""A conversation as a page of Markdown."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from clex_local.errors import ClexError, escaped
from clex_local.private_files import write_private
from clex_local.session.thoughts import CLOSE, OPEN

if TYPE_CHECKING:
    from clex_local.session.exchange import Exchange
    from clex_local.session.session import Session


def without_thoughts(answer: str) -> str:
    """An answer without what the model thought before it."""
    thoughts, ended, rest = answer.partition(CLOSE)
    # The beginning may be in the prompt.
    is_thought = bool(ended) and (thoughts.lstrip().startswith(OPEN) or OPEN not in thoughts)
    return rest.strip("\n") if is_thought else answer


def transcript(session: Session, model: str, unanswered: Exchange | None = None) -> str:
    """What was said, each message under a heading, with the names of attached files and without their texts."""
    parts = [f"# Conversation with {escaped(model, 100)}", f"Begun {session.began.replace('T', ' ')}."]
    if session.system is not None:
        parts += ["## System message", session.system.strip()]
    for exchange in session.exchanges:
        parts += [*_message(exchange), "## Model", without_thoughts(exchange.answer).strip("\n")]
        if exchange.finish_reason != "stop":
            parts.append(f"*(ended: {exchange.finish_reason})*")
    if unanswered is not None:
        parts += [*_message(unanswered), "*(not answered)*"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _message(exchange: Exchange) -> list[str]:
    files = [f"Attached: `{escaped(file.path, 400)}`, {file.size:,} bytes" for file in exchange.files]
    return ["## You", *files, exchange.typed.strip("\n")]


def export(session: Session, model: str, path: str, unanswered: Exchange | None = None) -> Path:
    """Write the conversation to a file that is not there yet.

    Args:
        session: the conversation.
        model: its name.
        path: of the file.
        unanswered: a message behind the last answer.

    Raises:
        ClexError: nothing was said, the file is there already, or it cannot be written.
    """
    if not session.exchanges and unanswered is None:
        raise ClexError("nothing has been said yet")
    file = Path(os.path.expanduser(path))
    try:
        if file.exists() or file.is_symlink():
            raise ClexError(f"{path}: there is such a file already, and it stays as it is; name another")
        write_private(file, transcript(session, model, unanswered))
    except (OSError, ValueError) as error:
        raise ClexError(f"{path}: not written: {getattr(error, 'strerror', None) or error}") from error
    return file
