"""One table baked into a plain GGUF file: stock llama.cpp computes what the tables give in that bucket."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest

import clex_local
from clex_convert import ConvertError, cli, convert
from clex_convert.gguf_writer import GGUFWriter, TensorData, tensors_of
from clex_eval.loading import coverage, open_for_evaluation
from clex_eval.models import Coverage
from clex_local import Llama
from clex_local.errors import ClexError
from clex_local.inspection import cli as inspect_command
from clex_local.inspection.inspection import inspect
from clex_local.library import llama_clex
from clex_local.model_file.baked import Baked
from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.tables import read_tables
from clex_local.runtime.arguments import ContextWarning
from helpers.gguf_maker import rewrite
from helpers.low_level import Context, Model
from helpers.tiny_models import LENGTH, kind_of, make_model
from test_architectures import MODELS

pytestmark = pytest.mark.convert

DATA = Path(__file__).parent / "data"
PLAIN, SECOND, LAST = 50, 128, 250  # tokens in the first, second and last bucket of 64
F32_TENSOR = 0  # ggml_type

STOCK = """
import json, sys, llama_cpp, numpy as np
assert not hasattr(llama_cpp.llama_cpp._lib, "llama_clex_bucket")
out = []
for path, ids in json.loads(sys.stdin.read()):
    llm = llama_cpp.Llama(path, n_ctx=256, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, verbose=False,
                          logits_all=True)
    llm.eval(ids)
    out.append(llm.scores[llm.n_tokens - 1].tolist())
    llm.close()
print(json.dumps(out))
"""


@pytest.fixture
def ids(golden_npz):
    return golden_npz("llama")["ids"]


@pytest.fixture
def stock(stock_library):
    """The last logits of prompts, by the stock library in one process of its own."""

    def run(*pairs: tuple[Path, np.ndarray]) -> list[np.ndarray]:
        wanted = json.dumps([(str(path), [int(token) for token in ids]) for path, ids in pairs])
        environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(stock_library)}
        command = [sys.executable, "-c", STOCK]
        done = subprocess.run(command, env=environment, input=wanted, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [np.array(logits) for logits in json.loads(done.stdout)]

    return run


def ours(path: Path, ids: np.ndarray, declared: int = 0) -> np.ndarray:
    """The last logits of a prompt by our library; `declared` is the length that chooses its table."""
    model = Model(path)
    with Context(model, n_ctx=max(256, declared)) as context:
        assert not declared or llama_clex.seq_reserve(context.pointer, 0, declared)
        logits = context.feed(ids, 0)
    model.close()
    return logits


def bake(source: Path, context: int, target: Path, **options: Any) -> Path:
    options.setdefault("outtype", "f32" if source.is_dir() else None)
    result = convert(source, target, bake=context, **options)
    assert result.baked == context
    with GGUFFile(target) as file:
        assert not [key for key in file.keys() if key.startswith("clex.")]  # noqa: SIM118
        assert file.get(f"{file.get('general.architecture')}.context_length") == context
    model = Model(target)
    assert llama_clex.n_buckets(model.pointer) == 0  # nor does our library see tables in it
    model.close()
    return target


def raw(path: Path, name: str) -> tuple[int, bytes] | None:
    """Type and bytes of a tensor; None if the file has none of that name."""
    with GGUFFile(path) as file:
        start = file.data_offset
        found = [tensor for tensor in file.tensors if tensor.name == name]
    return (found[0].type, path.read_bytes()[start + found[0].offset :][: found[0].size]) if found else None


def factors_of(path: Path) -> np.ndarray | None:
    found = raw(path, "rope_freqs.weight")
    if found is None:
        return None
    assert found[0] == F32_TENSOR
    return np.frombuffer(found[1], np.float32)


def assert_same(logits: np.ndarray, wanted: np.ndarray, rounding: float = 1e-5) -> None:
    """Equal but for the rounding of angles, which differs: relative to the largest of the logits."""
    assert np.std(wanted) > 0.1
    np.testing.assert_allclose(logits, wanted, atol=rounding * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_stock_computes_every_bucket_of_learned_tables(name, golden_gguf, ids, stock, tmp_path):
    """From the folder, and from the GGUF file that has the tables, which our library runs as stock does."""
    with_tables = golden_gguf(name)
    sources = [(DATA / name, SECOND), (with_tables, PLAIN), (with_tables, SECOND), (with_tables, LAST)]
    pairs = [
        (bake(source, context, tmp_path / f"{context}{source.suffix}.gguf"), ids[:context])
        for source, context in sources
    ]
    for logits, (path, prompt) in zip(stock(*pairs), pairs, strict=True):
        assert_same(logits, ours(with_tables, prompt))
        assert_same(logits, ours(path, prompt))


def test_another_table_would_be_noticed(golden_gguf, ids, stock, tmp_path):
    path = bake(golden_gguf("llama"), LAST, tmp_path / "m.gguf")
    (logits,) = stock((path, ids[:SECOND]))
    assert np.abs(logits - ours(golden_gguf("llama"), ids[:SECOND])).max() > 1e-2


def test_factors_are_what_the_base_is_divided_by(golden_gguf, tmp_path):
    tables, base = read_tables(golden_gguf("mixtral")), 1e6
    assert tables is not None
    factors = factors_of(bake(golden_gguf("mixtral"), SECOND, tmp_path / "m.gguf"))
    n = tables.inv_freq.shape[1]
    assert factors is not None
    np.testing.assert_allclose(base ** (-np.arange(n) / n) / factors, tables.inv_freq[1], rtol=1e-6)


def test_inside_the_original_context_the_file_is_the_plain_model(golden_gguf, tmp_path):
    result = convert(golden_gguf("llama"), tmp_path / "m.gguf", bake=PLAIN)
    assert factors_of(result.path) is None
    assert result.notes == [
        "50 tokens lie within the original context of 64: this is the model without extension",
    ]


@pytest.fixture(scope="module")
def ntk(golden_dir, tmp_path_factory):
    """A tiny model of an architecture: how to convert its folder, and it as a GGUF file with NTK tables."""

    def get(name: str) -> tuple[dict[str, Any], Path]:
        changes, tokenizer = MODELS[name]
        folder = tmp_path_factory.mktemp("model")
        make_model(name, changes, folder, golden_dir(tokenizer))
        options = dict(source=folder, method="ntk", pre_tokenizer="gpt-2" if tokenizer == "phi2" else None)
        convert(**options, output=folder / "model.gguf", outtype="f32")
        return options, folder / "model.gguf"

    return get


def scaled_linearly(path: Path, target: Path) -> Path:
    tables = read_tables(path)
    assert tables is not None
    rows = tables.inv_freq[0] / tables.scaling_factors[:, None]
    return rewrite(path, target, {"clex.method": "linear", "clex.inv_freq": rows.reshape(-1)})


@pytest.mark.parametrize("name", ["Phi3", "Phi3 partial", "Qwen3", "GPTNeoX", "StableLm", "Falcon"])
def test_stock_computes_ntk_and_linear_tables_in_every_architecture(name, ntk, ids, stock, tmp_path):
    """Where the graph takes no factors, the base and the linear factor carry them.

    The context of 256 is longer than one of the files says and not than the other: Phi-3 takes its long factors for
    one and its short factors for the other.
    """
    folder, source = ntk(name)
    linear = scaled_linearly(source, tmp_path / "linear.gguf")
    paths = [
        bake(**folder, context=LAST, target=tmp_path / "baked.gguf"),
        bake(linear, 4 * LENGTH, tmp_path / "baked-linear.gguf"),
    ]
    pairs = [(path, ids[:LAST]) for path in paths]
    # ggml looks GELU up in a table of 16-bit numbers: the least difference may take the next number
    rounding = 1e-3 if kind_of(name) in ("Phi", "GPTNeoX", "Falcon") else 1e-5
    for logits, path in zip(stock(*pairs), (source, linear), strict=True):
        assert_same(logits, ours(path, ids[:LAST]), rounding)


def test_an_architecture_without_factors_refuses_other_tables(golden_gguf, tmp_path):
    wanted = (
        r"no frequency factors for the architecture phi2, only for llama, mistral3, phi3, .*; of the tables of clex"
    )
    with pytest.raises(ConvertError, match=wanted) as refused:
        convert(golden_gguf("phi2"), tmp_path / "m.gguf", bake=SECOND)
    advised = re.findall(r"`method='(\w+)'`", str(refused.value))
    assert advised == ["ntk", "linear"]
    for method in advised:
        convert(golden_gguf("phi2"), tmp_path / f"{method}.gguf", bake=SECOND, method=method, check="none")
    bake(golden_gguf("phi2"), PLAIN, tmp_path / "plain.gguf")


SCALES = {"clex.attn_scale": np.array([1, 1.25, 0.8, 1.5], np.float32)}


def test_stock_scales_attention(golden_gguf, ids, stock, tmp_path):
    source = rewrite(golden_gguf("llama"), tmp_path / "scaled.gguf", SCALES)
    (logits,) = stock((bake(source, SECOND, tmp_path / "m.gguf"), ids[:SECOND]))
    assert_same(logits, ours(source, ids[:SECOND]))
    with GGUFFile(tmp_path / "m.gguf") as file:
        assert file.get("llama.rope.scaling.attn_factor") == pytest.approx(np.sqrt(1.25))


def test_attention_that_stock_would_scale_in_part_is_refused(golden_gguf, ntk, tmp_path):
    source = rewrite(ntk("Phi3 partial")[1], tmp_path / "scaled.gguf", SCALES)
    with pytest.raises(ConvertError, match=r"scale attention by 1.25, .* this model rotates 24 of 32"):
        convert(source, tmp_path / "m.gguf", bake=SECOND)


def test_log_scale_is_refused_unless_it_is_left_out(golden_gguf, ids, stock, tmp_path):
    folder, with_tables = DATA / "llama-log-scale", golden_gguf("llama-log-scale")
    pairs = []
    for source in (folder, with_tables):
        with pytest.raises(ConvertError, match=r"changes with every token, .* `log_scale=False` to leave it out"):
            convert(source, tmp_path / "m.gguf", bake=SECOND)
        pairs.append((bake(source, SECOND, tmp_path / f"baked{source.suffix}.gguf", log_scale=False), ids[:SECOND]))
    unscaled = rewrite(with_tables, tmp_path / "unscaled.gguf", {"clex.log_scale": None})
    for logits in stock(*pairs):
        assert_same(logits, ours(unscaled, ids[:SECOND]))


def test_factors_take_the_place_of_those_that_the_file_has(golden_gguf, tmp_path):
    source = bake(golden_gguf("llama"), LAST, tmp_path / "old.gguf")
    factors = np.arange(1, 17, dtype=np.float32)
    with GGUFFile(source) as file, GGUFWriter(file) as writer:
        for tensor in tensors_of(file):
            writer.add(tensor)
        writer.add(TensorData.of("rope_freqs.weight", factors))
        layout = writer.layout()
        layout.write_header(tmp_path / "new.gguf")
        layout.write(tmp_path / "new.gguf", progress=lambda part: None)
        names = [tensor.name for tensor in file.tensors]
    np.testing.assert_array_equal(factors_of(tmp_path / "new.gguf"), factors)
    with GGUFFile(tmp_path / "new.gguf") as file:
        assert [tensor.name for tensor in file.tensors] == names
    for name in names:
        if name != "rope_freqs.weight":
            assert raw(tmp_path / "new.gguf", name) == raw(source, name)


def test_quantizing_leaves_the_factors_alone(golden_gguf, tmp_path):
    exact = factors_of(bake(golden_gguf("llama"), SECOND, tmp_path / "f32.gguf"))
    for source in (DATA / "llama", golden_gguf("llama")):
        for outtype in ("f16", "q4_k_m"):
            target = tmp_path / f"{outtype}{source.suffix}.gguf"
            convert(source, target, bake=SECOND, outtype=outtype)
            np.testing.assert_array_equal(factors_of(target), exact)


def test_every_scaling_that_the_source_names_makes_room(golden_gguf, ids, stock, tmp_path):
    named = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": np.float32(1)}
    source = rewrite(golden_gguf("llama"), tmp_path / "named.gguf", named)
    path = bake(source, SECOND, tmp_path / "m.gguf")
    with GGUFFile(path) as file:
        assert not [key for key in file.keys() if "rope.scaling" in key]  # noqa: SIM118
    (logits,) = stock((path, ids[:SECOND]))
    assert_same(logits, ours(golden_gguf("llama"), ids[:SECOND]))


def test_a_file_keeps_its_own_tables_without_a_method(golden_gguf, tmp_path):
    source = golden_gguf("llama")
    convert(source, tmp_path / "q8_0.gguf", outtype="q8_0")
    kept, tables = read_tables(tmp_path / "q8_0.gguf"), read_tables(source)
    assert kept is not None
    assert tables is not None
    np.testing.assert_array_equal(kept.inv_freq, tables.inv_freq)
    assert kept.provenance == tables.provenance
    with pytest.raises(ConvertError, match=r"has tables already, .* pass `method` to make new ones"):
        convert(source, tmp_path / "m.gguf", max_factor=8)
    broken = rewrite(source, tmp_path / "broken.gguf", {"clex.scaling_factors": None})
    with pytest.raises(ConvertError, match=r"clex.scaling_factors is missing; pass `method` to make new tables"):
        convert(broken, tmp_path / "m.gguf", bake=SECOND)


@pytest.mark.parametrize("context", [0, -5, 257, 10**12])
def test_a_length_without_a_table_gets_one_line(golden_gguf, tmp_path, context):
    command = [str(golden_gguf("llama")), str(tmp_path / "m.gguf"), "--bake", str(context)]
    result = click.testing.CliRunner().invoke(cli.main, command)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        f"clex-convert: error: --bake {context}: the tables cover 1 to 256 tokens; "
        "choose a length among them, or make more tables with --max-factor"
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", ["folder", "file"])
def test_a_baked_file_says_so(golden_dir, golden_gguf, tmp_path, source):
    made_of = golden_dir("llama") if source == "folder" else golden_gguf("llama")
    path = bake(made_of, SECOND, tmp_path / "baked.gguf")
    found = inspect(path)
    assert found.baked == Baked("clex", LENGTH, SECOND)
    assert (found.trained_context, found.original_context, found.max_context) == (LENGTH, LENGTH, SECOND)
    assert found.to_json()["baked"] == {"method": "clex", "original_context_length": LENGTH, "context_length": SECOND}
    shown = click.testing.CliRunner().invoke(inspect_command.main, [str(path)]).stdout
    assert "64 tokens, 128 with the baked table" in shown
    assert "one baked for 128 tokens, method clex: runs as in llama.cpp, short prompts too" in shown
    assert coverage(path) == Coverage(LENGTH, None, SECOND)
    with open_for_evaluation(path) as model:
        assert (model.original_context_length, model.context_length) == (LENGTH, SECOND)
    with pytest.raises(ClexError, match="is baked for 128 tokens, not the 200 asked for; convert the model that it w"):
        clex_local.open_model(path, 200)
    with pytest.warns(
        ContextWarning, match="baked for 128 tokens, without tables for a context of 256; pass n_ctx=128$"
    ):
        Llama(str(path), n_ctx=256, verbose=False).close()
    assert inspect(golden_gguf("llama")).to_json()["baked"] is None


@pytest.mark.parametrize("options", [{}, {"method": "ntk"}, {"bake": LAST}, {"rope_scaling": {}, "method": "ntk"}])
def test_tables_are_not_put_upon_a_baked_one(golden_gguf, tmp_path, options):
    path = bake(golden_gguf("llama"), SECOND, tmp_path / "baked.gguf")
    with pytest.raises(ConvertError, match=r"baked for 128 tokens \(method clex, 64 without it\), .+ scale them twice"):
        convert(path, tmp_path / "out.gguf", **options)
    assert not (tmp_path / "out.gguf").exists()


def test_the_command_says_what_it_baked(golden_gguf, tmp_path):
    target = tmp_path / "m.gguf"
    result = click.testing.CliRunner().invoke(cli.main, [str(golden_gguf("llama")), str(target), "--bake", "100"])
    assert result.exit_code == 0, result.output
    *_, summary, digest, note = result.stdout.splitlines()
    assert summary.startswith(f"{target}: copy, method clex baked for 100 tokens, ")
    assert digest.startswith("SHA-256 ")
    assert note == "note: every prompt, short ones too, gets the frequencies made for up to 128 tokens"


def test_a_real_model_baked_for_16384_tokens(smollm_ntk, stock, tmp_path):
    """The declared length chooses our table, so that a few tokens show it; F32, for quantized products round more."""
    source, context = tmp_path / "f32.gguf", 2 * 8192
    convert(smollm_ntk, source, outtype="f32")
    path, prompt = bake(source, context, tmp_path / "m.gguf"), np.array([1 + i * 37 % 40000 for i in range(60)])
    (logits,) = stock((path, prompt))
    wanted, plain = ours(source, prompt, declared=context), ours(source, prompt)
    for big in (source, path):
        big.unlink()
    assert_same(logits, wanted)
    assert np.abs(plain - wanted).max() > 0.5
