"""The files that a GGUF model is split into, by their names."""

from __future__ import annotations

import os
import re
from pathlib import Path

# Source: llama_split_path of llama.cpp's src/llama.cpp.
_NAME = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})\.gguf", re.DOTALL)
_MOST = 1000  # parts that are looked for, whatever a name says


def part_name(prefix: str, number: int, count: int) -> str:
    """The name of a part, counted from 1."""
    return f"{prefix}-{number:05d}-of-{count:05d}.gguf"


def split_name(name: str) -> tuple[str, int, int] | None:
    """What the names of all parts begin with, the number of this part, and how many there are; None of another file."""
    found = _NAME.fullmatch(name)
    return (found[1], int(found[2]), int(found[3])) if found else None


def is_later_part(name: str) -> bool:
    """Whether a file is a part of a model that is named by another part, its first."""
    part = split_name(name)
    return part is not None and part[1] != 1


def model_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files of a model: of a split one all parts that are there, by the name of any of them."""
    path = Path(path)
    part = split_name(path.name)
    if not part or path.name != part_name(*part):
        return [path]
    prefix, _, count = part
    names = (part_name(prefix, number, count) for number in range(1, min(count, _MOST) + 1))
    return [found for name in names if (found := path.with_name(name)).is_file()] or [path]


def model_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of all files of a model.

    Raises:
        OSError: one cannot be looked at.
    """
    return sum(os.path.getsize(file) for file in model_files(path))
