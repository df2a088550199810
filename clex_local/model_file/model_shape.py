"""What decides how much memory a context of a model takes, from the header of its file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clex_local.model_file.cache_kinds import LayerCache, first_table, layer_caches, recurrent_width
from clex_local.model_file.keys import Metadata, ModelKeys, is_list


@dataclass(frozen=True)
class ModelShape:
    """What decides how much memory a context takes, from a GGUF file's metadata.

    Attributes:
        heads: for queries.
        caches: what each layer keeps of a sequence.
        embedding, feed_forward: numbers that a token is in a layer.
        vocabulary: tokens there are.
        recurrent: see ``recurrent_width``.
        first_table: tokens that the first of several RoPE tables covers, None where there is only one.
        sequences: contexts that are held at once.
        window_batch: tokens of a batch, where layers with a sliding window keep only those and the window; None where
            they keep all (``swa_full``, the bindings' default).
        checkpoints: copies of what windows and states hold that a server keeps of each context, see
            ``checkpoint_bytes``.
    """

    heads: int
    caches: tuple[LayerCache, ...]
    embedding: int
    feed_forward: int
    vocabulary: int
    recurrent: int = 0
    first_table: int | None = None
    sequences: int = 1
    window_batch: int | None = None
    checkpoints: int = 0

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> ModelShape | None:
        """Read the shape; None where the cache is of a kind this estimate does not cover, see ``layer_caches``."""
        keys = ModelKeys(metadata)
        if not keys.architecture:
            return None
        try:
            caches = layer_caches(keys)
            if caches is None:
                return None
            stateful = any(cache.state for cache in caches)
            feed_forward = _largest(keys.get("feed_forward_length", 0 if stateful else None))
            shape = cls(
                heads=_largest(keys.get("attention.head_count", 0 if stateful else None)),
                caches=caches,
                embedding=int(keys.get("embedding_length")),
                # The experts of a token are computed side by side.
                feed_forward=feed_forward * _largest(keys.get("expert_used_count") or 1),
                vocabulary=int(keys.get("vocab_size") or keys.array_size("tokenizer.ggml.tokens")),
                recurrent=recurrent_width(keys),
                first_table=first_table(keys),
            )
        except (TypeError, ValueError, OverflowError, ZeroDivisionError):  # a key is missing or no number
            return None
        sizes = [shape.heads, shape.recurrent, shape.embedding, shape.feed_forward, shape.vocabulary]
        sizes += [size for cache in caches for size in vars(cache).values()]
        return shape if min(sizes) >= 0 and (shape.heads > 0 or stateful) else None

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self.caches)

    @property
    def heads_kv(self) -> tuple[int, ...]:
        """Heads for keys and values of each layer, 0 for one that keeps none."""
        return tuple(cache.heads for cache in self.caches)

    @property
    def key_length(self) -> int:
        """Size of the largest heads."""
        return max(cache.key_length for cache in self.caches)

    @property
    def head_sizes(self) -> set[int]:
        """Sizes of heads that are cached."""
        return {size for cache in self.caches if cache.heads for size in (cache.key_length, cache.value_length)}


def _largest(value: Any) -> int:
    """A metadata value that may be one number or one per layer, as one number."""
    return max(int(n) for n in value) if is_list(value) else int(value)
