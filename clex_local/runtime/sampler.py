"""Drawing a token from logits, with llama.cpp's samplers in the order of llama-cpp-python."""

from __future__ import annotations

import ctypes
import reprlib
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import inf
from numbers import Integral, Real
from typing import Any, cast

import llama_cpp
import numpy as np
import numpy.typing as npt

from clex_local.errors import ClexError
from clex_local.grammar.grammar import grammar_sampler

RANDOM_SEED = llama_cpp.LLAMA_DEFAULT_SEED
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)], align=True)
_MIROSTAT_M = 100
_MOST_INT = 2**31 - 1
_NUMBERS = {"top_p", "min_p", "typical_p", "temp", "repeat_penalty", "frequency_penalty", "presence_penalty"} | {
    *("tfs_z", "mirostat_tau", "mirostat_eta")
}
_LEAST = 87  # exp(-87) is the least power that is a normal float

LogitsProcessor = Callable[[npt.NDArray[np.intc], npt.NDArray[np.single]], npt.NDArray[np.single]]


class SamplingError(ClexError, ValueError):
    """Sampling was asked for what it cannot do, or no token is left to be drawn."""


def _check_whole(name: str, value: Any) -> None:
    """Refuse what is no whole number; of a larger one than llama.cpp's, ctypes drops the upper bits.

    Raises:
        SamplingError: it is none; the message has the argument's name.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or not -_MOST_INT <= int(value) <= _MOST_INT:
        raise SamplingError(f"{name} must be a whole number of 32 bits, not {reprlib.repr(value)}")


def _check_number(name: str, value: Any) -> None:
    # Each comparison with NaN is false: llama.cpp would draw from all tokens, or none.
    if isinstance(value, bool) or not isinstance(value, Real) or value != value or abs(value) == inf:
        raise SamplingError(f"{name} must be a number, not {reprlib.repr(value)}")


@dataclass(frozen=True)
class SamplerOptions:
    """How a token is drawn: names and defaults of ``llama_cpp.Llama.generate``.

    Raises:
        SamplingError: an option has a value that llama.cpp would ignore.
    """

    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    temp: float = 0.80
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    tfs_z: float = 1.0
    mirostat_mode: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    penalize_nl: bool = True
    logits_processor: Sequence[LogitsProcessor] | LogitsProcessor | None = None
    grammar: Any = None

    def __post_init__(self) -> None:
        for name in sorted(_NUMBERS):
            _check_number("temperature" if name == "temp" else name, getattr(self, name))
        _check_whole("top_k", self.top_k)
        _check_whole("mirostat_mode", self.mirostat_mode)
        if self.tfs_z != 1.0:
            raise SamplingError("tfs_z must be 1.0: llama.cpp has no tail-free sampling any more")
        if not self.penalize_nl:
            raise SamplingError("penalize_nl must be True: llama.cpp's penalties know no exception any more")
        if not self.repeat_penalty > 0:
            raise SamplingError(f"repeat_penalty must be more than 0, not {self.repeat_penalty!r}")
        if self.mirostat_mode not in (0, 1, 2):
            raise SamplingError(f"mirostat_mode must be 0, 1 or 2, not {self.mirostat_mode!r}")

    @property
    def processors(self) -> Sequence[LogitsProcessor]:
        """The logits processors, also where one is given without a list."""
        given = self.logits_processor
        return [] if given is None else given if isinstance(given, Sequence) else [given]


class Sampler:
    """A chain of llama.cpp's samplers, with the state of one sequence.

    The bindings' ``LlamaSampler`` runs logits processors inside a callback, where ctypes prints their exceptions and
    goes on; here they run before llama.cpp's code. A token that a grammar does not accept ends the process there, so
    it is never offered one.

    Args:
        vocab: the model's ``llama_vocab``.
        options: what is in the chain.
        seed: of the draws; ``RANDOM_SEED`` for another one each time.
        last_n: tokens that penalties look back at.
        history: the last tokens of the sequence, which penalties count, as in llama.cpp's own programs.

    Raises:
        GrammarError: the grammar is invalid.
    """

    def __init__(self, vocab: Any, options: SamplerOptions, *, seed: int, last_n: int, history: Iterable[int]) -> None:
        self._options = options
        n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        self._blank = np.zeros(n_vocab, _CANDIDATE)
        self._blank["id"] = np.arange(n_vocab)
        self._candidates = self._blank.copy()
        # Plain numbers are copied several times as fast as structures.
        self._words, self._blank_words = self._candidates.view(np.int32), self._blank.view(np.int32)
        self._logits = self._candidates.view(np.float32).reshape(n_vocab, -1)[:, 1]
        self._excludes = bool(options.processors or options.grammar or _takes_logarithms(options))
        stack = ExitStack()
        self._free = weakref.finalize(self, stack.close)

        def chain() -> Any:
            sampler = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
            stack.callback(llama_cpp.llama_sampler_free, sampler)
            return sampler

        self._constrain, self._choose = chain(), chain()
        penalties = llama_cpp.llama_sampler_init_penalties(
            n_vocab, last_n, options.repeat_penalty, options.frequency_penalty, options.presence_penalty
        )
        llama_cpp.llama_sampler_chain_add(self._constrain, penalties)
        for token in history:
            if 0 <= token < n_vocab:  # what stands for an image is none
                llama_cpp.llama_sampler_accept(penalties, int(token))
        if options.grammar is not None:
            llama_cpp.llama_sampler_chain_add(self._constrain, grammar_sampler(vocab, options.grammar))
        for sampler in _choice(options, n_vocab, seed):
            llama_cpp.llama_sampler_chain_add(self._choose, sampler)

    def close(self) -> None:
        """Free what llama.cpp holds; done at the end of the object's life in any case."""
        self._free()

    def sample(self, logits: npt.NDArray[np.single], tokens: npt.NDArray[np.intc]) -> int:
        """Draw a token and remember it.

        Args:
            logits: float32 [n_vocab]; not changed.
            tokens: the sequence that they continue, for the logits processors.

        Raises:
            SamplingError: the logits are no numbers, or leave no token.
        """
        scores = np.array(logits, np.single) if self._options.processors else logits
        for processor in self._options.processors:
            scores = np.asarray(processor(tokens, scores))
            if scores.shape != logits.shape:
                raise SamplingError(f"a logits processor returned the shape {scores.shape}, not {logits.shape}")
        candidates = self._candidates
        self._words[:] = self._blank_words
        self._logits[:] = scores
        data = candidates.ctypes.data_as(llama_cpp.llama_token_data_p)
        array = llama_cpp.llama_token_data_array(data=data, size=len(candidates), selected=-1, sorted=False)
        pointer = cast(Any, ctypes.byref(array))
        llama_cpp.llama_sampler_apply(self._constrain, pointer)
        if self._excludes or not np.isfinite(scores.max()):
            array.size = _leave_possible(candidates, self._options)
        llama_cpp.llama_sampler_apply(self._choose, pointer)
        token = int(array.data[array.selected].id)
        llama_cpp.llama_sampler_accept(self._constrain, token)
        llama_cpp.llama_sampler_accept(self._choose, token)
        return token


def _takes_logarithms(options: SamplerOptions) -> bool:
    """Whether a sampler takes the logarithm of each probability, and sorts by NaN where one is 0."""
    return options.typical_p < 1 or options.mirostat_mode == 1


def _leave_possible(candidates: npt.NDArray[Any], options: SamplerOptions) -> int:
    """Move the tokens that can be drawn to the beginning, and return how many there are."""
    logits = candidates["logit"]
    best = logits.max()
    if np.isnan(best):
        raise SamplingError("the logits are not numbers (NaN)")
    if best == -np.inf:
        raise SamplingError("no token is left: grammar, logits processors and logit_bias together exclude all of them")
    if best == np.inf:  # inf - inf would be NaN
        logits[:] = np.where(logits == np.inf, 0, -np.inf)
        best = 0
    possible = np.flatnonzero(logits > (best - _LEAST if _takes_logarithms(options) else -np.inf))
    if len(possible) < len(candidates):
        candidates[: len(possible)] = candidates[possible]
    return len(possible)


def _choice(options: SamplerOptions, n_vocab: int, seed: int) -> list[Any]:
    """The samplers that cut off and draw."""
    if options.temp <= 0:
        # The bindings draw from all tokens where it is below 0; llama.cpp takes the likeliest.
        return [llama_cpp.llama_sampler_init_greedy()]
    temp = llama_cpp.llama_sampler_init_temp(options.temp)
    tau, eta = options.mirostat_tau, options.mirostat_eta
    # The bindings leave out the temperature here, llama.cpp does not.
    if options.mirostat_mode == 1:
        return [temp, llama_cpp.llama_sampler_init_mirostat(n_vocab, seed, tau, eta, _MIROSTAT_M)]
    if options.mirostat_mode == 2:
        return [temp, llama_cpp.llama_sampler_init_mirostat_v2(seed, tau, eta)]
    return [
        llama_cpp.llama_sampler_init_top_k(options.top_k),
        llama_cpp.llama_sampler_init_typical(options.typical_p, 1),
        llama_cpp.llama_sampler_init_top_p(options.top_p, 1),
        llama_cpp.llama_sampler_init_min_p(options.min_p, 1),
        temp,
        llama_cpp.llama_sampler_init_dist(seed),
    ]
