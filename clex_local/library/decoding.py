"""What a failed ``llama_decode`` means."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from clex_local.errors import ClexError

NOT_FINITE, DEVICE_LOST = -4, -5  # LLAMA_CLEX_NOT_FINITE and LLAMA_CLEX_DEVICE_LOST of llama-clex.h

_REASONS = {
    1: "the context is full",
    2: "the computation was aborted",
    -2: "there is not enough memory to compute it; use a smaller n_ubatch or a shorter context",
    DEVICE_LOST: "a worker of `rpc` is gone, with what it held; start it again, and load the model anew",
    NOT_FINITE: (
        "its outputs are no numbers (NaN); the file is damaged, or its values are too large for the types that it is "
        "computed with: download or convert it again, and try an F32 cache"
    ),
}


class DecodeError(ClexError, RuntimeError):
    """A batch that could not be computed; a RuntimeError too, as llama-cpp-python raises.

    Attributes:
        status: what ``llama_decode`` returned.
    """

    def __init__(self, name: object, status: int) -> None:
        super().__init__(f"{name}: {decode_failure(status)}")
        self.status = status


@contextmanager
def decode_errors(name: object) -> Iterator[None]:
    """Raise what the bindings make of a failed ``llama_decode`` as a `DecodeError` that names a model.

    Raises:
        DecodeError: the batch could not be computed.
    """
    try:
        yield
    except RuntimeError as error:
        if (status := re.fullmatch(r"llama_decode returned (-?\d+)", str(error))) is None:
            raise
        raise DecodeError(name, int(status[1])) from None


def decode_failure(status: int) -> str:
    """Why ``llama_decode`` returned a status other than 0, for people."""
    return _REASONS.get(status, f"llama.cpp failed to compute it (llama_decode returned {status})")
