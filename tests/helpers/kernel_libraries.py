"""The builds of ggml that the tests of a kernel compare: ours, ours without that kernel, and stock."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.flash_attention import Ggml, Library


def libraries(library: type[Library], functions: type[Ggml], **switch: str) -> tuple[Any, Any, Any, Any]:
    """Fixtures of a module, each a library in a process of its own.

    Args:
        library: computes the cases of the kernel.
        functions: what makes a case's numbers and the reference.
        switch: of the environment, with which ours computes as ggml does.

    Returns:
        Ours, ours with the switch, stock, and the functions in this process.
    """
    from clex_local._library import library_path

    @pytest.fixture(scope="module")
    def ours():
        opened = library(library_path())
        yield opened
        opened.close()

    @pytest.fixture(scope="module")
    def disabled():
        opened = library(library_path(), **switch)
        yield opened
        opened.close()

    @pytest.fixture(scope="module")
    def stock(stock_library):
        opened = library(stock_library)
        yield opened
        opened.close()

    @pytest.fixture(scope="module")
    def ggml():
        return functions(library_path())

    return ours, disabled, stock, ggml
