"""The text of a Word document (.docx): paragraphs, lists, tables and notes."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, cast
from xml.etree import ElementTree

from clex_local.documents.document import DocumentError
from clex_local.sizes import readable_size

_PARTS = {"word/document.xml": "", "word/footnotes.xml": "Footnotes", "word/endnotes.xml": "Endnotes"}
_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_FALLBACK = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"  # the same again, for old programs
_CHARACTERS = {f"{_W}tab": "\t", f"{_W}br": "\n", f"{_W}cr": "\n", f"{_W}noBreakHyphen": "-"}
_LARGEST = 128 * 2**20  # bytes of a part; a novel has some 10 MB
_DEEPEST = 200  # elements inside each other; Word's own have some 30


class _Limited(io.RawIOBase):
    """A part of a ZIP file, of which no more than a limit is unpacked."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._stream, self._name, self._left = stream, name, _LARGEST

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(min(size, 1 << 16) if size > 0 else 1 << 16)
        self._left -= len(data)
        if self._left < 0:
            limit = readable_size(_LARGEST, memory=True)
            raise DocumentError(f"{self._name}: unpacks to more than {limit}; not a document, or a ZIP bomb")
        if b"<!DOCTYPE" in data:  # Word writes none, and what they define can be without bounds
            raise DocumentError(f"{self._name}: a document that defines entities, which Word never does")
        return data


def read(data: bytes, name: str) -> tuple[str, list[str]]:
    """The text, and no notes.

    Raises:
        DocumentError: it is damaged, is none, or unpacks to too much.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if "word/document.xml" not in archive.namelist():
                raise DocumentError(f"{name}: a ZIP file, not a Word document")
            parts = []
            for part, title in _PARTS.items():
                if part in archive.namelist():
                    with archive.open(part) as stream:
                        text = "\n\n".join(_blocks(_root(_Limited(stream, name), name)))
                    parts.append(f"{title}\n\n{text}" if title and text else text)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DocumentError(f"{name}: a damaged Word document ({error})") from None
    return "\n\n".join(filter(None, parts)), []


def _root(stream: _Limited, name: str) -> ElementTree.Element:
    parser = ElementTree.XMLPullParser(("start", "end"))
    depth = 0
    root: ElementTree.Element | None = None
    try:
        while piece := stream.read():
            parser.feed(piece)
            events = cast("Iterator[tuple[str, ElementTree.Element]]", parser.read_events())
            for event, element in events:
                root = element if root is None else root
                depth += 1 if event == "start" else -1
                if depth > _DEEPEST:
                    raise DocumentError(f"{name}: a damaged Word document (its elements are too deep)")
        parser.close()
    except ElementTree.ParseError as error:
        raise DocumentError(f"{name}: a damaged Word document ({error})") from None
    if root is None:
        raise DocumentError(f"{name}: a damaged Word document (it is empty)")
    return root


def _blocks(element: ElementTree.Element) -> Iterator[str]:
    """Paragraphs and tables, each with its text; items of a list are one block."""
    items: list[str] = []
    for child in element:
        if child.tag == f"{_W}p" and child.find(f"{_W}pPr/{_W}numPr") is not None:
            items.append(f"- {_text(child)}")
            continue
        if items:
            yield "\n".join(items)
            items = []
        if child.tag == f"{_W}p":
            if text := _text(child).strip():
                yield _heading(child) + text
        elif child.tag == f"{_W}tbl":
            yield "\n".join(_row(row) for row in child.iter(f"{_W}tr"))
        else:  # the body, sections, notes
            yield from _blocks(child)
    if items:
        yield "\n".join(items)


def _heading(paragraph: ElementTree.Element) -> str:
    style = paragraph.find(f"{_W}pPr/{_W}pStyle")
    name = "" if style is None else style.get(f"{_W}val", "")
    return "#" * min(int(name[7:]), 6) + " " if name.startswith("Heading") and name[7:].isdecimal() else ""


def _row(row: ElementTree.Element) -> str:
    return " | ".join(" ".join(" ".join(_blocks(cell)).split()) for cell in row.findall(f"{_W}tc"))


def _text(element: ElementTree.Element) -> str:
    """The text of a paragraph, without what was deleted or stands there a second time."""
    parts = []
    for child in element:
        if child.tag == f"{_W}t":
            parts.append(child.text or "")
        elif child.tag in _CHARACTERS:
            parts.append(_CHARACTERS[child.tag])
        elif child.tag not in (f"{_W}pPr", f"{_W}moveFrom", _FALLBACK):
            parts.append(_text(child))
    return "".join(parts)
