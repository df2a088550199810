"""Hugging Face folders, computed by transformers in float32: the reference that the runtime is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clex_convert.errors import extra_packages
from clex_convert.model_files import read_config
from clex_convert.scaling import kind_of
from clex_convert.transformers_folder import cache_argument, load_config, load_tokenizer
from clex_convert.weights import settings_from
from clex_eval.models import Coverage, Prefill, Progress, before_stop, likelihoods, plan_prefill
from clex_local.errors import ClexError, one_line


def _scaling(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config of a folder, and what it says of RoPE scaling."""
    path = folder / "config.json"
    if not path.is_file():
        raise ClexError(f"{folder}: not a model folder, it has no config.json")
    config = read_config(path)
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return config, scaling if isinstance(scaling, dict) else {}


def folder_coverage(folder: Path) -> Coverage:
    """The context lengths of a folder, by its config.

    Raises:
        ClexError: it is no model folder, or its config lacks what is needed.
    """
    config, scaling = _scaling(folder)
    original = config.get("max_position_embeddings")
    if isinstance(original, bool) or not isinstance(original, int) or original < 1:
        raise ClexError(f"{folder / 'config.json'}: max_position_embeddings must be a number of tokens")
    if kind_of(scaling) != "clex":
        return Coverage(original, None)
    largest = settings_from(scaling, str(folder / "config.json")).max_factor
    if largest is None:
        raise ClexError(f"{folder / 'config.json'}: its CLEX layer names no max_factor")
    return Coverage(original, original * largest)


class FolderModel:
    """A folder in transformers; see ``Model``."""

    def __init__(self, path: Path, covers: Coverage, ctx: int, *, clamp: bool, threads: int | None) -> None:
        with extra_packages():
            import torch
            import transformers
            from transformers import AutoModelForCausalLM

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.path, self.name = path, path.resolve().name
        self.original_context_length = covers.original
        self.context_length = covers.context_size(ctx, clamp)
        self._largest = covers.maximum // covers.original if covers.maximum else None
        if threads:
            torch.set_num_threads(threads)
        try:
            self._tokenizer: Any = load_tokenizer(path)
            if self._largest is None:
                model: Any = AutoModelForCausalLM.from_pretrained(
                    path, config=load_config(path), dtype=torch.float32, local_files_only=True
                )
            else:
                from clex_train.model import load_model  # pyright: ignore[reportMissingImports]

                model = load_model(path, dtype=torch.float32)
        except ImportError as error:
            raise ClexError(f"{path}: needs the Python package {error.name}: pip install 'clex-local[train]'") from None
        except ClexError:
            raise
        except Exception as error:  # transformers raises anything over a damaged folder
            raise ClexError(f"{path}: transformers cannot load it ({one_line(error)})") from error
        self._model: Any = model.eval()
        self._cache_argument = cache_argument(model)
        begins = self._tokenizer("a").input_ids[:1]
        self.bos: tuple[int, ...] = tuple(begins) if begins == [self._tokenizer.bos_token_id] else ()

    def __enter__(self) -> FolderModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory."""
        self._model = None

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """As ``Model`` says."""
        tokens = self._tokenizer(text, add_special_tokens=False, split_special_tokens=not special).input_ids
        return [*self.bos, *tokens] if bos else tokens

    def detokenize(self, tokens: Sequence[int]) -> str:
        """As ``Model`` says."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def chat(self, message: str, answer: str = "") -> list[int]:
        """As ``Model`` says."""
        if not self._tokenizer.chat_template:
            return self.tokenize(f"{message}\n{answer}" if answer else message, bos=True)
        messages = [{"role": "user", "content": message}]
        try:
            start = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # a template is foreign code and may raise anything
            raise ClexError(f"{self.path}: the chat template refused the message ({one_line(error)})") from error
        if self.bos and tuple(start[:1]) != self.bos:
            start = [*self.bos, *start]
        return [*start, *self.tokenize(answer)]

    def generate(self, prompt: Sequence[int], max_tokens: int, stop: Sequence[str] = ()) -> str:
        """As ``Model`` says."""
        import torch

        total = len(prompt) + max_tokens
        if total > self.context_length:
            raise ClexError(f"{self.path}: {total:,} tokens do not fit in a context of {self.context_length:,}")
        ends = self._model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        tokens: list[int] = []
        cache, fed = self._cache(), list(prompt)
        while len(tokens) < max_tokens:
            with torch.inference_mode():
                logits = self._model(
                    torch.tensor([fed]), **{self._cache_argument: cache}, use_cache=True, logits_to_keep=1
                ).logits
            fed = [int(logits[0, -1].argmax())]
            if fed[0] in ends:
                break
            tokens += fed
            if (before := before_stop(self.detokenize(tokens), stop)) is not None:
                return before
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
        """As ``Model`` says; a chunk, or the whole of a one-shot prefill, is one pass."""
        import torch

        total, step, first = plan_prefill(self, len(tokens), prefill, chunk, last)
        cache = self._cache() if step < total else None
        ids = torch.tensor(tokens[None, :-1].astype(np.int64))
        parts = [np.empty(0)]
        for start in range(0, total, step):
            end = min(start + step, total)
            kept = end - max(start, first)
            with torch.inference_mode():
                found = self._model(
                    ids[:, start:end],
                    **{self._cache_argument: cache},
                    use_cache=cache is not None,
                    logits_to_keep=max(kept, 1),
                )
            if kept > 0:
                parts.append(likelihoods(found.logits[0].float().numpy(), tokens[end - kept + 1 : end + 1]))
            if progress:
                progress(end - start)
        return np.concatenate(parts)

    def scaling_factor(self, n_tokens: int) -> float | None:
        """As ``Model`` says."""
        if self._largest is None:
            return None
        return float(min(max(-(-n_tokens // self.original_context_length), 1), self._largest))

    @staticmethod
    def _cache() -> Any:
        from transformers import DynamicCache

        return DynamicCache()
