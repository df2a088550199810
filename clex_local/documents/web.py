"""Pages and files of the web, fetched where a person asks for them."""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.message import Message
from importlib.metadata import PackageNotFoundError, version
from urllib.parse import quote, urlsplit, urlunsplit

from clex_local.documents.document import DocumentError
from clex_local.sizes import readable_size

LARGEST = 64 * 2**20  # bytes
TIMEOUT = 30.0  # seconds without an answer
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

    Raises:
        DocumentError: it is none of the web, nobody answers, or it is too large.
    """
    if not is_address(address):
        raise DocumentError(f"{address}: no address of the web, which begins with https://")
    try:
        package = version("clex-local")
    except PackageNotFoundError:
        package = "0"
    headers = {"User-Agent": f"clex-local/{package}", "Accept": "*/*"}
    try:
        request = urllib.request.Request(_in_ascii(address), headers=headers)
        with urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT) as answer:
            data = answer.read(LARGEST + 1)
            said: Message = answer.headers
    except urllib.error.HTTPError as error:
        raise DocumentError(f"{address}: the server answered {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise DocumentError(
            f"{address}: cannot be fetched: {getattr(error.reason, 'strerror', error.reason)}"
        ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DocumentError(f"{address}: cannot be fetched: {error}") from None
    if len(data) > LARGEST:
        raise DocumentError(f"{address}: more than {readable_size(LARGEST, memory=True)}; download it, and give a part")
    media = said.get_content_type() if said.get("Content-Type") else ""
    return Page(data, media, said.get_content_charset())


def _in_ascii(address: str) -> str:
    """An address as it is sent: people write and copy them with letters of their own."""
    parts = urlsplit(address)
    path, query = (re.sub(r"[^\x00-\x7f]+", lambda found: quote(found[0]), part) for part in (parts.path, parts.query))
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    return urlunsplit((parts.scheme, host, path, query, ""))
