"""Models that name a RoPE scaling of their own: their logits are those of transformers, and no file scales twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click.testing
import llama_cpp
import numpy as np
import pytest
import torch
import transformers

from clex_convert import ConvertError, cli, convert
from clex_convert.checkpoint import Checkpoint
from clex_convert.gguf_source import GGUFSource
from clex_convert.transformers_folder import rope_scaling, set_rope_scaling
from clex_local.model_file.gguf_file import GGUFFile
from helpers.gguf_maker import MODEL, gguf_bytes
from helpers.low_level import Context, Model
from helpers.tiny_models import LENGTH, convert_plainly, make_model

pytestmark = [pytest.mark.convert, pytest.mark.folders]

LONG = 4 * LENGTH
HALF = 16  # frequencies of a head of the tiny models


def long_factors(half: int) -> dict[str, Any]:
    factors = {"short_factor": np.linspace(1, 1.5, half).tolist(), "long_factor": np.linspace(1, 6, half).tolist()}
    return {"type": "longrope", **factors}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LENGTH}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": LENGTH,
}
OUTSIDE = {"original_max_position_embeddings": LENGTH}
# Name of transformers' class, what differs from the sizes of all, the scaling, and the method of the tables.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "llama3": ("Llama", {}, LLAMA3, "llama3"),
    "linear": ("Llama", {}, {"type": "linear", "factor": 4.0}, "linear"),
    "yarn": ("Llama", {}, YARN, "yarn"),
    "yarn, attention": ("Llama", {}, {**YARN, "attention_factor": 0.9}, "yarn"),
    "yarn, betas": ("Llama", {}, {**YARN, "beta_fast": 16.0, "beta_slow": 0.5}, "yarn"),
    "yarn, mscale": ("Qwen2", {}, {**YARN, "mscale": 0.8, "mscale_all_dim": 1.2}, "yarn"),
    "yarn, no original": ("Llama", {"max_position_embeddings": LENGTH}, {"type": "yarn", "factor": 4.0}, "yarn"),
    "dynamic": ("Llama", {"max_position_embeddings": LENGTH}, {"rope_type": "dynamic", "factor": 4.0}, "ntk"),
    "longrope": ("Llama", OUTSIDE, {**long_factors(HALF), "attention_factor": 1.1}, "longrope"),
    "phi3": ("Phi3", {**OUTSIDE, "sliding_window": None}, long_factors(HALF), "longrope"),
    "partial": ("StableLm", {"partial_rotary_factor": 0.5}, {"rope_type": "linear", "factor": 2.0}, "linear"),
}
FIXED = ("llama3", "linear", "yarn")


@pytest.fixture(scope="module")
def source(golden_dir, tmp_path_factory):
    """A model of transformers with a scaling, and its folder."""
    made = {}

    def get(name: str) -> tuple[transformers.PreTrainedModel, Path]:
        if name not in made:
            kind, changes, scaling, _ = CASES[name]
            folder = tmp_path_factory.mktemp("model")
            sizes = {"max_position_embeddings": LONG, **changes, "rope_scaling": dict(scaling)}
            made[name] = make_model(kind, sizes, folder, golden_dir("phi2" if kind == "StableLm" else "llama")), folder
        return made[name]

    return get


@pytest.fixture
def ids(golden_npz) -> np.ndarray:
    return np.resize(golden_npz("llama")["ids"], LONG)


def reference_logits(model: transformers.PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens[None].astype(np.int64)), use_cache=False).logits[0, -1].numpy()


def assert_logits(path: Path, model: transformers.PreTrainedModel, ids: np.ndarray, lengths: tuple[int, ...]) -> None:
    loaded = Model(path)
    for n in lengths:
        with Context(loaded, n_ctx=LONG) as context:
            np.testing.assert_allclose(context.feed(ids[:n], 0), reference_logits(model, ids[:n]), atol=2e-4, rtol=0)
    loaded.close()


def keys_of(path: Path) -> dict[str, Any]:
    with GGUFFile(path) as file:
        return {key.partition(".")[2]: file.get(key) for key in file.keys() if ".rope." in key}  # noqa: SIM118


@pytest.mark.parametrize("name", CASES)
def test_folder_does_what_transformers_does(source, ids, tmp_path, name):
    model, folder = source(name)
    pre_tokenizer = "gpt-2" if name == "partial" else None
    result = convert(folder, tmp_path / "m.gguf", outtype="f32", pre_tokenizer=pre_tokenizer)
    fixed = name.partition(",")[0] in (*FIXED, "partial")
    assert result.tables.method == CASES[name][3]
    assert len(result.tables.scaling_factors) == (1 if fixed else {"ntk": 4, "longrope": 2}[CASES[name][3]])
    assert result.tables.max_context_length == LONG
    # Dynamic scaling depends on the length to the token, tables on the bucket: at its end they are the same.
    assert_logits(result.path, model, ids, (20, LENGTH, 2 * LENGTH, LONG))
    if name != "dynamic":
        assert_logits(result.path, model, ids, (LENGTH + 1,))
    # The file's own keys still say what the model is, so that it can be converted again.
    if fixed or name == "phi3":
        options = {"method": "longrope", "max_factor": 4} if name == "phi3" else {}
        again = convert(result.path, tmp_path / "again.gguf", **options)
        np.testing.assert_allclose(again.tables.inv_freq, result.tables.inv_freq, rtol=1e-6)
        assert again.tables.max_context_length == LONG
        scales = [table.attn_scale if table.attn_scale is not None else 1.0 for table in (again.tables, result.tables)]
        np.testing.assert_allclose(*scales, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama3", "linear", "yarn", "phi3"])
def test_gguf_file_does_what_transformers_does(source, ids, tmp_path, name):
    model, folder = source(name)
    plain = convert_plainly(folder)
    result = convert(plain, tmp_path / "m.gguf")
    assert result.tables.max_context_length == LONG
    assert_logits(result.path, model, ids, (20, LENGTH + 1, LONG))
    assert keys_of(result.path) == keys_of(plain)


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_context_length_stays_that_of_the_tables(source, tmp_path, name, kind):
    """llama.cpp would take the RoPE parameters of a context with tables for those of a custom YaRN."""
    _, folder = source(name)
    result = convert(folder if kind == "folder" else convert_plainly(folder), tmp_path / "m.gguf", outtype="f32")
    model = Model(result.path)
    Context(model, n_ctx=LONG).__exit__()
    assert llama_cpp.llama_model_n_ctx_train(model.pointer) == LONG
    model.close()


STOCK = """
import sys, numpy as np, llama_cpp
ids = np.load(sys.argv[1])
for path in sys.argv[2:]:
    llm = llama_cpp.Llama(path, n_ctx=256, n_threads=1, type_k=0, type_v=0, verbose=False, logits_all=True)
    llm.eval(ids.tolist())
    np.save(path + ".npy", llm.scores[llm.n_tokens - 1])
"""


def test_stock_runs_the_first_bucket(source, ids, stock_library, tmp_path):
    """The model's scaling once where the tables begin with it, and not at all where they begin without."""
    expected = {}
    for name in ("llama3", "linear", "yarn", "yarn, attention"):
        model, folder = source(name)
        path = convert(folder, tmp_path / f"{name}.gguf", outtype="f32").path
        expected[path] = reference_logits(model, ids[:200])
        if name in ("linear", "yarn"):
            by_length = convert(path, tmp_path / f"{name} by length.gguf", method=name).path
            assert not [key for key in keys_of(by_length) if "scal" in key and "original" not in key]
            expected[by_length] = None
    for path, logits in expected.items():
        if logits is None:
            plain = source("linear")[0]
            config = transformers.LlamaConfig(**plain.config.to_dict())
            set_rope_scaling(config, None)
            unscaled = transformers.LlamaForCausalLM(config).eval()
            unscaled.load_state_dict(plain.state_dict())
            expected[path] = reference_logits(unscaled, ids[:200])
    np.save(tmp_path / "ids.npy", ids[:200])
    command = [sys.executable, "-c", STOCK, str(tmp_path / "ids.npy"), *map(str, expected)]
    subprocess.run(command, env={**os.environ, "LLAMA_CPP_LIB_PATH": str(stock_library)}, check=True)
    for path, logits in expected.items():
        np.testing.assert_allclose(np.load(f"{path}.npy"), logits, atol=5e-4, rtol=0, err_msg=path.name)


@pytest.mark.parametrize("method", ["yarn", "linear"])
def test_tables_by_length_are_the_scaling_for_each_factor(source, ids, tmp_path, method):
    scaled, folder = source(method)
    factors = [1, 1.5, 2.5, 4]
    result = convert(folder, tmp_path / "m.gguf", outtype="f32", method=method, factors=factors)
    assert result.tables.context_lengths == [64, 96, 160, 256]
    model = Model(result.path)
    for t, n in zip(factors, result.tables.context_lengths, strict=True):
        config = transformers.LlamaConfig(**scaled.config.to_dict())
        set_rope_scaling(config, {**rope_scaling(config), "factor": t})
        reference = transformers.LlamaForCausalLM(config).eval()
        reference.load_state_dict(scaled.state_dict())
        with Context(model, n_ctx=LONG) as context:
            np.testing.assert_allclose(
                context.feed(ids[:n], 0), reference_logits(reference, ids[:n]), atol=2e-4, rtol=0
            )
    model.close()


def test_ntk_extends_a_scaled_model(source, ids, tmp_path):
    """Inside the first bucket it is the model as it was, from a folder and from a GGUF file."""
    model, folder = source("llama3")
    made = [
        convert(origin, tmp_path / f"{i}.gguf", outtype="f32", method="ntk", max_factor=2).tables
        for i, origin in enumerate((folder, convert_plainly(folder)))
    ]
    np.testing.assert_allclose(made[0].inv_freq, made[1].inv_freq, rtol=1e-6)
    assert made[0].context_lengths == [LONG, 2 * LONG]
    assert_logits(tmp_path / "0.gguf", model, ids, (20, LONG))


def test_rope_scaling_takes_the_place_of_the_sources(source, ids, tmp_path, golden_dir):
    model, folder = source("yarn")
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    config = json.loads((plain / "config.json").read_text())
    theta = config.pop("rope_theta", None) or config["rope_parameters"]["rope_theta"]  # before release 5, and since
    config |= {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    config["max_position_embeddings"] = LENGTH
    (plain / "config.json").write_text(json.dumps(config))
    arguments = [plain, tmp_path / "m.gguf", "--outtype", "f32", "--rope-scaling", json.dumps(YARN)]
    done = click.testing.CliRunner().invoke(cli.main, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    assert_logits(tmp_path / "m.gguf", model, ids, (20, LONG))
    # The same for a GGUF file, whose keys then name it.
    gguf = convert(plain, tmp_path / "plain.gguf", outtype="f32", method="ntk").path
    result = convert(gguf, tmp_path / "again.gguf", rope_scaling=YARN)
    assert_logits(result.path, model, ids, (20, LONG))
    with GGUFFile(result.path) as file:
        assert file.get("llama.context_length") == LONG
    assert keys_of(result.path) == keys_of(tmp_path / "m.gguf")
    # And back to none.
    result = convert(folder, tmp_path / "none.gguf", outtype="f32", method="ntk", rope_scaling={})
    np.testing.assert_allclose(result.tables.inv_freq[0], 1e4 ** (-np.arange(0, 32, 2) / 32), rtol=1e-6)


# what is read


def own_scaling(folder: Path, **changes: Any) -> Any:
    config = json.loads((folder / "config.json").read_text())
    merged = {**config, **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))
    return Checkpoint(folder).rope.scaling


def test_configs_are_read_in_every_spelling(tmp_path, golden_dir):
    folder = tmp_path / "llama"
    shutil.copytree(golden_dir("llama"), folder)
    newer = {**LLAMA3, "rope_theta": 5e5}
    changes = dict(rope_scaling=None, rope_theta=None, max_position_embeddings=LONG)
    scaling = own_scaling(folder, **changes, rope_parameters=newer)
    assert (scaling.kind, scaling.factor, scaling.original) == ("llama3", 8, LENGTH)
    assert Checkpoint(folder).rope.base == 5e5
    # A length outside of the mapping is that of LongRoPE alone.
    inside = {**long_factors(HALF), "original_max_position_embeddings": LENGTH, "rope_theta": 1e4}
    scaling = own_scaling(folder, rope_parameters=inside)
    assert (scaling.original, scaling.factor, scaling.reach) == (LENGTH, 4, LONG)
    scaling = own_scaling(folder, rope_parameters={**inside, "factor": 32.0}, original_max_position_embeddings=128)
    assert (scaling.original, scaling.factor, scaling.reach) == (128, 2, LONG)


def test_first_names_of_longrope_are_understood(source, tmp_path):
    _, folder = source("phi3")
    copy = tmp_path / "phi3"
    shutil.copytree(folder, copy)
    known = Checkpoint(folder).rope.scaling
    assert known.attention_factor is None
    factors = {key: value for key, value in long_factors(HALF).items() if key != "type"}
    for name in ("su", "yarn"):
        assert own_scaling(copy, rope_scaling={"type": name, **factors}, rope_parameters=None) == known


def test_longrope_that_does_not_say_how_far_it_reaches(source, tmp_path):
    """A file with tables names the context length of the first bucket."""
    _, folder = source("phi3")
    path = convert(convert_plainly(folder), tmp_path / "m.gguf").path
    with pytest.raises(ConvertError, match="longrope must know the largest scaling factor: pass `max_f"):
        convert(path, tmp_path / "again.gguf", method="longrope")


def test_partly_rotated_heads_with_an_attention_factor_are_refused(golden_dir, tmp_path):
    changes = dict(**OUTSIDE, max_position_embeddings=LONG, partial_rotary_factor=0.75, sliding_window=None)
    make_model("Phi3", {**changes, "rope_scaling": long_factors(12)}, tmp_path, golden_dir("llama"))
    for origin in (tmp_path, convert_plainly(tmp_path)):
        with pytest.raises(ConvertError, match=r"acts on 24 of the 32 dimensions .* chooses its factors by length"):
            convert(origin, tmp_path / "m.gguf", outtype="f32")


def gguf_scaling(path: Path, tensors: dict[str, np.ndarray] | None = None, **keys: Any) -> Any:
    keys = {f"llama.rope.{name}": value for name, value in keys.items()}
    path.write_bytes(gguf_bytes({**MODEL, **keys}, {"a.weight": np.ones(4, np.float32), **(tensors or {})}))
    source = GGUFSource(path)
    source.file.close()
    return source.rope.scaling


F32, U32 = np.float32, np.uint32
YARN_KEYS = {"scaling.type": "yarn", "scaling.factor": F32(4), "scaling.original_context_length": U32(16)}


def test_keys_of_gguf_files_are_read(tmp_path):
    path = tmp_path / "in.gguf"
    assert gguf_scaling(path, scale_linear=F32(2)).kind == "linear"
    assert gguf_scaling(path, **{"scaling.type": "none", "scaling.factor": F32(4)}).kind == "default"
    assert gguf_scaling(path, **{"scaling.factor": F32(0)}).kind == "default"
    scaling = gguf_scaling(path, **YARN_KEYS)
    assert (scaling.kind, scaling.factor, scaling.original, scaling.reach) == ("yarn", 4, 16, 64)
    assert scaling.attention(4) == pytest.approx(0.1 * np.log(4) + 1)
    scaling = gguf_scaling(path, **YARN_KEYS, **{"scaling.yarn_beta_fast": F32(16), "scaling.yarn_beta_slow": F32(2)})
    assert (scaling.beta_fast, scaling.beta_slow) == (16, 2)
    scaling = gguf_scaling(path, **YARN_KEYS, **{"scaling.yarn_log_multiplier": F32(1)})
    assert scaling.attention(4) == 1
    scaling = gguf_scaling(path, **YARN_KEYS, **{"scaling.attn_factor": F32(1.25)})
    assert scaling.attention(4) == pytest.approx(1.25 * (0.1 * np.log(4) + 1))
    scaling = gguf_scaling(path, **YARN_KEYS, **{"scaling.yarn_attn_factor": F32(1.5)})
    assert scaling.attention(4) == pytest.approx(1.5)


FREQS = {"rope_freqs.weight": np.array([1, 2, 4, 8], F32)}
FACTORS = {f"rope_factors_{name}.weight": np.array([1, 2, 3, 4], F32) for name in ("short", "long")}


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ({"scaling.type": "ntk"}, {}, "the RoPE scaling 'ntk' (rope.scaling.type) is unknown; known: none, linear"),
        ({"scaling.type": U32(2)}, {}, "is unknown; known"),
        ({"scaling.type": "longrope"}, {}, "names LongRoPE, but has no tensors with its factors"),
        ({"scaling.attn_factor": F32(0.8)}, {}, "attn_factor is 0.8 without a scaling that it belongs to"),
        ({"scaling.factor": F32(0.5)}, {}, "rope.scaling.factor is 0.5, it must be at least 1"),
        ({"scaling.factor": "four"}, {}, "rope.scaling.factor must be a number"),
        ({"scaling.factor": F32("nan")}, {}, "rope.scaling.factor must be a number"),
        ({"scaling.alpha": F32(1000)}, {}, "rope.scaling.alpha is 1000, which tables cannot do yet"),
        ({**YARN_KEYS, "scaling.yarn_ext_factor": F32(0.5)}, {}, "yarn_ext_factor is 0.5, which tables cannot do yet"),
        ({"scaling.later": F32(1)}, {}, "the key rope.scaling.later is unknown and may change the frequencies"),
        (YARN_KEYS, FREQS, "combines YaRN with the tensor rope_freqs.weight"),
        ({}, {**FREQS, **FACTORS}, "has LongRoPE factors that are incomplete or combined with another scaling"),
        ({}, {"rope_factors_long.weight": np.ones(4, F32)}, "has LongRoPE factors that are incomplete"),
        ({}, {"rope_freqs.weight": np.ones(3, F32)}, "rope_freqs.weight must hold 4 f32 values"),
        (
            {},
            {"rope_freqs.weight": np.zeros(4, F32)},
            "rope_freqs.weight holds a factor that is not finite and",
        ),
    ],
)
def test_keys_of_gguf_files_that_are_not_understood_are_refused(tmp_path, keys, tensors, message):
    with pytest.raises(ConvertError) as refusal:
        gguf_scaling(tmp_path / "in.gguf", tensors, **keys)
    assert message in str(refusal.value)
    assert str(refusal.value).startswith(str(tmp_path / "in.gguf"))


def test_frequency_factors_are_one_table_that_ntk_extends(tmp_path):
    path = tmp_path / "in.gguf"
    assert gguf_scaling(path, FREQS).kind == "rope_freqs"
    row = 1e4 ** (-np.arange(0, 8, 2) / 8) / [1, 2, 4, 8]
    made = convert(path, tmp_path / "one.gguf", check="none").tables
    assert (made.method, made.context_lengths) == ("rope_freqs", [64])
    np.testing.assert_allclose(made.inv_freq, [row], rtol=1e-6)
    made = convert(path, tmp_path / "two.gguf", method="linear", factors=[1, 2], check="none").tables
    np.testing.assert_allclose(made.inv_freq, [row, row / 2], rtol=1e-6)
    with pytest.raises(ConvertError, match=r"tensor rope_freqs.weight\), whose place another RoPE scaling cannot take"):
        convert(path, tmp_path / "three.gguf", rope_scaling=YARN)


def test_original_context_of_linear_scaling_can_be_said(source, tmp_path):
    """A config does not tell whether its context length is that before the scaling."""
    _, folder = source("linear")
    made = convert(folder, tmp_path / "a.gguf", outtype="f32", method="linear").tables
    assert made.context_lengths == [LENGTH, 2 * LENGTH, 3 * LENGTH, LONG]
    made = convert(folder, tmp_path / "b.gguf", outtype="f32", method="linear", original_context=LONG).tables
    assert made.context_lengths[-1] == 4 * LONG


def test_original_length_stays_without_the_scaling(source, tmp_path):
    """Mistral 3 counts its attention temperature from it; by itself it scales nothing."""
    _, folder = source("yarn")
    result = convert(convert_plainly(folder), tmp_path / "m.gguf", method="yarn")
    keys = keys_of(result.path)
    assert keys["rope.scaling.original_context_length"] == LENGTH
    assert "rope.scaling.type" not in keys


def test_options_that_do_not_fit(tmp_path):
    source = tmp_path / "in.gguf"
    source.write_bytes(gguf_bytes(MODEL))
    out = str(tmp_path / "m.gguf")

    def run(*arguments: str) -> tuple[int, str]:
        done = click.testing.CliRunner().invoke(cli.main, [str(source), out, *arguments])
        return done.exit_code, done.stderr.splitlines()[-1]

    code, line = run("--method", "ntk", "--factors", "1,2", "--max-factor", "2")
    assert (code, line) == (
        1,
        "clex-convert: error: --factors and --max-factor exclude each other: pass one of them",
    )
    for arguments in (["--factors", "1,two"], ["--rope-scaling", "{"], ["--rope-scaling", "[]"]):
        assert run(*arguments)[0] == 2
    code, line = run("--method", "yarn", "--rope-scaling", '{"type": "yarn", "factor": 4, "beta": 1}')
    assert code == 1
    assert "--rope-scaling: the key beta is unknown for 'yarn'" in line
    assert not Path(out).exists()
    done = click.testing.CliRunner().invoke(
        cli.main, [str(source), out, "--method", "ntk", "--factors", "1,1.5,4", "--check", "none"]
    )
    assert [line.split() for line in done.stdout.splitlines()[1:4]] == [
        ["1", "1", "64"],
        ["2", "1.5", "96"],
        ["3", "4", "256"],
    ]
