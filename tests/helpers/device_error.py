"""How exactly a device computes, for tests that run with all layers on one: its own error, measured without tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from helpers.low_level import GPU_LAYERS

KEYS = b"clex."
MARGIN = 3  # times that error; tables are one more input of RoPE, which every backend reads as it is


def without_tables(model: Path) -> Path:
    """The same file with keys that nobody reads in place of its tables."""
    target = model.with_name(f"{model.stem}-plain.gguf")
    if not target.exists():
        target.write_bytes(model.read_bytes().replace(KEYS, b"none."))
    return target


def allowance(model: Path, tokens: Sequence[int], lengths: Sequence[int], **options: Any) -> float:
    """What to add to a tolerance that is the CPU's: nothing on a CPU.

    Args:
        model: a file with tables, which are left out.
        tokens: a text.
        lengths: how much of it is computed, one prompt after the other.
        options: of ``Llama``.

    Returns:
        ``MARGIN`` times the largest difference between the logits of the device and those of the CPU.
    """
    if not GPU_LAYERS:
        return 0.0
    rows = [_logits(without_tables(model), tokens, lengths, layers, options) for layers in (GPU_LAYERS, 0)]
    return MARGIN * float(np.abs(rows[0] - rows[1]).max())


def _logits(
    model: Path, tokens: Sequence[int], lengths: Sequence[int], layers: int, options: dict[str, Any]
) -> np.ndarray:
    import warnings

    from clex_local import Llama

    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a context longer than it was trained for
        llm = Llama(str(model), n_ctx=512, logits_all=True, verbose=False, n_gpu_layers=layers, **options)
    with llm:
        for n in lengths:
            llm.reset()
            llm.eval(tokens[:n])
            found.append(llm.scores[n - 4 : n].copy())
    return np.stack(found)
