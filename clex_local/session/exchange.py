"""A message and its answer, as they are kept: with the answer's tokens, and the files that the message was made of."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from clex_local.errors import escaped


@dataclass(frozen=True)
class AttachedFile:
    """A file whose text was part of a message.

    Attributes:
        path: absolute.
        size: bytes.
        sha256: of its contents then, in hexadecimal digits.
    """

    path: str
    size: int
    sha256: str

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> AttachedFile | None:
        """A file as it is now; None for what is none, such as a pipe, or cannot be read."""
        try:
            if not os.path.isfile(path):
                return None
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
                return cls(os.path.abspath(path), file.tell(), digest.hexdigest())
        except OSError:
            return None

    def change(self) -> str | None:
        """What has become of it, in words; None where it is as it was."""
        try:
            size = os.stat(self.path).st_size
        except (OSError, ValueError):  # a NUL in a path
            return "is gone"
        if size == self.size and (now := self.of(self.path)) is not None and now.sha256 == self.sha256:
            return None
        return "has changed"


@dataclass
class Exchange:
    """A message and its answer.

    Attributes:
        message: of the user, with the text of the files.
        typed_from: where in it what was typed begins, behind the texts of files.
        answer: of the model.
        tokens: the answer as it was generated, without what ended it.
        finish_reason: why it ended, see ``Answer``.
        files: what the message was made of.
    """

    message: str
    answer: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "interrupted"
    files: list[AttachedFile] = field(default_factory=list)
    typed_from: int = 0

    @property
    def typed(self) -> str:
        """The message without the texts of files."""
        return self.message[self.typed_from :]


def file_names(exchanges: Iterable[Exchange]) -> list[str]:
    """The names of files that were part of messages, each once, without their folders, and as they can be shown."""
    names = dict.fromkeys(file.path.replace("\\", "/").rpartition("/")[2] for turn in exchanges for file in turn.files)
    return [escaped(name, 60) for name in names]
