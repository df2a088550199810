"""The trained model in examples/bytes: what it learned shows in transformers and in the quantized runtime alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from clex_convert import convert
from clex_eval.options import Length
from clex_eval.ppl import perplexity
from helpers.device import GPU_LAYERS

pytestmark = [pytest.mark.train, pytest.mark.evaluation]

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples" / "bytes"
L = 256  # bytes, its original context


@pytest.fixture(scope="module")
def text() -> str:
    """English that it was not trained on."""
    return (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def read(models: list[Path], text: str, factors: tuple[int, ...], **options) -> list[float]:
    lengths = [Length(tokens=L * t) for t in factors]
    rows = perplexity(models, text, lengths=lengths, threads=1, n_gpu_layers=GPU_LAYERS, **options)
    return [row["perplexity"] for row in rows]


def gguf(folder: Path, **options) -> Path:
    path = folder / "bytes.gguf"
    convert(MODEL, path, pre_tokenizer="gpt-2", check="none", **options)
    return path


def test_the_runtime_predicts_as_transformers_does_at_every_length(tmp_path, text):
    factors = (1, 2, 4, 8, 16)
    found = read([MODEL, gguf(tmp_path, outtype="f32")], text, factors, tokens=4096, kv_type="f32")
    assert found[5:] == pytest.approx(found[:5], rel=1e-5)


def test_quantized_it_reads_far_beyond_its_context_and_plain_rope_does_not(tmp_path, text):
    ours = read([gguf(tmp_path, outtype="q8_0")], text, (1, 4, 8), tokens=8192)
    plain = tmp_path / "plain"
    plain.mkdir()
    # one table, that of t = 1, whatever the length
    alone = read([gguf(plain, outtype="q8_0", max_factor=1)], text, (1, 4, 8), tokens=8192, clamp=True)
    assert alone[0] == pytest.approx(ours[0], rel=1e-6)
    assert ours[1] < 1.05 * ours[0]
    assert ours[2] < 1.1 * ours[0]
    assert alone[1] > 1.05 * ours[1]
    assert alone[2] > 1.15 * ours[2]
