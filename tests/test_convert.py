"""Conversions that succeed: the tables are the authors', and the files hold what their sources held."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import clex_convert
from clex_convert import cli, file_types, ode, weights
from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.tables import read_tables
from clex_local.sizes import readable_size
from helpers.gguf_maker import MODEL, TENSORS, gguf_bytes

pytestmark = [pytest.mark.convert, pytest.mark.folders]

DATA = Path(__file__).parent / "data"
UP, DOWN = "model.clex_layer.proj_func.ode_up_proj", "model.clex_layer.proj_func.ode_down_proj"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def model_folder(source: Path, target: Path, *, without: tuple[str, ...] = (), **config: Any) -> Path:
    """A copy of a model folder with some config keys changed (or, for None, removed) and without some files."""
    target.mkdir()
    for path in source.iterdir():
        if path.name not in ("golden.npz", *without):
            shutil.copy(path, target)
    merged = {key: value for key, value in {**config_of(source), **config}.items() if value is not None}
    (target / "config.json").write_text(json.dumps(merged))
    return target


def data_section(path: Path) -> bytes:
    with GGUFFile(path) as file:
        return path.read_bytes()[file.data_offset :]


def untouched_keys(path: Path, *changed: str) -> dict[str, Any]:
    with GGUFFile(path) as file:
        keys = (key for key in file.keys() if not key.startswith("clex.") and key not in changed)  # noqa: SIM118
        return {key: (file.kind(key), str(file.get(key))) for key in keys}


# tables


@pytest.mark.parametrize("name", ["llama2-128", "mixtral-128", "phi-32", "zero-64"])
def test_tables_are_the_authors(name: str) -> None:
    known = np.load(DATA / f"table_{name}.npz")
    made = clex_convert.tables(
        "clex",
        dim=int(known["dim"]),
        base=float(known["base"]),
        original_context=4096,
        max_factor=int(known["max_factor"]),
        weights={key: known[key] for key in weights.NAMES},
        act=str(known["act"]),
        time_dt=float(known["time_dt"]),
    )
    np.testing.assert_allclose(made.inv_freq, known["inv_freq"], rtol=1e-5, atol=0)
    np.testing.assert_array_equal(made.scaling_factors, known["t"])


@pytest.mark.parametrize("name", ["llama", "llama-log-scale", "mixtral", "phi2"])
def test_tables_of_the_golden_models_are_the_authors(name: str) -> None:
    config, tensors = config_of(DATA / name), load_file(DATA / name / "model.safetensors")
    scaling, heads = config["rope_scaling"], config["num_attention_heads"]
    made = clex_convert.tables(
        "clex",
        dim=int(config.get("partial_rotary_factor", 1) * (config["hidden_size"] // heads)),
        base=config["rope_theta"],
        original_context=64,
        max_factor=scaling["max_factor"],
        weights={"ode_up_proj": tensors[UP].numpy(), "ode_down_proj": tensors[DOWN].numpy()},
        act=scaling["act"],
        time_dt=scaling["time_dt"],
    )
    np.testing.assert_allclose(made.inv_freq, np.load(DATA / name / "golden.npz")["inv_freq"], rtol=1e-5, atol=0)


def closed_form(dim: int, base: float, factors: int) -> np.ndarray:
    even, t = np.arange(0, dim, 2), np.arange(1, factors + 1)[:, None]
    return base ** (-even / dim) * (2.0 * t - 1) ** (-even / (dim - 2))


def test_an_untrained_layer_gives_the_closed_form() -> None:
    known = np.load(DATA / "table_zero-64.npz")
    made = clex_convert.tables(
        "clex",
        dim=64,
        base=10000.0,
        original_context=4096,
        max_factor=16,
        weights={key: known[key] for key in weights.NAMES},
    )
    np.testing.assert_allclose(made.inv_freq, closed_form(64, 10000.0, 16), rtol=0, atol=1e-6)


def test_ntk_is_the_closed_form_and_needs_no_weights() -> None:
    made = clex_convert.tables("ntk", dim=64, base=1e5, original_context=8192)
    np.testing.assert_allclose(made.inv_freq, closed_form(64, 1e5, 4), rtol=1e-6, atol=0)
    assert made.context_lengths == [8192, 16384, 24576, 32768]


def test_defaults_of_the_layer_are_silu_and_a_hundredth() -> None:
    known = np.load(DATA / "table_mixtral-128.npz")
    options: dict[str, Any] = {"dim": 128, "base": 1e6, "original_context": 1, "max_factor": 3}
    matrices = {key: known[key] for key in weights.NAMES}
    said = clex_convert.tables("clex", **options, weights=matrices, act="silu", time_dt=0.01)
    unsaid = clex_convert.tables("clex", **options, weights=matrices)
    np.testing.assert_array_equal(said.inv_freq, unsaid.inv_freq)
    assert set(weights.ACTIVATIONS) == set(ode.ACTIVATIONS)


# model folders


@pytest.mark.parametrize("name", ["llama", "llama-log-scale", "mixtral"])
def test_a_converted_folder_carries_its_tables(name: str, golden_gguf: Callable[[str], Path]) -> None:
    path, config = golden_gguf(name), config_of(DATA / name)
    tables = read_tables(path)
    assert tables is not None
    np.testing.assert_allclose(tables.inv_freq, np.load(DATA / name / "golden.npz")["inv_freq"], rtol=1e-5, atol=0)
    assert tables.scaling_factors.tolist() == [1, 2, 3, 4]
    assert (tables.method, tables.original_context_length) == ("clex", 64)
    assert tables.log_scale is config["log_scale"]
    facts = json.loads(tables.provenance)
    assert facts["activation"] == config["rope_scaling"]["act"]
    assert (facts["solver"], facts["step"]) == ("torchdiffeq rk4", 0.01)
    assert facts["source"]["rope_scaling"]["type"] == "clex"
    digest = hashlib.sha256()
    tensors = load_file(DATA / name / "model.safetensors")
    for matrix in (tensors[UP], tensors[DOWN]):
        digest.update(matrix.numpy().tobytes())
    assert facts["weights_sha256"] == digest.hexdigest()


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_converted_folder_is_the_plain_model_otherwise(name: str, golden_gguf: Callable[[str], Path]) -> None:
    path, tensors = golden_gguf(name), load_file(DATA / name / "model.safetensors")
    with GGUFFile(path) as file:
        assert file.get("general.architecture") == "llama"
        assert file.get("llama.context_length") == 64
        assert file.get("llama.rope.freq_base") == config_of(DATA / name)["rope_theta"]
        assert not [key for key in file.keys() if "scaling" in key and not key.startswith("clex.")]  # noqa: SIM118
        infos = {tensor.name: tensor for tensor in file.tensors}
        data = path.read_bytes()[file.data_offset :]
    assert not [tensor for tensor in infos if "clex" in tensor]
    per_layer = 9 if name == "llama" else 10  # a router, and the experts stacked into the three matrices
    assert len(infos) == 3 + 2 * per_layer
    for theirs, ours in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("model.layers.1.self_attn.v_proj.weight", "blk.1.attn_v.weight"),
    ):
        info = infos[ours]
        assert data[info.offset : info.offset + info.size] == tensors[theirs].numpy().tobytes()


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, golden_gguf: Callable[[str], Path]) -> None:
    again = tmp_path / "again {outtype} ü.gguf"  # nor does its name matter
    clex_convert.convert(DATA / "llama", again, outtype="f32")
    assert again.read_bytes() == golden_gguf("llama").read_bytes()


@pytest.mark.parametrize("layout", ["sharded", "bin"])
def test_every_layout_of_weights_gives_the_same_file(
    tmp_path: Path, golden_gguf: Callable[[str], Path], layout: str
) -> None:
    folder = model_folder(DATA / "llama", tmp_path / "llama", without=("model.safetensors",))
    tensors = load_file(DATA / "llama" / "model.safetensors")
    if layout == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        names = sorted(tensors)
        halves = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
        for part, part_names in halves.items():
            save_file({name: tensors[name] for name in part_names}, folder / part)
        weight_map = {name: part for part, part_names in halves.items() for name in part_names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    clex_convert.convert(folder, tmp_path / "out.gguf", outtype="f32")
    known = golden_gguf("llama")
    assert data_section(tmp_path / "out.gguf") == data_section(known)
    assert untouched_keys(tmp_path / "out.gguf") == untouched_keys(known)
    made, wanted = read_tables(tmp_path / "out.gguf"), read_tables(known)
    assert made is not None
    assert wanted is not None
    np.testing.assert_array_equal(made.inv_freq, wanted.inv_freq)


@pytest.mark.parametrize("spelling", ["rope_type", "rope_parameters"])
def test_newer_spellings_of_the_config_are_understood(tmp_path: Path, spelling: str) -> None:
    config = config_of(DATA / "mixtral")
    scaling = config["rope_scaling"]
    scaling["rope_type"] = scaling.pop("type")
    changes: dict[str, Any] = {"rope_scaling": scaling}
    if spelling == "rope_parameters":
        changes = {"rope_scaling": None, "rope_theta": None, "rope_parameters": {**scaling, "rope_theta": 1e6}}
    folder = model_folder(DATA / "mixtral", tmp_path / "mixtral", **changes)
    result = clex_convert.convert(folder, tmp_path / "out.gguf", outtype="f16")
    known = np.load(DATA / "mixtral" / "golden.npz")["inv_freq"]
    np.testing.assert_allclose(result.tables.inv_freq, known, rtol=1e-5, atol=0)
    with GGUFFile(tmp_path / "out.gguf") as file:
        assert file.get("llama.rope.freq_base") == 1e6
        assert "llama.rope.scaling.type" not in file


def test_options_go_before_the_config(tmp_path: Path) -> None:
    result = clex_convert.convert(
        DATA / "llama",
        tmp_path / "out.gguf",
        outtype="bf16",
        original_context=32,
        max_factor=6,
        act="silu",
        time_dt=0.1,
        log_scale=True,
    )
    assert result.tables.context_lengths == [32 * t for t in range(1, 7)]
    assert result.tables.log_scale
    facts = json.loads(result.tables.provenance)
    assert (facts["activation"], facts["step"]) == ("silu", 0.1)
    with GGUFFile(tmp_path / "out.gguf") as file:
        assert file.get("llama.context_length") == 32


@pytest.mark.parametrize(
    ("dtypes", "wanted"),
    [
        ((torch.bfloat16, torch.bfloat16), "bf16"),
        ((torch.float16, torch.float16), "f16"),
        ((torch.float16, torch.bfloat16), "f32"),
        ((torch.float32, torch.bfloat16), "f32"),
    ],
)
def test_nothing_is_lost_before_quantization(tmp_path: Path, dtypes: tuple[Any, Any], wanted: str) -> None:
    from clex_convert.checkpoint import Checkpoint

    tensors = load_file(DATA / "llama" / "model.safetensors")
    mixed = {
        name: tensor if "clex" in name or tensor.dim() < 2 else tensor.to(dtypes[i % 2])
        for i, (name, tensor) in enumerate(tensors.items())
    }
    folder = model_folder(DATA / "llama", tmp_path / "llama")
    save_file(mixed, folder / "model.safetensors")
    assert Checkpoint(folder).precision == wanted


def test_a_folder_becomes_q4_k_m_unless_told(tmp_path: Path) -> None:
    result = clex_convert.convert(DATA / "llama", tmp_path / "out.gguf")
    assert result.outtype == "q4_k_m"
    assert "rows that blocks of q4_k_m do not divide" in result.notes[0]
    with GGUFFile(tmp_path / "out.gguf") as file:
        assert file.get("general.file_type") == file_types.file_type("q4_k_m")
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_a_plain_folder_can_have_ntk_tables(tmp_path: Path) -> None:
    folder = model_folder(DATA / "llama", tmp_path / "llama", rope_scaling=None)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "clex" not in name}, folder / "model.safetensors")
    result = clex_convert.convert(folder, tmp_path / "out.gguf", outtype="f32", method="ntk", max_factor=2)
    np.testing.assert_allclose(result.tables.inv_freq, closed_form(32, 1e4, 2), rtol=1e-6, atol=0)


def test_a_folder_may_have_the_name_of_a_model_with_another_vocabulary(tmp_path: Path) -> None:
    folder = model_folder(DATA / "phi2", tmp_path / "phi3-tiny")
    path = clex_convert.convert(folder, tmp_path / "out.gguf", method="ntk", pre_tokenizer="gpt-2").path
    with GGUFFile(path) as file:
        assert "phi3" in file.get("general.name").lower()


def test_an_unknown_pre_tokenizer_can_be_named(tmp_path: Path) -> None:
    folder = model_folder(DATA / "llama", tmp_path / "llama", without=("tokenizer.model", "tokenizer_config.json"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "phi2" / name, folder)
    with pytest.raises(clex_convert.ConvertError, match="pass its name with `pre_tokenizer`"):
        clex_convert.convert(folder, tmp_path / "out.gguf", outtype="f32")
    with pytest.raises(clex_convert.ConvertError, match="unknown pre-tokenizer type: 'nonsense'"):
        clex_convert.convert(folder, tmp_path / "out.gguf", outtype="f32", pre_tokenizer="nonsense")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]
    # As transformers writes it, when it saves what it read from a GGUF: it looks like a LLaMA vocabulary.
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["byte_fallback"] = True
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [tokenizer["decoder"]]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(clex_convert.ConvertError, match="if its tokenizer is a byte-level BPE, pass the name"):
        clex_convert.convert(folder, tmp_path / "out.gguf", outtype="f32")
    clex_convert.convert(folder, tmp_path / "out.gguf", outtype="f32", pre_tokenizer="gpt-2")
    with GGUFFile(tmp_path / "out.gguf") as file:
        assert file.get("tokenizer.ggml.model") == "gpt2"
        assert file.get("tokenizer.ggml.pre") == "gpt-2"


def test_another_package_named_gguf_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = types.ModuleType("gguf")
    monkeypatch.setitem(sys.modules, "gguf", other)
    paths = list(sys.path)
    clex_convert.convert(DATA / "llama", tmp_path / "out.gguf", outtype="f32")
    assert sys.modules["gguf"] is other
    assert "conversion" not in sys.modules
    assert sys.path == paths


# GGUF files


def test_adding_tables_copies_the_tensors_bit_for_bit(tmp_path: Path, smollm: Path) -> None:
    result = clex_convert.convert(smollm, tmp_path / "out.gguf", method="ntk", original_context=2048)
    before, after = data_section(smollm), data_section(result.path)
    assert hashlib.sha256(before).digest() == hashlib.sha256(after).digest()
    assert untouched_keys(smollm, "llama.context_length") == untouched_keys(result.path, "llama.context_length")
    with GGUFFile(smollm) as source, GGUFFile(result.path) as copy:
        assert source.tensors == copy.tensors
        assert (source.get("llama.context_length"), copy.get("llama.context_length")) == (8192, 2048)
    assert result.tables.context_lengths == [2048, 4096, 6144, 8192]
    np.testing.assert_allclose(result.tables.inv_freq, closed_form(64, 1e5, 4), rtol=1e-6, atol=0)


def test_tables_of_a_file_are_replaced(tmp_path: Path, golden_gguf: Callable[[str], Path]) -> None:
    source = golden_gguf("llama-log-scale")
    result = clex_convert.convert(source, tmp_path / "out.gguf", method="ntk", max_factor=3)
    assert (result.tables.method, result.tables.log_scale, len(result.tables.inv_freq)) == ("ntk", False, 3)
    assert data_section(source) == data_section(result.path)


def test_broken_tables_of_a_file_can_be_replaced(tmp_path: Path) -> None:
    source = tmp_path / "in.gguf"
    source.write_bytes(gguf_bytes({**MODEL, "clex.version": np.uint32(9), "clex.inv_freq": "nonsense"}))
    result = clex_convert.convert(source, tmp_path / "out.gguf", method="ntk", check="none")
    assert result.tables.context_lengths == [64, 128, 192, 256]


@pytest.mark.parametrize("alignment", [32, 64, 256])
def test_alignment_and_a_missing_end_are_minded(tmp_path: Path, alignment: int) -> None:
    source, keys = tmp_path / "in.gguf", dict(MODEL)
    if alignment == 32:
        data = gguf_bytes(keys, pad_end=False)
    else:
        keys["general.alignment"] = np.uint32(alignment)
        data = gguf_bytes(keys, pad_end=False, alignment=alignment)
    source.write_bytes(data)
    result = clex_convert.convert(source, tmp_path / "out.gguf", method="ntk", check="none")
    with GGUFFile(result.path) as file:
        assert file.data_offset % alignment == 0
        contents = result.path.read_bytes()[file.data_offset :]
        assert len(contents) == file.data_size
        for info, tensor in zip(file.tensors, TENSORS.values(), strict=True):
            assert contents[info.offset : info.offset + info.size] == tensor.tobytes()


def test_weights_from_a_file_give_the_tables_of_the_folder(tmp_path: Path, golden_gguf: Callable[[str], Path]) -> None:
    tensors = load_file(DATA / "llama" / "model.safetensors")
    matrices = {"ode_up_proj": tensors[UP], "ode_down_proj": tensors[DOWN]}
    save_file(matrices, tmp_path / "said.safetensors", {"act": "tanh", "max_factor": "4", "log_scale": "true"})
    save_file(matrices, tmp_path / "unsaid.safetensors")
    known = read_tables(golden_gguf("llama"))
    assert known is not None
    said = clex_convert.convert(
        golden_gguf("llama"), tmp_path / "said.gguf", clex_weights=tmp_path / "said.safetensors"
    )
    np.testing.assert_array_equal(said.tables.inv_freq, known.inv_freq)
    assert said.tables.log_scale
    unsaid = clex_convert.convert(
        golden_gguf("llama"),
        tmp_path / "unsaid.gguf",
        clex_weights=tmp_path / "unsaid.safetensors",
        act="tanh",
        max_factor=3,
        log_scale=False,
    )
    np.testing.assert_array_equal(unsaid.tables.inv_freq, known.inv_freq[:3])
    assert not unsaid.tables.log_scale


def test_outtypes_are_all_that_llama_cpp_has() -> None:
    from llama_cpp import llama_cpp

    prefix = "LLAMA_FTYPE_"
    names = {name.removeprefix(prefix) for name in dir(llama_cpp) if name.startswith(prefix)}
    # The first is no type, and llama_model_quantize does not make the second.
    names -= {"GUESSED", "MOSTLY_NVFP4"}
    assert {name.removeprefix("ALL_").removeprefix("MOSTLY_").lower() for name in names} == set(file_types.OUTTYPES)


# the command


def test_the_command_prints_the_buckets_and_the_file(tmp_path: Path) -> None:
    source = tmp_path / "in.gguf"
    source.write_bytes(gguf_bytes(MODEL))
    out = tmp_path / "out.gguf"
    arguments = [str(source), str(out), "--method", "ntk", "--max-factor", "20", "--outtype", "COPY"]
    arguments += ["--check", "none"]  # nothing but a header
    result = click.testing.CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["bucket", "factor", "tokens", "up", "to"]
    assert lines[1].split() == ["1", "1", "64"]
    assert "..." in lines[-4]
    assert lines[-3].split() == ["20", "20", "1280"]
    assert lines[-2].startswith(f"{out}: copy, method ntk, {readable_size(out.stat().st_size)}, ")
    assert lines[-1] == f"SHA-256 {hashlib.sha256(out.read_bytes()).hexdigest()}"
    assert result.stderr == ""


def test_overwriting_replaces_the_file(tmp_path: Path) -> None:
    source, out = tmp_path / "in.gguf", tmp_path / "out.gguf"
    source.write_bytes(gguf_bytes(MODEL))
    out.write_text("old")
    clex_convert.convert(source, out, method="ntk", overwrite=True, check="none")
    assert read_tables(out) is not None
