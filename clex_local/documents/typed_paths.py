"""Paths as people type them behind a command: with quotes, backslashes and ``~``, or a name with spaces as it is."""

from __future__ import annotations

import os

from clex_local.documents.document import DocumentError


def typed_paths(text: str) -> list[str]:
    r"""The paths in a line.

    A line that is the name of something that is there is one path: ``My Report.txt``. Otherwise spaces part paths, but
    for those in quotes or behind a backslash: ``"My Report.txt" My\ Report.txt``.

    Raises:
        DocumentError: a quote is not closed.
    """
    if os.path.lexists(os.path.expanduser(text)):
        return [text]
    words, word, quote, escaped = [], None, "", False
    for character in text:
        if escaped:
            # On Windows it also parts folders.
            keep = os.sep == "\\" and character not in " '\""
            word, escaped = (word or "") + ("\\" if keep else "") + character, False
        elif character == "\\" and quote != "'":
            escaped = True
        elif quote:
            quote, word = ("", word) if character == quote else (quote, (word or "") + character)
        elif character in "'\"":
            quote, word = character, word or ""
        elif character.isspace():
            words, word = (words if word is None else [*words, word]), None
        else:
            word = (word or "") + character
    if quote:
        raise DocumentError(f"a quote {quote} is not closed")
    if escaped:
        word = (word or "") + "\\"
    return words if word is None else [*words, word]
