"""LoRA adapters merged into GGUF files: what comes out is the merged folder's, without torch; the rest is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import clex_convert
from clex_convert import cli, ggml_rows
from clex_convert.gguf_writer import GGUFWriter, TensorData, tensors_of
from clex_local.model_file import architectures
from clex_local.model_file.gguf_api import tensor_types
from clex_local.model_file.gguf_file import GGUFFile
from helpers.gguf_maker import rewrite
from helpers.low_level import Context, Model
from helpers.tiny_models import make_model
from test_architectures import MODELS
from test_lora import ATTENTION, DATA, DOWN, OPTIONS, TIED, UP, adapted

pytestmark = [pytest.mark.convert, pytest.mark.folders, pytest.mark.filterwarnings("ignore::UserWarning")]

TABLES: dict[str, Any] = dict(method="ntk", max_factor=2)
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """The folder of a tiny model by its name in MODELS and what differs."""
    made: dict[Any, Path] = {}

    def get(name: str, **changes: Any) -> Path:
        key = (name, *changes.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp("base") / "base"
            make_model(name, {**MODELS[name][0], **changes}, made[key], DATA / MODELS[name][1])
        return made[key]

    return get


def save_adapter(folder: Path, target: Path, name: str, *, safe: bool = True, **options: Any) -> Path:
    """An adapter of the model in a folder whose every tensor is drawn, as peft saves it."""
    class_name = f"{name.split()[0]}ForCausalLM"
    model = getattr(transformers, class_name).from_pretrained(folder)
    model.name_or_path = model.config._name_or_path = ""  # peft would ask the hub about it
    adapted(model, **options).save_pretrained(str(target), safe_serialization=safe)
    return target


def write_adapter(folder: Path, weights: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}))
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def converted(source: Path, target: Path, outtype: str | None = "f32", **options: Any) -> Path:
    """A folder as a GGUF file, or a GGUF file with an adapter in it."""
    if (source / "tokenizer.json").exists():
        options["pre_tokenizer"] = "gpt-2"
    check = options.pop("check", "none")
    return clex_convert.convert(source, target, outtype=outtype, check=check, **TABLES, **options).path


def kinds(path: Path) -> dict[str, str]:
    with GGUFFile(path) as file:
        return {tensor.name: tensor.type_name.lower() for tensor in file.tensors}


def values(path: Path) -> dict[str, np.ndarray]:
    """Every tensor as float32."""
    with GGUFFile(path) as file:
        found = tensors_of(file)
    data = path.read_bytes()
    return {
        t.name: ggml_rows.dequantized(t.type, data[t.offset : t.offset + t.size], t.shape[0]).reshape(t.shape[::-1])
        for t in found
    }


def logits(path: Path) -> np.ndarray:
    model = Model(path)
    with Context(model, n_ctx=64) as context:
        found = context.feed(list(range(5, 45)), 0)
    model.close()
    return found


@pytest.mark.parametrize("outtype", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
def test_a_file_gets_what_its_folder_gets(model_folder, tmp_path: Path, name: str, outtype: str) -> None:
    folder = model_folder(name)
    lora_bias = name == "Qwen2"
    target_modules = [*ATTENTION[:3]] if lora_bias else "all-linear"
    options: dict[str, Any] = dict(
        target_modules=target_modules, bias="all" if lora_bias else "none", lora_bias=lora_bias
    )
    adapter = save_adapter(folder, tmp_path / "adapter", name, **options)
    wanted = converted(folder, tmp_path / "wanted.gguf", outtype, lora=adapter)
    plain = converted(folder, tmp_path / "plain.gguf", outtype)
    made = converted(plain, tmp_path / "made.gguf", None, lora=adapter, check="basic")
    assert kinds(made) == kinds(wanted) == kinds(plain)
    found, expected, before = values(made), values(wanted), values(plain)
    largest = max(float(np.abs(tensor).max()) for tensor in expected.values())
    atol = {"f32": 1e-6, "f16": largest / 1000, "q8_0": largest / 60}[outtype]
    for tensor in expected:
        np.testing.assert_allclose(found[tensor], expected[tensor], atol=atol, rtol=0, err_msg=tensor)
    # far from the model without it, and from one whose rows are in another order
    assert np.abs(before["blk.1.attn_k.weight"] - expected["blk.1.attn_k.weight"]).max() > 5 * atol
    spread = np.std(logits(wanted))
    assert np.abs(logits(made) - logits(wanted)).max() < {"f32": 1e-3, "f16": 0.02, "q8_0": 0.3}[outtype] * spread
    assert np.abs(logits(made) - logits(plain)).max() > spread


@pytest.mark.parametrize("name", ["patterns", "modules", "embeddings", "tokens", "biases", "fan in fan out", "fused"])
def test_what_peft_can_say(model_folder, tmp_path: Path, name: str) -> None:
    architecture, options = OPTIONS[name]
    # of a file with two tensors nobody can say whether trained rows are of both
    folder = model_folder(architecture, **({"tie_word_embeddings": True} if name == "tokens" else {}))
    adapter = save_adapter(folder, tmp_path / "adapter", architecture, safe=name != "patterns", **options)
    plain = converted(folder, tmp_path / "plain.gguf")
    made = values(converted(plain, tmp_path / "made.gguf", None, lora=adapter))
    wanted = values(converted(folder, tmp_path / "wanted.gguf", lora=adapter))
    assert made.keys() == wanted.keys()
    for tensor in wanted:
        np.testing.assert_allclose(made[tensor], wanted[tensor], atol=1e-6, rtol=0, err_msg=tensor)


@pytest.mark.parametrize("name", [name for name in TIED if TIED[name][0] != "Olmo2"])
def test_tied_embeddings_part_where_they_do_in_a_folder(model_folder, tmp_path: Path, name: str) -> None:
    architecture, options = TIED[name]
    folder = model_folder(architecture, tie_word_embeddings=True)
    adapter = save_adapter(folder, tmp_path / "adapter", architecture, **options)
    plain = converted(folder, tmp_path / "plain.gguf")
    made = values(converted(plain, tmp_path / "made.gguf", None, lora=adapter, check="basic"))
    wanted = values(converted(folder, tmp_path / "wanted.gguf", lora=adapter))
    for tensor in {**wanted, "output.weight": made["token_embd.weight"]}:
        output = wanted.get(tensor, wanted["token_embd.weight"])  # a folder's may be written twice
        found = made.get(tensor, made["token_embd.weight"])
        np.testing.assert_allclose(found, output, atol=1e-6, rtol=0, err_msg=tensor)


@pytest.mark.parametrize("name", [name for name in MODELS if " " not in name])
def test_every_tensor_is_right_or_refused(model_folder, tmp_path: Path, name: str) -> None:
    """An adapter that replaces tensors by those of another model gives these, where it is not refused."""
    folder, other = model_folder(name), tmp_path / "other"
    shutil.copytree(folder, other)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    changed = {tensor: value + 0.1 * torch.randn_like(value) for tensor, value in weights.items()}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    plain, wanted = (converted(path, tmp_path / f"{path.name}.gguf") for path in (folder, other))
    row = architectures.of_class(f"{name}ForCausalLM")
    accepted, refusals = {}, []
    for tensor, value in changed.items():
        if tensor == "lm_head.weight" and "output.weight" not in kinds(plain):
            continue
        adapter = write_adapter(tmp_path / "adapter", {tensor: value})
        try:
            clex_convert.sizes(plain, lora=adapter, outtype="copy")
        except clex_convert.ConvertError as error:
            refusals.append(str(error))
        else:
            accepted[tensor] = value
    assert all("merge it into the model folder: clex-convert FOLDER OUT.gguf --lora" in line for line in refusals)
    adapter = write_adapter(tmp_path / "adapter", accepted)
    made = values(converted(plain, tmp_path / "made.gguf", None, lora=adapter))
    before, after = values(plain), values(wanted)
    touched = {tensor for tensor in before if not np.array_equal(before[tensor], made[tensor])}
    for tensor in touched - {"output.weight", "token_embd.weight"}:
        np.testing.assert_allclose(made[tensor], after[tensor], atol=1e-6, rtol=0, err_msg=tensor)
    matrices = {tensor for tensor in after if tensor.endswith(("attn_q.weight", "attn_output.weight", "down.weight"))}
    if "blk." not in row.rewritten:
        assert {tensor for tensor in matrices if "exp" not in tensor} <= touched


# types


@pytest.fixture(scope="module")
def wide(model_folder, tmp_path_factory):
    """A model whose rows are as long as blocks of K-quants, and an adapter of it."""
    sizes = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    folder = model_folder("Llama", **sizes)
    adapter = tmp_path_factory.mktemp("adapter") / "adapter"
    return folder, save_adapter(folder, adapter, "Llama", target_modules=["q_proj", "down_proj"])


@pytest.mark.parametrize("outtype", ["q4_1", "q5_0", "bf16", "q4_k_m", "q2_k", "iq4_xs"])
def test_tensors_keep_their_types_and_the_others_their_bytes(wide, tmp_path: Path, outtype: str) -> None:
    folder, adapter = wide
    plain = converted(folder, tmp_path / "plain.gguf", outtype)
    result = clex_convert.convert(plain, tmp_path / "made.gguf", lora=adapter, check="none")
    assert kinds(result.path) == kinds(plain)
    found, before, wanted = (
        values(result.path),
        values(plain),
        values(converted(folder, tmp_path / "wanted.gguf", lora=adapter)),
    )
    for name in before:
        if name in ("blk.0.attn_q.weight", "blk.0.ffn_down.weight"):
            error = np.square(found[name] - wanted[name]).mean() / np.square(wanted[name]).mean()
            assert error < {"bf16": 1e-4, "q5_0": 0.01, "q2_k": 0.25}.get(outtype, 0.03), name
        else:
            np.testing.assert_array_equal(found[name], before[name], err_msg=name)
    again = any("quantized again" in note for note in result.notes)
    assert again == (outtype != "bf16"), result.notes
    source = json.loads(result.tables.provenance)["source"]
    assert "lora" not in source  # the tables are those that the file had


def with_type(source: Path, target: Path, tensor: str, kind: str, data: bytes | None = None) -> Path:
    """A copy of a file in which one tensor is of another type; zeros, or these data."""
    with GGUFFile(source) as file, GGUFWriter(file) as writer:
        for found in tensors_of(file):
            writer.add(found)
        shape = writer.tensors[tensor].shape
        size = ggml_rows.row_size(tensor_types()[kind], shape[0]) * (shape[1] if len(shape) > 1 else 1)
        writer.add(TensorData(tensor, shape, tensor_types()[kind], data or bytes(size), 0, size))
        layout = writer.layout()
        layout.write_header(target)
        layout.write(target, lambda part: None)
    return target


def test_types_that_need_an_importance_matrix_become_q8_0(wide, tmp_path: Path) -> None:
    folder, adapter = wide
    plain = converted(folder, tmp_path / "plain.gguf", "f16")
    source = with_type(plain, tmp_path / "source.gguf", "blk.0.attn_q.weight", "iq2_xxs")
    result = clex_convert.convert(source, tmp_path / "made.gguf", lora=adapter)
    assert kinds(result.path) == {**kinds(plain), "blk.0.attn_q.weight": "q8_0"}
    assert any("those of iq2_xxs, which need an importance matrix, became q8_0" in note for note in result.notes)


def test_another_type_is_made_of_what_is_not_quantized_again(wide, tmp_path: Path) -> None:
    folder, adapter = wide
    plain = converted(folder, tmp_path / "plain.gguf", "f32")
    made = clex_convert.convert(plain, tmp_path / "made.gguf", lora=adapter, outtype="q4_k_m", check="none")
    wanted = converted(folder, tmp_path / "wanted.gguf", "q4_k_m", lora=adapter)
    assert kinds(made.path) == kinds(wanted)
    assert [size.size for size in clex_convert.sizes(plain, lora=adapter, outtype="q4_k_m")] == [made.size]
    assert not any("quantized" in note for note in made.notes)
    found, expected = values(made.path), values(wanted)
    for name in expected:
        assert np.square(found[name] - expected[name]).mean() <= 1e-3 * np.square(expected[name]).mean(), name


# where it runs, and from what


def test_torch_is_not_needed(wide, tmp_path: Path) -> None:
    """Also with a CLEX layer whose second matrix is zero: the tables are those of YaRN."""
    folder, adapter = wide
    plain = converted(folder, tmp_path / "plain.gguf", "q8_0")
    rope = {"rope_type": "clex", "max_factor": 3, "dynamics": "yarn"}
    layer = {"model.clex_layer." + UP.split("layer.")[1]: torch.ones(32, 64)}
    layer["model.clex_layer." + DOWN.split("layer.")[1]] = torch.zeros(64, 32)
    weights = load_file(adapter / "adapter_model.safetensors")
    with_layer = tmp_path / "with layer"
    write_adapter(with_layer, {**weights, **layer}, r=4, lora_alpha=10, rope_scaling=rope)
    wanted = clex_convert.convert(plain, tmp_path / "wanted.gguf", method="yarn", max_factor=3, lora=adapter)
    missing = "import sys\nfor name in ('torch', 'torchdiffeq', 'transformers', 'safetensors', 'yaml', 'gguf'):\n"
    code = f"{missing} sys.modules[name] = None\nfrom clex_convert.cli import main\nmain()"
    arguments = [str(plain), str(tmp_path / "made.gguf"), "--lora", str(with_layer)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with GGUFFile(tmp_path / "made.gguf") as made, GGUFFile(wanted.path) as other:
        assert made.get("clex.method") == "clex"
        np.testing.assert_allclose(made.get("clex.inv_freq"), other.get("clex.inv_freq"), rtol=1e-6)
        np.testing.assert_array_equal(made.get("clex.attn_scale"), other.get("clex.attn_scale"))
        assert json.loads(made.get("clex.provenance"))["source"]["lora"] == {"r": 4, "lora_alpha": 10}
    found, expected = values(tmp_path / "made.gguf"), values(wanted.path)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    # a layer that was trained is integrated by torch, and without it one line says so
    layer["model.clex_layer." + DOWN.split("layer.")[1]] += 0.001
    write_adapter(with_layer, layer, rope_scaling=rope)
    arguments[1] = str(tmp_path / "none.gguf")
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "needs the Python package torch" in done.stderr
    assert not (tmp_path / "none.gguf").exists()


def test_an_untrained_layer_around_yarn_needs_no_integration() -> None:
    """The closed form is where the integration of a layer that is nearly zero comes out."""
    up = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
    down = np.zeros((32, 16), np.float32)
    options: dict[str, Any] = dict(dim=32, base=10000.0, original_context=512, max_factor=4, dynamics="yarn")
    closed = clex_convert.tables("clex", weights={"ode_up_proj": up, "ode_down_proj": down}, **options)
    assert json.loads(closed.provenance)["solver"] == "closed form"
    down[3, 5] = 1e-30
    integrated = clex_convert.tables("clex", weights={"ode_up_proj": up, "ode_down_proj": down}, **options)
    np.testing.assert_allclose(closed.inv_freq, integrated.inv_freq, rtol=1e-6)
    assert closed.attn_scale is not None
    assert integrated.attn_scale is not None
    np.testing.assert_array_equal(closed.attn_scale, integrated.attn_scale)


def test_a_trained_layer_is_the_files_as_it_is_the_folders(tmp_path: Path, golden_gguf) -> None:
    said = json.loads((DATA / "llama" / "config.json").read_text())
    layer = load_file(DATA / "llama" / "model.safetensors")
    adapter = write_adapter(
        *(tmp_path / "adapter", {name: layer[name] for name in (UP, DOWN)}), rope_scaling=said["rope_scaling"]
    )
    plain = clex_convert.convert(golden_gguf("llama"), tmp_path / "plain.gguf", method="ntk", check="none").path
    result = clex_convert.convert(plain, tmp_path / "made.gguf", lora=adapter, log_scale=said.get("log_scale"))
    with GGUFFile(golden_gguf("llama")) as file:
        np.testing.assert_array_equal(result.tables.inv_freq.ravel(), file.get("clex.inv_freq"))
    assert result.tables.method == "clex"
    yarn = clex_convert.convert(plain, tmp_path / "yarn.gguf", lora=adapter, method="yarn", max_factor=2, check="none")
    assert yarn.tables.method == "yarn"


def test_a_split_file_with_tables_and_rows_of_several_chunks(
    wide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, adapter = wide
    plain = converted(folder, tmp_path / "plain.gguf", "q8_0")
    names = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    with GGUFFile(plain) as file:
        found = tensors_of(file)
    for number, path in enumerate(names):
        with GGUFFile(plain) as file, GGUFWriter(file) as writer:
            writer.set({"split.no": np.uint16(number), "split.count": np.uint16(2)})
            for tensor in found[number::2]:
                writer.add(tensor)
            layout = writer.layout()
            layout.write_header(path)
            layout.write(path, lambda part: None)
    wanted = clex_convert.convert(plain, tmp_path / "wanted.gguf", lora=adapter)
    monkeypatch.setattr("clex_convert.gguf_adapter._CHUNK", 4 * 256 * 7)  # rows of the tensors are no multiple
    made = clex_convert.convert(names[1], tmp_path / "made.gguf", lora=adapter)
    assert made.tables == wanted.tables or made.tables.inv_freq.tobytes() == wanted.tables.inv_freq.tobytes()
    found_values, expected = values(made.path), values(wanted.path)
    assert all(np.array_equal(found_values[name], expected[name]) for name in expected)


# what is refused


@pytest.fixture
def refused(tmp_path: Path, capfd: Any):
    """Runs the command; returns its one line of error."""

    def run(source: Path, adapter: Path, *options: str) -> str:
        target = tmp_path / "out" / "out.gguf"
        target.parent.mkdir(exist_ok=True)
        capfd.readouterr()
        result = click.testing.CliRunner().invoke(
            cli.main, [str(source), str(target), "--lora", str(adapter), *options]
        )
        assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (1, "", 1), result.output
        assert capfd.readouterr() == ("", "")
        assert not list(target.parent.iterdir())
        return result.stderr

    return run


def pair(name: str = Q, rows: int = 128, columns: int = 128, value: float = 1.0) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_A.weight": torch.ones(2, columns), f"{name}.lora_B.weight": torch.full((rows, 2), value)}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            pair(rows=64),
            "model.layers.0.self_attn.q_proj.weight is [64, 128] in the adapter and [128, 128] in the base",
        ),
        (pair(Q.replace("layers.0", "layers.9")), "changes model.layers.9.self_attn.q_proj.weight, which"),
        (pair("base_model.model.model.layers.0.mlp.experts.0.up_proj"), "if the adapter belongs to this model, merge"),
        (pair(Q.replace("q_proj", "qkv_proj")), "self_attn.qkv_proj.weight, which"),
        (pair() | pair("model.layers.0.attention.wq"), "changes blk.0.attn_q.weight by two names"),
        (pair(value=float("nan")), "lora_B.weight holds values that are not finite; the adapter is of no use"),
        (pair(value=3e38), "blk.0.attn_q.weight holds values that are not finite (NaN or infinite), or the adapter"),
        (pair() | {f"{Q}.lora_B.bias": torch.ones(128)}, "q_proj.bias, which"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 128)}, "has only one of lora_A.weight and lora_B.weight"),
        ({"model.layers.0.self_attn.q_proj.weight": torch.ones(128, 128).int()}, "I32 where floats are expected"),
    ],
)
def test_weights_that_do_not_fit(refused, golden_gguf, tmp_path: Path, weights: Any, message: str) -> None:
    assert message in refused(golden_gguf("llama"), write_adapter(tmp_path / "adapter", weights))


def test_tensors_that_cannot_be_changed(refused, golden_gguf, model_folder, tmp_path: Path) -> None:
    llama, adapter = golden_gguf("llama"), write_adapter(tmp_path / "adapter", pair())
    integers = with_type(llama, tmp_path / "i8.gguf", "blk.0.attn_q.weight", "i8")
    assert "blk.0.attn_q.weight is of the type i8, which cannot be changed; merge it into the model" in refused(
        integers, adapter
    )
    infinite = np.full(128 * 128, np.inf, "<f4").tobytes()
    nan = with_type(llama, tmp_path / "inf.gguf", "blk.0.attn_q.weight", "f32", infinite)
    assert "blk.0.attn_q.weight holds values that are not finite" in refused(nan, adapter)
    halves = with_type(llama, tmp_path / "f16.gguf", "blk.0.attn_q.weight", "f16")
    big = write_adapter(tmp_path / "big", pair(value=50_000.0))
    assert "values beyond those of f16; choose another --outtype" in refused(halves, big)
    neox = converted(model_folder("GPTNeoX"), tmp_path / "neox.gguf")
    fused = write_adapter(tmp_path / "fused", pair("gpt_neox.layers.0.attention.query_key_value", 384))
    assert "does not hold what it does in transformers; merge it into the model folder" in refused(neox, fused)
    unknown = rewrite(llama, tmp_path / "deci.gguf", {"general.architecture": "deci"})
    assert "deci" in refused(unknown, adapter)
    rows = {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 128)}
    tokens = write_adapter(tmp_path / "tokens", rows, trainable_token_indices=[3])
    assert "may stand in the output, too" in refused(llama, tokens)


def test_adapters_and_files_of_no_use(refused, golden_gguf, tmp_path: Path) -> None:
    llama, adapter = golden_gguf("llama"), write_adapter(tmp_path / "adapter", pair())
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for kept in (0, 5, 100, len(whole) - 1):
        weights.write_bytes(whole[:kept])
        assert "adapter_model.safetensors: damaged or truncated" in refused(llama, adapter)
    for damaged in (whole + b"x", whole.replace(b'"F32"', b'"F33"'), whole.replace(b"[2,128]", b"[2,129]")):
        weights.write_bytes(damaged)
        assert "adapter_model.safetensors: damaged or truncated" in refused(llama, adapter)
    weights.write_bytes(whole)
    (adapter / "config.json").write_text(json.dumps({"rope_theta": 500000.0}))
    assert "was trained with a rope_theta of 500000.0" in refused(llama, adapter)
    (adapter / "config.json").write_text(json.dumps({"rope_scaling": "yarn"}))
    assert "what its config says of the rotary embedding is unusable" in refused(llama, adapter)
    (adapter / "config.json").unlink()
    (tmp_path / "short.gguf").write_bytes(llama.read_bytes()[:-70_000])
    assert "truncated GGUF file" in refused(tmp_path / "short.gguf", adapter)
    assert "the key llama.block_count is missing" in refused(
        rewrite(llama, tmp_path / "odd.gguf", {"llama.block_count": None}), adapter
    )
    for heads, said in ((np.uint32(3), 3), (np.array([], np.uint32), 0), (np.array([7, 4], np.uint32), 7), ("four", 0)):
        odd = rewrite(llama, tmp_path / "heads.gguf", {"llama.attention.head_count": heads})
        assert f"rows, which are not of {said} heads" in refused(odd, adapter)


def test_a_disk_without_room(wide, tmp_path: Path) -> None:
    """Nothing is left of what was begun."""
    folder, adapter = wide
    plain = converted(folder, tmp_path / "plain.gguf", "q8_0")
    (tmp_path / "out").mkdir()
    code = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
    code += "from clex_convert.cli import main\nmain()"
    arguments = [str(plain), str(tmp_path / "out" / "made.gguf"), "--lora", str(adapter)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert "the disk is full or a size limit was reached" in done.stderr
    assert not list((tmp_path / "out").iterdir())
