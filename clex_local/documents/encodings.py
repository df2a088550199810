"""Bytes that are text, in whatever encoding."""

from __future__ import annotations

import codecs
import re

from clex_local.documents.document import LARGEST, DocumentError
from clex_local.sizes import readable_size

# Longer marks first: that of UTF-32 begins with that of UTF-16.
_MARKS = [
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
]
_SAMPLE = 1 << 16  # bytes that an encoding is recognised by
_CONTROLS = re.compile(rb"[\x00-\x06\x0e-\x1a\x1c-\x1f]")  # in no encoding part of a text, but for escape sequences
_USUAL = "cp1252"  # of Western texts, most of which several encodings read alike
INSTALL = "pip install 'clex-local[documents]'"


def utf8_text(data: bytes, name: str) -> str:
    """The text that bytes are in UTF-8.

    Raises:
        DocumentError: they are not, or more than any context holds.
    """
    _check_size(data, name)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(_not_utf8(data, name, error)) from error
    return _without_nul(text, name)


def _check_size(data: bytes, name: str) -> None:
    if len(data) > LARGEST:
        raise DocumentError(f"{name}: more than {readable_size(LARGEST, memory=True)} of text, no context holds that")


def _not_utf8(data: bytes, name: str, error: UnicodeDecodeError) -> str:
    return f"{name}: not a UTF-8 text file (byte {error.start} is {data[error.start]:#04x})"


def _without_nul(text: str, name: str) -> str:
    if "\0" in text:
        raise DocumentError(f"{name}: a binary file, not text")
    return text


def decoded(data: bytes, name: str, hint: str | None = None) -> tuple[str, str | None]:
    """The text that bytes are.

    Args:
        data: all of it.
        name: of where it comes from, for messages.
        hint: an encoding that whoever sent it names.

    Returns:
        The text, and a note where it was not UTF-8.

    Raises:
        DocumentError: it is not text, or more than any context holds.
    """
    _check_size(data, name)
    mark, encoding = next(((mark, encoding) for mark, encoding in _MARKS if data.startswith(mark)), (b"", "utf-8"))
    try:
        text = data.decode("utf-8-sig" if mark == codecs.BOM_UTF8 else encoding)
    except UnicodeDecodeError as error:
        if mark and encoding != "utf-8":
            raise DocumentError(f"{name}: a damaged {encoding.upper()} text") from error
        return _recognised(data, name, hint, error)
    return _without_nul(text, name), f"read as {encoding.upper()}" if encoding != "utf-8" else None


def _recognised(data: bytes, name: str, hint: str | None, error: UnicodeDecodeError) -> tuple[str, str]:
    if _CONTROLS.search(data):
        raise DocumentError(f"{name}: a binary file, not text") from error
    wrong = _not_utf8(data, name, error)
    if hint:
        try:
            return data.decode(hint), f"read as {hint}"
        except (UnicodeDecodeError, LookupError):
            pass
    text = data.decode("utf-8", "replace")
    errors = text.count("\ufffd")
    # Hardly any character of another encoding happens to be one in UTF-8.
    if len(text) - len(text.encode("ascii", "ignore")) > 10 * errors:
        return text, f"damaged UTF-8: {errors:,} character{'s' * (errors != 1)} cannot be read"
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        raise DocumentError(f"{wrong}; {INSTALL} lets other encodings be recognised") from error
    # Lines in ASCII tell nothing.
    sample = b"".join(re.findall(rb"[^\n]{0,500}[\x80-\xff][^\n]{0,500}\n?", data[: 64 * _SAMPLE]))[:_SAMPLE]
    found = from_bytes(sample or data[error.start : error.start + _SAMPLE])
    best = found.best()
    if best is None:
        raise DocumentError(f"{wrong}, nor in another encoding that can be recognised") from error
    alike = [match for match in found if match.encoding == _USUAL or _USUAL in match.could_be_from_charset]
    encodings = [_USUAL] if alike and alike[0].chaos <= best.chaos else []
    for encoding in [*encodings, best.encoding]:
        try:
            return data.decode(encoding), f"not UTF-8, read as {encoding}"
        except UnicodeDecodeError:
            continue
    return data.decode(best.encoding, "replace"), f"not UTF-8, read as {best.encoding}, with errors"
