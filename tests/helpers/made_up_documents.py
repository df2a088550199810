"""PDF and Word documents, written byte by byte so that they can also be wrong."""

from __future__ import annotations

import io
import zipfile

_ENCRYPTED = b"<</Filter/Standard/V 1/R 2/Length 40/P -4/O(" + b"o" * 32 + b")/U(" + b"u" * 32 + b")>>"
W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"


def pdf(*pages: str | None, encrypted: bool = False) -> bytes:
    """A PDF file with a page for each text; None is a page with a filled rectangle alone, as a scanner makes."""
    count = len(pages)
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(count))
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Count {count}/Kids[{kids}]>>".encode(),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>",
    ]
    for i, text in enumerate(pages):
        page = "<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Resources<</Font<</F1 3 0 R>>>>"
        page += f"/Contents {5 + 2 * i} 0 R>>"
        if text is None:
            drawn = b"0.5 g 50 50 500 700 re f"
        else:
            lines = [line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)") for line in text.split("\n")]
            drawn = ("BT /F1 12 Tf 14 TL 72 720 Td " + " ".join(f"({line}) Tj T*" for line in lines) + " ET").encode(
                "cp1252"
            )
        objects += [page.encode(), b"<</Length %d>>\nstream\n%s\nendstream" % (len(drawn), drawn)]
    if encrypted:
        objects.append(_ENCRYPTED)
    data, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(data)
    data += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    data += b"".join(b"%010d 00000 n \n" % place for place in places)
    extra = b"/Encrypt %d 0 R/ID[(0123456789abcdef)(0123456789abcdef)]" % len(objects) if encrypted else b""
    return data + b"trailer <</Size %d/Root 1 0 R%s>>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, extra, start)


def docx(body: str, **parts: str) -> bytes:
    """A Word document with this inside of ``w:body``; other parts by the names of their files."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr("word/document.xml", f'<w:document xmlns:w="{W}"><w:body>{body}</w:body></w:document>')
        for name, text in parts.items():
            archive.writestr(f"word/{name}.xml", text)
    return data.getvalue()


def paragraph(text: str, properties: str = "") -> str:
    return f"<w:p><w:pPr>{properties}</w:pPr><w:r><w:t>{text}</w:t></w:r></w:p>"
