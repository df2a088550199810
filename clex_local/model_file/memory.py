"""The bytes that a context of a model takes, known before the model is loaded."""

from __future__ import annotations

from clex_local.model_file.cache_kinds import LayerCache
from clex_local.model_file.kv_types import KV_TYPES, is_quantized
from clex_local.model_file.model_shape import ModelShape

CELLS = 256  # llama.cpp rounds a context up to a multiple of this


def cells_of(n_ctx: int) -> int:
    """Tokens that a cache has room for: llama.cpp rounds up."""
    return -(-n_ctx // CELLS) * CELLS


def kv_bytes(
    shape: ModelShape, n_ctx: int, kv_type: str = "f16", layers: int | None = None, *, flash_attn: bool = True
) -> int:
    """Bytes of what the first ``layers`` layers, or all, keep of ``n_ctx`` tokens.

    A quantized cache that reaches a second RoPE table keeps keys twice, in the table in use and as they were computed;
    those of sliding windows use no table. Without flash attention all values take the room of the largest.
    """
    _, per_block, block_bytes = KV_TYPES[kv_type]
    twice = is_quantized(kv_type) and reaches_second_table(shape, n_ctx)
    largest = max(cache.heads * cache.value_length for cache in shape.caches)
    total = 0
    for cache in shape.caches[:layers]:
        keys = cache.heads * cache.key_length * (2 if twice and not cache.window else 1)
        values = cache.heads * cache.value_length
        if values and not flash_attn:
            values = largest
        total += cache_cells(shape, cache, n_ctx) * (keys + values) * block_bytes // per_block + cache.state
    return shape.sequences * total


def checkpoint_bytes(shape: ModelShape, n_ctx: int, kv_type: str = "f16") -> int:
    """Bytes of one of llama-server's context checkpoints, which are in main memory whatever a GPU computes.

    What a sequence lost in a sliding window, or went over in a state, is not there to go back to: a checkpoint has the
    window's keys and values, and the states, at one position. 0 where all layers keep everything.
    """
    _, per_block, block_bytes = KV_TYPES[kv_type]
    total = 0
    for cache in shape.caches:
        numbers = min(cache.window, n_ctx) * cache.heads * (cache.key_length + cache.value_length)
        total += numbers * block_bytes // per_block + cache.state
    return total


def cache_cells(shape: ModelShape, cache: LayerCache, n_ctx: int) -> int:
    """Tokens that a layer has room for."""
    if cache.window and shape.window_batch is not None:
        n_ctx = min(n_ctx, cache.window + shape.window_batch)
    return cells_of(n_ctx)


def reaches_second_table(shape: ModelShape, n_ctx: int) -> bool:
    """Whether a sequence can outgrow the first of several RoPE tables."""
    return shape.first_table is not None and n_ctx > shape.first_table


def kv_type_fits(shape: ModelShape, kv_type: str) -> bool:
    """Whether a cache can be of this type: the heads must hold whole blocks of it."""
    block = KV_TYPES[kv_type][1]
    return all(size % block == 0 for size in shape.head_sizes)


def compute_bytes(shape: ModelShape, n_ctx: int, batch: int = 512, flash_attn: bool = False) -> int:
    """Bytes of llama.cpp's buffer for intermediate results, an estimate from above for ``batch`` tokens at once.

    Without flash attention the scores of every head over the whole context are there at once, which at 100,000
    tokens can be more than the cache itself.
    """
    cells = {cache.window > 0: cache_cells(shape, cache, n_ctx) for cache in shape.caches if cache.heads}
    batch = min(batch, cells_of(n_ctx))
    scores = 0 if flash_attn else 4 * shape.heads
    mask = 6 if flash_attn else 4  # float32, and a float16 copy of it; layers with a window have one of their own
    attention = batch * (max(cells.values(), default=0) * scores + sum(cells.values()) * mask)
    logits = 4 * batch * shape.vocabulary
    activations = 4 * batch * (2 * shape.feed_forward + 3 * shape.embedding + shape.recurrent)
    return max(attention, logits) + activations
