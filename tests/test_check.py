"""What is verified of a file after it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click.testing
import numpy as np
import pytest

import clex_convert
from clex_convert import cli
from clex_convert.check import TEXT, check_result
from clex_convert.rope_metadata import RopeMetadata, with_tables
from clex_convert.source_rope import SourceRope
from clex_convert.weights import OdeSettings
from clex_local import Llama
from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.tables import Tables, read_tables
from helpers.gguf_maker import MODEL, gguf_bytes
from helpers.low_level import Context, Model

pytestmark = pytest.mark.convert


def log_probabilities(path: Path, tokens: list[int]) -> np.ndarray:
    """Those of every next token, float64 [tokens, n_vocab], one token at a time."""
    model = Model(path)
    with Context(model, n_ctx=256) as context:
        logits = np.stack([context.feed([token], i) for i, token in enumerate(tokens)]).astype(np.float64)
    model.close()
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_a_full_check_measures_the_divergence(tmp_path: Path, golden_gguf: Callable[[str], Path]) -> None:
    source = golden_gguf("llama")
    made = {
        outtype: clex_convert.convert(
            source, tmp_path / outtype, method="ntk", outtype=outtype, check="full", pure=outtype == "q4_0"
        )
        for outtype in ("q8_0", "q4_0")
    }
    tokens = Llama(str(source), vocab_only=True, verbose=False).tokenize(TEXT.read_bytes(), add_bos=True)[:64]
    wanted = log_probabilities(source, tokens)
    for outtype, result in made.items():
        found = log_probabilities(tmp_path / outtype, tokens)
        assert result.divergence is not None
        assert result.divergence.tokens == 64
        agreement = (wanted.argmax(axis=1) == found.argmax(axis=1)).mean()
        # Batches of another size are rounded otherwise, which may decide between two tokens that are as likely.
        assert result.divergence.agreement == pytest.approx(agreement, abs=1 / 64)
        kl = (np.exp(wanted) * (wanted - found)).sum(axis=1).mean()
        np.testing.assert_allclose(result.divergence.kl, kl, rtol=0.1)
    assert made["q8_0"].divergence.kl < made["q4_0"].divergence.kl / 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q4_0", "q8_0"]


def test_the_command_prints_it(tmp_path: Path, golden_gguf: Callable[[str], Path]) -> None:
    arguments = [str(golden_gguf("llama")), str(tmp_path / "out.gguf"), "--method", "ntk", "--check", "full"]
    quantized = click.testing.CliRunner().invoke(cli.main, [*arguments, "--outtype", "q5_1"])
    assert quantized.exit_code == 0, quantized.output
    assert "check: mean KL divergence 0.0" in quantized.stdout
    assert "% of 64 tokens" in quantized.stdout


def test_where_nothing_is_quantized_nothing_is_compared(tmp_path: Path, golden_gguf: Callable[[str], Path]) -> None:
    for outtype in ("copy", "f16"):
        result = clex_convert.convert(
            golden_gguf("llama"), tmp_path / outtype, method="ntk", outtype=outtype, check="full"
        )
        assert result.divergence is None
        assert result.notes == [f"{outtype} quantizes nothing, so there is nothing to compare"]


@pytest.mark.parametrize(("check", "passes"), [("none", True), ("basic", False)])
def test_a_file_that_cannot_be_decoded_with_is_not_made(tmp_path: Path, check: str, passes: bool) -> None:
    source, out = tmp_path / "in.gguf", tmp_path / "out.gguf"
    source.write_bytes(gguf_bytes(MODEL))  # no vocabulary, no layers
    arguments = [str(source), str(out), "--method", "ntk", "--check", check]
    result = click.testing.CliRunner().invoke(cli.main, arguments)
    assert (result.exit_code == 0) is passes, result.output
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in.gguf", *(["out.gguf"] if passes else [])]
    if not passes:
        (line,) = result.stderr.splitlines()
        assert f"{out}: the result cannot be decoded with: " in line


def test_logits_that_are_not_finite(tmp_path: Path, golden_gguf: Callable[[str], Path]) -> None:
    source = tmp_path / "in.gguf"
    data = bytearray(golden_gguf("llama").read_bytes())
    with GGUFFile(golden_gguf("llama")) as file:
        norm = next(tensor for tensor in file.tensors if tensor.name == "output_norm.weight")
        start = file.data_offset + norm.offset
    data[start : start + 4] = np.float32("nan").tobytes()
    source.write_bytes(data)
    for arguments in (["--outtype", "copy"], ["--outtype", "q8_0", "--check", "full"]):
        out = tmp_path / "out.gguf"
        result = click.testing.CliRunner().invoke(cli.main, [str(source), str(out), "--method", "ntk", *arguments])
        assert result.exit_code == 1
        (line,) = result.stderr.splitlines()
        assert f"{source}: output_norm.weight holds values that are not finite (NaN or infinite)" in line
        assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


def test_tables_must_be_those_that_were_made(golden_gguf: Callable[[str], Path]) -> None:
    path = golden_gguf("llama")
    tables = read_tables(path)
    assert tables is not None

    def metadata(tables: Tables) -> RopeMetadata:
        return with_tables(tables, "llama", SourceRope(32, 32, 1e4, 64, OdeSettings(), {}))

    check_result(path, metadata(tables))
    inv_freq = tables.inv_freq.copy()
    inv_freq[2, 3] = np.nextafter(inv_freq[2, 3], np.float32(1))
    others = {
        "clex.inv_freq": metadata(replace(tables, inv_freq=inv_freq)),
        "clex.log_scale": metadata(replace(tables, log_scale=True)),
        "llama.context_length": replace(metadata(tables), context_length=65),
        "clex.version": RopeMetadata(64, {}),
    }
    for key, other in others.items():
        with pytest.raises(clex_convert.ConvertError, match=f"{key} is not what was written"):
            check_result(path, other)


def test_an_unknown_check(tmp_path: Path, golden_gguf: Callable[[str], Path]) -> None:
    with pytest.raises(clex_convert.ConvertError, match="the check must be one of none, basic, full"):
        clex_convert.convert(golden_gguf("llama"), tmp_path / "out.gguf", method="ntk", check="some")
