"""One completion from its prompt to its end: the text and the logprobs that are told, whole or in parts."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp.llama_tokenizer import LlamaTokenizer

from clex_local.runtime.chat_call import ChatCall
from clex_local.runtime.logprobs import TokenLogprobs, token_name


@dataclass(eq=False)
class RunningCompletion:
    """One completion on its way.

    Attributes:
        llm: what completes.
        prompt, tokens: what is continued.
        max_tokens: most to draw.
        n_top: likeliest tokens to tell with each, None for no logprobs.
        echo: the prompt is told too.
        stops: what ends the text, and is not told.
        stream: it is told in parts.
        ending: what is told after it.
        draw: begins to draw tokens.
        call: the chat's, which gets the usage.
        model: name to tell.
    """

    llm: llama_cpp.Llama
    prompt: str | Sequence[int]
    tokens: list[int]
    max_tokens: int
    n_top: int | None
    echo: bool
    stops: list[bytes]
    stream: bool
    ending: str
    draw: Callable[[], Generator[int, Any, None]]
    call: ChatCall
    model: str

    def __post_init__(self) -> None:
        self._head = {
            "id": f"cmpl-{uuid.uuid4()}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.model,
        }
        self._generated: list[int] = []
        self._text = bytearray()  # of the generated tokens
        self._end: int | None = None  # where a stop string begins in it
        self._entries: list[TokenLogprobs] = []  # logprobs of the generated tokens
        self._told = self._told_entries = 0  # bytes and entries that were streamed

    def run(self) -> Iterator[dict[str, Any]]:
        """The whole answer, or the parts of a streamed one."""
        self._load()
        pieces = self._prompt_pieces() if self.echo or self.n_top is not None else []
        before = b"".join(pieces).decode("utf-8", "ignore")
        echoed: list[TokenLogprobs] = []
        finish = "length"
        with closing(self.draw()) as drawn:
            for token in drawn:
                if not self._generated and self.echo:
                    echoed = self._prompt_entries(pieces)
                    if self.stream:
                        yield self._part(before, echoed)
                if llama_cpp.llama_vocab_is_eog(self.llm._model.vocab, token):
                    finish = "stop"
                    break
                self._add(token, len(before))
                if self._end is not None:
                    finish = "stop"
                    break
                if self.stream:
                    yield from self._tell(self._safe())
                if len(self._generated) >= self.max_tokens:
                    break
            else:  # a stopping criterion
                finish = "stop"
        self._save()
        end = len(self._text) if self._end is None else self._end
        entries = [entry for entry in self._entries if self._end is None or entry.start < end]
        usage = {
            "prompt_tokens": len(self.tokens),
            "completion_tokens": len(self._generated),
            "total_tokens": len(self.tokens) + len(self._generated),
        }
        self.call.usage, self.call.finish_reason = usage, finish
        if self.stream:
            rest = _decoded(self._text[self._told : end]) + self.ending
            if rest or len(entries) > self._told_entries:
                yield self._part(rest, entries[self._told_entries :])
            yield {**self._part("", None, finish), "usage": usage}
        else:
            text = (before if self.echo else "") + _decoded(self._text[:end]) + self.ending
            yield {**self._part(text, echoed + entries, finish), "usage": usage}

    def _add(self, token: int, offset: int) -> None:
        """Append a token that was drawn, whose text begins `offset` characters after where ``_text`` begins."""
        llm, start = self.llm, len(self._text)
        self._generated.append(token)
        if isinstance(llm.tokenizer_, LlamaTokenizer):
            piece = llm.detokenize([token])
            # Sentencepiece puts a space before every text.
            first = len(self._generated) == 1 and self.tokens == [llm.token_bos()]
            self._text += piece.removeprefix(b" ") if first else piece
        else:
            self._text[:] = llm.detokenize(self._generated, prev_tokens=self.tokens)
        if self.n_top is not None:
            row = llm.scores[len(self.tokens) + len(self._generated) - 2]
            self._entries.append(self._entry(token, start, offset + len(_decoded(self._text[:start])), row))
        longest = max(map(len, self.stops), default=0)
        found = [self._text.find(stop, max(0, start - longest + 1)) for stop in self.stops]
        self._end = min((at for at in found if at >= 0), default=None)

    def _safe(self) -> int:
        """Bytes of the text that can be told: no part of a character, nor of what may become a stop string."""
        waiting = _incomplete(self._text)
        for stop in self.stops:
            sizes = range(min(len(stop) - 1, len(self._text)), waiting, -1)
            waiting = next((size for size in sizes if self._text.endswith(stop[:size])), waiting)
        return len(self._text) - waiting

    def _tell(self, end: int) -> Iterator[dict[str, Any]]:
        """The text up to `end`, as far as it was not told, and the tokens that begin in it."""
        if end > self._told:
            entries = [entry for entry in self._entries[self._told_entries :] if entry.start < end]
            yield self._part(_decoded(self._text[self._told : end]), entries)
            self._told, self._told_entries = end, self._told_entries + len(entries)

    def _part(self, text: str, entries: list[TokenLogprobs] | None, finish: str | None = None) -> dict[str, Any]:
        logprobs = None
        if self.n_top is not None and entries is not None:
            logprobs = {
                "tokens": [entry.text for entry in entries],
                "text_offset": [entry.offset for entry in entries],
                "token_logprobs": [entry.logprob for entry in entries],
                "top_logprobs": [entry.top for entry in entries],
            }
        return {
            **self._head,
            "choices": [{"text": text, "index": 0, "logprobs": logprobs, "finish_reason": finish}],
        }

    def _prompt_pieces(self) -> list[bytes]:
        """The bytes of each token of the prompt, none for the BOS that it begins with."""
        llm = self.llm
        pieces = [self._piece(token) for token in self.tokens]
        if self.tokens[0] == llm.token_bos():
            pieces[0] = b""
        if isinstance(self.prompt, str):
            first = next((i for i, piece in enumerate(pieces) if piece), None)
            if first is not None and not self.prompt.startswith(" "):
                pieces[first] = pieces[first].removeprefix(b" ")
        return pieces

    def _prompt_entries(self, pieces: list[bytes]) -> list[TokenLogprobs]:
        """The logprobs of the prompt, as OpenAI's API gives them: without BOS, and none for the first token.

        Without BOS, llama-cpp-python gives each token the logprob of standing one place further (its #1983).
        """
        if self.n_top is None:
            return []
        entries, text = [], b""
        for index, (token, piece) in enumerate(zip(self.tokens, pieces, strict=True)):
            if index or token != self.llm.token_bos():
                row = self.llm.scores[index - 1] if entries else None
                entries.append(self._entry(token, 0, len(_decoded(text)), row, piece))
                text += piece
        return entries

    def _entry(
        self, token: int, start: int, offset: int, logits: npt.NDArray[np.single] | None, piece: bytes | None = None
    ) -> TokenLogprobs:
        name, n_top = token_name(self._piece(token) if piece is None else piece), self.n_top or 0
        if logits is None:
            return TokenLogprobs(name, start, offset, None, None)
        logprobs = self.llm.logits_to_logprobs(logits)
        likely = np.argpartition(-logprobs, min(n_top, len(logprobs) - 1))[:n_top]
        top: dict[str, float] = {}
        # Tokens may have the same name: the likeliest counts.
        for i in sorted(likely.tolist(), key=lambda i: -logprobs[i]):
            top.setdefault(token_name(self._piece(i)), float(logprobs[i]))
        top.setdefault(name, float(logprobs[token]))
        return TokenLogprobs(name, start, offset, float(logprobs[token]), top)

    def _piece(self, token: int) -> bytes:
        return self.llm.detokenize([token], special=True) if token >= 0 else b""  # what stands for an image is none

    def _load(self) -> None:
        """Take back the state of ``set_cache`` that begins like the prompt, where it is longer than what is there."""
        llm = self.llm
        if llm.cache is None:
            return
        try:
            state = llm.cache[self.tokens]
            saved = state.input_ids[: state.n_tokens].tolist()
            if llm.longest_token_prefix(saved, self.tokens) > llm.longest_token_prefix(
                llm._input_ids.tolist(), self.tokens
            ):
                llm.load_state(state)
        except (KeyError, RuntimeError) as error:  # no such prompt, or the state of another model
            if llm.verbose:
                print(f"clex_local: not in the cache: {error}", file=sys.stderr)

    def _save(self) -> None:
        if self.llm.cache is not None:
            self.llm.cache[self.tokens + self._generated] = self.llm.save_state()


def _decoded(data: bytearray | bytes) -> str:
    return data.decode("utf-8", "ignore")


def _incomplete(data: bytearray) -> int:
    """Bytes at the end that are the beginning of a character."""
    if data.endswith("\ufffd".encode()):  # as tokenizers of transformers write it
        return len("\ufffd".encode())
    for size in range(1, min(3, len(data)) + 1):
        lead = data[-size]
        if lead & 0xC0 != 0x80:
            needed = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
            return size if needed > size else 0
    return 0
