"""The text of a PDF file."""

from __future__ import annotations

import re

from clex_local.documents.document import DocumentError
from clex_local.documents.encodings import INSTALL

# PDFium's signs for a hyphen at the end of a line, where the word goes on in the next one.
_HYPHENS = re.compile("[\ufffe\x02](?:\r?\n)?")


def read(data: bytes, name: str) -> tuple[str, list[str]]:
    """The text of all pages, and notes.

    Raises:
        DocumentError: it is damaged, encrypted, or has no text.
    """
    try:
        import pypdfium2
    except ImportError:
        raise DocumentError(f"{name}: a PDF file; {INSTALL} lets it be read") from None
    try:
        pdf = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower():
            raise DocumentError(f"{name}: an encrypted PDF; save a copy without a password") from None
        raise DocumentError(f"{name}: a damaged PDF file ({error})") from None
    pages, empty, broken = [], 0, 0
    for number in range(len(pdf)):
        try:
            page = pdf[number]
            text = page.get_textpage().get_text_range()
            page.close()
        except pypdfium2.PdfiumError:
            broken += 1
            continue
        text = _HYPHENS.sub("", text).replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").strip()
        empty += not text
        pages.append(text)
    if not any(pages):
        what = "no page can be read" if broken else f"{len(pdf):,} scanned page{'s' * (len(pdf) != 1)} without text"
        raise DocumentError(f"{name}: a PDF of {what}" + ("" if broken else "; OCR adds it (such as ocrmypdf)"))
    notes = []
    if empty:
        notes.append(f"{empty:,} of {len(pdf):,} pages have no text: scanned, or pictures")
    if broken:
        notes.append(f"{broken:,} of {len(pdf):,} pages are damaged and left out")
    return "\n\n".join(filter(None, pages)), notes
