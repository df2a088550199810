"""One text that was attached, with the name that the model is told, and the errors of what cannot be one."""

from __future__ import annotations

from dataclasses import dataclass

from clex_local.errors import ClexError
from clex_local.session.exchange import AttachedFile

LARGEST = 256 * 2**20  # bytes of a file, and of its text; no context holds more


class DocumentError(ClexError):
    """Something that was attached and cannot be read as a text."""


@dataclass(frozen=True)
class AttachedText:
    """A text that was attached.

    Attributes:
        name: what the model is told of where it comes from; empty: nothing.
        text: without the markup of its kind.
        file: what is remembered of the file; None for what is none, such as a pipe.
        notes: what the person should know of how it was read, each without a full stop.
    """

    name: str
    text: str
    file: AttachedFile | None = None
    notes: tuple[str, ...] = ()
