"""The text of a web page: what a reader sees, without scripts, styles and markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from clex_local.documents.document import DocumentError
from clex_local.documents.encodings import decoded

_UNSEEN = {"script", "style", "template", "noscript", "svg", "math", "iframe", "object", "select", "head"}
_BLOCKS = {
    *("address", "article", "aside", "blockquote", "body", "dd", "details", "div", "dl", "dt", "fieldset", "figure"),
    *("figcaption", "footer", "form", "header", "hr", "html", "li", "main", "nav", "ol", "p", "pre", "section"),
    *("summary", "table", "tbody", "tfoot", "thead", "title", "tr", "ul", "h1", "h2", "h3", "h4", "h5", "h6"),
}
_APART = {"p", "pre", "table", "ul", "ol", "dl", "blockquote", "title", "h1", "h2", "h3", "h4", "h5", "h6"}
_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
# Elements that need no end of their own, with the beginnings that end them.
_CELLS, _PARTS_OF_TABLES = {"td", "th"}, {"tbody", "tfoot"}
_ENDS = {
    "head": _BLOCKS - {"html", "title"},
    "p": _BLOCKS - {"body", "html", "li", "dt", "dd", "tr", "tbody", "thead", "title"},
    "li": {"li"},
    "dt": {"dt", "dd"},
    "dd": {"dt", "dd"},
    "td": {*_CELLS, "tr", *_PARTS_OF_TABLES},
    "th": {*_CELLS, "tr", *_PARTS_OF_TABLES},
    "tr": {"tr", *_PARTS_OF_TABLES},
    "thead": _PARTS_OF_TABLES,
    "tbody": _PARTS_OF_TABLES,
}
_DEEPEST = 1000  # open elements that are looked through
_ROW, _CELL = "\x1e", "\x1f"  # where they begin
_CHARSET = re.compile(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?\s*([\w-]{1,40})", re.IGNORECASE)


def read(data: bytes, name: str) -> tuple[str, list[str]]:
    """The text of a page, and a note where it is not UTF-8.

    Raises:
        DocumentError: it is not text, or has none.
    """
    named = _CHARSET.search(data[:4096])
    source, note = decoded(data, name, named[1].decode() if named else None)
    page = _Page()
    page.feed(source)
    page.close()
    text = page.text()
    if not text:
        raise DocumentError(f"{name}: a web page without text; its scripts, which are not run, may make it")
    return text, [note] if note else []


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._unseen: list[str] = []  # open elements, from the first on that is not shown
        self._open: list[str] = []  # those around it
        self._in_title = False  # of the page, in its head; pictures have titles too
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        while self._unseen and tag in _ENDS.get(self._unseen[-1], ()):
            self._unseen.pop()
        if self._unseen:
            if tag == "title" and self._unseen == ["head"]:
                self._in_title, self._unseen = True, []
                self._parts.append("\n")
            elif tag not in _VOID:
                self._unseen.append(tag)
            return
        if tag not in _VOID:
            if tag in _UNSEEN or _is_hidden(dict(attrs)):
                self._unseen = [tag]
                return
            self._open.append(tag)
        if tag in _BLOCKS:
            self._parts.append("\n\n" if tag in _APART else "\n")
        self._pre += tag == "pre"
        if tag == "br":
            self._parts.append("\n")
        elif tag == "li":
            self._parts.append("- ")
        elif tag == "tr":
            self._parts.append(_ROW)
        elif tag in ("td", "th"):
            self._parts.append(_CELL)
        elif tag[0] == "h" and tag[1:].isdecimal():
            self._parts.append("#" * int(tag[1:]) + " ")

    def handle_endtag(self, tag: str) -> None:
        if self._unseen:
            if tag in self._unseen:
                _close(self._unseen, tag)
                return
            if tag not in ("head", "html", *self._open[-_DEEPEST:]):
                return
            self._unseen = []  # what ends around it ends it too
        if tag in self._open[-_DEEPEST:]:
            _close(self._open, tag)
        if tag == "title" and self._in_title:  # of the rest of the head nothing is shown
            self._in_title, self._unseen = False, ["head"]
        self._pre = max(0, self._pre - (tag == "pre"))
        if tag in _BLOCKS and tag not in ("li", "tr", "dt", "dd"):  # after which another one begins
            self._parts.append("\n\n" if tag in _APART else "\n")

    def handle_data(self, data: str) -> None:
        if self._unseen:
            return
        data = data.replace(_ROW, " ").replace(_CELL, " ")
        if not self._pre:
            data = re.sub(r"\s+", " ", data)
            if not self._parts or self._parts[-1][-1:] in "\n ":
                data = data.lstrip(" ")
        self._parts.append(data)

    def text(self) -> str:
        """What was read until now."""
        text = "".join(self._parts)
        text = re.sub(rf"{_ROW}[ \n]*{_CELL}?", "", text)
        # What stands behind spaces is looked at once, and not from each of them.
        text = re.sub(rf"(?<![ \n])[ \n]*{_CELL}[ \n]*", " | ", text)
        text = re.sub(r"(?<![ \t])[ \t]+\n", "\n", text)
        return re.sub(r"\n{3,}", "\n\n", text).strip()


def _close(elements: list[str], tag: str) -> None:
    """Take out the last element of a name, with those in it."""
    while elements.pop() != tag:
        pass


def _is_hidden(attributes: dict[str, str | None]) -> bool:
    style = re.sub(r"\s", "", attributes.get("style") or "").lower()
    return "hidden" in attributes or "display:none" in style or "visibility:hidden" in style
