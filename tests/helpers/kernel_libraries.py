"""The builds of ggml that the tests of a kernel compare: ours, ours without that kernel, and stock."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.flash_attention import Ggml, Library

CPUINFO = Path("/proc/cpuinfo")


def tiles_in_software(library: type[Library]) -> Any:
    """A fixture of a module: ours with tile registers (AMX) in software, on any x86-64."""
    from clex_local.library.loading import library_path

    @pytest.fixture(scope="module")
    def tiles():
        if sys.platform != "linux" or platform.machine() != "x86_64":
            pytest.skip("tile registers in software are for x86-64 and Linux")
        opened = library(library_path(), GGML_CLEX_TILES="software")
        yield opened
        opened.close()

    return tiles


def tiles_of_processor(library: type[Library]) -> Any:
    """A fixture of a module: ours where the processor has tile registers."""
    return _where(library, "amx_bf16", "AMX")


def in_pairs(library: type[Library]) -> Any:
    """A fixture of a module: ours with attention of prompts in numbers of 16 bits, where the library has that."""
    from clex_local.library.loading import library_path

    @pytest.fixture(scope="module")
    def opened():
        import llama_cpp

        features = {part.partition(" = ")[0] for part in llama_cpp.llama_print_system_info().decode().split(" | ")}
        if "AVX512_VNNI" not in features and ("AVX2" not in features or "AVX512" in features):
            pytest.skip("this library has neither AVX512-VNNI nor AVX2 alone")
        opened = library(library_path(), GGML_AMX_DISABLE="1")
        yield opened
        opened.close()

    return opened


def _where(library: type[Library], flag: str, name: str, **environment: str) -> Any:
    """A fixture of a module: ours with these variables, where Linux says that the CPU has the instructions."""
    from clex_local.library.loading import library_path

    @pytest.fixture(scope="module")
    def opened():
        if not CPUINFO.exists() or flag not in CPUINFO.read_text():
            pytest.skip(f"this CPU has no {name}")
        opened = library(library_path(), **environment)
        yield opened
        opened.close()

    return opened


def libraries(library: type[Library], functions: type[Ggml], **switch: str) -> tuple[Any, Any, Any, Any]:
    """Fixtures of a module, each a library in a process of its own.

    Args:
        library: computes the cases of the kernel.
        functions: what makes a case's numbers and the reference.
        switch: of the environment, with which ours computes as ggml does.

    Returns:
        Ours with attention in F32, ours with the switch, stock, all with vectors alone, and the functions in this
        process.
    """
    from clex_local.library.loading import library_path

    @pytest.fixture(scope="module")
    def ours():
        opened = library(library_path(), GGML_AMX_DISABLE="1", GGML_CLEX_ATTN_F32="1")
        yield opened
        opened.close()

    @pytest.fixture(scope="module")
    def disabled():
        opened = library(library_path(), GGML_AMX_DISABLE="1", **switch)
        yield opened
        opened.close()

    @pytest.fixture(scope="module")
    def stock(stock_library):
        opened = library(stock_library, GGML_AMX_DISABLE="1")
        yield opened
        opened.close()

    @pytest.fixture(scope="module")
    def ggml():
        return functions(library_path())

    return ours, disabled, stock, ggml
