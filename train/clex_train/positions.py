"""Positions of training sequences: a short sequence spread over the span of a long one."""

from __future__ import annotations

import torch

from clex_train.options import POSITIONS

_CHUNKS = 4


def factor_for(tokens: int, original: int, max_factor: int) -> int:
    """Scaling factor t of a context of so many tokens, ceil(n / L) but at most the largest."""
    return min(max(1, -(-tokens // original)), max_factor)


def draw_positions(
    kind: str,
    length: int,
    original: int,
    factor: int,
    generator: torch.Generator | None = None,
    span: int | None = None,
) -> torch.Tensor:
    """Positions of one training sequence for scaling factor t.

    All but `none` begin at 0 and spread over n * t positions, or s * t where `span` s is more. Where n is above L they
    are divided by n // L, as the authors do it, so that they spread over about L * t.

    Args:
        kind: `random`: n distinct positions, the last of them n * t - 1 (CLEX, arXiv 2310.16450, and the authors'
            code). `uniform`: evenly spaced from 0 to n * t - 1. `none`: 0, 1, ... n - 1. `chunked`: neighbours stay
            neighbours within four contiguous chunks of random sizes, with random skips between them that sum up to at
            most n * t - n; in the manner of PoSE (arXiv 2309.10400), which CLEX's authors do not use.
        length: n, at least 2.
        original: L, the original context length in tokens.
        factor: t.
        generator: where the chance comes from.
        span: s, so that sequences shorter than L reach the positions of longer ones; None for n.

    Returns:
        float32 [n], ascending.
    """
    if kind not in POSITIONS:
        raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, not {kind!r}")
    span = max(length, span or length) * factor

    def numbers(first: int, above: int) -> torch.Tensor:
        return torch.randint(first, above, (_CHUNKS - 1,), generator=generator).sort().values

    if kind == "none":
        return torch.arange(length).float()
    if span == length:
        positions = torch.arange(length)
    elif kind == "random":
        inner = torch.randperm(span - 2, generator=generator)[: length - 2].sort().values + 1
        positions = torch.cat((torch.tensor([0]), inner, torch.tensor([span - 1])))
    elif kind == "uniform":
        positions = torch.arange(length) * (span - 1) / (length - 1)
    else:
        starts, skips = numbers(1, length), numbers(0, span - length + 1)
        skipped = torch.searchsorted(starts, torch.arange(length), right=True)
        positions = torch.arange(length) + torch.cat((torch.tensor([0]), skips))[skipped]
    return positions.float() / max(1, length // original)
