"""GGUF files, computed by the quantized runtime."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clex_eval.models import Coverage, Prefill, Progress, before_stop, likelihoods, plan_prefill
from clex_eval.options import EvalOptions
from clex_local import inspect
from clex_local.errors import ClexError
from clex_local.model_file.extension import extension
from clex_local.runtime.opening import load


def gguf_coverage(path: Path, extend: str | None = None) -> Coverage:
    """The context lengths of a file, by its metadata, or by the tables that it is to have.

    Raises:
        ClexError: it is no model.
    """
    if extend:
        tables = extension(path, extend).tables
        return Coverage(tables.original_context_length, tables.max_context_length)
    found = inspect(path)
    if not found.original_context:
        raise ClexError(f"{path}: not a language model (it has no context length)")
    baked = found.baked.context_length if found.baked else None
    return Coverage(found.original_context, found.max_context if found.tables else None, baked)


class GGUFModel:
    """A GGUF file in the quantized runtime; see ``Model``."""

    def __init__(self, path: Path, covers: Coverage, options: EvalOptions) -> None:
        from jinja2 import TemplateError

        from clex_local.runtime.arguments import ContextWarning
        from clex_local.runtime.low_level import Context

        self.path = path
        self.name = path.name.removesuffix(".gguf")
        self.original_context_length = covers.original
        self.context_length = covers.context_size(options.ctx, options.clamp)
        self._policy, self._maximum = options.policy, covers.maximum
        # The runtime's fixed policy takes the table of the context's size.
        fixed = options.policy == "fixed"
        ctx = max(self.context_length, covers.maximum or 0) if fixed else self.context_length
        try:
            with warnings.catch_warnings():
                # How a model does beyond its training is what is measured.
                warnings.simplefilter("ignore", ContextWarning)
                self._llm = load(
                    path,
                    options.to_run(ctx),
                    n_ubatch=options.batch,
                    policy=options.policy,
                    clamp=options.clamp,
                    prefix_reuse="exact",  # so that what is cached of an earlier prompt changes no answer
                )
        except TemplateError as error:
            raise ClexError(f"{path}: its chat template is not valid: {error}") from error
        import llama_cpp

        vocab = self._llm._model.vocab
        wanted = llama_cpp.llama_vocab_get_add_bos(vocab) and self._llm.token_bos() >= 0
        self.bos = (self._llm.token_bos(),) if wanted else ()
        self._vocab = vocab
        self._context = Context.of(self._llm)

    def __enter__(self) -> GGUFModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory."""
        if self._llm is not None:
            self._context.close()
            self._llm.close()
            self._llm: Any = None

    @cached_property
    def _session(self) -> Any:
        from clex_local.session.session import Sampling, Session

        return Session(self._llm, sampling=Sampling(temp=0))

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """As ``Model`` says."""
        tokens = self._llm.tokenize(text.encode(), add_bos=False, special=special) if text else []
        return [*self.bos, *tokens] if bos else tokens

    def detokenize(self, tokens: Sequence[int]) -> str:
        """As ``Model`` says."""
        return b"".join(map(self._session.piece, tokens)).decode("utf-8", "replace")

    def chat(self, message: str, answer: str = "") -> list[int]:
        """As ``Model`` says."""
        return self._session.prompt(message, answer)

    def generate(self, prompt: Sequence[int], max_tokens: int, stop: Sequence[str] = ()) -> str:
        """As ``Model`` says."""
        import llama_cpp

        from clex_local.session.session import PromptTooLong

        if len(prompt) + max_tokens > self.context_length:
            raise PromptTooLong(len(prompt) + max_tokens, self.context_length)
        tokens: list[int] = []
        stream = self._llm.generate(list(prompt), temp=0.0)
        try:
            for token in stream:
                if llama_cpp.llama_vocab_is_eog(self._vocab, token):
                    break
                tokens.append(token)
                text = self.detokenize(tokens)
                if (before := before_stop(text, stop)) is not None:
                    return before
                if len(tokens) == max_tokens:
                    break
        except RuntimeError as error:  # what the bindings make of a failed llama_decode
            raise ClexError(f"{self.path}: the model could not go on: {error}") from error
        finally:
            stream.close()
        return self.detokenize(tokens)

    def negative_log_likelihoods(
        self,
        tokens: npt.NDArray[np.int32],
        *,
        prefill: Prefill = "one-shot",
        chunk: int | None = None,
        last: int | None = None,
        progress: Progress | None = None,
    ) -> npt.NDArray[np.float64]:
        """As ``Model`` says."""
        total, step, first = plan_prefill(self, len(tokens), prefill, chunk, last)
        llm = self._llm
        llm.reset()  # what it had cached is overwritten
        self._context.clear(data=False)
        parts = [np.empty(0)]
        for start in range(0, total, step):
            end = min(start + step, total)
            if self._maximum:
                self._context.declare(end)
            for a in range(start, end, llm.n_batch):
                b = min(a + llm.n_batch, end)
                self._context.decode_sequence(tokens[a:b], a, first=first)
                rows = b - max(a, first)
                if rows > 0:
                    parts.append(likelihoods(self._context.all_logits(rows), tokens[b - rows + 1 : b + 1]))
                if progress:
                    progress(b - a)
        return np.concatenate(parts)

    def scaling_factor(self, n_tokens: int) -> float | None:
        """As ``Model`` says."""
        clex = self._llm.clex
        if clex is None:
            return None
        return clex.buckets[-1 if self._policy == "fixed" else clex.bucket_of(min(n_tokens, clex.max_context))]
