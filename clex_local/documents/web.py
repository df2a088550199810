"""Pages and files of the web, fetched where a person asks for them."""

from __future__ import annotations

import http.client
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from importlib.metadata import PackageNotFoundError, version
from urllib.parse import quote, urlsplit, urlunsplit

from clex_local.documents.document import DocumentError
from clex_local.sizes import readable_size

LARGEST = 64 * 2**20  # bytes
TIMEOUT = 30.0  # seconds without a byte
MINUTES = 3.0  # in all, however steadily bytes come
_PIECE = 1 << 16
_NAME = re.compile(r"(?:localhost|[\w-]+(?:\.[\w-]+)+)(?::\d+)?(?:[/?#]|$)")  # of a site, without https://
_SCHEMES = ("http", "https")


@dataclass(frozen=True)
class Page:
    """What an address gave.

    Attributes:
        data: as it came.
        media: its type, such as ``text/html``; empty where it is not said.
        charset: the encoding that is said.
    """

    data: bytes
    media: str
    charset: str | None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Those that lead from the web to elsewhere are not followed."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # pyright: ignore
        if urlsplit(newurl).scheme not in _SCHEMES:
            raise urllib.error.URLError(f"it leads to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def is_address(text: str) -> bool:
    """Whether a text is an address of the web."""
    return text.lower().startswith(("http://", "https://"))


def fetch(address: str) -> Page:
    """What is at an address.

    Args:
        address: where it does not say how it is fetched, as people type it, that is by https.

    Raises:
        DocumentError: it is none of the web, nobody answers, or it is too large, takes too long or comes in part.
    """
    if _NAME.match(address):
        address = f"https://{address}"
    if not is_address(address):
        raise DocumentError(f"{address}: no address of the web, which begins with https://")
    try:
        package = version("clex-local")
    except PackageNotFoundError:
        package = "0"
    headers = {"User-Agent": f"clex-local/{package}", "Accept": "*/*"}
    try:
        request = urllib.request.Request(_in_ascii(address), headers=headers)
        page = _in_time(lambda end: _download(address, request, end))
    except urllib.error.HTTPError as error:
        raise DocumentError(f"{address}: the server answered {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise DocumentError(
            f"{address}: cannot be fetched: {getattr(error.reason, 'strerror', error.reason)}"
        ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DocumentError(f"{address}: cannot be fetched: {error}") from None
    if page is None:
        raise DocumentError(f"{address}: takes more than {MINUTES:g} minutes; download it, and give the file")
    return page


def _in_time(work: Callable[[float], Page | None]) -> Page | None:
    """What a function gives; None where that takes longer than `MINUTES`.

    It works in a thread, which is left to itself then: a name that is looked up, or a head that comes byte by byte,
    knows no time in all.

    Args:
        work: the function, which is given the time of `time.monotonic` to end at.
    """
    pages: list[Page | None] = []
    errors: list[BaseException] = []
    end = time.monotonic() + 60 * MINUTES

    def run() -> None:
        try:
            pages.append(work(end))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive() and (left := end - time.monotonic()) > 0:
        thread.join(min(left, 0.1))  # Ctrl-C is noticed in between, also on Windows
    if errors:
        raise errors[0]
    return pages[0] if pages else None


def _download(address: str, request: urllib.request.Request, end: float) -> Page | None:
    large = DocumentError(f"{address}: more than {readable_size(LARGEST, memory=True)}; download it, and give a part")
    data, opener = bytearray(), urllib.request.build_opener(_Redirects)
    with opener.open(request, timeout=TIMEOUT) as answer:
        size = answer.length  # None where it is not said
        if size and size > LARGEST:
            raise large
        while (size is None or len(data) < size) and (piece := answer.read1(_PIECE)):
            data += piece
            if len(data) > LARGEST:
                raise large
            if time.monotonic() > end:
                return None
        said: Message = answer.headers
    if size is not None and len(data) < size:
        raise DocumentError(f"{address}: the connection ended after {len(data):,} of {size:,} bytes; try again")
    media = said.get_content_type() if said.get("Content-Type") else ""
    return Page(bytes(data), media, said.get_content_charset())


def _in_ascii(address: str) -> str:
    """An address as it is sent: people write and copy them with letters of their own."""
    parts = urlsplit(address)
    path, query = (re.sub(r"[^\x00-\x7f]+", lambda found: quote(found[0]), part) for part in (parts.path, parts.query))
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    return urlunsplit((parts.scheme, host, path, query, ""))
