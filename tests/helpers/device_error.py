"""How exactly a device computes, for tests that run with all layers on one: its own error, measured without tables."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from helpers.device import GPU_LAYERS, cpu_alone, model_params
from helpers.low_level import Context, Model

KEYS = b"clex."
MARGIN = 3  # times that error; tables are one more input of RoPE, which every backend reads as it is
PROMPTS, STEPS = (50, 120, 200), 4  # tokens: GPUs choose their kernels by the size of a batch


def slack(path: str | Path, **options: int) -> float:
    """How much further two ways to compute the same may be apart than on a CPU: nothing on one.

    Args:
        path: a GGUF file; its tables are left out.
        options: of the context.

    Returns:
        ``MARGIN`` times the largest difference between the logits of the device and those of the CPU.
    """
    return _measured(Path(path), tuple(options.items())) if GPU_LAYERS else 0.0


@functools.cache
def _measured(path: Path, options: tuple[tuple[str, int], ...]) -> float:
    plain = without_tables(path)
    found = []
    for where in (model_params(), cpu_alone()):
        model = Model(plain, **where)
        tokens = np.random.default_rng(0).integers(0, model.n_vocab, max(PROMPTS) + STEPS)
        for prompt in PROMPTS:
            with Context(model, n_ctx=256, **dict(options)) as context:
                found.append(context.steps(tokens, prompt, STEPS))
        model.close()
    device, cpu = np.split(np.array(found), 2)
    return MARGIN * float(np.abs(device - cpu).max())


def without_tables(model: Path) -> Path:
    """The same file with keys that nobody reads in place of its tables."""
    target = model.with_name(f"{model.stem}-plain.gguf")
    if not target.exists():
        target.write_bytes(model.read_bytes().replace(KEYS, b"none."))
    return target
