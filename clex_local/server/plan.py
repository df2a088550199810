"""How many conversations are served at once, and how long they may be, before a model is loaded."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from clex_local.errors import ClexError
from clex_local.library.devices import has_gpu
from clex_local.machine import available_bytes, default_threads, maps_weights
from clex_local.model_file.context_plan import ContextPlan, plan_context
from clex_local.model_file.extension import OVERLAY, Extension
from clex_local.model_file.facts import ModelFacts
from clex_local.model_file.memory import cells_of
from clex_local.model_file.model_shape import ModelShape
from clex_local.model_file.split_files import model_bytes
from clex_local.runtime.opening import offloaded_layers
from clex_local.server.options import PARALLEL, ServeOptions
from clex_local.sizes import readable_size

MIB = 2**20
PROMPT_CACHE = 8 * 2**30  # the most that llama-server keeps of earlier prompts unless it is told otherwise
# Short, as batches of up to 8 tokens give each the bits that it has alone; after more agreeing tokens than in
# `PromptLookup`, as llama.cpp does not count how often its guesses are right.
_LOOKUP = {"spec-type": "ngram-simple", "spec-ngram-simple-size-n": "6", "spec-ngram-simple-size-m": "7"}
_EMBEDDINGS = {"--embedding", "--embeddings", "--rerank", "--reranking"}  # options of llama-server
LEAST_PROMPT_CACHE = 64 * MIB  # less than this is of no use
CHECKPOINTS = 32  # of a conversation, unless llama-server is told otherwise
# Three are at the end of a prompt, where the next one mostly goes on, and one is further back.
LEAST_CHECKPOINTS = 4
_CHECKPOINTS = ("--ctx-checkpoints", "-ctxcp", "--swa-checkpoints")  # options of llama-server


@dataclass(frozen=True)
class ServePlan:
    """What is served of one model.

    Attributes:
        path: the file.
        context: the context of one conversation, its cache for all of them.
        parallel: conversations at once.
        covered: tokens that the model covers.
        method: what made its tables, None where it has none.
        prompt_cache: bytes of main memory for earlier prompts.
        checkpoints: of a conversation, None where the model can go back without them.
        limited: whether memory is what keeps conversations from being as long as the model covers.
        embeddings: whether the model makes embeddings instead of text.
        storable: whether the document store takes what it computes, as far as the file tells.
        extension: what its file is extended by.
        mmap: its weights are mapped from the file, not read into memory.
    """

    path: str | os.PathLike[str]
    context: ContextPlan
    parallel: int
    covered: int
    method: str | None
    prompt_cache: int
    checkpoints: int | None = None
    limited: bool = False
    embeddings: bool = False
    storable: bool = True
    extension: Extension | None = None
    mmap: bool = True

    def lines(self) -> list[str]:
        """What a person wants to know, in two lines."""
        first = f"one conversation: {self.context.n_ctx:,} tokens"
        notes = [f"{self.method} tables by length"] if self.method else []
        if self.context.n_ctx < self.covered:
            notes.append(f"the model covers {self.covered:,}{', memory does not' if self.limited else ''}")
        if notes:
            first += f" ({', '.join(notes)})"
        second = f"at once: {self.parallel}"
        if self.context.kv:
            second += f", in {readable_size(self.context.kv, memory=True)} of {self.context.kv_type} cache"
        if self.context.checkpoints:
            second += f", {readable_size(self.context.checkpoints, memory=True)} to go back in it"
        if self.prompt_cache:
            second += f", and {readable_size(self.prompt_cache, memory=True)} for earlier ones"
        return [first, second]


def for_conversations(shape: ModelShape | None, parallel: int, batch: int, checkpoints: int = 0) -> ModelShape | None:
    """A shape that takes the memory of llama-server's for so many conversations, each with so many checkpoints."""
    return shape and replace(shape, sequences=parallel, window_batch=batch, checkpoints=checkpoints)


def plan_service(path: str | os.PathLike[str], options: ServeOptions, available: int | None = None) -> ServePlan:
    """Decide how a model is served.

    Args:
        path: a GGUF file.
        options: what was asked for.
        available: bytes of memory there are; None asks the system.

    Raises:
        ClexError: the file cannot be read, or does not cover ``ctx``, or memory does not hold what was asked for.
    """
    facts = ModelFacts.read(path, options.extend)
    facts.check_context(options.ctx)
    layers = offloaded_layers(options)
    if available is None:
        available = available_bytes()
    weights = model_bytes(path)
    mmap = options.mmap
    if mmap is None:
        mmap = maps_weights(weights, offloaded=bool(options.rpc) or has_gpu(), available=available)
    checkpoints = 0 if facts.pools or _makes_embeddings(options) else asked_checkpoints(options.server_args)

    def plan(parallel: int) -> ContextPlan:
        least = LEAST_CHECKPOINTS if checkpoints is None else checkpoints
        return plan_context(
            for_conversations(facts.shape, parallel, options.batch, least),
            facts.maximum,
            options.ctx,
            kv_type=options.kv_type,
            flash_attn=options.flash_attn,
            batch=options.batch,
            n_gpu_layers=layers,
            weights=weights + min(PROMPT_CACHE, available // 8),
            available=available,
        )

    parallel, context = _plan_parallel(plan, options, facts.maximum)
    left = available * 3 // 4 - weights - context.needed
    if context.checkpoints and checkpoints is None:
        context, checkpoints = _more_checkpoints(context, left // 2)
        left = available * 3 // 4 - weights - context.needed
    prompt_cache = min(PROMPT_CACHE, left // 2)
    return ServePlan(
        path,
        context,
        parallel,
        facts.maximum,
        facts.tables.method if facts.tables else None,
        prompt_cache if prompt_cache >= LEAST_PROMPT_CACHE else 0,
        checkpoints,
        limited=options.ctx is None and context.n_ctx < facts.maximum,
        embeddings=facts.pools,
        storable=not facts.pools and not (facts.shape and any(cache.state for cache in facts.shape.caches)),
        extension=facts.extension,
        mmap=mmap,
    )


def _more_checkpoints(context: ContextPlan, room: int) -> tuple[ContextPlan, int]:
    """A plan with ``LEAST_CHECKPOINTS``, with as many more as there is room for, and how many it has then."""
    of_all = context.checkpoints // LEAST_CHECKPOINTS
    count = LEAST_CHECKPOINTS + max(min(CHECKPOINTS - LEAST_CHECKPOINTS, room // of_all), 0)
    return replace(context, checkpoints=count * of_all), count


def _makes_embeddings(options: ServeOptions) -> bool:
    """Whether llama-server is told to make embeddings of a model that makes text."""
    return not _EMBEDDINGS.isdisjoint(options.server_args)


def asked_checkpoints(server_args: Sequence[str]) -> int | None:
    """How many checkpoints llama-server is told to keep; None where it is not told, or nothing that it takes."""
    given = [value for name, value in pairwise(server_args) if name in _CHECKPOINTS]
    return int(given[-1]) if given and given[-1].isdigit() else None


def _plan_parallel(plan: Callable[[int], ContextPlan], options: ServeOptions, maximum: int) -> tuple[int, ContextPlan]:
    """Conversations at once with their context: as many as were asked for, or as have all that was asked of one."""
    if options.parallel is not None:
        return options.parallel, plan(options.parallel)
    for parallel in range(PARALLEL, 1, -1):
        try:
            found = plan(parallel)
        except ClexError:  # memory does not hold them; what else is wrong is said of one
            continue
        if options.ctx is not None or found.n_ctx == maximum:
            return parallel, found
    return 1, plan(1)


def server_settings(plan: ServePlan, options: ServeOptions, folder: Path) -> dict[str, str]:
    """The options of llama-server, without their dashes, that serve a model as planned; flags have the value ``""``.

    Args:
        plan: of the model.
        options: what was asked for.
        folder: for what the server reads; it is there as long as the server runs.
    """
    context = plan.context
    threads = options.threads or default_threads()
    settings = {
        "model": os.path.abspath(plan.path),
        "alias": Path(plan.path).stem,
        "parallel": str(plan.parallel),
        "ctx-size": str(cells_of(context.n_ctx) * plan.parallel),
        "kv-unified-per-slot": str(context.n_ctx),
        "cache-type-k": context.kv_type,
        "cache-type-v": context.kv_type,
        "flash-attn": "on" if context.flash_attn else "off",
        "batch-size": str(options.batch),
        "ubatch-size": str(options.batch),
        "threads": str(threads),
        "threads-batch": str(options.threads_batch or threads),
        "seed": str(options.seed),
        "cache-ram": str(plan.prompt_cache // MIB),
        # Each conversation has a context of its own: what is idle in one takes no room from others.
        "no-cache-idle-slots": "",
        "fit": "off",
    }
    if not plan.mmap:
        settings["load-mode"] = "none"
    if plan.checkpoints is not None:
        settings["ctx-checkpoints"] = str(plan.checkpoints)
    if plan.extension:
        path = folder / f"{zlib.crc32(os.fsencode(plan.path)):08x}.keys"  # short, as names have to be there
        plan.extension.write(path)
        override = f"{OVERLAY}=str:{path}"
        settings["override-kv"] = f'"{override}"' if "," in override else override
    if options.prompt_lookup:
        settings |= _LOOKUP
    if options.rpc:
        settings["rpc"] = ",".join(options.rpc)
    if options.rpc or has_gpu():
        layers = offloaded_layers(options)
        settings["n-gpu-layers"] = "all" if layers < 0 else str(layers)
    if plan.embeddings:
        settings["embeddings"] = ""
    if plan.embeddings or _makes_embeddings(options):
        # In caches of their own, texts of different lengths are computed in parts, of which llama.cpp pools the last.
        settings["kv-unified"] = ""
    return settings
