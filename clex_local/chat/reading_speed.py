"""How fast prompts are read: what was measured, remembered for the next time, and what it lets expect.

A token costs more the more tokens it looks back at, a + b * depth seconds. Both numbers are fitted to what was measured
at each depth, by relative errors, so that short prompts count as much as long ones. At the beginning nothing is known
of the depth: the fit then leans on what attention alone takes on this machine, or, where that is not to be measured, on
the share that it has of the computation by the shape of the model; the more was measured at depth, the less.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from clex_local.errors import ClexError
from clex_local.model_file.model_shape import ModelShape
from clex_local.private_files import write_private
from clex_local.store.cache_folder import cache_folder, make_cache_folder

STEP = 1024  # tokens of depth that are averaged
_REMEMBERED = 4096  # tokens that an average counts as at most, so that it follows a machine that changes
_MODELS = 100  # sets of averages that are kept
_VERSION = 1

# What is known before of how the cost grows, as so many tokens whose cost were off by as much as the growth is: a batch
# of 512 is believed to 5 %, attention by itself to 10 %, and the shape not even to the factor 2.
_ALONE, _BY_SHAPE = 128.0, 1.0
_UNKNOWN_DEPTH = 4096  # tokens at which no growth at all is expected, where even the shape is unknown
# Time of a multiplication in attention, as a part of that of one with a weight: 0.8 to 3, by processor and weights.
_ATTENTION = 1.5


@dataclass(frozen=True)
class ReadingSpeed:
    """Seconds that a token costs: ``base + per_depth * depth``, depth being the tokens before it."""

    base: float
    per_depth: float

    def seconds(self, start: int, end: int) -> float:
        """The time that the tokens from one depth to another take."""
        return (end - start) * (self.base + self.per_depth * (start + end) / 2)


@dataclass(frozen=True)
class Growth:
    """What is known of ``per_depth`` before it was measured at depth.

    Attributes:
        share: what it is of ``base`` as far as the shape of the model tells.
        alone: what it is as far as attention by itself tells, in seconds; None where that was not measured.
    """

    share: float = 0.0
    alone: float | None = None


@dataclass
class Measured:
    """Seconds per token by depth.

    Attributes:
        steps: of each `STEP` of depth, counted from 0, the tokens that were measured and their mean depth and cost.
    """

    steps: dict[int, tuple[float, float, float]] = field(default_factory=dict)

    def add(self, start: int, end: int, seconds: float) -> None:
        """Take in that the tokens from one depth to another took so long."""
        if end > start and 0 < seconds < math.inf:
            self._add((start + end) // 2 // STEP, end - start, (start + end) / 2, seconds / (end - start))

    def _add(self, step: int, tokens: float, depth: float, cost: float) -> None:
        before, *mean = self.steps.get(step, (0.0, 0.0, 0.0))
        part = tokens / (before + tokens)
        depth, cost = (old + part * (new - old) for old, new in zip(mean, (depth, cost), strict=True))
        self.steps[step] = (before + tokens, depth, cost)

    def merged(self, other: Measured, scale: float = 1.0, most: float = _REMEMBERED) -> Measured:
        """Both, this one's costs scaled and each of its steps worth no more than so many tokens."""
        result = Measured({step: (min(n, most), depth, cost * scale) for step, (n, depth, cost) in self.steps.items()})
        for step, values in other.steps.items():
            result._add(step, *values)
        return result

    @property
    def deepest(self) -> float:
        """Tokens of depth up to which something was measured."""
        return max((depth for _, depth, _ in self.steps.values()), default=0.0)

    def speed(self, growth: Growth) -> ReadingSpeed | None:
        """The speed that fits best; None where nothing was measured.

        Args:
            growth: what is known besides.
        """
        if not self.steps:
            return None
        points = list(self.steps.values())
        # The least squares of (cost - a - b d) / cost for each token, and of (b - expected) / expected.
        expected, weight = self._expected(growth)
        n, nd, ndd = (sum(tokens * depth**power / cost**2 for tokens, depth, cost in points) for power in range(3))
        c, cd = (sum(tokens * depth**power / cost for tokens, depth, cost in points) for power in range(2))
        ndd, cd = ndd + weight, cd + weight * expected
        base, per_depth = (c * ndd - nd * cd) / (n * ndd - nd * nd), (n * cd - nd * c) / (n * ndd - nd * nd)
        if per_depth < 0:  # noise
            return ReadingSpeed(sum(n * cost for n, _, cost in points) / sum(n for n, _, _ in points), 0.0)
        return ReadingSpeed(base, per_depth) if base >= 0 else ReadingSpeed(0.0, cd / ndd)

    def _expected(self, growth: Growth) -> tuple[float, float]:
        """What ``per_depth`` is expected to be, and the weight of the square of what it is off by."""
        if growth.alone:
            return growth.alone, _ALONE / growth.alone**2
        _, depth, cost = self.steps[min(self.steps)]
        if growth.share:
            by_shape = growth.share * cost / (1 + growth.share * depth)
            return by_shape, _BY_SHAPE / by_shape**2
        return 0.0, _BY_SHAPE * (_UNKNOWN_DEPTH / cost) ** 2


def attention_share(shape: ModelShape | None) -> float:
    """What looking back at one token costs, as a part of what a token costs without: an estimate from the shape."""
    if shape is None:
        return 0.0
    width, looks, weights = shape.embedding, 0, 0
    for cache in shape.caches:
        sizes = cache.key_length + cache.value_length if cache.heads else 0
        looks += 0 if cache.window else shape.heads * sizes
        weights += width * ((shape.heads + cache.heads) * sizes + 3 * shape.feed_forward)
    return _ATTENTION * looks / max(weights, 1)


def speeds_file() -> Path:
    """Where speeds are remembered."""
    return cache_folder() / "speeds.json"


def remembered(key: str) -> Measured:
    """What was measured under a key; nothing where the file is missing or damaged."""
    return _parsed(_entries().get(key))


def remember(key: str, measured: Measured) -> None:
    """Add to what was measured under a key. It is a convenience: where it cannot be written, it is not."""
    if not measured.steps:
        return
    entries = _entries()
    whole = _parsed(entries.pop(key, None)).merged(measured)
    steps = {str(step * STEP): [round(n), round(depth), float(f"{cost:.4g}")] for step, (n, depth, cost) in
             sorted(whole.steps.items())}  # fmt: skip
    entries[key] = {"measured": datetime.now(timezone.utc).isoformat(timespec="seconds"), "depths": steps}
    kept = dict(list(entries.items())[-_MODELS:])
    about = "tokens, mean depth and seconds per token of prompts that were read, by depth"
    text = json.dumps({"version": _VERSION, "about": about, "speeds": kept}, indent=1, ensure_ascii=False)
    with suppress(ClexError, OSError, UnicodeError):
        make_cache_folder()
        write_private(speeds_file(), text + "\n")


def _entries() -> dict[str, Any]:
    try:
        value = json.loads(speeds_file().read_text("utf-8"))
    except (ClexError, OSError, ValueError, RecursionError):
        return {}
    right = isinstance(value, Mapping) and value.get("version") == _VERSION and isinstance(value.get("speeds"), dict)
    return value["speeds"] if right else {}


def _parsed(entry: Any) -> Measured:
    measured = Measured()
    depths = entry.get("depths") if isinstance(entry, Mapping) else None
    for step, values in depths.items() if isinstance(depths, Mapping) else ():
        with suppress(TypeError, ValueError, OverflowError):
            tokens, depth, cost = map(float, values)
            if 1 <= tokens < 1e9 and 0 <= depth < 1e9 and 1e-9 < cost < 1e6:
                measured.steps[int(step) // STEP] = (tokens, depth, cost)
    return measured
