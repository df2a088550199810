"""Logprobs of tokens as OpenAI's API tells them."""

from __future__ import annotations

from dataclasses import dataclass

_BYTES = "bytes:"  # how it writes a token that is no text by itself


@dataclass(frozen=True)
class TokenLogprobs:
    """A token with its logprobs: ``start`` in bytes of the answer, ``offset`` in characters of prompt and answer."""

    text: str
    start: int
    offset: int
    logprob: float | None
    top: dict[str, float] | None


def token_name(piece: bytes) -> str:
    """A token in a list of logprobs; one that is no text by itself as in OpenAI's API."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return _BYTES + "".join(f"\\x{byte:02x}" for byte in piece)


def token_bytes(name: str) -> bytes:
    """The bytes of a token by its name in such a list."""
    if name.startswith(_BYTES + "\\x"):
        return bytes.fromhex(name.removeprefix(_BYTES).replace("\\x", ""))
    return name.encode()
