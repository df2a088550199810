"""Arguments of ``Llama`` that would be dropped without a word."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import llama_cpp

from clex_local.errors import ClexError
from clex_local.memory import KV_TYPES

_NAMES = [name for name in inspect.signature(llama_cpp.Llama.__init__).parameters if name not in ("self", "kwargs")]
_OWN = ["prefix_reuse", "policy", "clamp"]
# Gone from llama-cpp-python, but other packages (LangChain, its own server) still pass them, given or not.
_RETIRED = {"n_parts", "f16_kv", "n_gqa", "rms_norm_eps", "mul_mat_q", "low_vram", "memory_f16", "rpc_servers"}

_INT = 2**31 - 1
_RANGES = {
    "n_ctx": (0, _INT),
    "n_batch": (1, _INT),
    "n_ubatch": (1, _INT),
    "n_threads": (0, _INT),
    "n_threads_batch": (0, _INT),
    "pooling_type": (llama_cpp.LLAMA_POOLING_TYPE_UNSPECIFIED, llama_cpp.LLAMA_POOLING_TYPE_RANK),
    "attention_type": (llama_cpp.LLAMA_ATTENTION_TYPE_UNSPECIFIED, llama_cpp.LLAMA_ATTENTION_TYPE_NON_CAUSAL),
    "rope_scaling_type": (llama_cpp.LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED, llama_cpp.LLAMA_ROPE_SCALING_TYPE_MAX_VALUE),
}

# of ggml's types those that a cache can be written in
_CACHE_TYPES = {code: kind for kind, (code, _, _) in KV_TYPES.items()} | {llama_cpp.GGML_TYPE_IQ4_NL: "iq4_nl"}

# What rotates keys in a model without tables, and the values that change nothing.
_ROPE: dict[str, tuple[float | None, ...]] = {
    "rope_freq_base": (0.0, 10000.0),  # LangChain passes 10000 and 1 where nothing was asked for
    "rope_freq_scale": (0.0, 1.0),
    "rope_scaling_type": (None, llama_cpp.LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED),
    "yarn_ext_factor": (-1.0,),
    "yarn_attn_factor": (-1.0, 1.0),
    "yarn_beta_fast": (-1.0, 32.0),
    "yarn_beta_slow": (-1.0, 1.0),
    "yarn_orig_ctx": (0,),
}


class ArgumentError(ClexError, ValueError):
    """Arguments that a model cannot be loaded with."""


class ContextWarning(UserWarning):
    """A context longer than a model was trained for, without tables for it."""


def file_path(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> str:
    """A path as the bindings take it, with ``~`` for the home folder."""
    text = os.fsdecode(path)
    if text.startswith("~"):
        with contextlib.suppress(RuntimeError):  # there is no such user
            text = str(Path(text).expanduser())
    return _Path(text)


class _Path(str):
    """A path whose name in the file system need not be UTF-8: the bindings encode it as they would a text."""

    __slots__ = ()

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        del encoding, errors
        return super().encode(sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())


def check_names(names: Iterable[str]) -> None:
    """Refuse keywords that llama-cpp-python accepts and drops.

    Raises:
        TypeError: a keyword is no argument of ``Llama``; the message has those that it may stand for.
    """
    for name in names:
        if name not in _NAMES and name not in _RETIRED:
            close = difflib.get_close_matches(name, [*_NAMES, *_OWN], cutoff=0.5)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise TypeError(f"Llama() got an unexpected keyword argument {name!r}{hint}")


def check_values(options: Mapping[str, Any]) -> None:
    """Refuse numbers that llama.cpp does not look at before it divides by them, or reads beside its tables.

    Raises:
        ArgumentError: a size is negative, or a type is none; the message names the argument.
    """
    for name, (lowest, highest) in _RANGES.items():
        value = options.get(name)
        if value is not None and not lowest <= value <= highest:
            raise ArgumentError(f"{name} must be {lowest} to {highest:,}, not {value:,}")
    for name in ("type_k", "type_v"):
        if options.get(name) is not None and options[name] not in _CACHE_TYPES:
            kinds = ", ".join(f"{code} ({kind})" for code, kind in sorted(_CACHE_TYPES.items()))
            raise ArgumentError(f"{name} {options[name]} is no type of a cache, which are {kinds}")


def rope_arguments(options: Mapping[str, Any]) -> list[str]:
    """Those of llama-cpp-python's arguments that ask for another rotation than the file's."""
    given = [name for name, neutral in _ROPE.items() if options.get(name, neutral[0]) not in neutral]
    overrides = options.get("kv_overrides") or {}
    return given + [key for key in overrides if key.startswith("clex.") or ".rope." in key]


def check_rope(path: str, options: Mapping[str, Any]) -> None:
    """Refuse another rotation for a file with tables, which alone decide there.

    Raises:
        ArgumentError: it is asked for; the message names the arguments.
    """
    if given := rope_arguments(options):
        raise ArgumentError(
            f"{path}: {', '.join(given)} would have no effect, since the file's own tables rotate its keys; leave "
            f"{'it' if len(given) == 1 else 'them'} out, or convert the model again for another scaling"
        )
