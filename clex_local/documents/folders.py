"""The files of a folder, or those of it that a pattern names."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from clex_local.documents.document import DocumentError
from clex_local.documents.ignored import Ignored, glob_pattern

MOST_FILES = 1000  # that one folder or pattern may give
MOST_SEEN = 100_000  # files and folders that are looked at
_MAGIC = re.compile(r"[*?\[]")


@dataclass
class Found:
    """Files of a folder.

    Attributes:
        files: in the order of their names.
        ignored: files and folders that git ignores, and hidden ones.
    """

    files: list[Path] = field(default_factory=list)
    ignored: int = 0


def is_pattern(text: str) -> bool:
    """Whether there are wildcards in a path."""
    return _MAGIC.search(text) is not None


def matching(pattern: Path) -> Found:
    """The files that a path with wildcards names; ``**`` is any folders.

    Raises:
        DocumentError: there are none, or too many.
    """
    parts = pattern.parts
    fixed = next(index for index, part in enumerate(parts) if is_pattern(part))
    folder = Path(*parts[:fixed]) if fixed else Path()
    deep = len(parts) - fixed > 1
    try:
        wanted = re.compile(glob_pattern("/".join(parts[fixed:])), re.DOTALL)
    except re.error as error:
        raise DocumentError(f"{pattern}: no pattern: {error.msg}") from None
    found = _walk(folder, wanted, str(pattern), deep)
    if not found.files:
        ignored = f"; {found.ignored:,} that git ignores or that are hidden do not count" if found.ignored else ""
        raise DocumentError(f"{pattern}: no file has such a name{ignored}")
    return found


def files_in(folder: Path) -> Found:
    """All files of a folder and of those in it.

    Raises:
        DocumentError: there are none, or too many, or it cannot be read.
    """
    found = _walk(folder, None, str(folder), True)
    if not found.files:
        ignored = f" but {found.ignored:,} that git ignores or that are hidden" if found.ignored else ""
        raise DocumentError(f"{folder}: a folder without files{ignored}")
    return found


def _walk(top: Path, wanted: re.Pattern[str] | None, name: str, deep: bool) -> Found:
    """Links to folders are not followed: they may lead around in circles."""
    found, seen = Found(), 0
    waiting = [(top, Ignored.around(top.absolute()))]
    while waiting:
        folder, rules = waiting.pop()
        try:
            with os.scandir(folder) as listing:
                entries = []
                for entry in listing:
                    seen += 1
                    if seen > MOST_SEEN:
                        raise DocumentError(f"{name}: more than {MOST_SEEN:,} files; name a folder or a pattern in it")
                    entries.append(entry)
        except OSError as error:
            if folder != top:
                continue
            raise DocumentError(f"{folder}: {error.strerror or error}") from None
        inner = []
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = folder / entry.name
            is_folder = entry.is_dir(follow_symlinks=False)
            if entry.name.startswith(".") or (rules and rules.has(path.absolute(), is_folder)):
                found.ignored += 1
            elif is_folder:
                inner.append(path)
            elif _is_file(entry) and (wanted is None or wanted.fullmatch(path.relative_to(top).as_posix())):
                found.files.append(path)
                if len(found.files) > MOST_FILES:
                    raise DocumentError(f"{name}: more than {MOST_FILES:,} files; name a folder or a pattern in it")
        if deep:
            waiting += [(path, Ignored.inside(path.absolute(), rules)) for path in reversed(inner)]
    found.files.sort()
    return found


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # links that lead to each other, or into what cannot be looked at
        return False
