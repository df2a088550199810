"""The process that renders chat templates: one for all models, started when it is needed, and its bounds.

A template comes with the model, and is foreign code; `worker` is what runs there.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clex_local.templates import worker
from clex_local.templates.worker import Unusable

SECONDS = 5.0  # of processor time, and one more for each MiB of contents; real templates take milliseconds
MEMORY = 256 * 2**20  # bytes, and 64 for each byte of contents
LONGEST = 4 * 2**20  # characters of a prompt, and 16 for each byte of contents


def rendered(source: str, contexts: list[dict[str, Any]], now: str, *, foreign: bool) -> list[str]:
    """Conversations as a template writes them, see `worker.render`.

    Args:
        source: the template.
        contexts: its variables, for each prompt.
        now: the time that it is told.
        foreign: whether it is run in the process, with bounds.

    Raises:
        Unusable: the template is not valid, raised, or goes beyond the bounds.
    """
    if not foreign:
        return worker.render(source, contexts, sys.maxsize, now)
    try:
        data = pickle.dumps(contexts)
    except Exception as error:  # whatever it is that the caller has among the messages
        raise Unusable("refused", worker.reason(error)) from error
    seconds = SECONDS + len(data) / 2**20
    request = {
        "source": source,
        "contexts": data,
        "now": now,
        "seconds": seconds,
        "memory": MEMORY + 64 * len(data),
        "longest": LONGEST + 16 * len(data),
    }
    with _lock:
        process = _started()
        if process is not None:
            return process.ask(pickle.dumps(request), seconds)
    return worker.render(source, contexts, request["longest"], now)


class _Process:
    """One that renders templates, and forgets each template's values."""

    def __init__(self) -> None:
        # Where an app embeds Python, that is what it told multiprocessing.
        from multiprocessing.spawn import get_executable

        found = [find_spec(name) for name in ("jinja2", "markupsafe")]
        places = [Path(spec.origin).parent.parent for spec in found if spec and spec.origin]
        self._process = subprocess.Popen(
            [get_executable(), "-I", "-S", worker.__file__, *map(str, places)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Ctrl-C at the terminal is for us, and what we preload is not for it.
            start_new_session=True,
            env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
        )

    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: bytes, seconds: float) -> list[str]:
        """What the template makes of a request; ``seconds`` of processor time are its bound."""
        # Where the kernel does not count processor time, and should anything else go wrong, the clock decides.
        timer = threading.Timer(60 + 10 * seconds if os.name == "posix" else 2 * seconds, self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            with suppress(BrokenPipeError):
                worker.write_frame(self._process.stdin, request)
            reply = json.loads(worker.read_frame(self._process.stdout) or b"null")
            texts = [worker.read_frame(self._process.stdout) for _ in range((reply or {}).get("texts", 0))]
        except BaseException:  # Ctrl-C: whatever it would still answer is not for the next request
            self.close()
            raise
        finally:
            timer.cancel()
        if reply is None or None in texts:
            self.close()
            if -self._process.returncode in _OUT_OF_TIME:
                raise Unusable("time")
            raise Unusable("refused", f"its process ended with {self._process.returncode}")
        if "kind" in reply:
            if reply["kind"] == "memory":  # what is left of its memory is in pieces
                self.close()
            raise Unusable(reply["kind"], reply["reason"])
        return [text.decode() for text in texts if text is not None]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


_OUT_OF_TIME = [int(getattr(signal, name)) for name in ("SIGPROF", "SIGKILL") if hasattr(signal, name)]
_lock = threading.Lock()
_running: _Process | None = None


def _started() -> _Process | None:
    """The process, started where it does not run; None where none can be."""
    global _running
    if _running is not None and _running.alive():
        return _running
    _forget()
    # A frozen app would start itself.
    if not getattr(sys, "frozen", False):
        with suppress(OSError, TypeError):
            _running = _Process()
    return _running


def _forget() -> None:
    global _running
    if _running is not None:
        _running.close()
    _running = None


def _after_fork() -> None:
    """The process is the parent's, and so is the lock that another thread of it may hold."""
    global _lock, _running
    _lock, _running = threading.Lock(), None


atexit.register(_forget)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
