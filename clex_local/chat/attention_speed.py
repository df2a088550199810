"""How much longer a token takes for each one before it, measured by computing attention alone."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from clex_local.model_file.model_shape import ModelShape

if TYPE_CHECKING:
    from clex_local.runtime.llama import Llama

_DEPTH = 1024  # positions that are looked back at: enough that what a batch costs by itself does not show
_MOST = 512  # tokens


def measured_per_depth(llm: Llama, shape: ModelShape | None) -> float | None:
    """Seconds that a token of a prompt costs for each token before it; None where that cannot be measured alone.

    It takes a tenth of a second, or some where heads are many. Layers with a sliding window cost the same everywhere.

    Args:
        llm: the model, whose context is left alone.
        shape: of it.
    """
    if shape is None or llm.model_params.n_gpu_layers:
        return None
    from clex_local.library.llama_clex_attention import Attention, attention_time

    types = llm.context_params.type_k, llm.context_params.type_v
    tokens = min(llm.settings.n_ubatch, _MOST)
    layers = Counter(
        (cache.heads, cache.key_length, cache.value_length or cache.key_length)
        for cache in shape.caches
        if cache.heads and not cache.window
    )
    seconds = 0.0
    for sizes, count in layers.items():
        took = attention_time(llm.ctx, Attention(shape.heads, *sizes, *types), tokens, _DEPTH)
        if not took > 0:
            return None
        seconds += count * took / (tokens * _DEPTH)
    return seconds
