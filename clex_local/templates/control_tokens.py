"""Control tokens of a vocabulary, and contents of messages that stay text whatever they have in them.

``<|im_end|>`` in a template ends a turn. The same characters inside a message are what somebody wrote about ChatML, or
wants a model to believe; a prompt that is cut into tokens as a whole makes no difference. So before a template sees the
contents, ``MARK`` is put inside whatever would be a control token there, and ``ControlTokens.tokenize`` reads the
prompt that comes out: what the mark is in is text, and the mark goes. That survives what templates do to contents
(trim, slice, split, JSON) and leaves their conditions alone, where placeholders for whole contents would not, and no
token of contents without control tokens changes. It misses what a template puts together of parts without a mark,
``"<|im_<b>end|>"`` with ``<b>`` removed, say; for that there is ``ControlTokens.guard_edges``.

Some files have tokens that end turns, or begin them, as "user defined" ones, which llama.cpp finds in any text. In what
is not an answer of the model these are marked too, and cut where the mark is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    import llama_cpp

# No character that texts may have: Unicode keeps it for the insides of programs. One that is in a text all the same is
# doubled there, and comes out whole.
MARK = "\ufdd0"
_MARKS = re.compile(f"{MARK}({MARK}?)")
_SPACE = " \t\n\v\f\r"
_STRUCTURE = re.compile(r"[^\w\s](?=.*[^\W\d]).*[^\w\s]", re.DOTALL)  # such as <start_of_turn>, and not a line end
_ALWAYS = re.compile(r"<[|\uff5c].*[|\uff5c]>", re.DOTALL)
_ANCHOR = "\n"

T = TypeVar("T")


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
