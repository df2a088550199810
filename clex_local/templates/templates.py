"""Chat templates: conversations as prompts, with a bound on what that costs and with contents that stay text.

**Control tokens.** ``<|im_end|>`` in a template ends a turn. The same characters inside a message are what somebody
wrote about ChatML, or wants a model to believe; a prompt that is cut into tokens as a whole makes no difference. So
before a template sees the contents, ``MARK`` is put inside whatever would be a control token there, and
``ControlTokens.tokenize`` reads the prompt that comes out: what the mark is in is text, and the mark goes.
That survives what templates do to contents (trim, slice, split, JSON) and leaves their conditions alone, where
placeholders for whole contents would not, and no token of contents without control tokens changes. It misses what a
template puts together of parts without a mark, ``"<|im_<b>end|>"`` with ``<b>`` removed, say. Therefore it writes such
a prompt twice, the second time with the mark at every character that control tokens begin or end with: where that
changes which control tokens there are, the second one is used.

Some files have tokens that end turns, or begin them, as "user defined" ones, which llama.cpp finds in any text. In what
is not an answer of the model these are marked too, and cut where the mark is.

**Bounds.** A template comes with the model, and is run in a process of its own (``worker``).
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from clex_local.errors import ClexError
from clex_local.templates import worker as template_worker

if TYPE_CHECKING:
    import llama_cpp

SECONDS = 5.0  # of processor time, and one more for each MiB of contents; real templates take milliseconds
MEMORY = 256 * 2**20  # bytes, and 64 for each byte of contents
LONGEST = 4 * 2**20  # characters of a prompt, and 16 for each byte of contents
LARGEST_TEMPLATE = 2**20  # characters; the longest of Hugging Face have some 30,000

# No character that texts may have: Unicode keeps it for the insides of programs. One that is in a text all the same is
# doubled there, and comes out whole.
MARK = "\ufdd0"
_MARKS = re.compile(f"{MARK}({MARK}?)")
_SPACE = " \t\n\v\f\r"
_STRUCTURE = re.compile(r"[^\w\s](?=.*[^\W\d]).*[^\w\s]", re.DOTALL)  # such as <start_of_turn>, and not a line end
_ALWAYS = re.compile(r"<[|\uff5c].*[|\uff5c]>", re.DOTALL)
_ANCHOR = "\n"

T = TypeVar("T")


class TemplateError(ClexError, ValueError):
    """A chat template that is not valid, refuses a conversation or does not come to an end; a ValueError too, as
    llama-cpp-python raises.
    """


class TextError(ClexError, ValueError):
    """Contents of a message that are not Unicode; a ValueError too, as Python raises."""


class ControlTokens:
    """The control tokens of a vocabulary, and the texts of conversations without them.

    Args:
        texts: of each control token, whether space before it, and after it, belongs to it.
        defined: texts of tokens that llama.cpp finds in any text, and that have a meaning in conversations.
    """

    def __init__(self, texts: Mapping[str, tuple[bool, bool]], defined: Collection[str] = ()):
        self._texts = dict(texts)
        longest_first = sorted(map(re.escape, defined), key=len, reverse=True)
        self._defined = re.compile("|".join(longest_first) or r"(?!)")
        guarded = (re.escape(text[0] + MARK + text[1:]) for text in sorted(defined, key=len, reverse=True))
        self._guarded = re.compile("|".join(guarded) or r"(?!)")
        # By their first character, the lengths they have, longest first: llama.cpp prefers longer ones too.
        lengths: dict[str, set[int]] = {}
        begins: dict[str, set[str]] = {}
        for text in texts:
            lengths.setdefault(text[0], set()).add(len(text))
            begins.setdefault(text[0], set()).add(text[1:4])
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        # A document of megabytes may have a "<" in every word, and not one of them begin a control token.
        ahead = {first: "|".join(map(re.escape, sorted(rests))) for first, rests in begins.items()}
        begin = "|".join(f"{re.escape(first)}(?={rests})" for first, rests in ahead.items())
        self._begin = re.compile(begin or r"(?!)")
        self._edges = {text[0] for text in texts} | {text[-1] for text in texts}
        self._last = {text[-1] for text in texts}

    @classmethod
    def of(cls, llm: llama_cpp.Llama) -> ControlTokens:
        """Those of a model: the ones that llama.cpp finds in a text only when it is asked to."""
        from llama_cpp import llama_cpp as library

        vocab = llm._model.vocab
        special = library.LLAMA_TOKEN_ATTR_CONTROL | library.LLAMA_TOKEN_ATTR_UNKNOWN
        texts, defined = {}, []
        template = (library.llama_model_chat_template(llm.model, None) or b"").decode("utf-8", "replace")
        for token in range(library.llama_vocab_n_tokens(vocab)):
            attributes = library.llama_vocab_get_attr(vocab, token)
            if attributes & special:
                with suppress(UnicodeDecodeError):  # no text has it then
                    if text := library.llama_vocab_get_text(vocab, token).decode():
                        left, right = library.LLAMA_TOKEN_ATTR_LSTRIP, library.LLAMA_TOKEN_ATTR_RSTRIP
                        texts[text] = (bool(attributes & left), bool(attributes & right))
            elif attributes & library.LLAMA_TOKEN_ATTR_USER_DEFINED:
                text = library.llama_vocab_get_text(vocab, token).decode("utf-8", "replace")
                used = text in template or library.llama_vocab_is_eog(vocab, token) or _ALWAYS.fullmatch(text)
                if used and _STRUCTURE.fullmatch(text):
                    defined.append(text)
        return cls(texts, defined)

    def guard(self, value: T) -> T:
        """Mark the control tokens in every text of a value made of lists and mappings; a copy where there are any.

        In what is no answer of a model, but for a text by itself, also the tokens that llama.cpp finds in any text:
        answers have them, and templates look for them there.
        """
        if isinstance(value, Mapping) and value.get("role") != "assistant":
            return cast("T", {_each_text(key, self._guard): self._guard_given(item) for key, item in value.items()})
        if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
            return cast("T", [self.guard(item) for item in value])
        return _each_text(value, self._guard)

    def _guard_given(self, value: Any) -> Any:
        if isinstance(value, str):
            marked = self._defined.sub(lambda found: found[0][0] + MARK + found[0][1:], self._guard(value))
            return marked
        return self.guard(value)

    def guard_edges(self, value: T) -> T:
        """Mark all that a control token could begin or end with."""
        return _each_text(value, self._guard_edges)

    def has_edges(self, value: Any) -> bool:
        """Whether `guard_edges` marks anything."""
        found = False

        def look(text: str) -> str:
            nonlocal found
            found = found or any(edge in text for edge in self._edges)
            return text

        _each_text(value, look)
        return found

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """Where control tokens begin and end in a text, from left to right and without overlap."""
        end = 0
        for start, stop in self._candidates(text):
            # Of a single character, there is no inside to put the mark into.
            if start >= end and not (stop - start == 1 and text.startswith(MARK, stop)):
                yield start, stop
                end = stop

    def tokenize(self, text: str, tokenize: Callable[[str, bool], list[int]]) -> list[int]:
        """Cut a text with marks into tokens.

        Args:
            text: as a template wrote it.
            tokenize: cuts a text, with control tokens in it or without.
        """
        tokens: list[int] = []
        # Parts between control tokens are cut by themselves anyhow: llama.cpp takes those out first.
        waiting, end, strip = "", 0, False
        for start, stop in [*self.find(text), (len(text), len(text))]:
            part, control = text[end:start], text[start:stop]
            left, right = self._texts.get(control, (False, False))
            if MARK in part:
                tokens += tokenize(waiting, True) if waiting else []
                waiting = ""
                tokens += self._tokenize_text(part, tokenize, strip, left)
            else:
                waiting += part
            waiting += control
            end, strip = stop, right
        return tokens + (tokenize(waiting, True) if waiting else [])

    def _tokenize_text(
        self, text: str, tokenize: Callable[[str, bool], list[int]], lstrip: bool, rstrip: bool
    ) -> list[int]:
        """Tokens of a text with marks, which is none of the template's, without space at its ends where that goes."""
        cuts = [found.start() + 1 for found in self._guarded.finditer(text)]
        parts = [_MARKS.sub(r"\1", text[i:j]) for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        parts[0] = parts[0].lstrip(_SPACE) if lstrip else parts[0]
        parts[-1] = parts[-1].rstrip(_SPACE) if rstrip else parts[-1]
        tokens = tokenize(parts[0], False) if parts[0] else []
        for part in parts[1:]:  # vocabularies that begin every text with a space do not begin these
            before = tokenize(_ANCHOR, False)
            both = tokenize(_ANCHOR + part, False)
            tokens += both[len(before) :] if both[: len(before)] == before else tokenize(part, False)
        return tokens

    def controls(self, text: str) -> list[str]:
        """The control tokens in a text."""
        return [text[start:stop] for start, stop in self.find(text)]

    def _candidates(self, text: str) -> Iterator[tuple[int, int]]:
        for found in self._begin.finditer(text):
            start = found.start()
            for length in self._lengths[found[0]]:
                if text[start : start + length] in self._texts:
                    yield start, start + length
                    break

    def _guard(self, text: str) -> str:
        parts, end = [], 0
        text = text.replace(MARK, MARK * 2)
        for start, _ in self._candidates(text):
            parts.append(text[end : start + 1])
            end = start + 1
        return MARK.join([*parts, text[end:]]) if parts else text

    def _guard_edges(self, text: str) -> str:
        text = text.replace(MARK, MARK * 2)
        for edge in self._edges:
            before = MARK if edge in self._last else ""
            text = text.replace(edge, before + edge + (MARK if edge in self._lengths else ""))
        return text


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """A value with every text in it changed; mappings and sequences become dicts and lists."""
    if isinstance(value, str):
        return change(str(value))
    if isinstance(value, Mapping):
        return {_each_text(key, change): _each_text(item, change) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_each_text(item, change) for item in value]
    return value


class ChatTemplate:
    """A chat template that can be used.

    Args:
        source: in the dialect of Jinja that Hugging Face's chat templates are in.
        control: the control tokens of the model that reads the prompts.
        tokens: texts of tokens that the template may name, such as ``bos_token``.
        name: what messages call it.
        foreign: whether it is run in a process of its own, with bounds; for all that are not ours.

    Attributes:
        now: the time that the template is told, ISO 8601; empty: that of the clock.
    """

    def __init__(
        self,
        source: str,
        control: ControlTokens,
        tokens: Mapping[str, str],
        *,
        name: str = "the chat template",
        foreign: bool = True,
    ):
        self.source = source
        self.control = control
        self.tokens = tokens
        self.name = name
        self.foreign = foreign
        self.now = ""

    def check(self) -> None:
        """Compile it.

        Raises:
            TemplateError: it is not valid.
        """
        self._run([])

    def render(self, messages: Sequence[Any], **variables: Any) -> str:
        """Write a conversation as a prompt that ends where the answer begins; ``MARK`` is in what is not a token.

        Args:
            messages: mappings with ``role`` and ``content``, and whatever else the template reads.
            variables: such as ``tools``.

        Raises:
            TemplateError: the template is not valid, refuses the conversation, or takes too much time or memory.
            TextError: contents are not Unicode.
        """
        try:
            prompt = self._write(messages, variables)
        except TemplateError:
            texts = [with_text(message) for message in messages]
            if texts == list(messages):
                raise
            return self._write(texts, variables)
        if _is_lost(messages, prompt):
            # Templates of models that see take contents as lists of parts, and find no part in a text.
            with suppress(TemplateError):
                other = self._write([_with_parts(message) for message in messages], variables)
                if not _is_lost(messages, other):
                    return other
        return prompt

    def _write(self, messages: Sequence[Any], variables: Mapping[str, Any]) -> str:
        given = {"messages": messages, **variables}
        own = {"add_generation_prompt": True, **self.tokens}
        contexts = [{**own, **self.control.guard(given)}]
        if self.control.has_edges(given):
            contexts.append({**own, **self.control.guard_edges(given)})
        prompt, *others = self._run(contexts)
        for other in others:
            if self.control.controls(prompt) != self.control.controls(other):
                return other
        return prompt

    def _run(self, contexts: list[dict[str, Any]]) -> list[str]:
        if len(self.source) > LARGEST_TEMPLATE:
            raise TemplateError(f"{self.name} is not valid: it has {len(self.source):,} characters")
        try:
            return _rendered(self.source, contexts, self.now, foreign=self.foreign)
        except template_worker.Unusable as error:
            if error.kind == "text":
                raise TextError("the message is not valid UTF-8 text") from error
            message = {
                "invalid": f"is not valid: {error.reason}",
                "refused": f"refused the conversation: {error.reason}",
                "memory": "is not usable: it takes too much memory",
                "long": "is not usable: it writes too much text",
                "time": "is not usable: it takes too much time",
            }
            raise TemplateError(f"{self.name} {message[error.kind]}") from error


def _content(message: Any) -> Any:
    return message.get("content") if isinstance(message, Mapping) else None


def _with_parts(message: Any) -> Any:
    """A message whose content is a list of parts, where it was a text."""
    content = _content(message)
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def with_text(message: Any) -> Any:
    """A message whose content is a text, where it was a list of texts."""
    parts = _content(message)
    if not isinstance(parts, Sequence) or isinstance(parts, str):
        return message
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    whole = len(texts) == len(parts) and all(isinstance(text, str) for text in texts)
    return {**message, "content": "\n".join(map(str, texts))} if whole else message


def _is_lost(messages: Sequence[Any], prompt: str) -> bool:
    """Whether a prompt has nothing of the first or the last message; others a template may leave out."""
    for message in {id(message): message for message in (*messages[:1], *messages[-1:])}.values():
        content = _content(message)
        word = max(re.findall(r"\w+", content[:10_000]), key=len, default="") if isinstance(content, str) else ""
        if word not in prompt and word.casefold() not in prompt.casefold():
            return True
    return False


def _rendered(source: str, contexts: list[dict[str, Any]], now: str, *, foreign: bool) -> list[str]:
    if not foreign:
        return template_worker.render(source, contexts, sys.maxsize, now)
    try:
        data = pickle.dumps(contexts)
    except Exception as error:  # whatever it is that the caller has among the messages
        raise template_worker.Unusable("refused", template_worker.reason(error)) from error
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
        worker = _worker()
        if worker is not None:
            return worker.ask(pickle.dumps(request), seconds)
    return template_worker.render(source, contexts, request["longest"], now)


class _Worker:
    """The process that runs templates: one for all models, because it forgets each template's values."""

    def __init__(self) -> None:
        # Where an app embeds Python, that is what it told multiprocessing.
        from multiprocessing.spawn import get_executable

        found = [find_spec(name) for name in ("jinja2", "markupsafe")]
        places = [Path(spec.origin).parent.parent for spec in found if spec and spec.origin]
        self._process = subprocess.Popen(
            [get_executable(), "-I", "-S", template_worker.__file__, *map(str, places)],
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
                template_worker.write_frame(self._process.stdin, request)
            reply = json.loads(template_worker.read_frame(self._process.stdout) or b"null")
            texts = [template_worker.read_frame(self._process.stdout) for _ in range((reply or {}).get("texts", 0))]
        except BaseException:  # Ctrl-C: whatever it would still answer is not for the next request
            self.close()
            raise
        finally:
            timer.cancel()
        if reply is None or None in texts:
            self.close()
            if -self._process.returncode in _OUT_OF_TIME:
                raise template_worker.Unusable("time")
            raise template_worker.Unusable("refused", f"its process ended with {self._process.returncode}")
        if "kind" in reply:
            if reply["kind"] == "memory":  # what is left of its memory is in pieces
                self.close()
            raise template_worker.Unusable(reply["kind"], reply["reason"])
        return [text.decode() for text in texts if text is not None]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


_OUT_OF_TIME = [int(getattr(signal, name)) for name in ("SIGPROF", "SIGKILL") if hasattr(signal, name)]
_lock = threading.Lock()
_running: _Worker | None = None


def _worker() -> _Worker | None:
    """The process, started where it does not run; None where none can be."""
    global _running
    if _running is not None and _running.alive():
        return _running
    _forget()
    # A frozen app would start itself.
    if not getattr(sys, "frozen", False):
        with suppress(OSError, TypeError):
            _running = _Worker()
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
