"""Renders chat templates in a process of its own, whose time and memory end where the caller says.

A template is a program that comes with a model. Jinja's sandbox keeps it from files and from the interpreter, but not
from a loop without end, ``"x" * 10**10`` or ``9**9**9``, and no check inside the interpreter can stop a single
operation of that kind. The kernel can stop a process.

``clex_local.templates.process`` starts this file as a script and speaks to it in frames, each a length and that many
bytes: a pickled request to it, a JSON object and the texts that it counts from it. It imports nothing of this package,
so that it starts in some 60 ms.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import IO, TYPE_CHECKING, Any, ClassVar, NoReturn

if TYPE_CHECKING:
    import jinja2

FRAME = struct.Struct("<Q")


class Unusable(Exception):
    """``kind`` is ``invalid`` (the template cannot be compiled), ``refused`` (it raised), ``memory``, ``long``
    or ``text`` (what it wrote is not Unicode).
    """

    def __init__(self, kind: str, reason: str = ""):
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


def render(source: str, contexts: Sequence[Mapping[str, Any]], longest: int, now: str = "") -> list[str]:
    """Write conversations as prompts.

    Args:
        source: a Jinja template, in the dialect of Hugging Face's chat templates.
        contexts: the variables of each prompt; with none of them the template is only compiled.
        longest: characters that a prompt may have.
        now: the time that the template is told, ISO 8601; empty: that of the clock.

    Raises:
        Unusable: the template is not valid, raised, or writes more than that.
    """
    try:
        template = compiled(source)
    except MemoryError:
        raise Unusable("memory") from None
    except Exception as error:  # what a template makes of the compiler is not only a TemplateError
        raise Unusable("invalid", reason(error)) from error
    functions = {"raise_exception": _raise, "strftime_now": _strftime(now)}
    return [_write(template, context, functions, longest) for context in contexts]


def _write(
    template: jinja2.Template, context: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]], longest: int
) -> str:
    pieces, length = [], 0
    try:
        for piece in template.generate(context, **functions):
            length += len(piece)
            if length > longest:
                raise Unusable("long")
            pieces.append(piece)
        return "".join(pieces)
    except Unusable:
        raise
    except MemoryError:
        raise Unusable("memory") from None
    except Exception as error:  # a template is foreign code and may raise anything
        raise Unusable("refused", reason(error)) from error


@lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """The template, in the environment that Hugging Face's ``apply_chat_template`` gives it."""
    from jinja2 import ext, nodes, sandbox
    from jinja2.parser import Parser

    class Generation(ext.Extension):
        """``{% generation %}`` marks what a model is trained on; here it is only what it contains."""

        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    return environment.from_string(source)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes what HTML would read as markup.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise ValueError(message)


def _strftime(now: str) -> Callable[[str], str]:
    return lambda form: (datetime.fromisoformat(now) if now else datetime.now()).strftime(form)


def reason(error: BaseException) -> str:
    """The message of an exception on one line of bearable length."""
    return " ".join(str(error)[:2000].split()) or type(error).__name__


def read_frame(stream: IO[bytes]) -> bytes | None:
    """The next message, or None at the end of the stream."""
    head = stream.read(FRAME.size)
    if len(head) < FRAME.size:
        return None
    (size,) = FRAME.unpack(head)
    data = stream.read(size)
    return data if len(data) == size else None


def write_frame(stream: IO[bytes], data: bytes) -> None:
    """Send one message."""
    stream.write(FRAME.pack(len(data)))
    stream.write(data)
    stream.flush()


def limit_to(kind: int, wanted: int) -> None:
    """Set a soft limit of this process, such as ``resource.RLIMIT_AS``, or to the hard one where that is lower."""
    import resource

    _, most = resource.getrlimit(kind)
    resource.setrlimit(kind, (wanted if most < 0 else min(wanted, most), most))


def _limiter() -> Callable[[float, int], None]:
    """A function that gives this process so many more seconds of processor time, and so many bytes."""
    try:
        import resource
    except ImportError:  # Windows, where the caller's clock is all there is
        return lambda seconds, memory: None
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    occupied = 0
    with contextlib.suppress(OSError), open("/proc/self/statm", "rb") as file:
        occupied = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")

    def limit(seconds: float, memory: int) -> None:
        # Processor time, not the clock's: a busy computer is not the template's fault.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        if occupied:
            limit_to(resource.RLIMIT_AS, occupied + memory)

    return limit


def main() -> None:
    """Answer requests until the caller closes the pipe."""
    sys.path += sys.argv[1:]  # where Jinja is
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    compiled("")  # imports Jinja before the memory is counted
    limit = _limiter()
    while (data := read_frame(requests)) is not None:
        texts: list[bytes] = []
        try:
            request = pickle.loads(data)
            limit(request["seconds"], request["memory"])
            contexts = pickle.loads(request["contexts"])
            made = render(request["source"], contexts, request["longest"], request["now"])
            texts = [text.encode() for text in made]
            answer = {"texts": len(texts)}
        except Unusable as error:
            answer = {"kind": error.kind, "reason": error.reason}
        except MemoryError:  # while the request was read
            answer = {"kind": "memory", "reason": ""}
        except UnicodeEncodeError:
            answer = {"kind": "text", "reason": ""}
        limit(0, 2**62)
        for part in (json.dumps(answer).encode(), *texts):
            write_frame(replies, part)


if __name__ == "__main__":
    main()
