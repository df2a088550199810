"""A conversation with a model: its messages, the prompt they make, the answer as it comes. No terminal code."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import llama_cpp

from clex_local.errors import ClexError, one_line
from clex_local.runtime.sampling import Sampling
from clex_local.runtime.vocabulary import common_prefix
from clex_local.session.answer import Answer
from clex_local.session.exchange import Exchange
from clex_local.session.repetition import is_stuck
from clex_local.session.thoughts import CLOSE, OPEN, ended, opens_thought
from clex_local.templates.builtin import CHATML, PLAIN
from clex_local.templates.chat_formats import chat_template
from clex_local.templates.chat_template import ChatTemplate, TemplateError

if TYPE_CHECKING:
    from clex_local.runtime.llama import Llama

SUMMARY = "What was said before, in short:"
_THINKING = ("enable_thinking", "thinking")  # what templates call whether the model is to think first
# What `Session.resume` replaces.
_CONVERSATION = ("system", "exchanges", "left_out", "summary", "messages", "_text", "_tokens")


class PromptTooLong(ClexError):
    """A prompt of ``tokens`` tokens does not leave room for an answer in a context of ``capacity`` tokens."""

    def __init__(self, tokens: int, capacity: int):
        self.tokens = tokens
        self.capacity = capacity
        super().__init__(f"the prompt has {tokens:,} tokens but the context holds {capacity:,}")


class Session:
    """A conversation with a loaded model.

    The tokens of an answer are kept as they were generated: writing the conversation out again and cutting it into
    tokens afresh may cut the answer differently, and everything behind the first difference would be computed again.

    Args:
        llm: the model; this session is meant to be its only user.
        system: the system message, if any.
        template: a Jinja chat template in place of the one in the model's file, such as ``CHATML`` or ``PLAIN``.
        sampling: how tokens are drawn.
        stops_repetition: end an answer that repeats itself without end.

    Attributes:
        messages: the conversation as templates take it.
        exchanges: the same, each message with its answer.
        left_out: of the exchanges, how many at the beginning are no part of prompts any more.
        summary: what stands for them.
        template_arguments: what the template is told beside the messages, such as ``enable_thinking``.
        began: when it began, ISO 8601. Templates that write a date write this one: were it to change, everything
            behind it would be computed again.
        last: how the last turn went.

    Raises:
        ClexError: the template is broken or refuses a system message.
    """

    def __init__(
        self,
        llm: Llama,
        *,
        system: str | None = None,
        template: str | None = None,
        sampling: Sampling | None = None,
        stops_repetition: bool = False,
    ):
        self.llm = llm
        self.stops_repetition = stops_repetition
        self.system = system
        self.sampling = sampling or Sampling()
        self.has_own_template = chat_template(llm) is not None
        self.template_arguments: dict[str, Any] = {}
        self.last: Answer | None = None
        self.totals = Answer()
        self._opens_thought = False
        vocab = self._vocab = llm._model.vocab
        bos = llm.token_bos()
        self._bos = bos if llama_cpp.llama_vocab_get_add_bos(vocab) and bos >= 0 else None
        own = chat_template(llm) if template is None else None
        source = template or own or PLAIN
        self._template = ChatTemplate(
            source,
            llm.control_tokens,
            {"bos_token": llm.token_text(bos), "eos_token": llm.token_text(llm.token_eos())},
            name=f"{llm.model_path}: its chat template" if own else "the chat template",
            foreign=source not in (CHATML, PLAIN),
        )
        self._template.check()
        self.reset()
        if system is not None:
            # Some templates know no system message: say so now, not after the first question.
            self._template.render([*self.messages, {"role": "user", "content": "."}])

    @property
    def capacity(self) -> int:
        """Tokens the context holds."""
        return self.llm.n_ctx()

    @property
    def used(self) -> int:
        """Tokens of the conversation so far."""
        return len(self._tokens)

    def reset(self) -> None:
        """Start over. The system message stays, and so does what the cache holds of it."""
        self.exchanges: list[Exchange] = []
        self.left_out, self.summary = 0, ""
        self._begin(datetime.now().isoformat(timespec="seconds"))
        self.messages = self._opening()
        self._text = ""
        self._tokens: list[int] = []

    def _begin(self, time: str) -> None:
        self.began = self._template.now = time

    def resume(
        self,
        exchanges: Sequence[Exchange],
        system: str | None = None,
        began: str = "",
        left_out: int = 0,
        summary: str = "",
    ) -> None:
        """Go on with another conversation; nothing is computed before the next message.

        The tokens of an answer count where they are this text in this model's vocabulary. Where they are not, the text
        is cut into tokens afresh.

        Args:
            exchanges: what was said in it.
            system: its system message.
            began: when it began, ISO 8601; now, where that is not known.
            left_out: of the exchanges, how many at the beginning are no part of prompts.
            summary: what stands for them.

        Raises:
            ClexError: the template refuses it; the conversation is what it was.
        """
        before = {name: vars(self)[name] for name in _CONVERSATION}
        time = self.began
        self.system = system
        try:
            self.reset()
            self._begin(began or self.began)
            self.exchanges, self.left_out, self.summary = list(exchanges[:left_out]), left_out, summary
            for exchange in exchanges[left_out:]:
                messages = self._with_message(exchange.message)
                self._take(messages, *self._prompt(messages), replace(exchange, tokens=self._answer_tokens(exchange)))
        except BaseException:
            vars(self).update(before)
            self._begin(time)
            raise

    def change(self, **changes: Any) -> None:
        """Go on with the same conversation, but for what is changed.

        Args:
            changes: arguments of `resume`.

        Raises:
            ClexError: the template refuses it; the conversation is what it was.
        """
        now = {"exchanges": self.exchanges, "system": self.system, "began": self.began,
               "left_out": self.left_out, "summary": self.summary}  # fmt: skip
        wanted = now | changes
        if len(wanted["exchanges"]) < wanted["left_out"]:
            # A summary would tell of what was taken back; what is left may fit again.
            wanted |= {"left_out": 0, "summary": ""}
        self.resume(**wanted)

    def undo(self) -> Exchange | None:
        """Take back the last message and its answer, and return them; None where nothing was said."""
        if not self.exchanges:
            return None
        last = self.exchanges[-1]
        self.change(exchanges=self.exchanges[:-1])
        return last

    def set_template_arguments(self, arguments: dict[str, Any]) -> None:
        """Tell the template other things than until now.

        Raises:
            ClexError: it refuses them, or the conversation with them; all is what it was.
        """
        before, self.template_arguments = self.template_arguments, dict(arguments)
        try:
            self._template.render(self._with_message("."), **self.template_arguments)
            self.change()
        except BaseException:
            self.template_arguments = before
            raise

    def reads_argument(self, name: str) -> bool:
        """Whether the template can be told something by this name."""
        return self._template.reads(name)

    def _opening(self) -> list[dict[str, str]]:
        """What a conversation begins with: the system message, if there is one."""
        return [{"role": "system", "content": self.system}] if self.system is not None else []

    def _with_message(self, text: str) -> list[dict[str, str]]:
        """The messages with one more of the user, which has the summary in front of it where it is the first."""
        if self.summary and len(self.exchanges) == self.left_out:
            text = f"{SUMMARY}\n{self.summary}\n\n{text}"
        return [*self.messages, {"role": "user", "content": text}]

    def _answer_tokens(self, exchange: Exchange) -> list[int]:
        """Tokens of an answer: as they were generated, if they still stand for it."""
        tokens = exchange.tokens
        if max(tokens, default=0) < self.llm.n_vocab():
            text = b"".join(map(self.piece, tokens)).decode("utf-8", "replace")
            if text == exchange.answer:
                return tokens
        return self._tokenize(exchange.answer, special=False)

    def _take(self, messages: list[dict[str, str]], prompt: str, tokens: list[int], exchange: Exchange) -> None:
        """Make an answer part of the conversation."""
        answer = ended(exchange.answer, begun=opens_thought(prompt))
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.exchanges = [*self.exchanges, exchange]
        self._text = prompt + self.llm.control_tokens.guard(exchange.answer)
        self._tokens = tokens + exchange.tokens

    def count(self, text: str) -> int:
        """Tokens of a text by itself."""
        return len(self._tokenize(text, special=False))

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for, none for a control token; a character may be spread over several."""
        return self.llm.detokenize([token])

    def prompt(self, message: str, answer: str = "") -> list[int]:
        """Tokens of a conversation of one message, with its answer begun; nothing is computed or changed.

        Raises:
            ClexError: the template refuses the message, or the text is not Unicode.
        """
        messages = [*self._opening(), {"role": "user", "content": message}]
        text = self._template.render(messages, **self.template_arguments)
        if not self.has_own_template:
            return self._whole(f"{text}\n{self.llm.control_tokens.guard(answer)}" if answer else text)
        return self._whole(text) + self._tokenize(answer, special=False)

    def send(self, text: str, max_tokens: int | None = None) -> Generator[str, None, None]:
        """Add a user message and return the answer as a stream of text; ``last`` tells afterwards how it went.

        Closing the stream early, or an exception inside it, ends the turn: what was generated until then becomes the
        answer. A turn that ends before its first token is dropped, and the conversation is what it was before.

        Args:
            text: the message.
            max_tokens: end the answer after so many tokens; None lets it run until the model ends it or the context
                is full.

        Raises:
            PromptTooLong: the conversation with this message does not fit; nothing was computed or changed.
            ClexError: the template refuses the conversation, or the text is not Unicode.
        """
        self.last = None
        messages = self._with_message(text)
        prompt, tokens = self._prompt(messages)
        if len(tokens) >= self.capacity:
            raise PromptTooLong(len(tokens), self.capacity)

        def take(answer: str, generated: list[int], reason: str) -> None:
            self._take(messages, prompt, tokens, Exchange(text, answer, generated, reason))

        return self._answer(prompt, tokens, max_tokens, take)

    @property
    def opens_thought(self) -> bool:
        """Whether the prompt of the last answer ends with the beginning of a thought, as some templates write it."""
        return self._opens_thought

    @property
    def may_think(self) -> bool:
        """Whether the template knows of thoughts."""
        return OPEN in self._template.source or CLOSE in self._template.source

    def size_with(self, text: str, **changes: Any) -> int:
        """Tokens of the prompt that a message would make.

        Args:
            text: the message.
            changes: arguments of `resume`, as if the conversation were changed so.

        Raises:
            ClexError: the template refuses the conversation, or the text is not Unicode.
        """
        before = {name: vars(self)[name] for name in _CONVERSATION}
        try:
            if changes:
                self.change(**changes)
            return len(self._prompt(self._with_message(text))[1])
        finally:
            vars(self).update(before)

    def aside(self, exchanges: Sequence[Exchange], text: str, max_tokens: int) -> Generator[str, None, None]:
        """Answer a message that does not become part of the conversation, which begins with these exchanges.

        A model that can be told not to think before it answers is told so.

        Raises:
            PromptTooLong: they do not fit.
            ClexError: the template refuses them.
        """
        messages = self._opening()
        for exchange in exchanges:
            messages.append({"role": "user", "content": exchange.message})
            messages.append({"role": "assistant", "content": ended(exchange.answer, begun=False)})
        at_once = {name: False for name in _THINKING if self.reads_argument(name)}
        prompt, tokens = self._prompt([*messages, {"role": "user", "content": text}], **at_once)
        if len(tokens) + max_tokens > self.capacity:
            raise PromptTooLong(len(tokens) + max_tokens, self.capacity)
        return self._answer(prompt, tokens, max_tokens, lambda *_: None)

    def _answer(
        self, prompt: str, tokens: list[int], max_tokens: int | None, take: Callable[[str, list[int], str], None]
    ) -> Generator[str, None, None]:
        self._opens_thought = opens_thought(prompt)
        answer = self.last = Answer(prompt_tokens=len(tokens), prefill_tokens=len(tokens) - self._cached(tokens))
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        generated: list[int] = []
        whole = 0  # generated tokens up to the last complete character
        # Not by a `for` loop: the time a reader of the stream takes is not ours to count.
        stream = self.llm.generate(tokens, reset=True, **asdict(self.sampling))
        drafted, accepted = self.llm.drafted_tokens, self.llm.accepted_tokens
        try:
            for token in answer.timed(stream):
                if not generated:
                    self._count_restored(answer)
                if llama_cpp.llama_vocab_is_eog(self._vocab, token):
                    answer.finish_reason = "stop"
                    break
                generated.append(token)
                piece = decoder.decode(self.piece(token))
                if not decoder.getstate()[0]:
                    whole = len(generated)
                answer.text += piece
                if piece:
                    yield piece
                if len(generated) == max_tokens:
                    answer.finish_reason = "length"
                    break
                if self.stops_repetition and is_stuck(generated):
                    answer.finish_reason = "repetition"
                    break
                if len(tokens) + len(generated) >= self.capacity:
                    answer.finish_reason = "context"
                    break
        except RuntimeError as error:  # what the bindings make of a failed llama_decode
            raise ClexError(f"the model could not go on: {one_line(error)}") from error
        finally:
            stream.close()
            answer.completion_tokens = len(generated)
            answer.drafted_tokens = self.llm.drafted_tokens - drafted
            answer.accepted_tokens = self.llm.accepted_tokens - accepted
            self.totals.add(answer)
            if generated or answer.finish_reason != "interrupted":
                take(answer.text, generated[:whole], answer.finish_reason)

    def _count_restored(self, answer: Answer) -> None:
        answer.prefill_tokens += answer.restored_tokens - self.llm.restored_tokens
        answer.restored_tokens = self.llm.restored_tokens

    def _cached(self, tokens: list[int]) -> int:
        """Leading tokens that ``Llama.generate`` finds in its cache."""
        return min(common_prefix(self.llm.input_ids[: self.llm.n_tokens], tokens), len(tokens) - 1)

    def _prompt(self, messages: list[dict[str, str]], **arguments: Any) -> tuple[str, list[int]]:
        """The conversation as the template writes it, told these arguments too, and as tokens.

        Raises:
            ClexError: the template refuses the conversation, or writes nothing.
        """
        text = self._template.render(messages, **{**self.template_arguments, **arguments})
        if not text.strip() and any(str(message["content"]).strip() for message in messages):
            raise TemplateError(f"{self._template.name} makes nothing of the conversation")
        if self._text and text.startswith(self._text):
            rest = self._tokenize(text[len(self._text) :], special=True)
            # Only a control token is sure to be cut the same way with and without the text before it.
            if rest and llama_cpp.llama_vocab_is_control(self._vocab, rest[0]):
                return text, self._tokens + rest
        return text, self._whole(text)

    def _whole(self, text: str) -> list[int]:
        """Tokens of a conversation as the template writes it."""
        tokens = self._tokenize(text, special=True)
        # A template may write the token itself; a second one harms the answer.
        if self._bos is not None and tokens[:1] != [self._bos]:
            tokens.insert(0, self._bos)
        return tokens

    def _tokenize(self, text: str, special: bool) -> list[int]:
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ClexError("the message is not valid UTF-8 text") from error
        return self.llm.tokenize(data, add_bos=False, special=special) if data else []
