"""Files that nobody else can read, written whole: each is the old one or the new one, whatever happens."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from clex_local.errors import ClexError


def users_folder(find: Callable[..., Path], variable: str) -> Path:
    """The folder of this program among a user's, or what a variable of the environment names in its place.

    Args:
        find: one of ``platformdirs``.
        variable: its name.

    Raises:
        ClexError: the user has no home folder.
    """
    if given := os.environ.get(variable):
        return Path(os.path.expanduser(given)).absolute()
    try:
        return find("clex-local", appauthor=False)
    except RuntimeError:  # an account without one, as in some containers
        raise ClexError(f"there is no home folder: set HOME, or {variable} to a folder") from None


def make_private(folder: Path) -> None:
    """Make a folder that nobody else can look into; one that is there stays as it is.

    Raises:
        OSError: it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def write_private(path: Path, text: str) -> None:
    """Write a file in place of what is there.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    fresh = path.parent / f".{path.name[:100]}.{secrets.token_hex(8)}.tmp"
    try:
        descriptor = os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        with suppress(OSError):
            fresh.unlink()
