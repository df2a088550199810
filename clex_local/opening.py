"""Opening a model with a context that its tables and the memory hold."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from clex_local.baked import baked_in
from clex_local.errors import ClexError
from clex_local.gguf_file import GGUFFile
from clex_local.memory import KV_TYPES, ModelShape, plan_context, trained_context
from clex_local.options import takes_options
from clex_local.run_options import RunOptions
from clex_local.tables import Tables, named_tables

if TYPE_CHECKING:
    from clex_local.llama import Llama


@dataclass(frozen=True)
class ModelFacts:
    """What a file says that decides how its model can be run.

    Attributes:
        path: the file.
        tables: its ``clex.*`` tables, or None.
        trained: tokens that it says the model was trained for, 0 where it does not say.
        baked: whether its frequencies are one table that was baked in, for ``trained`` tokens.
        shape: what decides the memory; None for a kind of cache that the estimate does not cover.
    """

    path: str | os.PathLike[str]
    tables: Tables | None
    trained: int
    baked: bool
    shape: ModelShape | None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ModelFacts:
        """Read it.

        Raises:
            GGUFError: the file is missing, not GGUF, or damaged.
            TablesError: its tables break a rule of the metadata.
        """
        with GGUFFile(path) as file:
            tables, shape = named_tables(file, path), ModelShape.from_metadata(file)
            return cls(path, tables, trained_context(file), baked_in(file) is not None, shape)

    @property
    def maximum(self) -> int:
        """Tokens that the model covers, 0 where the file does not say."""
        return self.tables.max_context_length if self.tables else self.trained

    def check_context(self, ctx: int | None) -> None:
        """Refuse a context that the model does not cover.

        Raises:
            ClexError: it does not, or is no language model.
        """
        path, maximum = self.path, self.maximum
        if not maximum:
            raise ClexError(f"{path}: not a language model (it has no context length)")
        if not ctx or ctx <= maximum:
            return
        if self.tables:
            reach = f"{self.tables.original_context_length:,} at t = 1, t up to {self.tables.scaling_factors[-1]:g}"
            raise ClexError(f"{path} covers {maximum:,} tokens ({reach}), not the {ctx:,} asked for")
        if self.baked:
            raise ClexError(
                f"{path} is baked for {maximum:,} tokens, not the {ctx:,} asked for; "
                "convert the model that it was made of"
            )
        raise ClexError(
            f"{path} was trained for {maximum:,} tokens and has no tables to cover the {ctx:,} asked for; "
            "`clex-convert MODEL OUT.gguf` adds them"
        )


@takes_options(RunOptions)
def open_model(path: str | os.PathLike[str], options: RunOptions) -> Llama:
    """Load a GGUF file with a context that its tables and the memory hold.

    Args:
        path: the file.
        {options}

    Raises:
        ClexError: the file cannot be read or loaded, or does not cover ``ctx``, or memory does not hold it.
    """
    facts = ModelFacts.read(path)
    facts.check_context(options.ctx)
    options = on_this_machine(options)
    plan = plan_context(
        facts.shape,
        facts.maximum,
        options.ctx,
        kv_type=options.kv_type,
        flash_attn=options.flash_attn,
        batch=options.batch,
        n_gpu_layers=options.n_gpu_layers or 0 if supports_gpu() else 0,
        weights=os.path.getsize(path),
    )
    options = replace(options, ctx=plan.n_ctx, kv_type=plan.kv_type, flash_attn=plan.flash_attn)
    try:
        return load(path, options)
    except (ClexError, ValueError, RuntimeError, MemoryError) as error:
        gpu = supports_gpu() and options.n_gpu_layers
        hint = "; if it is the GPU's memory, pass a smaller `n_gpu_layers`" if gpu else ""
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
    from clex_local.llama import Llama

    options = on_this_machine(options)
    kv_type = None if options.kv_type is None else KV_TYPES[options.kv_type][0]
    arguments: dict[str, Any] = {
        "n_ctx": options.ctx or 0,
        "n_batch": options.batch,
        "n_threads": options.threads,
        "n_threads_batch": options.threads_batch,
        "n_gpu_layers": options.n_gpu_layers,
        "type_k": kv_type,
        "type_v": kv_type,
        "flash_attn": options.flash_attn,
        "seed": options.seed,
        "verbose": options.verbose,
    }
    llm = Llama(path, **arguments | more)
    if not options.verbose:
        # The bindings print warnings even when they are told not to.
        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL + 1)
    return llm


def on_this_machine(options: RunOptions) -> RunOptions:
    """The options with a number of layers for the GPU: all where there is one, unless it was given."""
    if options.n_gpu_layers is not None:
        return options
    return replace(options, n_gpu_layers=-1 if supports_gpu() else 0)


def supports_gpu() -> bool:
    """Whether the library can compute on a GPU."""
    import llama_cpp

    return llama_cpp.llama_supports_gpu_offload()
