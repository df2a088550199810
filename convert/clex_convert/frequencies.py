"""Closed forms of RoPE's inverse frequencies in rad/position, and of the factors on attention that go with them.

Each function returns float64 [d/2] for a rotary dimension d; they agree with ``ROPE_INIT_FUNCTIONS`` of transformers.
An attention factor multiplies cosine and sine, so the logits get its square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def plain(dim: int, base: float) -> Array:
    """base^(-2i/d), RoPE without scaling."""
    return base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def ntk(start: Array, stretch: float) -> Array:
    """NTK-aware scaling: the slowest dimension is stretched all the way, the fastest not at all.

    Args:
        start: [d/2], frequencies to begin with.
        stretch: by how much; the base grows by stretch^(d/(d-2)).
    """
    even = np.arange(0, 2 * start.size, 2, dtype=np.float64)
    return start * stretch ** (-even / (2 * start.size - 2))


def yarn(
    dim: int, base: float, original: int, factor: float, *, beta_fast: float, beta_slow: float, truncate: bool
) -> Array:
    """YaRN (arXiv 2309.00071): plain where a dimension turns often, divided by the factor where it hardly turns.

    Args:
        dim: d.
        base: RoPE base.
        original: context length without scaling, in tokens.
        factor: by how much the context is extended.
        beta_fast: turns in the original context above which a dimension keeps its frequency.
        beta_slow: turns below which its frequency is divided by the factor.
        truncate: whether the ends of the range between them are moved out to whole dimensions.
    """
    ramp = yarn_ramp(dim, base, original, beta_fast=beta_fast, beta_slow=beta_slow, truncate=truncate)
    start = plain(dim, base)
    return start * (1 - ramp) + start / factor * ramp


def yarn_ramp(
    dim: int, base: float, original: int, *, beta_fast: float = 32.0, beta_slow: float = 1.0, truncate: bool = True
) -> Array:
    """How far YaRN divides each frequency by the factor, 0 to 1, whatever that is; arguments are those of `yarn`."""

    def dimension(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    return np.clip((np.arange(dim // 2, dtype=np.float64) - low) / (high - low), 0, 1)


def yarn_attention(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention factor, 0.1 mscale ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1


def llama3(start: Array, original: int, factor: float, *, low_freq_factor: float, high_freq_factor: float) -> Array:
    """Llama 3.1's scaling: divided by the factor where a dimension turns less than low_freq_factor times.

    Args:
        start: [d/2], frequencies to begin with.
        original: context length before the extension, in tokens.
        factor: by how much the slow dimensions are slowed further.
        low_freq_factor: turns in the original context below which a dimension is slowed by the whole factor.
        high_freq_factor: turns above which it keeps its frequency.
    """
    turns = original * start / (2 * math.pi)
    smooth = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return start * (1 - smooth) / factor + start * smooth


def divided(start: Array, factors: Sequence[float]) -> Array:
    """Frequencies divided by a factor each, as LongRoPE and GGUF's frequency factors have it."""
    return start / np.array(factors, dtype=np.float64)


def longrope_attention(factor: float, original: int) -> float:
    """LongRoPE's attention factor, sqrt(1 + ln(factor) / ln(original))."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
