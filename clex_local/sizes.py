"""Numbers of bytes for people."""

from __future__ import annotations

import re

_OF_MEMORY = ((2**30, "GiB", 1), (2**20, "MiB", 0))
_OF_FILES = ((10**9, "GB", 1), (10**6, "MB", 1), (10**3, "kB", 1), (1, "bytes", 0))


def readable_size(size: int, *, memory: bool = False) -> str:
    """Bytes with a unit: ``1.5 GB`` as disks and downloads count them, or of memory ``1.5 GiB`` and ``720 MiB``."""
    units = _OF_MEMORY if memory else _OF_FILES
    scale, unit, digits = next((unit for unit in units if size >= unit[0]), units[-1])
    return f"{size / scale:.{digits}f} {unit}"


def size_in_bytes(text: str) -> int:
    """The bytes that a person means: ``20GB``, ``512 MiB``, ``1.5G`` (1,000s), or a number of bytes.

    Raises:
        ValueError: it is no such size, or none at all.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " ")) if found else 0
    if size <= 0 or (found and found[3] and not found[2]):
        raise ValueError("must be a size such as 20GB")
    return size
