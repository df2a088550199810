"""Run quantized models on contexts longer than they were trained for.

Importing this package makes llama-cpp-python use the patched llama.cpp. Where the bindings have a library of their own,
import it before ``llama_cpp``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clex_local._library import library_path, use_library
from clex_local.errors import ClexError

if TYPE_CHECKING:
    from clex_local.inspection import Inspection, inspect
    from clex_local.integration import install
    from clex_local.llama import ClexState, Llama

__all__ = ["ClexError", "ClexState", "Inspection", "Llama", "inspect", "install"]

use_library()


def __getattr__(name: str) -> object:
    # Loading the library takes a while, and reading metadata or `--help` does without Llama.
    if name in ("Llama", "ClexState"):
        library_path()  # says what to do where llama_cpp would only miss its library
        from clex_local import llama

        return getattr(llama, name)
    if name == "install":
        library_path()
        from clex_local.integration import install

        return install
    if name in ("Inspection", "inspect"):
        from clex_local import inspection

        return getattr(inspection, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
