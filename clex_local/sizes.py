"""Numbers of bytes for people."""

from __future__ import annotations

_OF_MEMORY = ((2**30, "GiB", 1), (2**20, "MiB", 0))
_OF_FILES = ((10**9, "GB", 1), (10**6, "MB", 1), (10**3, "kB", 1), (1, "bytes", 0))


def readable_size(size: int, *, memory: bool = False) -> str:
    """Bytes with a unit: ``1.5 GB`` as disks and downloads count them, or of memory ``1.5 GiB`` and ``720 MiB``."""
    units = _OF_MEMORY if memory else _OF_FILES
    scale, unit, digits = next((unit for unit in units if size >= unit[0]), units[-1])
    return f"{size / scale:.{digits}f} {unit}"
