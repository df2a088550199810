"""Saved states of prompts, as llama-cpp-python's ``set_cache`` keeps them, of the model that they are of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import llama_cpp
from llama_cpp.llama_cache import BaseLlamaCache

from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.split_files import model_files

if TYPE_CHECKING:
    from llama_cpp.llama import LlamaState


class PromptCache(BaseLlamaCache):
    """A cache of llama-cpp-python's, or one like it, which may hold states of other models too.

    A state of another model is a miss. In llama-cpp-python it is an error, or the wrong state where the models are of
    one size.
    """

    def __init__(self, cache: BaseLlamaCache, llm: llama_cpp.Llama, options: Mapping[str, Any]) -> None:
        super().__init__(cache.capacity_bytes if hasattr(cache, "capacity_bytes") else 0)
        self.cache = cache
        self._capacity = len(llm.input_ids)
        self._first = model_number(llm, options) << 32

    @property
    def cache_size(self) -> int:
        """Bytes of all states, as the cache counts them."""
        return self.cache.cache_size

    def _key(self, tokens: Sequence[int]) -> tuple[int, ...]:
        # Caches look for the longest common beginning, and there is none with the prompts of other models.
        return (tokens[0] + self._first, *tokens[1:]) if len(tokens) else ()

    def __getitem__(self, key: Sequence[int]) -> LlamaState:
        state = self.cache[self._key(key)]
        if state.n_tokens > self._capacity:
            raise KeyError(f"a state of {state.n_tokens:,} tokens")
        return state

    def __contains__(self, key: Sequence[int]) -> bool:
        return self._key(key) in self.cache

    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None:
        self.cache[self._key(key)] = value


def model_number(llm: llama_cpp.Llama, options: Mapping[str, Any]) -> int:
    """A number of 63 bits that tells apart models, adapters, and what else the computed keys depend on.

    ``options`` are those of our ``Llama`` alone.
    """
    given: list[Any] = [
        *(llm.lora_scale, llm.context_params.rope_freq_base, llm.context_params.rope_freq_scale),
        *(getattr(llm.context_params, name) for name in ("rope_scaling_type", "yarn_ext_factor", "yarn_attn_factor")),
        *(getattr(llm.context_params, name) for name in ("yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx")),
        *(options["policy"], options["clamp"], llm.kv_overrides, *filter(None, [options.get("extend")])),
    ]
    digest = hashlib.sha256(repr(given).encode())
    for path in [*model_files(llm.model_path), *filter(None, [llm.lora_path])]:
        with GGUFFile(path) as header, open(path, "rb") as file:
            digest.update(file.read(header.data_offset))
            for tensor in header.tensors:
                # Models that were trained further differ in nothing else, and all of it would take long to read. The
                # middle: a vocabulary begins with tokens that are hardly trained.
                file.seek(header.data_offset + tensor.offset + max(0, tensor.size // 2 - 256))
                digest.update(file.read(min(tensor.size, 512)))
    return int.from_bytes(digest.digest()[:8], "big") >> 1
