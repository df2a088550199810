"""Models opened for an evaluation, whatever kind they are of."""

from __future__ import annotations

from pathlib import Path

from clex_eval.folder import FolderModel, folder_coverage
from clex_eval.gguf import GGUFModel, gguf_coverage
from clex_eval.models import Coverage, Model, Policy
from clex_local.errors import ClexError


def coverage(path: Path) -> Coverage:
    """The context lengths of a GGUF file or a Hugging Face folder, without loading its weights.

    Raises:
        ClexError: it is no model.
    """
    if path.is_dir():
        return folder_coverage(path)
    if not path.exists():
        raise ClexError(f"{path}: no such model: neither a GGUF file nor a Hugging Face folder")
    return gguf_coverage(path)


def open_for_evaluation(
    path: Path,
    *,
    ctx: int = 0,
    kv_type: str | None = "f16",
    policy: Policy = "by-length",
    clamp: bool = False,
    flash_attn: bool | None = None,
    batch: int = 512,
    threads: int | None = None,
    n_gpu_layers: int = 0,
) -> Model:
    """Load a GGUF file or a Hugging Face folder; use it in a ``with`` statement.

    Args:
        path: the file or folder. Folders are computed in float32 by transformers; of the options below, only
            ``ctx``, ``clamp`` and ``threads`` concern them.
        ctx: tokens the context holds; 0 for all that the tables cover, or that the model was trained for. A model
            without tables takes any.
        kv_type: type of the key and value cache, a name from ``clex_local.memory.KV_TYPES``; None takes F16, or
            q8_0 where only that fits.
        policy: ``by-length`` uses the table of each sequence's length, ``fixed`` the last one for all.
        clamp: allow contexts beyond the last table, which is then used.
        flash_attn: None takes what is faster and fits.
        batch: prompt tokens computed at once.
        threads: None takes the physical cores.
        n_gpu_layers: layers computed on a GPU; -1: all.

    Raises:
        ClexError: it cannot be read or loaded.
    """
    covers = coverage(path)
    if path.is_dir():
        if policy == "fixed":
            raise ClexError(f"{path}: transformers chooses the table by the length; --policy fixed needs a GGUF file")
        return FolderModel(path, covers, ctx, clamp=clamp, threads=threads)
    return GGUFModel(
        path,
        covers,
        ctx,
        kv_type=kv_type,
        policy=policy,
        clamp=clamp,
        flash_attn=flash_attn,
        batch=batch,
        threads=threads,
        n_gpu_layers=n_gpu_layers,
    )
