"""Where the patched llama.cpp is, and making llama-cpp-python load it."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from clex_local.errors import ClexError

if TYPE_CHECKING:
    import ctypes

_VARIABLE = "LLAMA_CPP_LIB_PATH"


def library_file(name: str) -> str:
    """What the file of a library is called on this system, such as ``libggml.so`` for ``ggml``."""
    return {"win32": "{}.dll", "darwin": "lib{}.dylib"}.get(sys.platform, "lib{}.so").format(name)


def library_path() -> Path:
    """Directory of the llama.cpp and ggml libraries: that of ``LLAMA_CPP_LIB_PATH``, otherwise our own.

    Raises:
        ClexError: the package was installed without its libraries.
    """
    if chosen := os.environ.get(_VARIABLE):
        return Path(chosen)
    name = library_file("llama")
    if library := _built(f"lib/{name}"):
        return library.parent
    raise ClexError(f"{name} is missing from the clex_local package; install it again with `pip install .`")


def _built(name: str) -> Path | None:
    """A file that the build adds to the package; None where it did not."""
    spec = find_spec("clex_local")
    # An editable install has two locations: the sources, and site-packages with what CMake built.
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / name).is_file():
            return Path(location) / name
    return None


@functools.cache
def load_ggml() -> ctypes.CDLL:
    """The ggml-base library that lies beside libllama.

    Raises:
        ClexError: it is missing, or cannot be loaded.
    """
    import ctypes

    path = library_path() / library_file("ggml-base")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ClexError(f"{path}: cannot be loaded ({error}); install clex-local again") from None


def use_library() -> None:
    """Make ``import llama_cpp`` load the patched library; one that is missing is an error when it is first needed.

    The bindings are those of the release that the library is of, which the package carries, whatever else is installed.

    Nothing is written to the environment: programs that are started from here may have a llama_cpp of their own.

    Raises:
        ClexError: llama_cpp was imported first, with a library that is not patched.
    """
    loaded = sys.modules.get("llama_cpp.llama_cpp")
    if loaded is None:
        sys.meta_path.insert(0, _BindingsFinder())  # pyright: ignore[reportArgumentType]
    elif not hasattr(loaded._lib, "llama_clex_n_buckets"):
        raise ClexError("llama_cpp was imported before clex_local and has loaded another llama.cpp; swap the imports")


class _BindingsFinder:
    """Finds the llama-cpp-python that we carry, and changes two modules of it once they are there."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "llama_cpp":
            ours = _built("_bindings/llama_cpp/__init__.py")
            return PathFinder.find_spec(name, [str(ours.parent.parent)]) if ours else None
        change = _CHANGES.get(name)
        if change is None:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_change(module: ModuleType) -> None:
                execute(module)
                change(module)

            spec.loader.exec_module = execute_and_change
        return spec


def _load_ours(extensions: Any) -> None:
    """Let ``load_shared_library`` take the libraries that we have from our directory."""
    load = extensions.load_shared_library

    def load_shared_library(name: str, directory: Path) -> Any:
        if name in ("llama", "ggml") and not os.environ.get(_VARIABLE):
            directory = library_path()
        library = load(name, directory)
        if name == "llama":
            load_backends(directory)
        return library

    extensions.load_shared_library = load_shared_library


def load_backends(directory: Path) -> None:
    """Load the backends where they are libraries of their own, as in wheels, and print nothing of it.

    Not every program has llama.cpp do it.
    """
    import ctypes

    path = directory / library_file("ggml")
    ggml = ctypes.CDLL(str(path)) if path.is_file() else None
    if ggml is None or hasattr(ggml, "ggml_backend_cpu_reg"):  # that is of a library that it depends on
        return
    if ggml.ggml_backend_reg_count():  # somebody did
        return
    base = load_ggml()
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    base.ggml_log_set(quiet, None)
    try:
        ggml.ggml_backend_load_all()
    finally:
        base.ggml_log_set(None, None)


def _declare_lengths(llama: Any) -> None:
    """Let the bindings' own ``Llama`` declare how long a prompt is before its first batch."""
    if hasattr(sys.modules["llama_cpp.llama_cpp"]._lib, "llama_clex_seq_reserve"):
        from clex_local.library.declared_length import declare_lengths

        declare_lengths(llama.Llama)


_CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "llama_cpp._ctypes_extensions": _load_ours,
    "llama_cpp.llama": _declare_lengths,
}
