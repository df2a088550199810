"""llama.cpp's own conversion scripts.

They and their gguf package come from the same source as the runtime's library. They lie in ``_llama_cpp`` beside this
module, outside the import path, because other packages are named gguf too.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from clex_convert.errors import ConvertError, extra_packages

_lock = threading.Lock()
_loaded: dict[str, ModuleType] = {}


def _ours(name: str) -> bool:
    return name.partition(".")[0] in ("conversion", "gguf")


def _scripts() -> Path:
    # An editable install has two folders in the package's path: the sources and what the build installed.
    for folder in sys.modules[__name__.partition(".")[0]].__path__:
        scripts = Path(folder) / "_llama_cpp"
        if (scripts / "conversion").is_dir() and (scripts / "gguf").is_dir():
            return scripts
    raise ConvertError("llama.cpp's conversion scripts are not installed; install clex-local again")


@contextlib.contextmanager
def conversion_scripts() -> Iterator[tuple[ModuleType, ModuleType]]:
    """Lends llama.cpp's packages ``conversion`` and ``gguf``, and leaves others of that name as they were."""
    scripts = str(_scripts())
    with _lock:
        others = {name: sys.modules.pop(name) for name in list(sys.modules) if _ours(name)}
        variable = os.environ.get("NO_LOCAL_GGUF")
        sys.modules.update(_loaded)
        sys.path.insert(0, scripts)
        os.environ["NO_LOCAL_GGUF"] = "1"  # else they look for the gguf package in llama.cpp's source tree
        try:
            with extra_packages():
                modules = importlib.import_module("conversion"), importlib.import_module("gguf")
            yield modules
        finally:
            _loaded.update({name: sys.modules.pop(name) for name in list(sys.modules) if _ours(name)})
            sys.modules.update(others)
            sys.path.remove(scripts)
            if variable is None:
                del os.environ["NO_LOCAL_GGUF"]
            else:
                os.environ["NO_LOCAL_GGUF"] = variable


def tensor_names(architecture: str, layers: int) -> Callable[[str], str | None]:
    """What the scripts call a tensor in GGUF, by its name in transformers; None for one that they do not rename.

    Their package gguf is not imported, which needs others; two of its modules need none.

    Args:
        architecture: name in GGUF.
        layers: of the model.
    """
    name = f"{__name__}.gguf"
    if name not in sys.modules:
        package = sys.modules[name] = ModuleType(name)
        package.__path__ = [str(_scripts() / "gguf")]
    constants, mapping = (importlib.import_module(f"{name}.{module}") for module in ("constants", "tensor_mapping"))
    number = next(number for number, known in constants.MODEL_ARCH_NAMES.items() if known == architecture)
    names = mapping.get_tensor_name_map(number, layers)
    return lambda tensor: names.get_name(tensor, (".weight", ".bias"))


@contextlib.contextmanager
def quiet_scripts(verbose: bool) -> Iterator[None]:
    """Keeps the scripts' and transformers' messages off the terminal, unless they are wanted."""
    import transformers

    loggers = [logging.getLogger(name) for name in ("hf-to-gguf", "gguf", "transformers")]
    before = [logger.level for logger in loggers]
    verbosity = transformers.logging.get_verbosity()
    for logger in loggers:
        logger.setLevel(logging.INFO if verbose else logging.CRITICAL)
    if not verbose:
        transformers.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
        transformers.logging.set_verbosity(verbosity)
