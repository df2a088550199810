"""Malformed and hostile model files: one line of error or a right answer, in bounded time and memory, never a crash."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from clex_local import ClexError, Llama
from helpers import hostile_gguf as hostile
from helpers.gguf_maker import gguf_bytes

pytestmark = [pytest.mark.runtime, pytest.mark.convert]

FILES = {
    "truncations": hostile.truncations,
    "cut-models": hostile.cut_models,
    "counts": hostile.counts,
    "structures": hostile.structures,
    "values": hostile.values,
    "half-the-values": lambda: islice(hostile.values(), 0, None, 2),
    "some-values": lambda: islice(hostile.values(), 0, None, 7),
    "flips": lambda: hostile.flips(400),
}
RUNS = [
    *(("read", files) for files in ("truncations", "counts", "structures", "values", "flips")),
    *(("load", files) for files in ("cut-models", "counts", "structures", "half-the-values", "flips")),
    *(("convert", files) for files in ("cut-models", "counts", "structures", "some-values", "flips")),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sound.gguf").write_bytes(gguf_bytes(*hostile.models()))
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


def check(mode: str, folder: Path) -> list[str]:
    """Opens every file; returns the outcomes, of which none is a crash, a traceback or a shortage of memory."""
    outcomes = dict(hostile.run(mode, sorted(folder.glob("*.gguf"))))
    bad = {
        path.name: outcome
        for path, outcome in outcomes.items()
        if outcome.startswith(("DIED", "RAISED")) or "alloc" in outcome
    }
    assert not bad
    return list(outcomes.values())


@pytest.mark.parametrize(("mode", "files"), RUNS, ids=map("-".join, RUNS))
def test_a_malformed_file(mode: str, files: str, folder: Path) -> None:
    hostile.write(folder, iter(FILES[files]()))
    outcomes = check(mode, folder)
    assert sum(outcome != "ok" for outcome in outcomes) > len(outcomes) / 8


@pytest.mark.parametrize("mode", ["read", "load", "convert"])
def test_a_sparse_file_that_claims_everything(mode: str, folder: Path) -> None:
    hostile.write_sparse(folder)
    assert "ok" not in check(mode, folder)


def test_the_sound_file_is_one(folder: Path) -> None:
    hostile.write(folder, iter([("sound", (folder.parent / "sound.gguf").read_bytes())]))
    for mode in hostile.MODES:
        assert check(mode, folder) == ["ok"]


def test_an_assert_that_fails_while_loading_is_an_error_that_names_it(tmp_path: Path) -> None:
    keys, tensors = hostile.models()
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes({**keys, "llama.expert_count": np.uint32(3)}, tensors))
    for _ in range(2):
        with pytest.raises(ClexError, match=r"m\.gguf: error loading model: .*GGML_ASSERT\(n_expert_used_max > 0\)"):
            Llama(str(path), verbose=False)
