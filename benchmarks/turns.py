"""Measurements that take turns, so that what else the machine does meets all of them alike, and ratios of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from statistics import quantiles
from typing import NamedTuple, TypeVar

Name = TypeVar("Name", bound=Hashable)
Value = TypeVar("Value")


def in_turns(
    sides: Mapping[Name, Callable[[], Value]], rounds: int, *, warm_up: int = 0, limit: float = math.inf
) -> dict[Name, list[Value]]:
    """What each side measures in each round; whoever comes first in one comes last in the next.

    Args:
        sides: their measurements.
        rounds: how many count.
        warm_up: rounds before them, which do not.
        limit: seconds after which there are no more rounds, but two at least.
    """
    found: dict[Name, list[Value]] = {name: [] for name in sides}
    began = time.monotonic()
    for turn in range(warm_up + rounds):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            found[name].append(sides[name]())
        if turn > warm_up and time.monotonic() - began > limit:
            break
    return {name: values[warm_up:] for name, values in found.items()}


class Quartiles(NamedTuple):
    """The median of measurements, and how far half of them are from it."""

    low: float
    median: float
    high: float

    def text(self, digits: int = 2) -> str:
        """As the tables have it."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def quartiles(values: Iterable[float]) -> Quartiles:
    """Of two measurements at least."""
    return Quartiles(*quantiles(values, n=4, method="inclusive"))


def speedup(slow: Iterable[float], fast: Iterable[float]) -> Quartiles:
    """How many times as fast: the quotients of the times that two sides took in the same rounds."""
    return quartiles([a / b for a, b in zip(slow, fast, strict=True)])
