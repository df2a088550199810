"""Completions of llama-cpp-python's ``Llama``, mended: how tokens are drawn and what is told of them."""

from __future__ import annotations

import inspect
import random
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from clex_local.grammar.grammar import GrammarError, grammar_of_response_format
from clex_local.model_file.tables import ContextError
from clex_local.runtime.chat_call import CHAT_CALL, ChatCall, chat_answer, complete_tools
from clex_local.runtime.completion_arguments import (
    CompletionError,
    adding,
    biases_of,
    check_whole,
    encoded,
    stop_strings,
    token_list,
)
from clex_local.runtime.running_completion import RunningCompletion
from clex_local.runtime.sampler import RANDOM_SEED, Sampler, SamplerOptions, SamplingError
from clex_local.runtime.vocabulary import check_tokens, common_prefix

_GENERATE = inspect.signature(llama_cpp.Llama.generate)
_SAMPLE = inspect.signature(llama_cpp.Llama.sample)
_CHAT = inspect.signature(llama_cpp.Llama.create_chat_completion)
_SENTENCEPIECE = llama_cpp.LLAMA_VOCAB_TYPE_SPM


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

    def _drawn(self, tokens: list[int], seed: int, options: Mapping[str, Any]) -> Generator[int, Any, None]:
        """``generate`` with a seed for this call alone."""
        self._call_seed = seed
        return self.generate(tokens, **options)

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

    # llama-cpp-python decides what it is called with; what is named here is looked at.
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
        call = self._chat_call or ChatCall(None, None, None, None)
        seed = call.seed if seed is None else seed
        check_whole("max_tokens", max_tokens)
        if seed is not None:
            check_whole("seed", seed)
        if logprobs is not None:
            check_whole("logprobs", logprobs, least=0)
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
        seed = (self._seeds.randrange(RANDOM_SEED) if seed is None else seed) & 0xFFFFFFFF
        completion = RunningCompletion(
            self,
            prompt=prompt,
            tokens=tokens,
            max_tokens=min(max_tokens, room) if max_tokens > 0 else room,
            n_top=logprobs,
            echo=echo,
            stops=[stop.encode() for stop in stop_strings(stop)],
            stream=stream,
            ending=suffix if suffix is not None and infill is None else "",
            draw=partial(self._drawn, tokens, seed, {**options, "stopping_criteria": stopping_criteria}),
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
            biases = biases_of(logit_bias)
            check_tokens(biases, self._n_vocab, self.model_path)
            options = {**options, "logits_processor": [*given, adding(biases)]}
        SamplerOptions(**options)
        return options

    @property
    def _chat_call(self) -> ChatCall | None:
        """The chat completion that this thread is making."""
        call = CHAT_CALL.get()
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
            data = encoded(prompt, "the prompt")
            tokens = self.tokenize(data, add_bos=False, special=infill is None) if prompt else []
            is_text = True
        else:
            tokens = token_list(prompt)
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
        tool = complete_tools(given)
        given["stop"] = stop_strings(given.get("stop"))
        n_top = given.get("top_logprobs") or 0
        given["top_logprobs"] = n_top  # upstream's gives no logprobs at all without it
        call = ChatCall(self, given.get("seed"), given.get("logit_bias"), tool)
        token = CHAT_CALL.set(call)
        try:
            answer: Any = super().create_chat_completion(**given)
        finally:
            CHAT_CALL.reset(token)
        if given.get("stream"):
            return (chat_answer(chunk, call, n_top) for chunk in answer)
        return chat_answer(answer, call, n_top)


def _is_enough(criteria: Callable[..., bool], n_prompt: int, tokens: Sequence[int], logits: Any) -> bool:
    return len(tokens) > n_prompt and criteria(tokens, logits)
