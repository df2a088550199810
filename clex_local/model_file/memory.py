"""The memory a context needs, known before a model is loaded, and the memory there is. Sizes are bytes."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from clex_local.errors import ClexError
from clex_local.model_file.cache_kinds import LayerCache, first_table, layer_caches, recurrent_width
from clex_local.model_file.keys import Metadata, ModelKeys, is_list
from clex_local.model_file.kv_types import KV_TYPES, is_quantized
from clex_local.sizes import readable_size

CELLS = 256  # llama.cpp rounds a context up to a multiple of this


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


def available_bytes() -> int:
    """Bytes that can be allocated now: the system's figure, or what is left under a control group's limit."""
    available = psutil.virtual_memory().available
    for directory, limit_name, usage_name, cache_name in _cgroups():
        try:
            limit = int((directory / limit_name).read_text())
            usage = int((directory / usage_name).read_text())
            stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such limit: a v2 group says "max"
            continue
        # Pages of files that were read count as used, but give way.
        available = min(available, max(limit - usage + int(stat.get(cache_name, 0)), 0))
    return available


def _cgroups() -> list[tuple[Path, str, str, str]]:
    """The control groups this process is in, with all above them: directory and names of its files."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        directory = root / path.lstrip("/")
        # In a container the path is often the host's and does not exist: the root is then the group itself.
        found += [(place, *names) for place in [directory, *directory.parents] if place.is_relative_to(root)]
    return found


def default_threads() -> int:
    """Threads to compute with: the physical cores this process may use."""
    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        usable = os.cpu_count() or 1
    return max(min(usable, psutil.cpu_count(logical=False) or usable), 1)
