"""What this process may use of the machine: its memory and its cores."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil


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


def maps_weights(size: int, *, offloaded: bool, available: int | None = None) -> bool:
    """Whether weights are mapped from their file, not read into memory.

    Linux gives large pages to memory, and to mapped files hardly ever: read, weights of 8 bits decode up to 1.4 times
    as fast. Mapped, they are there at once, processes share them, and they may be larger than memory.

    Args:
        size: bytes that they have.
        offloaded: there is a GPU or a worker that they may go to.
        available: bytes of memory there are; None asks the system.
    """
    if offloaded or sys.platform != "linux":
        return True
    return size > (available_bytes() if available is None else available) // 2


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
