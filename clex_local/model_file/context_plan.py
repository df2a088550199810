"""The context that a machine's memory holds: its tokens, the type of its cache, flash attention. Sizes are bytes."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from clex_local.errors import ClexError
from clex_local.machine import available_bytes
from clex_local.model_file.kv_types import is_quantized
from clex_local.model_file.memory import (
    CELLS,
    checkpoint_bytes,
    compute_bytes,
    kv_bytes,
    kv_type_fits,
    reaches_second_table,
)
from clex_local.model_file.model_shape import ModelShape
from clex_local.sizes import readable_size


@dataclass(frozen=True)
class ContextPlan:
    """A way to hold a context. ``kv``, ``compute`` and ``checkpoints`` are bytes of main memory, 0 if unknown."""

    n_ctx: int
    flash_attn: bool
    kv_type: str = "f16"
    kv: int = 0
    compute: int = 0
    checkpoints: int = 0

    @property
    def needed(self) -> int:
        """Bytes of main memory in all."""
        return self.kv + self.compute + self.checkpoints


def has_fast_flash_attention(shape: ModelShape | None) -> bool:
    """Whether flash attention is the fastest path on a CPU: native/src/cpu/ggml-clex-attn.cpp computes it."""
    if shape is None or "GGML_CLEX_ATTN_DISABLE" in os.environ:
        return False
    return bool(shape.head_sizes) and all(size % 16 == 0 for size in shape.head_sizes)


def cache_choices(
    shape: ModelShape | None, kv_type: str | None = None, flash_attn: bool | None = None, n_gpu_layers: int = 0
) -> list[tuple[str, bool]]:
    """Types of the cache, each with or without flash attention, the best first; what is given is kept.

    F16 comes first because its keys lose nothing when they are re-rotated. q8_0 is as fast and takes about half the
    memory, or four fifths where keys can be re-rotated.
    With flash attention llama.cpp makes an F16 copy of an F32 cache for every batch (llama-graph.cpp, build_attn_mha).
    """
    if flash_attn is None and (n_gpu_layers or (kv_type != "f32" and has_fast_flash_attention(shape))):
        flash_attn = True
    types = [kv_type] if kv_type else ["f16"]
    if kv_type is None and shape and kv_type_fits(shape, "q8_0"):
        types.append("q8_0")
    flash = [False, True] if flash_attn is None else [flash_attn]
    return [(name, on) for name in types for on in flash if on or not is_quantized(name)]


def layers_in_memory(shape: ModelShape, n_gpu_layers: int) -> int:
    """Layers that use main memory. On a Mac the GPU's memory is the main memory."""
    if sys.platform == "darwin":
        return shape.layers
    return 0 if n_gpu_layers < 0 else max(shape.layers - n_gpu_layers, 0)


def cache_plan(
    shape: ModelShape, n_ctx: int, kv_type: str, flash_attn: bool, batch: int = 512, n_gpu_layers: int = 0
) -> ContextPlan:
    """What a context of ``n_ctx`` tokens takes with this cache."""
    layers = layers_in_memory(shape, n_gpu_layers)
    return ContextPlan(
        n_ctx,
        flash_attn,
        kv_type,
        kv_bytes(shape, n_ctx, kv_type, layers, flash_attn=flash_attn),
        compute_bytes(shape, n_ctx, batch, flash_attn) if layers else 0,
        shape.sequences * shape.checkpoints * checkpoint_bytes(shape, n_ctx, kv_type),
    )


def choose_cache(
    shape: ModelShape | None,
    n_ctx: int,
    *,
    kv_type: str | None = None,
    flash_attn: bool | None = None,
    batch: int = 512,
    n_gpu_layers: int = 0,
    available: int | None = None,
) -> ContextPlan:
    """Choose the type of cache and flash attention for ``n_ctx`` tokens: the first of ``cache_choices`` that fits.

    Where none fits, or the shape is unknown, it is the first of all. The arguments are those of ``plan_context``.
    """
    choices = cache_choices(shape, kv_type, flash_attn, n_gpu_layers)
    if shape is None:
        return ContextPlan(n_ctx, choices[0][1], choices[0][0])
    if available is None:
        available = available_bytes()
    plans = [cache_plan(shape, n_ctx, *choice, batch, n_gpu_layers) for choice in choices]
    return next((plan for plan in plans if plan.needed <= available), plans[0])


def plan_context(
    shape: ModelShape | None,
    maximum: int,
    ctx: int | None = None,
    *,
    kv_type: str | None = None,
    flash_attn: bool | None = None,
    batch: int = 512,
    n_gpu_layers: int = 0,
    weights: int = 0,
    available: int | None = None,
) -> ContextPlan:
    """Decide how many tokens the context holds, the type of its cache, and whether flash attention is used.

    Args:
        shape: the model's, or None where it is unknown; memory is not checked then.
        maximum: tokens the model covers.
        ctx: tokens asked for; 0 asks for the maximum, None for as much of it as leaves the machine usable.
        kv_type: a name from ``KV_TYPES``; None takes F16, or q8_0 where only that holds the context.
        flash_attn: None takes what is faster, unless only flash attention makes it fit.
        batch: prompt tokens computed at once.
        n_gpu_layers: layers computed on a GPU, counted from the last one, -1 for all; 0 where there is no GPU.
        weights: bytes of the model's weights, which share the memory when ``ctx`` is None.
        available: bytes there are; None asks the system.

    Raises:
        ClexError: the model does not cover ``ctx``, memory does not hold it, or the options contradict each other.
    """
    _check_cache(shape, kv_type, flash_attn)
    if ctx and ctx > maximum:
        raise ClexError(f"this model covers {maximum:,} tokens, asked for {ctx:,}")
    if shape is None:
        n_ctx = min(maximum, 8192) if ctx is None else ctx or maximum
        return choose_cache(None, n_ctx, kv_type=kv_type, flash_attn=flash_attn, n_gpu_layers=n_gpu_layers)
    if available is None:
        available = available_bytes()
    choices = cache_choices(shape, kv_type, flash_attn, n_gpu_layers)
    plans = _Plans(shape, maximum, batch, n_gpu_layers)
    if ctx is None:
        # A quarter stays free for everything else, and the weights must stay in memory to be of use.
        budget = available * 3 // 4 - (weights if layers_in_memory(shape, n_gpu_layers) else 0)
        if fitting := [found for choice in choices if (found := plans.largest(budget, choice))]:
            return max(fitting, key=lambda found: found.n_ctx)  # the first of the largest
        ctx = min(maximum, 4096)  # weights that fill the memory by themselves still run, slowly, from disk
    found = next((plan for choice in choices if (plan := plans.of(ctx or maximum, choice)).needed <= available), None)
    if found is None:
        raise _too_large(plans, ctx or maximum, choices[-1], available, other_types=flash_attn is not False)
    return found


def _check_cache(shape: ModelShape | None, kv_type: str | None, flash_attn: bool | None) -> None:
    """Refuse a type of cache that cannot be.

    Raises:
        ClexError: it needs flash attention, or the heads do not hold its blocks.
    """
    if kv_type and is_quantized(kv_type) and flash_attn is False:
        raise ClexError(f"a {kv_type} cache needs flash attention; drop `flash_attn=False` or use `kv_type=f16`")
    if shape and kv_type and not kv_type_fits(shape, kv_type):
        raise ClexError(
            f"a {kv_type} cache needs head sizes divisible by 32, this model has {shape.key_length}; "
            "use `kv_type=f16`, bf16 or f32"
        )


@dataclass(frozen=True)
class _Plans:
    """Plans of contexts of one model: ``maximum`` is the tokens it covers, the others are as for ``cache_plan``."""

    shape: ModelShape
    maximum: int
    batch: int
    n_gpu_layers: int

    def of(self, n_ctx: int, choice: tuple[str, bool]) -> ContextPlan:
        """The plan of a context with one of ``cache_choices``."""
        return cache_plan(self.shape, n_ctx, *choice, self.batch, self.n_gpu_layers)

    def largest(self, budget: int, choice: tuple[str, bool]) -> ContextPlan | None:
        """The plan of the longest context that so many bytes hold."""
        low, high = 0, -(-self.maximum // CELLS)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.of(min(middle * CELLS, self.maximum), choice).needed <= budget
            low, high = (middle, high) if fits else (low, middle - 1)
        return self.of(min(low * CELLS, self.maximum), choice) if low else None


def _too_large(plans: _Plans, n_ctx: int, least: tuple[str, bool], available: int, *, other_types: bool) -> ClexError:
    """The error of a context that memory does not hold, with what would fit.

    Args:
        plans: of the model.
        n_ctx: tokens of the context.
        least: the choice of a cache that takes the least.
        available: bytes there are.
        other_types: whether a cache of another type may be advised.
    """
    advice = []
    if (fits := plans.largest(available, least)) is not None:
        advice.append(f"`ctx={fits.n_ctx}`")
    if other_types:
        # The roundings of q4_0 count twice for keys that were re-rotated.
        names = ["q8_0"] if reaches_second_table(plans.shape, n_ctx) else ["q8_0", "q4_0"]
        smaller = [plans.of(n_ctx, (name, True)) for name in names if kv_type_fits(plans.shape, name)]
        advice += [f"`kv_type={plan.kv_type}`" for plan in smaller if plan.needed <= available][:1]
    plan = plans.of(n_ctx, least)
    needed, there = (readable_size(size, memory=True) for size in (plan.needed, available))
    return ClexError(
        f"a context of {n_ctx:,} tokens needs {needed} of memory ({plan.kv_type} cache) but {there} are available"
        + (f"; pass {' or '.join(advice)}" if advice else "")
    )
