"""What is attached to a message: read, told apart by name, and each of it once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clex_local.documents.document import LARGEST, AttachedText, DocumentError
from clex_local.documents.files import STANDARD_INPUT, STDIN_NAME, read_file, read_standard_input
from clex_local.documents.folders import Found, files_in, is_pattern, matching
from clex_local.documents.kinds import text_of
from clex_local.documents.web import fetch, is_address
from clex_local.errors import escaped
from clex_local.session.exchange import AttachedFile
from clex_local.sizes import readable_size


@dataclass(frozen=True)
class Attachment:
    """One thing that was attached: a file, a folder, what a pattern names, a page.

    Attributes:
        name: for the person.
        documents: its texts.
        notes: what the person should know, a line each.
        tokens: of all of it, where they were counted.
    """

    name: str
    documents: tuple[AttachedText, ...]
    notes: tuple[str, ...] = ()
    tokens: int = 0

    @property
    def files(self) -> list[AttachedFile]:
        """What is remembered of its files."""
        return [document.file for document in self.documents if document.file]


def attach(path: str, *, web: bool = False) -> Attachment:
    """Read what a path names: a file, a folder, a pattern, or ``-`` for standard input.

    Args:
        path: it; ``~`` is the home folder.
        web: it is an address of the web.

    Raises:
        DocumentError: it is not there, cannot be read as text, or is too much.
    """
    if web:
        page = fetch(path)
        text, notes = text_of(page.data, path, page.media, page.charset)
        return _single(AttachedText(path, text, None, tuple(notes)))
    if path == STANDARD_INPUT:
        text, notes = text_of(read_standard_input(), STDIN_NAME)
        documents = (AttachedText("", text),) if text.strip() else ()
        return Attachment(STDIN_NAME, documents, tuple(f"{STDIN_NAME}: {note}" for note in notes))
    if not path:  # of a script whose variable is empty: not all that is in the current folder
        raise DocumentError("the name of a file is empty")
    place = Path(os.path.expanduser(path))
    try:
        if place.is_dir():
            return _several(place, files_in(place), place.resolve().parent)
        if not os.path.lexists(place):
            if is_address(path):
                raise DocumentError(f"{path}: an address of the web: --url fetches it, and /url in a conversation")
            if is_pattern(path):
                return _several(place, matching(place), Path())
        data, is_file = read_file(place)
    except OSError as error:  # a name that is too long
        raise DocumentError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in a path
        raise DocumentError(f"{path}: {error}") from error
    return _single(_document(str(place), data, place if is_file else None, place.name))


def _single(document: AttachedText) -> Attachment:
    if not document.text.strip():
        raise DocumentError(f"{document.name}: an empty file")
    name = escaped(document.name, 60)
    return Attachment(name, (document,), tuple(f"{name}: {note}" for note in document.notes))


def _several(place: Path, found: Found, above: Path) -> Attachment:
    """Files of a folder: those that are no texts are left out, and said to be."""
    documents, notes, left_out, size = [], [], 0, 0
    for path in found.files:
        name = Path(os.path.relpath(path.resolve(), above)).as_posix() if above != Path() else path.as_posix()
        try:
            data, _ = read_file(path)
            document = _document(str(path), data, path, name)
        except DocumentError:
            left_out += 1
            continue
        size += len(document.text)
        if size > LARGEST:
            raise DocumentError(f"{place}: more than {readable_size(LARGEST, memory=True)} of text; name a part of it")
        if document.text.strip():
            documents.append(document)
            notes += [f"{escaped(name, 60)}: {note}" for note in document.notes]
    if not documents:
        raise DocumentError(f"{place}: none of its {len(found.files):,} files is text")
    name = escaped(str(place), 60)
    if left_out:
        notes.append(f"{name}: {left_out:,} file{'s are' if left_out > 1 else ' is'} no text, and left out")
    if found.ignored:
        notes.append(f"{name}: left out what git ignores, and what is hidden")
    files = f"{len(documents):,} file{'s' * (len(documents) != 1)}"
    return Attachment(f"{name} ({files})", tuple(documents), tuple(notes))


def _document(path: str, data: bytes, place: Path | None, name: str | None = None) -> AttachedText:
    text, notes = text_of(data, path)
    file = None
    if place is not None:
        file = AttachedFile(os.path.abspath(place), len(data), hashlib.sha256(data).hexdigest())
    return AttachedText(name or path, text, file, tuple(notes))


def without_twice(attachment: Attachment, known: Iterable[AttachedFile]) -> tuple[Attachment, list[str]]:
    """An attachment without files that are known as they are, and the names of those.

    Args:
        attachment: to be sent.
        known: files whose text is in the conversation, or waits to be.
    """
    seen = {(os.path.realpath(file.path), file.sha256) for file in known}
    documents, twice = [], []
    for document in attachment.documents:
        file = document.file
        if file and (key := (os.path.realpath(file.path), file.sha256)) in seen:
            twice.append(document.name)
            continue
        if file:
            seen.add(key)
        documents.append(document)
    return replace(attachment, documents=tuple(documents)) if twice else attachment, twice


def texts(documents: Sequence[AttachedText], *, named: bool) -> list[str]:
    """Texts as a model is given them; with names before them no two have one name."""
    names = [document.name if named else "" for document in documents]
    full = [document.file.path if document.file else document.name for document in documents]
    names = [whole if name and names.count(name) > 1 else name for name, whole in zip(names, full, strict=True)]
    # A name is no place for line ends, and neither for what a terminal would do.
    return [
        f"File: {escaped(name)}\n\n{document.text.strip(chr(10))}" if name else document.text
        for name, document in zip(names, documents, strict=True)
    ]
