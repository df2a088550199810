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
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._unseen:
            if tag == "title":
                self._unseen, self._parts = [], [*self._parts, "\n"]
            elif tag not in _VOID:
                self._unseen.append(tag)
            return
        if tag not in _VOID and (tag in _UNSEEN or _is_hidden(dict(attrs))):
            self._unseen = [tag]
            return
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
                del self._unseen[self._unseen.index(tag) :]
            elif tag in ("head", "html"):
                self._unseen = []
            return
        if tag == "title":  # of the rest of the head nothing is shown
            self._unseen = ["head"]
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
        text = re.sub(rf"[ \n]*{_CELL}[ \n]*", " | ", text)
        text = re.sub(r"[ \t]+\n", "\n", text)
        return re.sub(r"\n{3,}", "\n\n", text).strip()


def _is_hidden(attributes: dict[str, str | None]) -> bool:
    style = re.sub(r"\s", "", attributes.get("style") or "").lower()
    return "hidden" in attributes or "display:none" in style or "visibility:hidden" in style
