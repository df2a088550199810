"""LoRA adapters: the merge is peft's, the file's logits are those of the adapted model, and the rest is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import clex_convert
from clex_convert import cli
from clex_local.model_file.gguf_file import GGUFFile
from helpers.tiny_models import assert_growing, convert_plainly, make_model
from test_architectures import MODELS, tolerance

pytestmark = [pytest.mark.convert, pytest.mark.folders]

DATA = Path(__file__).parent / "data"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
UP, DOWN = "model.clex_layer.proj_func.ode_up_proj", "model.clex_layer.proj_func.ode_down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model of transformers and its folder, by the name of its architecture and what differs from MODELS."""
    made = {}

    def get(name: str, **changes: Any) -> tuple[transformers.PreTrainedModel, Path]:
        key = (name, *changes.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("base") / "base"
            model = make_model(name, {**MODELS[name][0], **changes}, folder, DATA / MODELS[name][1])
            model.config._name_or_path = ""  # peft would ask the hub about it
            made[key] = folder
        class_name = f"{name.split()[0]}ForCausalLM"
        model = getattr(transformers, class_name).from_pretrained(made[key], attn_implementation="eager").eval()
        model.name_or_path = model.config._name_or_path = ""
        return model, made[key]

    return get


def adapted(model: transformers.PreTrainedModel, **options: Any) -> peft.PeftModel:
    """A model with an adapter whose every tensor is drawn."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM", **options})
    model = peft.get_peft_model(model, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def converted(folder: Path, target: Path, **options: Any) -> Path:
    tokenizer = "gpt-2" if (folder / "tokenizer.json").exists() else None
    return clex_convert.convert(
        folder, target, outtype="f32", method="ntk", max_factor=2, pre_tokenizer=tokenizer, **options
    ).path


def tensors(path: Path) -> dict[str, np.ndarray]:
    with GGUFFile(path) as file:
        data = path.read_bytes()[file.data_offset :]
        return {
            info.name: np.frombuffer(data[info.offset : info.offset + info.size], np.float32) for info in file.tensors
        }


# What of peft's config is tried with which architecture.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("Llama", dict(target_modules=ATTENTION)),
    "patterns": (
        "Llama",
        dict(
            target_modules="all-linear",
            use_rslora=True,
            rank_pattern={"down_proj": 2, r".*\.1\.self_attn\.(q|k)_proj": 7},
            alpha_pattern={"model.layers.0.self_attn.v_proj": 3, "o_proj": 5},
        ),
    ),
    "modules": ("Llama", dict(target_modules=["q_proj"], modules_to_save=["lm_head", "norm", "embed_tokens"])),
    "embeddings": ("Llama", dict(target_modules=["embed_tokens", "lm_head", "v_proj"])),
    "tokens": ("Llama", dict(target_modules=["q_proj"], trainable_token_indices=[3, 500, 7])),
    "tokens by name": ("Llama", dict(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 9]})),
    "biases": ("Qwen2", dict(target_modules=["q_proj", "k_proj"], bias="all", lora_bias=True)),
    "fan in fan out": ("Mistral", dict(target_modules=["down_proj"], fan_in_fan_out=True)),
    "fused": ("Phi3", dict(target_modules=["qkv_proj", "gate_up_proj"])),
    "reordered": ("GPTNeoX", dict(target_modules=["query_key_value", "dense_4h_to_h"])),
    "falcon": ("Falcon", dict(target_modules=["query_key_value", "dense"])),
    "experts": ("Qwen2Moe", dict(target_modules=[*ATTENTION, "up_proj", "shared_expert_gate"])),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_merge_is_the_one_of_peft(base, tmp_path: Path, name: str) -> None:
    architecture, options = OPTIONS[name]
    model, folder = base(architecture)
    model = adapted(model, **options)
    model.save_pretrained(tmp_path / "adapter", safe_serialization=name != "patterns")  # that one as .bin
    made = tensors(converted(folder, tmp_path / "made.gguf", lora=tmp_path / "adapter"))
    shutil.copytree(folder, tmp_path / "merged")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    if (folder / "tokenizer.model").exists():
        wanted = tensors(convert_plainly(tmp_path / "merged"))
    else:
        wanted = tensors(converted(tmp_path / "merged", tmp_path / "wanted.gguf"))
    assert made.keys() == wanted.keys()
    for tensor in wanted:
        np.testing.assert_allclose(made[tensor], wanted[tensor], atol=1e-6, rtol=0, err_msg=tensor)


TIED: dict[str, tuple[str, dict[str, Any]]] = {
    "no adapter of the embedding": ("Llama", dict(target_modules=["q_proj"])),
    "embedding": ("Llama", dict(target_modules=["embed_tokens", "q_proj"])),
    "output": ("Llama", dict(target_modules=["lm_head", "q_proj"])),
    "embedding, kept tied": ("Qwen3", dict(target_modules=["embed_tokens"], ensure_weight_tying=True)),
    "trained embedding, kept tied": (
        "Llama",
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "trained embedding": ("Llama", dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
    "tokens": ("Llama", dict(target_modules=["q_proj"], trainable_token_indices=[0, 5, 9])),
    "tokens, output needed": ("Olmo2", dict(target_modules=["q_proj"], trainable_token_indices=[0, 5, 9])),
}


@pytest.mark.parametrize("name", TIED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tied_embeddings_part_where_the_adapter_parts_them(base, golden_npz, tmp_path: Path, name: str) -> None:
    """Merging in place would change both; the model with the adapter beside it is what was trained."""
    architecture, options = TIED[name]
    model, folder = base(architecture, tie_word_embeddings=True)
    model = adapted(model, **options)
    model.save_pretrained(tmp_path / "adapter")
    path = converted(folder, tmp_path / "made.gguf", lora=tmp_path / "adapter")
    assert_growing(model, path, golden_npz("llama")["ids"], 62, 66, tolerance(architecture))


# a CLEX layer


def clex_adapter(folder: Path, prefix: str, **config: Any) -> Path:
    """The layer of the golden LLaMA as an adapter, with its settings where `config` puts them."""
    folder.mkdir()
    layer = load_file(DATA / "llama" / "model.safetensors")
    save_file(
        {f"{prefix}{name.split('.')[-1]}": layer[name] for name in (UP, DOWN)}, folder / "adapter_model.safetensors"
    )
    said = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize(
    ("prefix", "place"),
    [
        ("base_model.model.model.clex_layer.proj_func.", "adapter_config.json"),
        ("clex_layer.modules_to_save.proj_func.", "config.json"),
        ("", "base"),
    ],
)
def test_a_clex_layer_in_an_adapter_is_the_models(tmp_path: Path, golden_gguf, prefix: str, place: str) -> None:
    base, golden = tmp_path / "base", json.loads((DATA / "llama" / "config.json").read_text())
    shutil.copytree(DATA / "llama", base)
    plain = {name: tensor for name, tensor in load_file(base / "model.safetensors").items() if "clex" not in name}
    save_file(plain, base / "model.safetensors")
    if place != "base":
        (base / "config.json").write_text(json.dumps({**golden, "rope_scaling": None, "log_scale": None}))
    settings = {key: golden.get(key) for key in ("rope_scaling", "log_scale")}
    adapter = clex_adapter(tmp_path / "adapter", prefix, **(settings if place == "adapter_config.json" else {}))
    if place == "config.json":
        (adapter / "config.json").write_text(json.dumps(settings))
    result = clex_convert.convert(base, tmp_path / "out.gguf", outtype="f32", lora=adapter)
    known = tensors(golden_gguf("llama"))
    made = tensors(result.path)
    assert all(np.array_equal(made[name], known[name]) for name in known)
    with GGUFFile(golden_gguf("llama")) as file:
        np.testing.assert_array_equal(result.tables.inv_freq.ravel(), file.get("clex.inv_freq"))
    assert json.loads(result.tables.provenance)["source"]["lora"] == {"r": 8, "lora_alpha": 8}


# what is refused


@pytest.fixture
def refused(tmp_path: Path, capfd: Any):
    """Runs the command with an adapter of the golden LLaMA; returns its one line of error."""

    def run(config: dict[str, Any], weights: dict[str, torch.Tensor] | None, source: Path = DATA / "llama") -> str:
        folder = tmp_path / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
        (folder / "adapter_config.json").write_text(json.dumps(said))
        if weights is not None:
            save_file(weights, folder / "adapter_model.safetensors")
        arguments = [str(source), str(tmp_path / "out.gguf"), "--lora", str(folder), "--outtype", "f32"]
        result = click.testing.CliRunner().invoke(cli.main, arguments)
        assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (1, "", 1), result.output
        assert capfd.readouterr() == ("", "")
        assert not list(tmp_path.glob("*.gguf")) + list(tmp_path.glob(".*"))
        return result.stderr

    return run


Q = "base_model.model.model.layers.0.self_attn.q_proj"
PAIR = {f"{Q}.lora_A.weight": torch.ones(2, 128), f"{Q}.lora_B.weight": torch.ones(128, 2)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "DoRA cannot be merged; merge it with peft"),
        ({"peft_type": "LOHA"}, "an adapter of the kind 'LOHA' cannot be merged"),
        ({"alora_invocation_tokens": [1]}, "an adapter with alora_invocation_tokens = [1] cannot be merged"),
        ({"layer_replication": [[0, 2]]}, "layer_replication = [[0, 2]] cannot be merged"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"some_new_variant": {"a": 1}}, "some_new_variant = {'a': 1} cannot be merged"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa', which changes the base model, cannot"),
        ({"r": "2"}, "r must be a number above 0, not '2'"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number above 0, not nan"),
        ({"rank_pattern": {"q_proj": None}}, "rank_pattern must map names to numbers"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern: '(' is no pattern"),
        ({"r": 3}, "has rank 2, but adapter_config.json says 3; the two files belong to different adapters"),
    ],
)
def test_configs_that_cannot_be_merged(refused, config: dict[str, Any], message: str) -> None:
    assert message in refused(config, PAIR)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "holds nothing that changes the base model"),
        (
            {f"{Q}.lora_A.weight": torch.ones(2, 128)},
            "has only one of lora_A.weight and lora_B.weight for",
        ),
        (PAIR | {f"{Q}.lora_magnitude_vector": torch.ones(128)}, "q_proj.lora_magnitude_vector, a variant of LoRA"),
        (PAIR | {f"{Q}.lora_A.weight": torch.ones(2, 64)}, "is [128, 64] in the adapter and [128, 128] in the base"),
        (PAIR | {f"{Q}.lora_A.weight": torch.ones(3, 128)}, "the factors [128, 2] and [3, 128]"),
        (PAIR | {f"{Q}.lora_B.weight": torch.full((128, 2), torch.nan)}, "lora_B.weight holds values that are not"),
        ({"model.layers.9.mlp.up_proj.weight": torch.ones(1)}, "changes model.layers.9.mlp.up_proj.weight, which the"),
        ({"model.norm.weight": torch.ones(64)}, "model.norm.weight is [64] in the adapter and [128] in the base model"),
        ({"clex_layer.proj_func.ode_up_proj": torch.ones(16, 32)}, "0 tensors named ode_down_proj"),
        (
            {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 128)},
            "trainable_token_indices do not say which rows of model.embed_tokens.weight",
        ),
    ],
)
def test_weights_that_do_not_fit(refused, weights: dict[str, torch.Tensor], message: str) -> None:
    assert message in refused({}, weights)


def test_adapters_of_no_use(refused, capfd: Any, tmp_path: Path) -> None:
    assert "holds no weights, neither adapter_model.safetensors nor" in refused({}, None)
    assert "r must be a number above 0, not None" in refused({"r": None}, PAIR)
    with pytest.raises(clex_convert.ConvertError, match="not the folder of a LoRA adapter"):
        clex_convert.convert(DATA / "llama", tmp_path / "out.gguf", lora=tmp_path)
    with pytest.raises(clex_convert.ConvertError, match="no such folder"):
        clex_convert.convert(DATA / "llama", tmp_path / "out.gguf", lora=tmp_path / "none")
    (tmp_path / "adapter" / "adapter_config.json").write_text("[")
    with pytest.raises(clex_convert.ConvertError, match="cannot be read"):
        clex_convert.convert(DATA / "llama", tmp_path / "out.gguf", lora=tmp_path / "adapter")


def test_a_quantized_base_is_refused(refused, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(DATA / "llama", base)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(128, 128, dtype=torch.int8)
    save_file(weights, base / "model.safetensors")
    assert "q_proj.weight is quantized; use the original base model" in refused({}, PAIR, base)
