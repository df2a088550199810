"""llama-cpp-python's ``Llama`` for models with length-aware RoPE tables."""

from __future__ import annotations

import ctypes
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import llama_cpp
import numpy as np
from llama_cpp import _internals
from llama_cpp.llama_cache import BaseLlamaCache
from llama_cpp.llama_speculative import LlamaDraftModel
from llama_cpp.llama_tokenizer import LlamaTokenizer

from clex_local.errors import ModelError
from clex_local.library import llama_clex
from clex_local.library.decoding import NOT_FINITE, DecodeError, decode_errors
from clex_local.library.devices import WorkerError, devices_with
from clex_local.library.interrupt import aborts, handled_later, is_main_thread, kept_until_return, progress
from clex_local.library.log import ERROR, logged
from clex_local.model_file.extension import Extension
from clex_local.model_file.facts import ModelFacts
from clex_local.runtime.arguments import (
    ContextWarning,
    check_choices,
    check_rope,
    checked,
    completed,
    context_warning,
    file_path,
    names_every_argument,
    with_arguments_of,
)
from clex_local.runtime.clex_state import ClexState, too_long
from clex_local.runtime.clipped_draft import ClippedDraft
from clex_local.runtime.completion import Completions
from clex_local.runtime.embedding import embeddings
from clex_local.runtime.in_turn import in_turn, reading
from clex_local.runtime.lifetime import Closed, close_at_exit
from clex_local.runtime.lora import check_adapter
from clex_local.runtime.prompt_cache import PromptCache
from clex_local.runtime.prompt_lookup import PromptLookup
from clex_local.runtime.saved_state import SavedStates
from clex_local.runtime.settings import Settings
from clex_local.runtime.stored_prompt import StoredPrompt
from clex_local.runtime.table_choice import TableChoice
from clex_local.runtime.turn import Turn
from clex_local.runtime.vocabulary import Tokenizer, check_tokens
from clex_local.templates.chat_formats import ChatFormats

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from clex_local.runtime.bindings_arguments import BindingsArguments

_GENERATE = inspect.signature(llama_cpp.Llama.generate)

_LONG_BATCH = 32  # tokens
_NEVER = llama_cpp.ggml_abort_callback()

# With verbose off the bindings send the whole process's output to nowhere while a model loads: also that of other
# threads, and for good where two of them load. ``logged`` keeps llama.cpp quiet.
for _module in (_internals, llama_cpp.llama):
    vars(_module)["suppress_stdout_stderr"] = lambda disable=True: nullcontext()


class Llama(SavedStates, Completions, ChatFormats):
    """llama-cpp-python's ``Llama``, every argument and method of it, aware of the length of the sequence.

    A model whose GGUF has ``clex.*`` tables uses the table of the sequence's actual length, whatever ``n_ctx``, and so
    does one with LongRoPE factors (Phi-3), unless the environment has ``LLAMA_CLEX_LONGROPE_DISABLE``; one with neither
    runs as in llama-cpp-python. ``n_ctx=0`` gives all the context that the tables cover, and so does a larger one:
    there is no table beyond. What else is not given is chosen to be fast on this machine; ``settings`` has it.

    Args:
        model_path: a GGUF file; ``~`` is the home folder.
        n_ctx: context size in tokens. One longer than a model without tables was trained for, or than the tables
            cover, is a ``ContextWarning``.
        prefix_reuse: what to do with cached tokens that a new prompt starts with and that were computed with the table
            of another length. ``fast`` keeps them and brings their keys to the table in use, as during generation.
            ``exact`` computes them again, so that the result is that of the prompt alone; where queries are scaled by
            the length (``clex.log_scale``), that is after every change of the length.
        policy: ``by-length``, or ``fixed`` to use the table of ``n_ctx`` for every length.
        clamp: allow contexts beyond the last table, which is then used; the authors' code does so.
        prompt_lookup: guess the next tokens from the text so far, as a ``draft_model`` does; see ``PromptLookup``.
        store: keep what is computed of texts on disk, and take from there what a prompt begins with: True for the
            folder of the commands, or a folder. ``CLEX_STORE=0`` in the environment is none. What cannot be stored
            (recurrent models, adapters, layers of other machines) is computed as without.
        extend: make tables for a file without any, kept in memory: ``"4x"`` for four times its context, ``"ntk:4x"``
            with a method of clex-convert's. What is computed is what the converted file computes.
        rpc: workers that compute layers in place of this machine, ``host:port`` each, where ``clex-worker`` listens;
            all layers, unless ``n_gpu_layers`` says how many.
        flash_attn: None uses flash attention where it is faster, and where the cache does not fit in memory without.
        type_k: ggml type of the key cache; with neither type given it is F16, or q8_0 where only that fits in memory.
        type_v: ggml type of the value cache, in the same way.
        use_mmap: map the weights from the file, do not read them into memory; None maps them where half of the memory
            does not hold them, and with a GPU or workers. On Linux what is read has large pages, and decodes faster.
        n_threads: threads for single tokens; None takes the physical cores.
        n_threads_batch: threads for prompts; None takes as many as for single tokens.
        verbose: print llama.cpp's log to stderr, and what was chosen. Its debug lines take the environment's
            ``LLAMA_CLEX_LOG_DEBUG``.

    Every other argument is llama-cpp-python's; those that rotate keys otherwise (``rope_freq_base``,
    ``yarn_ext_factor`` ...) are refused where a file has tables.

    It can be used in ``with``, and by several threads: calls wait for each other, as ``Turn`` describes.

    Attributes:
        on_prefill: called with (tokens done, tokens in all) before, between and after the batches of an ``eval`` of
            more than one batch.

    Raises:
        ModelError: the file, or that of an adapter, is missing, is no GGUF, is truncated or cannot be run, or its
            tables break a rule of the metadata (``TablesError``); the message says which.
        ArgumentError: an argument would have no effect on this file.
        StoreError: the folder of ``store`` cannot be used.
        WorkerError: a worker of ``rpc`` cannot be reached.
        TypeError: a keyword is no argument of this class; the message has those it may stand for.
    """

    _cache: PromptCache | None = None

    @names_every_argument
    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        prefix_reuse: Literal["fast", "exact"] = "fast",
        policy: Literal["by-length", "fixed"] = "by-length",
        clamp: bool = False,
        prompt_lookup: bool = False,
        store: bool | str | os.PathLike[str] | None = False,
        extend: str | float | None = None,
        rpc: Sequence[str] = (),
        **kwargs: Unpack[BindingsArguments],
    ) -> None:
        self.on_prefill: Callable[[int, int], None] | None = None
        self._stack = ExitStack()  # what the base class closes, should the file be refused before it has one
        self._has_tables = False
        self._draft: LlamaDraftModel | None = None
        self._drafted = 0  # guesses in the next batch
        self._stored: StoredPrompt | None = None
        self._workers = tuple(rpc)
        self._turn = Turn()
        check_choices(prefix_reuse, policy, prompt_lookup, kwargs)
        given = checked(kwargs)
        path = file_path(model_path)
        if not Path(path).is_file():
            raise ModelError(f"{path}: no such model file")
        if given.get("lora_path") is not None:
            given["lora_path"] = check_adapter(file_path(given["lora_path"]))
        facts = ModelFacts.read(path, extend)
        self._devices = devices_with(self._workers) if self._workers else None
        self._load(path, completed(given, facts, clamp, workers=bool(self._workers)), facts.extension)
        close_at_exit(self)
        if self._has_tables:
            fixed = llama_clex.Policy.FIXED if policy == "fixed" else llama_clex.Policy.BY_LENGTH
            llama_clex.set_policy(self.ctx, fixed, clamp)
        if warning := context_warning(kwargs, facts, clamp=clamp, has_tables=self._has_tables):
            warnings.warn(warning, ContextWarning, stacklevel=2)
        # A draft model needs the logits of its guesses and not those of every token, which llama-cpp-python keeps.
        self._logits_all = bool(given.get("logits_all", False))
        if type(self.tokenizer_) is LlamaTokenizer:
            self.tokenizer_ = self.tokenizer()
        self._options = {
            "prefix_reuse": prefix_reuse,
            "policy": policy,
            "clamp": clamp,
            "prompt_lookup": prompt_lookup,
            "store": store,
            "extend": extend,
            "rpc": self._workers,
        }
        if prompt_lookup:
            self._draft = PromptLookup()
        self._fixed = policy == "fixed"
        self._exact = prefix_reuse == "exact" and self._has_tables
        self._computed = np.full(len(self.input_ids), -1, np.int64)
        self._stored = StoredPrompt.of(self, store, exact=self._exact or self._fixed)
        if self.verbose:
            print(f"clex_local: {self.settings}", file=sys.stderr)

    def _load(self, path: str, arguments: dict[str, Any], extension: Extension | None = None) -> None:
        """Make what the bindings make: the model and a context.

        Raises:
            ModelError: llama.cpp refuses the file, or the adapter.
            WorkerError: a worker cannot be used any more.
            ArgumentError: the keys are to be rotated in another way than by the file's tables.
        """
        given = arguments.get("kv_overrides")
        keys = extension.overrides() if extension else nullcontext({})
        try:
            with keys as overrides, kept_until_return(), logged(ERROR, forward=arguments["verbose"]) as errors:
                try:
                    loaded: dict[str, Any] = {**arguments, "kv_overrides": {**(given or {}), **overrides} or None}
                    super().__init__(path, **loaded)
                except (ValueError, RuntimeError) as error:
                    # The first names the cause, without the function that says so; the last only that there is none.
                    reason = errors[0].split(": ", 1)[-1] if errors else str(error)
                    if any(reason.startswith(f"{worker}: ") for worker in self._workers):
                        raise WorkerError(reason) from error
                    raise ModelError(f"{path}: {reason}") from error
                # The bindings compare a null pointer with None, and llama.cpp would follow it at the first token.
                if self._lora_adapter is not None and not self._lora_adapter:
                    reason = errors[-1].split(": ", 1)[-1] if errors else "llama.cpp did not take it"
                    raise ModelError(f"{self.lora_path}: no adapter for {path}: {reason}")
            self.kv_overrides = given  # without the name of a file that is gone
            self._has_tables = llama_clex.n_buckets(self.model) > 0
            if extension and not self._has_tables:
                raise ModelError(f"{path}: this llama.cpp takes no tables for `extend`; build clex-local again")
            if self._has_tables:
                check_rope(path, arguments)
        except BaseException:
            with kept_until_return():
                self._stack.close()  # at once, and not when the exception is forgotten
            raise

    @property
    def model_params(self) -> llama_cpp.llama_model_params:
        """What the model is loaded with."""
        return self._model_params

    @model_params.setter
    def model_params(self, params: llama_cpp.llama_model_params) -> None:
        params.progress_callback = progress
        if self._devices is not None:
            params.devices = ctypes.addressof(self._devices)  # pyright: ignore[reportAttributeAccessIssue]
        self._model_params = params

    @property
    def settings(self) -> Settings:
        """What the context computes with, whether it was given or chosen."""
        return Settings.of(self.context_params)

    @property
    def clex(self) -> ClexState | None:
        """What the tables are and have done; None for a model without tables."""
        if not self._has_tables:
            return None
        stats = llama_clex.get_stats(self.ctx)
        bucket = llama_clex.seq_bucket(self.ctx, 0)
        return ClexState(
            method=llama_clex.method(self.model),
            original_context=llama_clex.original_context(self.model),
            max_context=llama_clex.max_context(self.model),
            buckets=tuple(llama_clex.scaling_factor(self.model, i) for i in range(llama_clex.n_buckets(self.model))),
            bucket=None if bucket < 0 else bucket,
            rerotations=stats.n_rerotations,
            rerotated_cells=stats.n_cells,
            rerotation_ms=stats.t_us / 1000,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model; what is called afterwards raises ``ClosedError``."""
        if isinstance(self._model, Closed):
            return
        with self._turn.take(at_once=True), kept_until_return():
            if self._stored is not None:
                self._stored.close()
            self._stack.close()
            closed: Any = Closed(self.model_path)
            self._model = self._ctx = self._batch = closed

    def __del__(self, closed: type = Closed) -> None:  # a name of the module may be gone by then
        # Python calls it even where the constructor was never reached.
        if (stack := self.__dict__.get("_stack")) and not isinstance(self.__dict__.get("_model"), closed):
            with handled_later():
                stack.close()

    def n_ctx(self) -> int:
        """Tokens that the context holds."""
        # llama.cpp rounds up to a multiple of 256, the buffers of the bindings have the size that was asked for: what
        # lies between would be computed and lost.
        return min(super().n_ctx(), self.context_params.n_ctx)

    def tokenizer(self) -> LlamaTokenizer:
        """The model's own tokenizer."""
        return Tokenizer(self)

    @in_turn
    def reset(self) -> None:
        """Forget the cached tokens."""
        super().reset()

    @in_turn
    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens after those in the cache.

        The length after the last of them is declared to the library first, so that a prompt of many batches uses one
        table throughout. An interrupt between batches leaves ``n_tokens`` and the cache in agreement.

        Args:
            tokens: token ids, appended at position ``n_tokens``.

        Raises:
            ContextError: the sequence would be longer than the context, or than the last bucket covers.
            TokenError: a number is no token.
            DecodeError: there is not enough memory, or the model computes values that are no numbers; what was cached
                is forgotten then.
        """
        if self._ctx.memory is None:
            raise ModelError(f"{self.model_path}: an encoder, which continues no text; `embed` is for it")
        check_tokens(tokens, self._n_vocab, self.model_path)
        total = self.n_tokens + len(tokens)
        if total > self._n_ctx:
            raise too_long(total, self._n_ctx)
        if len(tokens) > self.context_params.n_ubatch and not llama_clex.causal(self.ctx):
            raise too_long(len(tokens), self.context_params.n_ubatch, "a ubatch, as they see each other,")
        # Before the declaration, which goes with the last token of what was cached.
        self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        if self._has_tables:
            llama_clex.seq_reserve(self.ctx, 0, total)
            self._computed[self.n_tokens : total] = self._tables.of(total)
        if self._stored is not None:
            self._stored.save()  # guesses that turned out right
        guesses, self._drafted = self._drafted, 0
        for start in range(0, len(tokens), self.n_batch):
            if len(tokens) > self.n_batch:
                self._report(start, len(tokens))
            self._decode(tokens[start : start + self.n_batch], guesses > 0)
            if self._stored is not None and not guesses:
                self._stored.save()
        if len(tokens) > self.n_batch:
            self._report(len(tokens), len(tokens))

    def _decode(self, tokens: Sequence[int], guesses: bool) -> None:
        """Compute one batch, and logits of its last token; of all where they are kept or `guesses` are compared."""
        with kept_until_return() if self._devices is not None else nullcontext():  # where C waits for a worker
            self._decode_here(tokens, guesses)

    def _decode_here(self, tokens: Sequence[int], guesses: bool) -> None:
        end = self.n_tokens + len(tokens)
        self._batch.set_batch(batch=tokens, n_past=self.n_tokens, logits_all=self._logits_all or guesses)
        try:
            with decode_errors(self.model_path), self._stoppable(len(tokens)):
                self._ctx.decode(self._batch)
        except DecodeError as error:
            if error.status == NOT_FINITE:  # it would reach whatever is computed next
                self._ctx.kv_cache_clear()
                self.n_tokens = 0
            raise
        self.input_ids[self.n_tokens : end] = tokens
        if self._logits_all:
            logits = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(len(tokens), self._n_vocab))
            self.scores[self.n_tokens : end] = logits
        self.n_tokens, self._guessed = end, 0
        self._requires_eval = False

    @contextmanager
    def _stoppable(self, n_tokens: int) -> Iterator[None]:
        """Let Ctrl-C end a batch that takes long: what was computed of it is forgotten."""
        # What cannot be taken back, or has been taken by a part of the batch, would be missed.
        takes_back = n_tokens <= self.context_params.n_ubatch and self._takes_back
        if n_tokens < _LONG_BATCH or not takes_back or not is_main_thread():
            yield
            return
        with kept_until_return():
            # Not for good: it is asked at each step of a computation, which costs a token more than a batch.
            llama_cpp.llama_set_abort_callback(self.ctx, aborts, ctypes.c_void_p())
            try:
                yield
            finally:
                llama_cpp.llama_set_abort_callback(self.ctx, _NEVER, ctypes.c_void_p())

    @reading
    @with_arguments_of(llama_cpp.Llama.sample)
    def sample(self, *args: Any, **kwargs: Any) -> int:
        """As llama-cpp-python's."""
        return super().sample(*args, **kwargs)

    @with_arguments_of(llama_cpp.Llama.generate)
    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """As llama-cpp-python's; with ``prefix_reuse="exact"``, only what a one-shot prefill would give is reused.

        Raises:
            TokenError: a number is no token.
            StreamError: another call has used the model between two tokens.
        """
        return self._turn.stream(self._generate(tokens, *args, **kwargs))

    def _generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        tokens = list(tokens)
        check_tokens(tokens, self._n_vocab, self.model_path)
        if _GENERATE.bind(self, tokens, *args, **kwargs).arguments.get("reset", True):
            if self._exact:
                self._drop_inexact(tokens)
            self._restore(tokens)
        return (yield from super().generate(tokens, *args, **kwargs))

    @in_turn
    @with_arguments_of(llama_cpp.Llama.create_chat_completion)
    def create_chat_completion(self, *args: Any, **kwargs: Any) -> Any:
        """As llama-cpp-python's."""
        # Handlers of images evaluate before they complete.
        return super().create_chat_completion(*args, **kwargs)

    def _create_completion(self, *args: Any, **kwargs: Any) -> Generator[Any, None, None]:
        # What a chat in another thread keeps for its completion is not for this one.
        with self._turn.take(reading=True):
            steps: Any = super()._create_completion(*args, **kwargs)
        # From the prompt cache that is looked into to the state that is put there, one text is computed.
        return self._turn.stream(steps)

    @in_turn
    def embed(
        self, input: str | list[str], normalize: bool = False, truncate: bool = False, return_count: bool = False
    ) -> Any:
        """Embed texts; the cache is empty afterwards.

        Args:
            input: a text, or several.
            normalize: divide each embedding by its length. Scores of a model that ranks stay as they are.
            truncate: cut texts that are longer than the context instead of refusing them.
            return_count: return the number of tokens too.

        Returns:
            A list of floats for a text, or without pooling a list of them for each of its tokens; a list of these for
            a list of texts; a pair of that and the number of tokens with `return_count`.

        Raises:
            ContextError: a text is longer than the context.
            EmbeddingError: a text has no tokens, or the model was loaded without ``embedding=True``.
        """
        rows, count = embeddings(self, [input] if isinstance(input, str) else input, truncate)
        if normalize and self.pooling_type() != llama_cpp.LLAMA_POOLING_TYPE_RANK:
            lengths = (np.linalg.norm(row, axis=-1, keepdims=True) for row in rows)
            rows = [row / np.where(length > 0, length, 1) for row, length in zip(rows, lengths, strict=True)]
        lists = [row.tolist() for row in rows]
        result = lists[0] if isinstance(input, str) else lists
        return (result, count) if return_count else result

    @property
    def cache(self) -> BaseLlamaCache | None:
        """Saved states of prompts; those of other models in it do not count."""
        return self._cache

    @cache.setter
    def cache(self, cache: BaseLlamaCache | None) -> None:
        self._cache = None if cache is None else PromptCache(cache, self, self._options)

    def _drop_inexact(self, tokens: Sequence[int]) -> None:
        """Forget the cached tokens from the first on that was computed with another table than `tokens` needs."""
        other = np.flatnonzero(self._computed[: self.n_tokens] != self._tables.of(len(tokens)))
        if other.size:
            self.n_tokens = int(other[0])
            self._requires_eval = True

    def _restore(self, tokens: Sequence[int]) -> None:
        """Take from the store what a prompt begins with."""
        if self._stored is None:
            return
        if self._logits_all:  # those of all tokens are not in the store
            self._stored.restored = 0
            return
        with kept_until_return():
            begin = self._stored.restore(tokens)
            table = self._tables.of(len(tokens)) if self._exact or self._fixed else -1
            self._computed[begin : self.n_tokens] = table

    @property
    def restored_tokens(self) -> int:
        """Tokens of the last prompt of ``generate`` that came from the store."""
        return 0 if self._stored is None else self._stored.restored

    @property
    def stored_tokens(self) -> int | None:
        """Tokens of the cached text that are in the store or on their way; None where nothing is stored."""
        return None if self._stored is None else self._stored.saved

    @property
    def draft_model(self) -> LlamaDraftModel | None:
        """Guesses the next tokens; with tables, only as many as leave the sequence in the table of its own length.

        None for a model that cannot forget guesses that were wrong (a recurrent one), and where the context is full.
        """
        if self._draft is None or self.n_tokens >= self._n_ctx or not self._takes_back:
            return None
        return ClippedDraft(self._draft, self._tables, self._count_guesses)

    @draft_model.setter
    def draft_model(self, model: LlamaDraftModel | None) -> None:
        self._draft = model

    @property
    def _tables(self) -> TableChoice:
        return TableChoice(self, self._n_ctx, self._fixed)  # not kept: the model would be freed by the collector alone

    def _count_guesses(self, guesses: int) -> None:
        self._drafted = guesses

    @property
    def _takes_back(self) -> bool:
        """Whether the last tokens can be forgotten, and were computed without a look at those behind them."""
        keeps_state = llama_cpp.llama_model_is_recurrent(self.model) or llama_cpp.llama_model_is_hybrid(self.model)
        return llama_clex.causal(self.ctx) and not keeps_state

    def __getstate__(self) -> dict[str, Any]:
        draft = None if self._options["prompt_lookup"] else self._draft
        return {**super().__getstate__(), "draft_model": draft, **self._options}

    def _report(self, done: int, total: int) -> None:
        if self.on_prefill is not None:
            self.on_prefill(done, total)
