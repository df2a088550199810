"""Names of the files that a GGUF model is split into."""

from __future__ import annotations

import re

# Source: llama_split_path of llama.cpp's src/llama.cpp.
_NAME = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})\.gguf", re.DOTALL)


def part_name(prefix: str, number: int, count: int) -> str:
    """The name of a part, counted from 1."""
    return f"{prefix}-{number:05d}-of-{count:05d}.gguf"


def split_name(name: str) -> tuple[str, int, int] | None:
    """What the names of all parts begin with, the number of this part, and how many there are; None of another file."""
    found = _NAME.fullmatch(name)
    return (found[1], int(found[2]), int(found[3])) if found else None
