"""The memory a context needs, known before a model is loaded, and the memory there is. Sizes are bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from clex_local.errors import ClexError
from clex_local.gguf_file import GGUFFile

# name -> (ggml type, values per block, bytes per block)
KV_TYPES: dict[str, tuple[int, int, int]] = {
    "f16": (1, 1, 2),
    "f32": (0, 1, 4),
    "bf16": (30, 1, 2),
    "q8_0": (8, 32, 34),
    "q5_1": (7, 32, 24),
    "q5_0": (6, 32, 22),
    "q4_1": (3, 32, 20),
    "q4_0": (2, 32, 18),
}

MAX_LAYERS = 512  # llama.cpp's LLAMA_MAX_LAYERS
CELLS = 256  # llama.cpp rounds a context up to a multiple of this


@dataclass(frozen=True)
class ModelShape:
    """What decides how much memory a context takes, from a GGUF file's metadata.

    ``heads_kv``, one number per layer, is zero for layers without a cache.
    """

    layers: int
    heads: int
    heads_kv: tuple[int, ...]
    key_length: int
    value_length: int
    embedding: int
    feed_forward: int
    vocabulary: int

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any] | GGUFFile) -> ModelShape | None:
        """Read the shape; None where the cache is of a kind this estimate does not cover.

        Those are models without attention heads (Mamba), with compressed keys (DeepSeek) or with a sliding window.
        """
        arch = metadata.get("general.architecture")

        def number(key: str, default: Any = None) -> Any:
            return metadata.get(f"{arch}.{key}", default)

        other_caches = ("attention.sliding_window", "attention.kv_lora_rank", "ssm.state_size", "wkv.head_size")
        if any(is_list(value) or value for value in map(number, other_caches)):
            return None
        try:
            layers, embedding = int(number("block_count")), int(number("embedding_length"))
            heads, feed_forward = largest(number("attention.head_count")), largest(number("feed_forward_length"))
            heads_kv = number("attention.head_count_kv", number("attention.head_count"))
            if not 0 < layers <= MAX_LAYERS or heads <= 0:
                return None
            per_layer = [int(n) for n in heads_kv] if is_list(heads_kv) else [int(heads_kv)] * layers
            shape = cls(
                layers=layers,
                heads=heads,
                heads_kv=tuple(per_layer),
                key_length=int(number("attention.key_length", embedding // heads)),
                value_length=int(number("attention.value_length", embedding // heads)),
                embedding=embedding,
                # The experts of a token are computed side by side.
                feed_forward=feed_forward * int(number("expert_used_count") or 1),
                vocabulary=int(number("vocab_size") or array_size(metadata, "tokenizer.ggml.tokens")),
            )
        except (TypeError, ValueError, OverflowError):  # a key is missing or no number
            return None
        sizes = (shape.key_length, shape.value_length, embedding, shape.feed_forward, shape.vocabulary, *per_layer)
        return shape if len(per_layer) == layers and min(sizes) >= 0 else None


def array_size(metadata: Mapping[str, Any] | GGUFFile, key: str) -> int:
    """Elements of an array in a model's metadata."""
    return metadata.array_size(key) if isinstance(metadata, GGUFFile) else len(metadata.get(key) or [])


def is_list(value: Any) -> bool:
    """Whether a metadata value is an array, whatever the reader made of it."""
    return hasattr(value, "__len__") and not isinstance(value, (str, bytes))


def largest(value: Any) -> int:
    """A metadata value that may be one number or one per layer, as one number."""
    return max(int(n) for n in value) if is_list(value) else int(value)


def kv_bytes(shape: ModelShape, n_ctx: int, kv_type: str = "f16", layers: int | None = None) -> int:
    """Bytes of a key and value cache for ``n_ctx`` tokens, of the first ``layers`` layers or all."""
    _, per_block, block_bytes = KV_TYPES[kv_type]
    cells = -(-n_ctx // CELLS) * CELLS
    heads = sum(shape.heads_kv[:layers])
    return cells * heads * (shape.key_length + shape.value_length) * block_bytes // per_block


def kv_type_fits(shape: ModelShape, kv_type: str) -> bool:
    """Whether a cache can be of this type: the heads must hold whole blocks of it."""
    block = KV_TYPES[kv_type][1]
    return shape.key_length % block == 0 and shape.value_length % block == 0


def compute_bytes(shape: ModelShape, n_ctx: int, batch: int = 512, flash_attn: bool = False) -> int:
    """Bytes of llama.cpp's buffer for intermediate results, an estimate from above for ``batch`` tokens at once.

    Without flash attention the scores of every head over the whole context are there at once, which at 100,000
    tokens can be more than the cache itself.
    """
    cells = -(-n_ctx // CELLS) * CELLS
    batch = min(batch, 512, cells)  # the bindings' n_ubatch
    scores = 0 if flash_attn else 4 * shape.heads
    mask = 6 if flash_attn else 4  # float32, and a float16 copy of it
    attention = cells * batch * (scores + mask)
    logits = 4 * batch * shape.vocabulary
    activations = 4 * batch * (2 * shape.feed_forward + 3 * shape.embedding)
    return max(attention, logits) + activations


@dataclass(frozen=True)
class ContextPlan:
    """A context that the model and the memory hold. ``kv`` and ``compute`` are bytes of main memory, 0 if unknown."""

    n_ctx: int
    flash_attn: bool
    kv: int = 0
    compute: int = 0


def plan_context(
    shape: ModelShape | None,
    maximum: int,
    ctx: int | None = None,
    *,
    kv_type: str = "f16",
    flash_attn: bool | None = None,
    batch: int = 512,
    gpu_layers: int = 0,
    weights: int = 0,
    available: int | None = None,
) -> ContextPlan:
    """Decide how many tokens the context holds and whether flash attention is used.

    Args:
        shape: the model's, or None where it is unknown; memory is not checked then.
        maximum: tokens the model covers.
        ctx: tokens asked for; 0 asks for the maximum, None for as much of it as leaves the machine usable.
        kv_type: a name from ``KV_TYPES``.
        flash_attn: None takes what is faster, which on a CPU is without, unless only flash attention makes it fit.
        batch: prompt tokens computed at once.
        gpu_layers: layers that do not use main memory, counted from the last one.
        weights: bytes of the model's weights, which share the memory when ``ctx`` is None.
        available: bytes there are; None asks the system.

    Raises:
        ClexError: the model does not cover ``ctx``, memory does not hold it, or the options contradict each other.
    """
    quantized = KV_TYPES[kv_type][1] > 1
    if quantized and flash_attn is False:
        raise ClexError(f"a {kv_type} cache needs flash attention; drop --no-flash-attn or use --kv-type f16")
    if shape and not kv_type_fits(shape, kv_type):
        raise ClexError(
            f"a {kv_type} cache needs head sizes divisible by 32, this model has {shape.key_length}; "
            "use --kv-type f16, bf16 or f32"
        )
    if ctx and ctx > maximum:
        raise ClexError(f"this model covers {maximum:,} tokens, asked for {ctx:,}")
    choices = [False, True] if flash_attn is None else [flash_attn]
    if flash_attn is None and (quantized or gpu_layers):
        choices = [True]
    if shape is None:
        return ContextPlan(min(maximum, 8192) if ctx is None else ctx or maximum, choices[0])
    if available is None:
        available = available_bytes()

    def plan(n_ctx: int, flash: bool, kv_type: str = kv_type) -> ContextPlan:
        on_cpu = max(shape.layers - gpu_layers, 0)
        kv = kv_bytes(shape, n_ctx, kv_type, on_cpu)
        return ContextPlan(n_ctx, flash, kv, compute_bytes(shape, n_ctx, batch, flash) if on_cpu else 0)

    def largest_plan(budget: int, flash: bool) -> ContextPlan | None:
        low, high = 0, -(-maximum // CELLS)
        while low < high:
            middle = (low + high + 1) // 2
            tried = plan(min(middle * CELLS, maximum), flash)
            low, high = (middle, high) if tried.kv + tried.compute <= budget else (low, middle - 1)
        return plan(min(low * CELLS, maximum), flash) if low else None

    if ctx is None:
        # A quarter stays free for everything else, and the weights must stay in memory to be of use.
        budget = available * 3 // 4 - (weights if gpu_layers < shape.layers else 0)
        plans = [found for flash in choices if (found := largest_plan(budget, flash))]
        if plans:
            return max(plans, key=lambda found: found.n_ctx)
        ctx = min(maximum, 4096)  # weights that fill the memory by themselves still run, slowly, from disk

    wanted = ctx or maximum
    for flash in choices:
        found = plan(wanted, flash)
        if found.kv + found.compute <= available:
            return found
    needed = plan(wanted, choices[-1])
    advice = []
    if (fits := largest_plan(available, choices[-1])) is not None:
        advice.append(f"--ctx {fits.n_ctx}")
    smaller = plan(wanted, True, "q8_0")
    if not quantized and flash_attn is not False and smaller.kv + smaller.compute <= available:
        advice.append("--kv-type q8_0")
    raise ClexError(
        f"a context of {wanted:,} tokens needs {gib(needed.kv + needed.compute)} of memory "
        f"but {gib(available)} are available" + (f"; pass {' or '.join(advice)}" if advice else "")
    )


def gib(size: int) -> str:
    """A size for people: ``1.5 GiB``, ``720 MiB``."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


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
