"""What differs between releases of huggingface_hub and of transformers on their way to the network.

huggingface_hub is built on requests before its release 1, on httpx in 1.x and on httpx2 since 2. transformers before 5
keeps an offline switch of its own, later ones look at huggingface_hub's.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def unreachable() -> tuple[type[Exception], ...]:
    """What the client raises where the cache may still help: no network, offline mode, a hub out of order."""
    from huggingface_hub import errors

    http = _http_library()
    names = ("ConnectionError", "Timeout") if http.__name__ == "requests" else ("ConnectError", "TimeoutException")
    return (*(getattr(http, name) for name in names), errors.OfflineModeIsEnabled)


def broken_off() -> type[Exception]:
    """What the client raises where a connection that stood breaks off; it is a base of `unreachable`'s errors."""
    http = _http_library()
    return http.RequestException if http.__name__ == "requests" else http.RequestError


def _http_library() -> Any:
    from huggingface_hub import errors

    # The base of all errors that an answer of the hub makes comes from there.
    base = next(base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    return importlib.import_module(base.__module__.partition(".")[0])


def cached_snapshot(repo: str, revision: str | None) -> Path:
    """The folder of a revision in the cache, whether or not all files of the repository are in it.

    Raises:
        LocalEntryNotFoundError: nothing of it is there.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True))
    except errors.LocalEntryNotFoundError as error:
        # Since release 2, for a folder that lacks files which the hub is known to have; a conversion reads only some.
        path = getattr(error, "snapshot_path", None)
        if path is None:
            raise
        return Path(path)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keeps transformers off the network: it would ask for files that a folder lacks."""
    import transformers.utils.hub
    from huggingface_hub import constants

    switches = [(constants, "HF_HUB_OFFLINE"), (transformers.utils.hub, "_is_offline_mode")]
    before = [(module, name, getattr(module, name)) for module, name in switches if hasattr(module, name)]
    for module, name, _ in before:
        setattr(module, name, True)
    forget_sessions()
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        forget_sessions()


def forget_sessions() -> None:
    """Before release 1, the client asks only once for each connection whether it may use the network."""
    import huggingface_hub.utils

    getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()
