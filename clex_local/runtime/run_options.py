"""How a model is run, said once: for ``open_model``, the commands and evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from clex_local.commands.options import documented, option
from clex_local.library.devices import addresses
from clex_local.model_file.extension import extension_text
from clex_local.model_file.kv_types import KV_TYPES


@documented
@dataclass(frozen=True)
class RunOptions:
    """How a model is run."""

    ctx: int | None = option(
        None,
        "Tokens the context holds; 0: all that the model covers.",
        default_text="as many of them as fit in memory",
        metavar="N",
        minimum=0,
    )
    kv_type: str | None = option(
        None,
        f"Type of the key and value cache: {', '.join(KV_TYPES)}.",
        default_text="f16, or q8_0 where only that fits",
        metavar="TYPE",
        choices=list(KV_TYPES),
    )
    flash_attn: bool | None = option(None, "Flash attention.", default_text="where it is faster or needed")
    batch: int = option(512, "Prompt tokens computed at once.", metavar="N", minimum=1)
    threads: int | None = option(
        None, "Threads to compute with.", default_text="the physical cores", metavar="N", minimum=1
    )
    threads_batch: int | None = option(
        None, "Threads to read prompts with.", default_text="as `threads`", metavar="N", minimum=1
    )
    mmap: bool | None = option(
        None,
        "Map the weights from the file, do not read them into memory: they are there at once and shared, but on Linux "
        "decode slower.",
        default_text="where half of the memory does not hold them, and with a GPU",
    )
    n_gpu_layers: int | None = option(
        None,
        "Layers computed on a GPU, or by workers; -1: all.",
        default_text="all if there is either",
        metavar="N",
        minimum=-1,
    )
    rpc: tuple[str, ...] = option(
        (),
        "Workers on other machines, which compute layers in place of this one: where each listens.",
        metavar="HOST:PORT,...",
        parse=addresses,
    )
    prompt_lookup: bool = option(
        False, "Guess tokens that repeat the text so far, and compute them together: faster where an answer quotes it."
    )
    extend: str | None = option(
        None,
        "Make tables in memory for a model that has none: up to so many times its context, such as 4x; ntk:4x takes "
        "another method than clex-convert would.",
        metavar="Nx",
        parse=extension_text,
    )
    store: bool = option(True, "Keep what is computed of texts on disk, and take from there what a prompt begins with.")
    seed: int = option(-1, "Seed of the sampling; -1: a new one each time.", metavar="N", minimum=-1, maximum=2**32 - 2)
    verbose: bool = option(False, "Show llama.cpp's log, and the settings chosen.", short="-v")
