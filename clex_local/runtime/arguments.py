"""Arguments of ``Llama``: their names, what is refused, and what is chosen where they are not given."""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

import llama_cpp

from clex_local.errors import ClexError
from clex_local.library.devices import has_gpu
from clex_local.machine import default_threads, maps_weights
from clex_local.model_file.context_plan import ContextPlan, choose_cache
from clex_local.model_file.extension import extension_advice
from clex_local.model_file.facts import ModelFacts
from clex_local.model_file.kv_types import KV_TYPES, TYPE_NAMES, is_quantized
from clex_local.model_file.split_files import model_bytes
from clex_local.runtime.bindings_arguments import BindingsArguments

Function = TypeVar("Function", bound=Callable[..., Any])
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_NAMES = [name for name in inspect.signature(llama_cpp.Llama.__init__).parameters if name not in ("self", "kwargs")]
_OWN = ["prefix_reuse", "policy", "clamp", "prompt_lookup", "store", "extend", "rpc"]
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

# Where ours differ from llama-cpp-python's; None: chosen.
_DEFAULTS: dict[str, Any] = {
    "n_ctx": 512,
    "flash_attn": None,
    "type_k": None,
    "type_v": None,
    "n_threads": None,
    "n_threads_batch": None,
    "use_mmap": None,
    "verbose": False,
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
    return _Path(os.path.expanduser(os.fsdecode(path)))


class _Path(str):
    """A path whose name in the file system need not be UTF-8: the bindings encode it as they would a text."""

    __slots__ = ()

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        del encoding, errors
        return super().encode(sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())


def names_every_argument(constructor: Function) -> Function:
    """Decorates the constructor of ``Llama``: ``help`` shows the bindings' arguments by name, with our defaults."""
    own = inspect.signature(constructor)
    theirs = inspect.signature(llama_cpp.Llama.__init__).parameters
    named = [
        argument.replace(default=_DEFAULTS.get(name, argument.default))
        for name, argument in theirs.items()
        if name not in own.parameters
    ]
    parameters = [argument for argument in own.parameters.values() if argument.kind is not argument.VAR_KEYWORD]
    constructor.__dict__["__signature__"] = own.replace(parameters=[*parameters, *named])
    return constructor


def with_arguments_of(
    theirs: Callable[Arguments, Result],
) -> Callable[[Callable[..., Any]], Callable[Arguments, Result]]:
    """Decorates a method that hands its arguments on to the bindings': ``help`` and editors show theirs by name."""

    def decorate(method: Callable[..., Any]) -> Callable[Arguments, Result]:
        method.__dict__["__signature__"] = inspect.signature(theirs)
        return method

    return decorate


def check_choices(prefix_reuse: str, policy: str, prompt_lookup: bool, given: BindingsArguments) -> None:
    """Refuse what our own arguments of ``Llama`` cannot be.

    Raises:
        ValueError: one is none of its values, or contradicts one of the bindings' that was given.
    """
    if prefix_reuse not in ("fast", "exact"):
        raise ValueError(f"prefix_reuse must be 'fast' or 'exact', not {prefix_reuse!r}")
    if policy not in ("by-length", "fixed"):
        raise ValueError(f"policy must be 'by-length' or 'fixed', not {policy!r}")
    if prompt_lookup and given.get("draft_model") is not None:
        raise ValueError("prompt_lookup and draft_model exclude each other: each of them guesses the next tokens")


def checked(given: BindingsArguments) -> dict[str, Any]:
    """The bindings' arguments with our defaults, of which none would be dropped or harm llama.cpp.

    Raises:
        TypeError: a keyword is no argument of ``Llama``.
        ArgumentError: a number is out of range.
    """
    check_names(given)
    arguments: dict[str, Any] = {**_DEFAULTS, **given}
    check_values(arguments)
    return arguments


def completed(arguments: dict[str, Any], facts: ModelFacts, clamp: bool, workers: bool = False) -> dict[str, Any]:
    """The arguments for a file: no context beyond its tables, and what was not given chosen for this machine.

    Args:
        arguments: as `checked` gives them.
        facts: of the file.
        clamp: contexts beyond its tables are wanted.
        workers: other machines compute layers, all of them unless it is said how many.

    Raises:
        ArgumentError: an argument would have no effect on this file.
    """
    if arguments.get("pooling_type") == llama_cpp.LLAMA_POOLING_TYPE_RANK and not facts.has_classifier:
        raise ArgumentError(
            f"{facts.path}: has no classifier, so that it cannot rank (pooling_type "
            f"{llama_cpp.LLAMA_POOLING_TYPE_RANK})"
        )
    n_ctx, threads = arguments["n_ctx"], arguments["n_threads"] or default_threads()
    if facts.tables is not None and not clamp:
        n_ctx = min(n_ctx, facts.tables.max_context_length)
    arguments = {
        **({"n_gpu_layers": -1} if workers else {}),
        **arguments,
        "n_ctx": n_ctx,
        "n_threads": threads,
        "n_threads_batch": arguments["n_threads_batch"] or threads,
    }
    if arguments["use_mmap"] is None:
        arguments["use_mmap"] = maps_weights(model_bytes(facts.path), offloaded=workers or has_gpu())
    chosen = arguments["type_k"] is None and arguments["type_v"] is None
    if arguments["flash_attn"] is None or (arguments["flash_attn"] and chosen):
        plan = _cache_for(arguments, facts, workers)
        arguments["flash_attn"] = plan.flash_attn
        if chosen:
            arguments["type_k"] = arguments["type_v"] = KV_TYPES[plan.kv_type][0]
    return arguments


def _cache_for(arguments: Mapping[str, Any], facts: ModelFacts, workers: bool) -> ContextPlan:
    """Flash attention and the type of cache, where they are not given."""
    # Types that are not among ours are quantized. Of two, the one that needs flash attention or more memory counts.
    codes = (arguments["type_k"], arguments["type_v"])
    given = [TYPE_NAMES.get(code, "q4_0") for code in codes if code is not None]
    return choose_cache(
        facts.shape,
        arguments["n_ctx"] or facts.maximum,
        kv_type=max(given, key=lambda name: (is_quantized(name), KV_TYPES[name][2]), default=None),
        flash_attn=arguments["flash_attn"],
        batch=min(arguments.get("n_batch", 512), arguments.get("n_ubatch", 512)),
        n_gpu_layers=arguments.get("n_gpu_layers", 0) if workers or has_gpu() else 0,
    )


def context_warning(arguments: Mapping[str, Any], facts: ModelFacts, *, clamp: bool, has_tables: bool) -> str | None:
    """What there is to say of a context that was asked for and is longer than the model covers; None if it is not.

    Args:
        arguments: as they were given.
        facts: of the file.
        clamp: the last table is to be used beyond what it covers.
        has_tables: the runtime found tables, or made some.
    """
    n_ctx, maximum = arguments.get("n_ctx", _DEFAULTS["n_ctx"]), facts.maximum
    if not 0 < maximum < n_ctx or arguments.get("vocab_only"):
        return None
    if facts.tables is not None:
        if clamp or "n_ctx" not in arguments:
            return None
        return (
            f"{facts.path}: the context holds {maximum:,} tokens, which its tables cover, and not the {n_ctx:,} asked "
            "for; convert it again for more, or pass clamp=True"
        )
    if has_tables or rope_arguments(arguments):
        return None
    advice = f"pass n_ctx={maximum}"
    if facts.can_have_tables and not facts.baked:
        advice += f", or add tables: {extension_advice(maximum, n_ctx)}"
    made = "baked" if facts.baked else "trained"
    return f"{facts.path}: {made} for {maximum:,} tokens, without tables for a context of {n_ctx:,}; {advice}"


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
