"""Opening a model with a context that its tables and the memory hold."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from clex_local.commands.options import takes_options
from clex_local.errors import ClexError
from clex_local.library.devices import WorkerError, has_gpu
from clex_local.model_file.context_plan import plan_context
from clex_local.model_file.facts import ModelFacts
from clex_local.model_file.kv_types import KV_TYPES
from clex_local.model_file.split_files import model_bytes
from clex_local.runtime.run_options import RunOptions

if TYPE_CHECKING:
    from clex_local.runtime.llama import Llama


@takes_options(RunOptions)
def open_model(path: str | os.PathLike[str], options: RunOptions) -> Llama:
    """Load a GGUF file with a context that its tables and the memory hold.

    Args:
        path: the file.
        {options}

    Raises:
        ClexError: the file cannot be read or loaded, or does not cover ``ctx``, or memory does not hold it.
    """
    facts = ModelFacts.read(path, options.extend)
    facts.check_context(options.ctx)
    options = on_this_machine(options)
    plan = plan_context(
        facts.shape,
        facts.maximum,
        options.ctx,
        kv_type=options.kv_type,
        flash_attn=options.flash_attn,
        batch=options.batch,
        n_gpu_layers=offloaded_layers(options),
        weights=model_bytes(path),
    )
    options = replace(options, ctx=plan.n_ctx, kv_type=plan.kv_type, flash_attn=plan.flash_attn)
    try:
        return load(path, options)
    except (ClexError, ValueError, RuntimeError, MemoryError) as error:
        where = "a worker" if options.rpc else "the GPU"
        is_memory = offloaded_layers(options) and not isinstance(error, WorkerError)
        hint = f"; if it is {where}'s memory, pass a smaller `n_gpu_layers`" if is_memory else ""
        raise ClexError(f"{error}{hint}") from error


def load(path: str | os.PathLike[str], options: RunOptions, **more: Any) -> Llama:
    """Load a GGUF file as the options say, unchecked and unplanned.

    This is where our names of how a model is run become llama-cpp-python's.

    Args:
        path: the file.
        options: with a ``ctx``.
        more: other arguments of ``Llama``.

    Raises:
        ClexError: the file cannot be read or loaded.
    """
    from clex_local.runtime.llama import Llama

    options = on_this_machine(options)
    kv_type = None if options.kv_type is None else KV_TYPES[options.kv_type][0]
    arguments: dict[str, Any] = {
        "n_ctx": options.ctx or 0,
        "n_batch": options.batch,
        "n_ubatch": options.batch,
        "n_threads": options.threads,
        "n_threads_batch": options.threads_batch,
        "n_gpu_layers": options.n_gpu_layers,
        "rpc": options.rpc,
        "use_mmap": options.mmap,
        "type_k": kv_type,
        "type_v": kv_type,
        "flash_attn": options.flash_attn,
        "prompt_lookup": options.prompt_lookup,
        "store": options.store,
        "extend": options.extend,
        "seed": options.seed,
        "verbose": options.verbose,
    }
    llm = Llama(path, **arguments | more)
    if not options.verbose:
        # The bindings print warnings even when they are told not to.
        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL + 1)
    return llm


def on_this_machine(options: RunOptions) -> RunOptions:
    """The options with a number of layers for GPUs and workers: all where there are any, unless it was given."""
    if options.n_gpu_layers is not None:
        return options
    return replace(options, n_gpu_layers=-1 if options.rpc or has_gpu() else 0)


def offloaded_layers(options: RunOptions) -> int:
    """Layers that are computed on GPUs or by workers, -1 for all."""
    return on_this_machine(options).n_gpu_layers or 0 if options.rpc or has_gpu() else 0
