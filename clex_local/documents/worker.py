"""Reads documents in a process of its own: what a file does to its reader, or asks of memory and time, ends there.

A document is foreign. The readers of PDF files are libraries in C++, a few kilobytes can unpack to gigabytes, and
Ctrl-C is to end what reads one at once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from typing import Any

from clex_local.documents.document import LARGEST, DocumentError
from clex_local.sizes import readable_size
from clex_local.templates.worker import limit_to, read_frame, write_frame

MEMORY = 2 * 2**30  # bytes, and 16 for each byte of a file
SECONDS = 60  # of processor time, and 30 for each MiB of a file: a PDF of a thousand pages takes some 5
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from clex_local.documents.worker import main; main()"
)


def read_apart(module: str, data: bytes, name: str) -> tuple[str, list[str]]:
    """What a reader makes of a file.

    Args:
        module: of the reader; it has ``read(data, name)``, which gives the text and notes.
        data: the file.
        name: of the file, for messages.

    Raises:
        DocumentError: it cannot be read, or takes too much time or memory.
    """
    if getattr(sys, "frozen", False):  # a frozen app would start itself
        return import_module(module).read(data, name)
    # Where an app embeds Python, that is what it told multiprocessing.
    from multiprocessing.spawn import get_executable

    size = len(data) / 2**20
    limits = {"memory": MEMORY + 16 * len(data), "seconds": SECONDS + int(30 * size)}
    request = json.dumps({"module": module, "name": name, **limits})
    process = subprocess.Popen(
        [get_executable(), "-I", "-c", _PROGRAM, json.dumps([path for path in sys.path if path])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # Ctrl-C at the terminal is for us.
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        try:
            write_frame(process.stdin, request.encode())
            write_frame(process.stdin, data)
        except BrokenPipeError:
            pass
        head, text = read_frame(process.stdout), read_frame(process.stdout)
    finally:
        process.kill()
        process.communicate()
    if head is None or text is None:
        raise DocumentError(f"{name}: cannot be read: {_why(process.returncode)}")
    reply = json.loads(head)
    if "error" in reply:
        raise DocumentError(reply["error"])
    return text.decode(), reply["notes"]


def _why(code: int) -> str:
    if -code in {getattr(signal, name, 0) for name in ("SIGXCPU", "SIGPROF")}:
        return "it takes too much time"
    return f"its reader ended with {code}; the file is damaged, or takes too much memory"


def _limit(memory: int, seconds: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    limit_to(resource.RLIMIT_CPU, seconds)
    if sys.platform == "linux":
        limit_to(resource.RLIMIT_AS, memory)
    os.nice(1)  # what the person sees goes first


def main() -> None:
    """Read one document and tell what is in it."""
    head, data = read_frame(sys.stdin.buffer), read_frame(sys.stdin.buffer)
    if head is None or data is None:
        return
    request = json.loads(head)
    name, text = request["name"], ""
    reply: dict[str, Any]
    try:
        reader = import_module(request["module"])
        _limit(request["memory"], request["seconds"])
        text, notes = reader.read(data, name)
        reply = {"notes": notes}
        if len(text) > LARGEST:
            reply = {"error": f"{name}: has more than {readable_size(LARGEST, memory=True)} of text"}
    except DocumentError as error:
        reply = {"error": Exception.__str__(error)}
    except MemoryError:
        text, reply = "", {"error": f"{name}: cannot be read: it takes too much memory"}
    except Exception as error:  # a library may raise anything of a damaged file
        reply = {"error": f"{name}: cannot be read, it is damaged ({type(error).__name__}: {error})"}
    write_frame(sys.stdout.buffer, json.dumps(reply).encode())
    write_frame(sys.stdout.buffer, b"" if "error" in reply else text.encode("utf-8", "replace"))
