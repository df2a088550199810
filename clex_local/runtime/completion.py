"""Completions of llama-cpp-python's ``Llama``, mended: how tokens are drawn and what is told of them."""

from __future__ import annotations

import inspect
import random
import reprlib
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import LlamaGrammar
from llama_cpp.llama_tokenizer import LlamaTokenizer

from clex_local.errors import ClexError
from clex_local.grammar.grammar import GrammarError, grammar_of_response_format, grammar_of_schema
from clex_local.model_file.tables import ContextError
from clex_local.runtime.sampler import RANDOM_SEED, LogitsProcessor, Sampler, SamplerOptions, SamplingError
from clex_local.runtime.vocabulary import check_tokens, common_prefix

_GENERATE = inspect.signature(llama_cpp.Llama.generate)
_SAMPLE = inspect.signature(llama_cpp.Llama.sample)
_CHAT = inspect.signature(llama_cpp.Llama.create_chat_completion)
_SENTENCEPIECE = llama_cpp.LLAMA_VOCAB_TYPE_SPM
_BYTES = "bytes:"  # how OpenAI's API writes a token that is no text by itself


class CompletionError(ClexError, ValueError):
    """A completion was asked for what it cannot do; a ValueError too, as llama-cpp-python raises."""


@dataclass
class _ChatCall:
    """What a chat handler is not sure to pass on to ``create_completion``, and what it leaves out of its answer."""

    llm: Completions | None
    seed: int | None
    logit_bias: Mapping[Any, float] | None
    tool: LlamaGrammar | None  # of the chosen tool's arguments
    finish_reason: str | None = None
    usage: dict[str, int] = field(default_factory=dict)


_CHAT_CALL: ContextVar[_ChatCall | None] = ContextVar("chat call", default=None)


class Completions(llama_cpp.Llama):
    """``generate``, ``sample`` and the completions built on them.

    An argument has the meaning that llama-cpp-python documents, and one that has no effect is refused. Tokens of the
    prompt count for penalties, as in llama.cpp's own programs and OpenAI's API. A completion without a seed draws one
    from a sequence that begins with the constructor's, or is random if that is -1 or not given (llama-cpp-python's
    #1809); calls with a seed of their own do not disturb it.

    Attributes:
        drafted_tokens, accepted_tokens: guesses of the draft model that were computed so far, and those of them that
            were drawn.
    """

    _call_seed: int | None = None
    drafted_tokens = accepted_tokens = 0
    _guessed = 0  # tokens that the last decode computed behind those that count

    def __init__(self, *args: Any, seed: int = RANDOM_SEED, **kwargs: Any) -> None:
        super().__init__(*args, seed=seed, **kwargs)
        self.set_seed(seed)  # the base class takes 0 for none

    def set_seed(self, seed: int | None) -> None:
        """Set the seed of the draws; -1, None and llama.cpp's default give a random one each time."""
        self._seed = RANDOM_SEED if seed is None else seed & 0xFFFFFFFF
        self._seeds = random.Random(None if self._seed == RANDOM_SEED else self._seed)
        self._draws = random.Random(self._seeds.random())

    @property
    def eval_logits(self) -> deque[list[float]]:
        """The logits of every cached token with ``logits_all``, else of the last; upstream's are then no logits."""
        if self._logits_all:
            return deque(self._scores.tolist(), maxlen=self._n_ctx)
        return deque([] if self._requires_eval else [self._logits(self.n_tokens - 1).tolist()], maxlen=1)

    def sample(self, *args: Any, **kwargs: Any) -> int:
        """Draw a token from the logits of the last token, or of the one at ``idx``, as llama-cpp-python's.

        Each call goes on with the draws of the seed. A grammar starts anew each time.

        Raises:
            SamplingError: nothing has been evaluated, or the logits at ``idx`` were not kept.
        """
        options = dict(_SAMPLE.bind(self, *args, **kwargs).arguments)
        del options["self"]
        index = options.pop("idx", None)
        index = self.n_tokens - 1 if index is None else index
        history = self._input_ids[: index + 1].tolist()
        with closing(self._sampler_of(options, self._draws.randrange(RANDOM_SEED), history)) as sampler:
            return sampler.sample(self._logits(index), self.input_ids[: index + 1])

    def _sampler_of(self, options: Mapping[str, Any], seed: int, history: Sequence[int]) -> Sampler:
        last_n = self.last_n_tokens_size if self.last_n_tokens_size >= 0 else self._n_ctx
        chosen = SamplerOptions(**options)
        return Sampler(self._model.vocab, chosen, seed=seed, last_n=last_n, history=history[len(history) - last_n :])

    def _logits(self, index: int) -> npt.NDArray[np.single]:
        """Of the token at `index` of the sequence, as the last decode left them: float32 [n_vocab]."""
        pointer = (
            llama_cpp.llama_get_logits_ith(self.ctx, index - self.n_tokens - self._guessed)
            if 0 <= index < self.n_tokens
            else None
        )
        if not pointer:
            raise SamplingError(f"there are no logits of token {index}: evaluate tokens first, or use logits_all=True")
        return np.ctypeslib.as_array(pointer, shape=(self._n_vocab,))

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """Evaluate a prompt and yield token after token, as llama-cpp-python's.

        Stopping criteria are given the logits that the token was drawn from; upstream's get those of the first token.

        Raises:
            SamplingError: an option has no effect, or no token is left to be drawn.
        """
        options = dict(_GENERATE.bind(self, tokens, *args, **kwargs).arguments)
        for name in ("self", "tokens"):
            del options[name]
        reset: bool = options.pop("reset", True)
        is_enough: Callable[..., bool] = options.pop("stopping_criteria", None) or (lambda tokens, logits: False)
        seed, self._call_seed = self._seed if self._call_seed is None else self._call_seed, None
        tokens = list(tokens)
        history = tokens if reset else [*self._input_ids.tolist(), *tokens]
        if not history:
            raise SamplingError("there is nothing to continue: the prompt has no tokens")
        position = len(history)  # of the next token to be drawn
        with closing(self._sampler_of(options, seed, history)) as sampler:
            if reset:
                tokens = self._reuse(tokens)
            while True:
                self.eval(tokens)
                end, last = self.n_tokens, self.n_tokens + self._guessed
                while position <= end:  # once, or for each guess of a draft model that was right
                    # Whoever looks between two tokens finds what there would be without guesses.
                    self.n_tokens, self._guessed = position, last - position
                    logits = self._logits(position - 1)
                    token = sampler.sample(logits, self.input_ids[:position])
                    if is_enough(self.input_ids[:position], logits):
                        return
                    more = yield token
                    tokens = [token, *(more or ())]
                    if position < end and (more or token != self.input_ids[position]):
                        self._requires_eval = True
                        end = position  # the next ``eval`` forgets the other guesses
                    self.accepted_tokens += position < end
                    position += len(tokens)
                if (guess := self.draft_model) is not None:
                    end = self.n_tokens + len(tokens)
                    self.input_ids[self.n_tokens : end] = tokens
                    draft = guess(self.input_ids[:end])[: max(0, self._n_ctx - end)]
                    tokens.extend(draft.astype(int).tolist())
                    self.drafted_tokens += len(draft)

    def _reuse(self, tokens: list[int]) -> list[int]:
        """Keep what the cache holds of a prompt; the tokens that are left to evaluate."""
        same = common_prefix(self.input_ids[: self.n_tokens], tokens)
        if same == len(tokens) == self.n_tokens and not self._requires_eval:
            return []
        same = min(same, len(tokens) - 1)  # one at least, for its logits
        if same > 0 and self._ctx.kv_cache_seq_rm(-1, same, -1):
            if self.verbose:
                print(f"Llama.generate: {same} tokens are cached, {len(tokens) - same} to evaluate", file=sys.stderr)
            self.n_tokens = same
            self._requires_eval = True
            return tokens[same:]
        self.reset()
        return tokens

    def _create_completion(
        self,
        *,
        prompt: str | Sequence[int],
        suffix: str | None,
        max_tokens: int,
        temperature: float,
        logprobs: int | None,
        echo: bool,
        stop: str | Iterable[str] | None,
        stream: bool,
        seed: int | None,
        model: str | None,
        stopping_criteria: Callable[..., bool] | None,
        logits_processor: Any,
        logit_bias: Mapping[Any, float] | None,
        **options: Any,
    ) -> Iterator[dict[str, Any]]:
        call = self._chat_call or _ChatCall(None, None, None, None)
        seed = call.seed if seed is None else seed
        _check_whole("max_tokens", max_tokens)
        if seed is not None:
            _check_whole("seed", seed)
        if logprobs is not None:
            _check_whole("logprobs", logprobs, least=0)
        infill = None if suffix is None else self._infill_tokens()
        tokens = self._fitting_tokens(prompt, suffix, infill)
        if logprobs is not None and not self._logits_all:
            raise CompletionError("logprobs is not supported for models created with logits_all=False")
        if self._chat_call is not None and stopping_criteria:
            # Templates' handlers end at EOS that way, also at one that ends the prompt.
            stopping_criteria = partial(_is_enough, stopping_criteria, len(tokens))
        if call.tool is not None and options["grammar"] is not None:  # where a handler's fails, any JSON will do for it
            options["grammar"] = call.tool
        options |= {"temp": temperature, "logits_processor": logits_processor}
        options = self._draw_options(options, call.logit_bias if logit_bias is None else logit_bias)
        room = self._n_ctx - len(tokens)
        completion = _Completion(
            self,
            prompt=prompt,
            tokens=tokens,
            max_tokens=min(max_tokens, room) if max_tokens > 0 else room,
            n_top=logprobs,
            echo=echo,
            stops=[stop.encode() for stop in _stops(stop)],
            stream=stream,
            ending=suffix if suffix is not None and infill is None else "",
            seed=(self._seeds.randrange(RANDOM_SEED) if seed is None else seed) & 0xFFFFFFFF,
            options={**options, "stopping_criteria": stopping_criteria},
            call=call,
            model=self.model_path if model is None else model,
        )
        return completion.run()

    def _fitting_tokens(
        self, prompt: str | Sequence[int], suffix: str | None, infill: tuple[int, int, int] | None
    ) -> list[int]:
        """A prompt as tokens of the vocabulary that leave room for another."""
        tokens = self._prompt_tokens(prompt, suffix, infill)
        check_tokens(tokens, self._n_vocab, self.model_path)
        if len(tokens) >= self._n_ctx:
            raise ContextError(f"Requested tokens ({len(tokens)}) exceed context window of {self._n_ctx}")
        return tokens

    def _draw_options(self, options: dict[str, Any], logit_bias: Mapping[Any, float] | None) -> dict[str, Any]:
        """How tokens are drawn, with the biases among the processors of logits.

        Raises:
            SamplingError: an option has no effect.
            CompletionError: the biases are none.
        """
        if logit_bias:
            # A new list: upstream's extends the caller's, and then uses neither.
            given = SamplerOptions(logits_processor=options["logits_processor"]).processors
            biases = _biases(logit_bias)
            check_tokens(biases, self._n_vocab, self.model_path)
            options = {**options, "logits_processor": [*given, _adding(biases)]}
        SamplerOptions(**options)
        return options

    @property
    def _chat_call(self) -> _ChatCall | None:
        """The chat completion that this thread is making."""
        call = _CHAT_CALL.get()
        return call if call is not None and call.llm is self else None

    def _infill_tokens(self) -> tuple[int, int, int] | None:
        """The vocabulary's tokens for prefix, suffix and middle; upstream's takes token 0 for all three."""
        vocab = self._model.vocab
        found = tuple(
            int(of(vocab))
            for of in (llama_cpp.llama_vocab_fim_pre, llama_cpp.llama_vocab_fim_suf, llama_cpp.llama_vocab_fim_mid)
        )
        return None if min(found) < 0 else found  # pyright: ignore[reportReturnType]

    def _prompt_tokens(
        self, prompt: str | Sequence[int], suffix: str | None, infill: tuple[int, int, int] | None
    ) -> list[int]:
        """A prompt as tokens: a list as it is, a text with the vocabulary's BOS and EOS, never two BOS."""
        bos = [self.token_bos()] if self._model.add_bos_token() and self.token_bos() >= 0 else []
        if isinstance(prompt, str):
            data = _encoded(prompt, "the prompt")
            tokens = self.tokenize(data, add_bos=False, special=infill is None) if prompt else []
            is_text = True
        else:
            tokens = _token_list(prompt)
            # Chat handlers pass what a template wrote, which may or may not have begun with BOS.
            cached = tokens == self._input_ids.tolist()  # what a handler of images has evaluated itself
            is_text = self._chat_call is not None and not cached
        if infill is not None and suffix is not None:
            pre, suf, mid = infill
            before, after = [pre, *tokens], [suf, *self._suffix_tokens(suffix)]
            return bos + (after + before if self.spm_infill else before + after) + [mid]
        if is_text:
            while bos and tokens[:1] == bos:
                tokens = tokens[1:]
            tokens = bos + tokens
            if isinstance(prompt, str) and self._model.add_eos_token() and prompt:
                tokens.append(self.token_eos())
        if not tokens and self.token_bos() >= 0:
            tokens = [self.token_bos()]
        if not tokens:
            raise CompletionError("the prompt is empty, and the vocabulary has no token to begin a text with")
        return tokens

    def _suffix_tokens(self, suffix: str) -> list[int]:
        """Tokens of the text after a gap, without the space that sentencepiece puts before every text."""
        if not suffix:
            return []
        if llama_cpp.llama_vocab_type(self._model.vocab) == _SENTENCEPIECE:
            mark = self.tokenize("☺".encode(), add_bos=False, special=False)
            tokens = self.tokenize(f"☺{suffix}".encode(), add_bos=False, special=False)
            if tokens[: len(mark)] == mark:
                return tokens[len(mark) :]
        return self.tokenize(suffix.encode(), add_bos=False, special=False)

    def create_chat_completion(self, *args: Any, **kwargs: Any) -> Any:
        """As llama-cpp-python's, whatever the chat handler makes of the arguments.

        ``response_format`` may be of type ``json_schema`` too, as OpenAI's clients send it.

        Raises:
            GrammarError: ``response_format`` or the parameters of the chosen tool cannot be made a grammar.
        """
        given = dict(_CHAT.bind(self, *args, **kwargs).arguments)
        del given["self"]
        if given.get("response_format") is not None:
            grammar = grammar_of_response_format(given["response_format"])
            given["response_format"] = None
            if grammar is not None and given.get("grammar") is not None:
                raise GrammarError("grammar and response_format exclude each other")
            given["grammar"] = grammar or given.get("grammar")
        tool = _complete_tools(given)
        given["stop"] = _stops(given.get("stop"))
        n_top = given.get("top_logprobs") or 0
        given["top_logprobs"] = n_top  # upstream's gives no logprobs at all without it
        call = _ChatCall(self, given.get("seed"), given.get("logit_bias"), tool)
        token = _CHAT_CALL.set(call)
        try:
            answer: Any = super().create_chat_completion(**given)
        finally:
            _CHAT_CALL.reset(token)
        if given.get("stream"):
            return (_chat_answer(chunk, call, n_top) for chunk in answer)
        return _chat_answer(answer, call, n_top)


@dataclass(eq=False)
class _Completion:
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
        seed, options: for ``generate``.
        call: the chat's, which gets the usage.
        model: name to tell.
    """

    llm: Completions
    prompt: str | Sequence[int]
    tokens: list[int]
    max_tokens: int
    n_top: int | None
    echo: bool
    stops: list[bytes]
    stream: bool
    ending: str
    seed: int
    options: dict[str, Any]
    call: _ChatCall
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
        self._entries: list[_Entry] = []  # logprobs of the generated tokens
        self._told = self._told_entries = 0  # bytes and entries that were streamed

    def run(self) -> Iterator[dict[str, Any]]:
        """The whole answer, or the parts of a streamed one."""
        self._load()
        pieces = self._prompt_pieces() if self.echo or self.n_top is not None else []
        before = b"".join(pieces).decode("utf-8", "ignore")
        echoed: list[_Entry] = []
        finish = "length"
        self.llm._call_seed = self.seed
        with closing(self.llm.generate(self.tokens, **self.options)) as drawn:
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

    def _part(self, text: str, entries: list[_Entry] | None, finish: str | None = None) -> dict[str, Any]:
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

    def _prompt_entries(self, pieces: list[bytes]) -> list[_Entry]:
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
    ) -> _Entry:
        name, n_top = _name(self._piece(token) if piece is None else piece), self.n_top or 0
        if logits is None:
            return _Entry(name, start, offset, None, None)
        logprobs = self.llm.logits_to_logprobs(logits)
        likely = np.argpartition(-logprobs, min(n_top, len(logprobs) - 1))[:n_top]
        top: dict[str, float] = {}
        # Tokens may have the same name: the likeliest counts.
        for i in sorted(likely.tolist(), key=lambda i: -logprobs[i]):
            top.setdefault(_name(self._piece(i)), float(logprobs[i]))
        top.setdefault(name, float(logprobs[token]))
        return _Entry(name, start, offset, float(logprobs[token]), top)

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


@dataclass(frozen=True)
class _Entry:
    """A token with its logprobs: ``start`` in bytes of the answer, ``offset`` in characters of prompt and answer."""

    text: str
    start: int
    offset: int
    logprob: float | None
    top: dict[str, float] | None


def _name(piece: bytes) -> str:
    """A token in a list of logprobs; one that is no text by itself as in OpenAI's API."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return _BYTES + "".join(f"\\x{byte:02x}" for byte in piece)


def _encoded(text: str, what: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise CompletionError(f"{what} is no Unicode text: {error.reason}") from None


def _check_whole(name: str, value: Any, least: int | None = None) -> None:
    if not isinstance(value, Integral) or (least is not None and int(value) < least):
        bound = "" if least is None else f" of at least {least}"
        raise CompletionError(f"{name} must be a whole number{bound}, not {reprlib.repr(value)}")


def _token_list(prompt: Any) -> list[int]:
    """A prompt of tokens; bytes would be taken for their numbers."""
    if isinstance(prompt, (bytes, bytearray, memoryview, Mapping)) or not isinstance(prompt, Iterable):
        raise CompletionError(f"the prompt must be a text or a list of tokens, not {type(prompt).__name__}")
    tokens = list(prompt)
    wrong = [token for token in tokens if isinstance(token, bool) or not isinstance(token, Integral)]
    if wrong:
        raise CompletionError(f"the prompt has {reprlib.repr(wrong[0])} among its tokens, which are whole numbers")
    return [int(token) for token in tokens]


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


def _is_enough(criteria: Callable[..., bool], n_prompt: int, tokens: Sequence[int], logits: Any) -> bool:
    return len(tokens) > n_prompt and criteria(tokens, logits)


def _stops(stop: str | Iterable[str] | None) -> list[str]:
    """Stop strings as a list; an empty one would be found everywhere."""
    if stop is not None and (isinstance(stop, (bytes, Mapping)) or not isinstance(stop, Iterable)):
        raise CompletionError(f"stop must be a text or a list of texts, not {reprlib.repr(stop)}")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else list(stop)
    for text in stops:
        if not isinstance(text, str):
            raise CompletionError(f"stop must be a text or a list of texts, not {text!r}")
        _encoded(text, "a stop string")
    return [text for text in stops if text]


def _biases(logit_bias: Mapping[Any, float]) -> dict[int, float]:
    """What to add to the logits of tokens, whose ids may be texts, as in JSON."""
    try:
        biases = {int(token): float(bias) for token, bias in logit_bias.items()}
    except (TypeError, ValueError) as error:
        raise CompletionError(f"logit_bias must map token ids to numbers: {error}") from None
    if any(np.isnan(bias) for bias in biases.values()):
        raise CompletionError("logit_bias has a number that is none (NaN)")
    return biases


def _adding(biases: dict[int, float]) -> LogitsProcessor:
    ids, values = np.array(list(biases), np.intp), np.array(list(biases.values()), np.single)

    def add(tokens: npt.NDArray[np.intc], logits: npt.NDArray[np.single]) -> npt.NDArray[np.single]:
        logits[ids] += values
        return logits

    return add


def _complete_tools(given: dict[str, Any]) -> LlamaGrammar | None:
    """Complete the tools of a chat, for handlers that ignore what they do not know; the grammar of the one chosen."""
    functions, tools = given.get("functions"), given.get("tools")
    if functions is not None:
        given["functions"] = functions = [_complete_function(function) for function in functions]
    if tools is not None:
        given["tools"] = [{**tool, "function": _complete_function(tool["function"])} for tool in tools]
        functions = [tool["function"] for tool in given["tools"]] if functions is None else functions
    if given.get("tool_choice") == "required" and functions:
        if len(functions) > 1:
            raise CompletionError("tool_choice 'required' is not supported with more than one tool: name one of them")
        given["tool_choice"] = {"type": "function", "function": {"name": functions[0]["name"]}}
    chosen = given.get("function_call") or given.get("tool_choice")
    if isinstance(chosen, Mapping):
        name = chosen.get("function", chosen).get("name")
        for function in functions or []:
            if function["name"] == name:
                return grammar_of_schema(function["parameters"], f"the parameters of the tool {name!r}")
    return None


def _complete_function(function: Mapping[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    return {**function, "parameters": parameters}


def _chat_answer(answer: dict[str, Any], call: _ChatCall, n_top: int) -> dict[str, Any]:
    """An answer of a chat handler, or a part of one, as OpenAI's API gives it."""
    for choice in answer["choices"]:
        if choice["finish_reason"] == "tool_calls" and call.finish_reason == "length":
            choice["finish_reason"] = "length"  # the arguments are cut off
        for token in (choice.get("logprobs") or {}).get("content") or ():
            token["top_logprobs"] = token["top_logprobs"][:n_top]
            for entry in (token, *token["top_logprobs"]):
                entry["bytes"] = list(_token_bytes(entry["token"]))
        if choice["finish_reason"] is not None and call.usage:
            answer.setdefault("usage", call.usage)
    return answer


def _token_bytes(name: str) -> bytes:
    if name.startswith(_BYTES + "\\x"):
        return bytes.fromhex(name.removeprefix(_BYTES).replace("\\x", ""))
    return name.encode()
