"""Large buffers ask Linux for large pages."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import pytest

from clex_local.library.loading import load_ggml

pytestmark = pytest.mark.native

MIB = 1 << 20


def flags(address: int) -> set[str]:
    """What the kernel knows of the memory at an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise AssertionError(f"nothing is at {address:x}")


@pytest.mark.parametrize("size", [64 * MIB, 100 * MIB + 12345])
def test_large_buffers_ask_for_large_pages(size):
    if sys.platform != "linux" or not Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        pytest.skip("this system has no transparent large pages")
    ggml = load_ggml()
    ggml.ggml_aligned_malloc.argtypes, ggml.ggml_aligned_malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    ggml.ggml_aligned_free.argtypes, ggml.ggml_aligned_free.restype = [ctypes.c_void_p, ctypes.c_size_t], None
    address = ggml.ggml_aligned_malloc(size)
    assert address
    try:
        assert address % 64 == 0
        assert "hg" in flags(address + size // 2)
        ctypes.memset(address, 1, size)
    finally:
        ggml.ggml_aligned_free(address, size)
