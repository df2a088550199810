"""The kinds of documents: what each is recognised by, and what reads it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from clex_local.documents.document import LARGEST, DocumentError
from clex_local.documents.encodings import decoded
from clex_local.documents.worker import read_apart
from clex_local.sizes import readable_size


@dataclass(frozen=True)
class Kind:
    """A kind of file, recognised by any of what is given.

    Attributes:
        name: in words, with its article.
        begin: what its files begin with.
        endings: of its names.
        media: its types on the web.
        reader: module with ``read(data, name)``; None for what is no document.
        advice: what to do with what is none.
    """

    name: str
    begin: re.Pattern[bytes]
    endings: tuple[str, ...] = ()
    media: tuple[str, ...] = ()
    reader: str | None = None
    advice: str = ""

    def fits(self, begin: bytes, name: str, media: str) -> bool:
        """Whether a file is of this kind, by its first bytes, its name, and what the web says it is."""
        return media in self.media or self.begin.match(begin) is not None or name.lower().endswith(self.endings or "/")


def _begins(*patterns: bytes, flags: re.RegexFlag = re.DOTALL) -> re.Pattern[bytes]:
    return re.compile(b"|".join(patterns), flags)


_LOOKED_AT = 4096  # first bytes of a file
_WORD = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
_PAGE = _begins(rb"(?:\xef\xbb\xbf)?\s*(?:<!doctype html|<html[\s>])", flags=re.IGNORECASE)
_PICTURE = _begins(rb"\x89PNG\r\n", rb"\xff\xd8\xff", rb"GIF8[79]a", rb"RIFF....WEBP")
_ARCHIVE = _begins(rb"PK\x03\x04", rb"\x1f\x8b", rb"7z\xbc\xaf", rb"Rar!", rb"\xfd7zXZ")
_HERE = "clex_local.documents"

# The first that fits counts. What none fits is text, in some encoding.
KINDS = [
    Kind("a PDF file", _begins(rb"(?:.{0,1000}?[^ -~])?%PDF-\d"), media=("application/pdf",), reader=f"{_HERE}.pdf"),
    Kind("an old or an encrypted Office file", _begins(rb"\xd0\xcf\x11\xe0"), advice="save it as .docx, not encrypted"),
    Kind("a Rich Text file", _begins(rb"\{\\rtf"), advice="save it as .docx or text"),
    Kind("a model", _begins(rb"GGUF"), advice="models are named without -f"),
    Kind("a picture", _PICTURE, advice="pictures are not read"),
    Kind("a program", _begins(rb"\x7fELF", rb"MZ.{60,500}PE\0\0"), advice="programs are not read"),
    Kind("a Word document", _begins(rb"PK\x03\x04.*?word/"), (".docx", ".docm"), (_WORD,), f"{_HERE}.docx"),
    Kind("an archive", _ARCHIVE, advice="unpack it, and give its files or its folder"),
    Kind("a web page", _PAGE, (".html", ".htm", ".xhtml"), ("text/html", "application/xhtml+xml"), f"{_HERE}.html"),
]


def kind_of(data: bytes, name: str, media: str = "") -> Kind | None:
    """The kind of a file by its first bytes, its name and what the web says it is; None for text."""
    return next((kind for kind in KINDS if kind.fits(data[:_LOOKED_AT], name, media)), None)


def text_of(data: bytes, name: str, media: str = "", charset: str | None = None) -> tuple[str, list[str]]:
    """The text of a document, and notes.

    Args:
        data: the whole file.
        name: of the file.
        media: what the web says it is.
        charset: the encoding that the web says it has.

    Raises:
        DocumentError: it is no document, cannot be read, or is larger than any context.
    """
    kind = kind_of(data, name, media)
    if kind is None:
        text, note = decoded(data, name, charset)
        return text, [note] if note else []
    if kind.reader is None:
        raise DocumentError(f"{name}: {kind.name}, not text; {kind.advice}")
    if len(data) > LARGEST:
        raise DocumentError(
            f"{name}: {kind.name} of more than {readable_size(LARGEST, memory=True)}; give a part of it"
        )
    return read_apart(kind.reader, data, name)
