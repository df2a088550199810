"""Where the patched llama.cpp is, and making llama-cpp-python load it."""

from __future__ import annotations

import contextlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from clex_local.errors import ClexError

_VARIABLE = "LLAMA_CPP_LIB_PATH"
_NAMES = {"win32": "llama.dll", "darwin": "libllama.dylib"}


def library_path() -> Path:
    """Directory of the llama.cpp and ggml libraries: that of ``LLAMA_CPP_LIB_PATH``, otherwise our own.

    Raises:
        ClexError: the package was installed without its libraries.
    """
    if chosen := os.environ.get(_VARIABLE):
        return Path(chosen)
    name = _NAMES.get(sys.platform, "libllama.so")
    spec = find_spec("clex_local")
    # An editable install has two locations: the sources, and site-packages with what CMake built.
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / "lib" / name).is_file():
            return Path(location) / "lib"
    raise ClexError(f"{name} is missing from the clex_local package; install it again with `pip install .`")


def use_library() -> None:
    """Make ``import llama_cpp`` load the patched library; one that is missing is an error when it is first needed.

    Raises:
        ClexError: llama_cpp was imported first, with a library that is not patched.
    """
    loaded = sys.modules.get("llama_cpp.llama_cpp")
    if loaded is None:
        with contextlib.suppress(ClexError):
            os.environ.setdefault(_VARIABLE, str(library_path()))
    elif not hasattr(loaded._lib, "llama_clex_n_buckets"):
        raise ClexError("llama_cpp was imported before clex_local and has loaded another llama.cpp; swap the imports")
