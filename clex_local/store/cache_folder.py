"""The folder for what can be made again: it may be deleted at any time."""

from __future__ import annotations

from pathlib import Path

from clex_local.private_files import make_private, users_folder


def cache_folder() -> Path:
    """Where it is: what the environment's ``CLEX_CACHE`` says, or a folder among the user's caches.

    It need not be there; `make_cache_folder` makes it.

    Raises:
        ClexError: the user has no home folder.
    """
    from platformdirs import user_cache_path

    return users_folder(user_cache_path, "CLEX_CACHE")


def make_cache_folder() -> Path:
    """The same folder, made for its owner alone where it is not there: what was read with a model lies in it.

    Raises:
        OSError: it cannot be made.
    """
    folder = cache_folder()
    make_private(folder)
    return folder
