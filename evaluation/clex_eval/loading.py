"""Models opened for an evaluation, whatever kind they are of."""

from __future__ import annotations

from pathlib import Path

from clex_eval.folder import FolderModel, folder_coverage
from clex_eval.gguf import GGUFModel, gguf_coverage
from clex_eval.models import Coverage, Model
from clex_eval.options import EvalOptions
from clex_local.commands.options import takes_options
from clex_local.errors import ClexError


def coverage(path: Path, extend: str | None = None) -> Coverage:
    """The context lengths of a GGUF file or a Hugging Face folder, without loading its weights.

    Args:
        path: the file or folder.
        extend: the tables that a file is to have, see `clex_local.model_file.extension`.

    Raises:
        ClexError: it is no model.
    """
    if path.is_dir():
        if extend:
            raise ClexError(f"{path}: `extend` is for GGUF files; `clex-convert` makes one of a folder")
        return folder_coverage(path)
    if not path.exists():
        raise ClexError(f"{path}: no such model: neither a GGUF file nor a Hugging Face folder")
    return gguf_coverage(path, extend)


@takes_options(EvalOptions)
def open_for_evaluation(path: Path, options: EvalOptions) -> Model:
    """Load a GGUF file or a Hugging Face folder; use it in a ``with`` statement.

    Args:
        path: the file or folder.
        {options}

    Raises:
        ClexError: it cannot be read or loaded.
    """
    covers = coverage(path, options.extend)
    if not path.is_dir():
        return GGUFModel(path, covers, options)
    if options.policy == "fixed":
        raise ClexError(f"{path}: transformers chooses the table by the length; `policy='fixed'` needs a GGUF file")
    return FolderModel(path, covers, options.ctx, clamp=options.clamp, threads=options.threads)
