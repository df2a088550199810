"""What the tables of a loaded model are, and what they have done."""

from __future__ import annotations

from dataclasses import dataclass

from clex_local.model_file.tables import ContextError


@dataclass(frozen=True)
class ClexState:
    """The tables of a loaded model, and what they have done so far.

    Attributes:
        method: what made the tables: ``clex``, ``ntk``, ...
        original_context: L, tokens covered at t = 1.
        max_context: tokens covered by the last bucket.
        buckets: scaling factor t of each bucket, ascending from 1.0.
        bucket: index of the bucket now in use; None before the first decode.
        rerotations: times that the cached keys were brought to another table.
        rerotated_cells: cached tokens whose keys were re-rotated, counted each time.
        rerotation_ms: time spent on it, milliseconds.
    """

    method: str
    original_context: int
    max_context: int
    buckets: tuple[float, ...]
    bucket: int | None
    rerotations: int
    rerotated_cells: int
    rerotation_ms: float

    def bucket_of(self, n_tokens: int) -> int:
        """Index of the first bucket with t * L >= n_tokens.

        Raises:
            ContextError: n_tokens is beyond the last bucket.
        """
        for index, factor in enumerate(self.buckets):
            if factor * self.original_context >= n_tokens:
                return index
        raise too_long(n_tokens, self.max_context)


def too_long(n_tokens: int, limit: int, place: str = "a context") -> ContextError:
    """The error of tokens that do not fit in a place, to be raised."""
    return ContextError(f"{n_tokens:,} tokens do not fit in {place} of {limit:,}")
