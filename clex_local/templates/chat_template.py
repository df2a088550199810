"""Chat templates: conversations as prompts, with a bound on what that costs and with contents that stay text.

What keeps contents text is in `control_tokens`, what bounds a template in `process`. A prompt is written twice, the
second time with the mark at every character that control tokens begin or end with: where that changes which control
tokens there are, the template has put one together, and the second one is used.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from clex_local.errors import ClexError
from clex_local.templates.control_tokens import ControlTokens
from clex_local.templates.process import rendered
from clex_local.templates.worker import Unusable

# What templates are given in any case, or by Jinja.
_GIVEN = {"messages", "add_generation_prompt", "bos_token", "eos_token", "raise_exception", "strftime_now"}
_GIVEN |= {"loop", "namespace", "range", "dict", "true", "false", "none", "set", "endif", "endfor", "filter"}
_CODE = re.compile(r"\{[{%](.*?)[%}]\}", re.DOTALL)
_TEXT = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"", re.DOTALL)
LARGEST_TEMPLATE = 2**20  # characters; the longest of Hugging Face have some 30,000


class TemplateError(ClexError, ValueError):
    """A chat template that is not valid, refuses a conversation or does not come to an end; a ValueError too, as
    llama-cpp-python raises.
    """


class TextError(ClexError, ValueError):
    """Contents of a message that are not Unicode; a ValueError too, as Python raises."""


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

    def reads(self, name: str) -> bool:
        """Whether it takes a variable of this name from outside, as far as its text tells."""
        if name in _GIVEN or keyword.iskeyword(name):
            return False
        code = "\n".join(_TEXT.sub("''", block) for block in _CODE.findall(self.source))
        word = re.escape(name)
        is_own = re.search(rf"\b(?:for|macro)\s+(?:\w+\s*,\s*)*{word}\b", code)  # a `set` may be a default
        return not is_own and re.search(rf"(?<![.\w]){word}(?!\w)", code) is not None

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
            return rendered(self.source, contexts, self.now, foreign=self.foreign)
        except Unusable as error:
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
