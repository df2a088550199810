"""How ``create_chat_completion`` writes messages as a prompt: the file's own templates, and the bindings' formats."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import llama_chat_format

from clex_local.templates.chat_template import ChatTemplate, TemplateError, with_text
from clex_local.templates.control_tokens import MARK, ControlTokens

_KEY = "tokenizer.chat_template"
_DEFAULT = "chat_template.default"  # what the bindings call it
_MARK = MARK.encode()


class ChatFormats(llama_cpp.Llama):
    """llama-cpp-python's ``Llama`` with chat templates that are bounded, and messages whose contents are text.

    The bindings compile every template of a file while they load it, so that a broken one keeps the file from being
    used at all, run it without bounds, and take a control token that somebody wrote into a message for one.
    """

    def __init__(
        self,
        model_path: str,
        *,
        chat_format: str | None = None,
        chat_handler: Any = None,
        **kwargs: Any,
    ) -> None:
        self._metadata: dict[str, str] = {}
        self._hides_templates = True
        super().__init__(model_path, chat_format=chat_format or _DEFAULT, chat_handler=chat_handler, **kwargs)
        self._hides_templates = False
        names = [key[len(_KEY) + 1 :] for key in self._metadata if key.startswith(f"{_KEY}.")]
        sources = {f"chat_template.{name}": chat_template(self, name) for name in names}
        sources[_DEFAULT] = chat_template(self)
        self._own_handlers = {name: self._handler(source) for name, source in sources.items() if source is not None}
        self._chat_handlers.update(self._own_handlers)
        if chat_format is None and chat_handler is None:
            if _DEFAULT in self._own_handlers:
                self.chat_format = llama_chat_format.guess_chat_format_from_gguf_metadata(self._metadata) or _DEFAULT
            else:
                self.chat_format = "llama-2"
            if self.verbose:
                print(f"Using chat format: {self.chat_format}", file=sys.stderr)
        elif chat_format is None:
            self.chat_format = None

    @property
    def metadata(self) -> dict[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Keys of the file and their values as text."""
        if self._hides_templates:
            return {key: value for key, value in self._metadata.items() if not key.startswith(_KEY)}
        return self._metadata

    @metadata.setter
    def metadata(self, metadata: dict[str, str]) -> None:
        self._metadata = metadata

    @cached_property
    def control_tokens(self) -> ControlTokens:
        """The control tokens of the model, which contents of messages may not have."""
        return ControlTokens.of(self)

    def token_text(self, token: int) -> str:
        """What the vocabulary calls a token; nothing for -1."""
        return self._model.token_get_text(token) if token >= 0 else ""

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """As llama-cpp-python's; a control token with ``MARK`` in it is text, of which the mark is no part.

        Args:
            text: UTF-8.
            add_bos: add the tokens that begin and end a text of this model.
            special: look for control tokens in the text.
        """
        if not special or _MARK not in text:
            return super().tokenize(text, add_bos, special)
        parent = super()
        tokens = self.control_tokens.tokenize(
            text.decode(), lambda part, special: parent.tokenize(part.encode(), False, special)
        )
        edges = parent.tokenize(b"", True) if add_bos else []
        begin = int(bool(edges) and llama_cpp.llama_vocab_get_add_bos(self._model.vocab))
        return edges[:begin] + tokens + edges[begin:]

    def create_chat_completion(self, messages: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """As llama-cpp-python's, with contents of messages that stay text.

        Raises:
            TemplateError: the chat template is not valid, refuses the messages, or does not come to an end; or a format
                of the bindings cannot write a message, which has more than text in it.
        """
        # Those of the bindings that come with a projector give the whole prompt to another library.
        handler = self.chat_handler or self._chat_handlers.get(self.chat_format or "")
        if handler is None:
            handler = llama_chat_format.get_chat_completion_handler(self.chat_format or "")
        its_own = inspect.isfunction(handler) and handler.__module__ == llama_chat_format.__name__
        if its_own and handler not in self._own_handlers.values():
            if self.chat_handler is None:
                messages = [_as_text(message, self.chat_format) for message in messages]
            messages = self.control_tokens.guard(messages)
        return super().create_chat_completion(messages, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    def _handler(self, source: str) -> Any:
        eos = self.token_eos()
        eos_text = self.token_text(eos)

        def ends(tokens: npt.NDArray[np.intc], logits: npt.NDArray[np.single]) -> bool:
            return tokens[-1] == eos

        def write(*, messages: Sequence[Any], **variables: Any) -> llama_chat_format.ChatFormatterResponse:
            # Not before the first conversation: who only completes texts needs no list of control tokens.
            template = ChatTemplate(
                source,
                self.control_tokens,
                {"bos_token": self.token_text(self.token_bos()), "eos_token": eos_text},
                name=f"{self.model_path}: its chat template",
            )
            try:
                prompt = template.render(messages, **variables)
            except TemplateError as error:
                raise TemplateError(f"{error}; chat_format='chatml' does without it") from error
            if not prompt.strip():
                raise TemplateError(f"{template.name} makes nothing of the messages; chat_format='chatml' may")
            return llama_chat_format.ChatFormatterResponse(
                prompt=prompt,
                stop=[eos_text] if eos_text else None,
                stopping_criteria=llama_cpp.StoppingCriteriaList([ends]),
                added_special=True,
            )

        return llama_chat_format.chat_formatter_to_chat_completion_handler(write)


def _as_text(message: Any, chat_format: str | None) -> Any:
    """A message as the bindings' formats take it: they drop contents that are a list of parts, or write its Python."""
    message = with_text(message)
    parts = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(parts, Sequence) or isinstance(parts, str):
        return message
    kinds = [part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in parts]
    other = next((kind for kind in kinds if kind != "text"), "text without a text")
    raise TemplateError(f"chat_format={chat_format!r} reads text alone, and a message has a part of type {other!r}")


def chat_template(llm: llama_cpp.Llama, name: str | None = None) -> str | None:
    """The chat template in a model's file, or the one of a name, such as ``tool_use``; None without one."""
    key = f"{_KEY}.{name}" if name else _KEY
    if llama_cpp.llama_model_meta_val_str(llm.model, key.encode(), b"", 0) < 0:
        return None  # llama.cpp would answer with the name of a format for some models that have none
    # Not the bindings' metadata: they lose the last byte of some values, and all of them for a byte that is not UTF-8.
    template = llama_cpp.llama_model_chat_template(llm.model, name.encode() if name else None)
    return template.decode("utf-8", "replace") if template else None
