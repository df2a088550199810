"""Configs as transformers reads them: defaults, every spelling, and what llama.cpp would not compute.

A conversion that goes through is compared with transformers' logits; one that would be wrong is refused by name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from clex_convert import ConvertError, convert
from clex_convert.checkpoint import Checkpoint
from clex_convert.model_classes import MODEL_CLASSES
from clex_convert.model_config import ModelConfig, read_model_config
from clex_convert.model_tensors import check_tensors, expected_tensors
from clex_convert.scaling import Scaling
from helpers.gguf_maker import MODEL, gguf_bytes
from helpers.low_level import Context, Model
from helpers.tiny_models import LENGTH, SIZES, kind_of, make_model
from test_architectures import EXPERTS, MODELS, tolerance

pytestmark = pytest.mark.convert

# Variants of the classes that llama.cpp computes, beside those of test_architectures.
VARIANTS = {
    "Llama biased": (dict(attention_bias=True, mlp_bias=True), "llama"),
    "Llama heads of another size": (dict(head_dim=48, num_key_value_heads=4), "llama"),
    "Llama swish": (dict(hidden_act="swish"), "llama"),
    "Mixtral": (dict(sliding_window=None, num_local_experts=4, rope_theta=3e4), "llama"),
    "Phi grouped": (dict(num_key_value_heads=2), "phi2"),
    "Phi uneven": (dict(hidden_size=160, num_key_value_heads=4, partial_rotary_factor=0.4), "phi2"),
    "Phi erf": (dict(num_key_value_heads=4, hidden_act="gelu"), "phi2"),
    "GPTNeoX whole": (dict(rotary_pct=1.0, layer_norm_eps=1e-3), "phi2"),
    "Qwen2Moe unbiased": (dict(**EXPERTS, shared_expert_intermediate_size=64, qkv_bias=False), "phi2"),
    "StableLm normed": (dict(partial_rotary_factor=0.5, qk_layernorm=True), "phi2"),
    "StableLm normed parallel": (dict(qk_layernorm=True, use_parallel_residual=True), "phi2"),
    "Falcon many heads": (dict(multi_query=False), "phi2"),
    "Falcon one norm": (dict(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1), "phi2"),
}
# One model of each class, for what all have in common.
ONE_EACH = {kind: {**MODELS, **VARIANTS}[kind] for kind in (*{kind_of(name): 0 for name in MODELS}, "Mixtral")}
# Keys that have to be said: the releases take them for different values, or llama.cpp does not compute the default.
NEEDED = {
    **dict.fromkeys(("Cohere", "FalconH1", "Olmo3"), "rope_theta"),
    **dict.fromkeys(("Apertus", "GptOss"), "rope_parameters"),
    "Glm": "head_dim",
    "Dots1": "num_experts_per_tok",
    "Exaone4": "sliding_window",
    "Ernie4_5_Moe": "moe_layer_end_index",
}
INSIDE = (
    *("rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters"),
    *("rotary_pct", "rotary_emb_base"),
)

Change = Callable[..., Path]


def reads(name: str, key: str) -> bool:
    """Whether a class reads a key."""
    return key in MODEL_CLASSES[f"{kind_of(name)}ForCausalLM"].defaults


@pytest.fixture(scope="module")
def made(golden_dir, tmp_path_factory):
    """A model of transformers and its folder, made once for each name."""
    models: dict[str, tuple[transformers.PreTrainedModel, Path]] = {}

    def get(name: str) -> tuple[transformers.PreTrainedModel, Path]:
        if name not in models:
            changes, tokenizer = {**MODELS, **VARIANTS}[name]
            folder = tmp_path_factory.mktemp("model")
            with pytest.MonkeyPatch.context() as patch:
                # Release 4 cannot initialise norms without a bias; every tensor is drawn by us.
                patch.setattr(transformers.StableLmPreTrainedModel, "_init_weights", lambda self, module: None)
                models[name] = make_model(name, changes, folder, golden_dir(tokenizer)), folder
        return models[name]

    return get


@pytest.fixture
def changed(made, tmp_path) -> Change:
    """A copy of a model's folder with other keys in its config; None as a string of dots removes one."""

    def change(name: str, *, without: tuple[str, ...] = (), **keys: Any) -> Path:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(made(name)[1], copy)
        config = json.loads((copy / "config.json").read_text())
        config = {key: value for key, value in config.items() if key not in without}
        (copy / "config.json").write_text(json.dumps({**config, **keys}))
        return copy

    return change


def assert_same(name: str, model: transformers.PreTrainedModel, folder: Path, ids: np.ndarray, **options: Any) -> None:
    """A conversion within the original context gives transformers' logits."""
    bpe = {**MODELS, **VARIANTS}[name][1] != "llama"
    path = folder.parent / "out.gguf"
    options = {"method": "ntk", "max_factor": 2, **options}
    convert(folder, path, outtype="f32", pre_tokenizer="gpt-2" if bpe else None, overwrite=True, **options)
    loaded = Model(path)
    with Context(loaded, n_ctx=256) as context:
        logits = context.feed(ids[:60], 0)
    loaded.close()
    with torch.no_grad():
        expected = model(torch.tensor(ids[None, :60].astype(np.int64))).logits[0, -1].numpy()
    np.testing.assert_allclose(logits, expected, atol=tolerance(name), rtol=0)


@pytest.fixture(scope="module")
def ids(golden_npz):
    return golden_npz("llama")["ids"]


def read(architecture: str, **keys: Any) -> ModelConfig:
    said = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 512, **keys}
    return read_model_config({"architectures": [architecture], **said}, "folder/config.json")


# what llama.cpp computes


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_give_the_logits_of_transformers(made, ids, name: str) -> None:
    model, folder = made(name)
    assert_same(name, model, folder, ids)


def test_experts_in_one_tensor_of_a_layer(made, ids, changed) -> None:
    """As transformers 5 saves them on request."""
    name = "Qwen2Moe"
    folder = changed(name)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        start = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors.pop(f"{start}.{expert}.{part}_proj.weight") for expert in range(4)])
            for part in ("gate", "up", "down")
        )
        tensors |= {f"{start}.gate_up_proj": torch.cat((gate, up), 1), f"{start}.down_proj": down}
    save_file(tensors, folder / "model.safetensors")
    assert_same(name, made(name)[0], folder, ids)


# the rotary embedding, in every spelling


@pytest.mark.parametrize("bake", [None, LENGTH])
@pytest.mark.parametrize("name", ["Llama", "Mixtral", "Phi", "Phi3 partial", "GPTNeoX sequential", "StableLm parallel"])
def test_rope_parameters_say_all_of_the_rotary_embedding(made, ids, changed, name: str, bake: int | None) -> None:
    """As transformers 5 saves it: base and rotated part inside, and nowhere else."""
    model, folder = made(name)
    config = json.loads((folder / "config.json").read_text())
    said = {**config, **(config.get("rope_parameters") or {})}
    inside = {key: said[key] for key in ("rope_theta", "partial_rotary_factor") if key in said}
    inside["rope_type"] = "default"
    assert_same(name, model, changed(name, without=INSIDE, rope_parameters=inside), ids, bake=bake)


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_base_that_is_not_said_is_the_class_default(made, ids, changed, name: str) -> None:
    kind, (changes, _) = kind_of(name), ONE_EACH[name]
    changes = {key: value for key, value in changes.items() if key not in INSIDE}
    folder = changed(name, without=INSIDE)
    if (needed := NEEDED.get(name)) in INSIDE:
        with pytest.raises(ConvertError, match=f"the key {needed} is missing or unusable"):
            Checkpoint(folder)
        return
    model_class = getattr(transformers, f"{kind}ForCausalLM")
    model = model_class(model_class.config_class(**{**SIZES, **changes}, attn_implementation="eager")).eval()
    model.load_state_dict(made(name)[0].state_dict())
    assert_same(name, model, folder, ids)


SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope_theta": 5e4, "rope_scaling": SCALED}, (5e4, "yarn")),
        ({"rope_theta": 5e4, "rope_scaling": {**SCALED, "rope_theta": 5e4}}, (5e4, "yarn")),
        ({"rope_parameters": {**SCALED, "rope_theta": 5e4}}, (5e4, "yarn")),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}, "rope_scaling": None}, (5e4, "default")),
        ({"rope_parameters": {"rope_theta": 5e4}, "rope_scaling": SCALED}, (5e4, "yarn")),
        ({"rope_parameters": {"full_attention": {**SCALED, "rope_theta": 5e4}}}, (5e4, "yarn")),
        (
            {"rope_parameters": {t: {"rope_theta": 5e4} for t in ("full_attention", "sliding_attention")}},
            (5e4, "default"),
        ),
        ({"rope_parameters": {**SCALED, "original_max_position_embeddings": None}}, (1e4, "yarn")),
        ({}, (1e4, "default")),
    ],
)
def test_spellings_of_the_rotary_embedding(changed, keys: dict[str, Any], expected: tuple[float, str]) -> None:
    rope = Checkpoint(changed("Llama", without=INSIDE, **keys)).rope
    assert (rope.base, rope.scaling.kind) == expected


def test_the_length_before_scaling_may_stand_beside_it(changed) -> None:
    scaling = {key: value for key, value in SCALED.items() if key != "original_max_position_embeddings"}
    for inside in ({}, {"original_max_position_embeddings": 32}):
        keys = {"rope_scaling": {**scaling, **inside}, "original_max_position_embeddings": 32}
        folder = changed("Llama", without=("rope_parameters",), **keys)
        assert Checkpoint(folder).rope.scaling == Scaling("yarn", 4.0, 32, 128)
    keys["original_max_position_embeddings"] = 16
    with pytest.raises(ConvertError, match="original_max_position_embeddings is 32 here and 16 beside it"):
        Checkpoint(changed("Llama", without=("rope_parameters",), **keys))


@pytest.mark.parametrize(
    ("architecture", "keys", "said"),
    [
        ("LlamaForCausalLM", {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e4}}, "rope_theta = 50000.0 and"),
        ("LlamaForCausalLM", {"rope_theta": 1e4, "rope_scaling": {"rope_theta": 5e4}}, "rope_theta = 50000.0 and"),
        (
            "PhiForCausalLM",
            {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.75}},
            "0.75 and",
        ),
        ("GPTNeoXForCausalLM", {"rotary_pct": 0.5, "partial_rotary_factor": 0.25}, "rotary_pct = 0.5 and partial"),
        ("GPTNeoXForCausalLM", {"rotary_emb_base": 5e4, "rope_theta": 1e4}, "rotary_emb_base = 50000.0 and rope_theta"),
        ("GPTNeoXForCausalLM", {"rope_theta": 5e4}, "transformers reads is rotary_emb_base, 10000.0 here"),
        ("GPTNeoXForCausalLM", {"partial_rotary_factor": 0.5}, "transformers reads is rotary_pct, 0.25 here"),
        ("StableLmForCausalLM", {"rope_pct": 0.5}, "transformers reads is partial_rotary_factor, 0.25 here"),
        ("StableLmForCausalLM", {"norm_eps": 1e-3}, "transformers reads is layer_norm_eps"),
        ("MixtralForCausalLM", {"num_experts": 4, "num_local_experts": 8}, "num_local_experts = 8 and num_experts = 4"),
        (
            "LlamaForCausalLM",
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"type": "linear", "factor": 4.0}},
            "rope_scaling and rope_parameters say different things",
        ),
        (
            "LlamaForCausalLM",
            {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
            "rope_type is 'dynamic' and type is 'linear'",
        ),
        (
            "Qwen2ForCausalLM",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            "rope_parameters: differs by the type of layer",
        ),
    ],
)
def test_a_value_that_is_said_twice_and_differently(architecture: str, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConvertError, match=r"folder/config\.json") as error:
        read(architecture, **keys)
    assert said in str(error.value)


def test_what_is_given_takes_the_place_of_what_the_file_says() -> None:
    """--rope-scaling and an adapter's config, in their own spellings, over a config of transformers 5."""
    said = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 512}
    inside = {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.75}
    config = {"architectures": ["PhiForCausalLM"], **said, "rope_parameters": inside}
    adapter = {"rope_scaling": {"type": "clex", "max_factor": 4}, "max_position_embeddings": 128}
    made = read_model_config(config, "config.json", adapter)
    assert (made.values["rope_theta"], made.rotary_dim, made.values["max_position_embeddings"]) == (5e4, 24, 128)
    assert made.scaling == adapter["rope_scaling"]
    made = read_model_config(config, "config.json", adapter, scaling={"rope_type": "yarn", "rope_theta": 1e6})
    assert (made.values["rope_theta"], made.rotary_dim, made.scaling) == (1e6, 24, {"rope_type": "yarn"})
    assert read_model_config(config, "config.json", adapter, scaling={}).scaling == {}


# defaults


@pytest.mark.parametrize("architecture", MODEL_CLASSES)
def test_defaults_are_those_of_transformers(architecture: str) -> None:
    """Of the release that is installed, whichever it is: our reading does not depend on it."""
    known, config = MODEL_CLASSES[architecture], getattr(transformers, architecture).config_class()
    assert config.model_type == known.model_type
    inside = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in inside:
        inside = {"rope_local_base_freq": inside["sliding_attention"]["rope_theta"], **inside["full_attention"]}
    for key, default in known.defaults.items():
        other = {"num_experts": "num_local_experts"}.get(key, key)  # release 5's
        theirs = inside[key] if key in inside else getattr(config, key, getattr(config, other, None))
        if default is not None and (key != "sliding_window" or known.window == "all"):  # else theirs says if it is used
            assert default == theirs, key


@pytest.mark.parametrize("name", ONE_EACH)
def test_keys_that_a_config_leaves_out_are_the_class_defaults(made, changed, name: str) -> None:
    """Where only sizes are left, the rest is what transformers takes it for."""
    _, folder = made(name)
    config = json.loads((folder / "config.json").read_text())
    known = MODEL_CLASSES[config["architectures"][0]]
    left_out = [key for key in known.defaults if key in config and key not in ("norm_topk_prob",)]
    kind = type(made(name)[0].config)
    kept = {key: value for key, value in config.items() if key not in (*left_out, *INSIDE)}
    if name in NEEDED:
        with pytest.raises(ConvertError, match=NEEDED[name]):
            read_model_config(kept, "config.json")
        return
    theirs = kind(**{key: value for key, value in kept.items() if key not in ("architectures", "model_type")})
    ours = read_model_config(kept, "config.json").values
    for key in (
        "max_position_embeddings",
        "tie_word_embeddings",
        "num_key_value_heads",
        "rms_norm_eps",
        "layer_norm_eps",
    ):
        if key in known.defaults:
            wanted = getattr(theirs, key)
            if key == "num_key_value_heads" and wanted is None:
                wanted = theirs.num_attention_heads
            assert ours[key] == wanted, key
    assert ours["head_dim"] == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)


# what llama.cpp does not compute

REFUSED = {
    **{
        f"{name}: hidden_act": ({"hidden_act": "relu"}, "hidden_act = relu")
        for name in ONE_EACH
        if reads(name, "hidden_act")
    },
    "Llama: gelu": ({"hidden_act": "gelu"}, "hidden_act = gelu is not supported; llama.cpp computes it with silu or"),
    "Llama: is_causal": ({"is_causal": False}, "is_causal = False"),
    "Llama: partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "Llama: partial inside": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    "Phi: quick": ({"hidden_act": "quick_gelu"}, "hidden_act = quick_gelu"),
    "Phi: qk_layernorm": ({"qk_layernorm": True}, "qk_layernorm = True"),
    "Phi: head_dim": ({"head_dim": 64}, "head_dim = 64"),
    "Phi3: head_dim": ({"head_dim": 64}, "head_dim = 64"),
    "Qwen2: head_dim": ({"head_dim": 64}, "head_dim = 64"),
    "Olmo2: head_dim": ({"head_dim": 64}, "head_dim = 64"),
    "GPTNeoX: bias": ({"attention_bias": False}, "attention_bias = False"),
    "Qwen3: bias": ({"attention_bias": True}, "attention_bias = True"),
    "Qwen3Moe: bias": ({"attention_bias": True}, "attention_bias = True"),
    "Olmo2: bias": ({"attention_bias": True}, "attention_bias = True"),
    "Qwen2Moe: router": ({"norm_topk_prob": True}, "norm_topk_prob = True"),
    "Qwen3Moe: router": ({"norm_topk_prob": False}, "norm_topk_prob = False"),
    "Qwen2Moe: dense": ({"mlp_only_layers": [0]}, "mlp_only_layers = [0]"),
    "Qwen3Moe: dense": ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
    "Falcon: activation": ({"activation": "relu"}, "activation = relu"),
    "Falcon: bias": ({"bias": True}, "bias = True"),
    "Falcon: sequential": ({"parallel_attn": False}, "parallel_attn = False"),
    "Falcon: alibi": ({"alibi": True}, "ALiBi"),
    "Qwen2: layer_types": ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types must name each"),
    "Qwen2: layer_types unused": ({"layer_types": ["sliding_attention"] * 2}, "no sliding_window is in use"),
    "SmolLM3: rope": ({"no_rope_layers": [1] * 5}, "no_rope_layers = [1, 1, 1, 1, 1]"),
    "Gemma2: scale": ({"query_pre_attn_scalar": 16}, "query_pre_attn_scalar = 16"),
    "Gemma2: tied": ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
    "Gemma3: capped": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    "Gemma3: both ways": ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    "Gemma3: layer_types": ({"layer_types": ["full_attention"]}, "layer_types must name each of the 4 layers"),
    "Olmo3: base": (
        {"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 5e5}}},
        "rope_local_base_freq = 10000.0",
    ),
    "Olmo3: scaled windows": (
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
                "full_attention": {"rope_theta": 5e5},
            }
        },
        "layers with a sliding window have",
    ),
    "Cohere: normed": ({"use_qk_norm": True}, "use_qk_norm = True"),
    "Cohere2: biased": ({"attention_bias": True}, "attention_bias = True"),
    "GptOss: limit": ({"swiglu_limit": 5.0}, "swiglu_limit = 5.0"),
    "Exaone4: window": (
        {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
        "sliding_window = 16",
    ),
    "Glm4Moe: groups": ({"n_group": 2}, "n_group = 2"),
    "Dots1: grouped keys": ({"num_key_value_heads": 2}, "num_key_value_heads = 2"),
    "Olmoe: clipped": ({"clip_qkv": 4.0}, "clip_qkv = 4.0"),
    "Ernie4_5_Moe: every other layer": ({"moe_layer_interval": 2}, "moe_layer_interval = 2"),
    "Ernie4_5_Moe: shared": ({"intermediate_size": 256}, "intermediate_size = 256"),
    "Starcoder2: unbiased": ({"use_bias": False}, "use_bias = False"),
    "Qwen3Next: dense": ({"mlp_only_layers": [0]}, "mlp_only_layers = [0]"),
    "FalconH1: norm": ({"mamba_norm_before_gate": True}, "mamba_norm_before_gate = True"),
    "Lfm2: biased": ({"conv_bias": True}, "conv_bias = True"),
    "Mistral: window": ({"sliding_window": 0}, "the key sliding_window is missing or unusable"),
    "Llama: switch": ({"mlp_bias": "no"}, "mlp_bias must be true or false, not no"),
    "Llama: model_type": ({"model_type": "mistral"}, "the model_type mistral, which is MistralForCausalLM"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused_by_name(changed, tmp_path, case: str) -> None:
    keys, said = REFUSED[case]
    folder = changed(case.partition(":")[0], **keys)
    with pytest.raises(ConvertError) as error:
        convert(folder, tmp_path / "out.gguf", method="ntk", pre_tokenizer="gpt-2")
    assert str(error.value).startswith(f"{folder / 'config.json'}: ")
    assert said in str(error.value)
    assert not (tmp_path / "out.gguf").exists()


def test_a_default_that_llama_cpp_does_not_compute_is_called_one(changed) -> None:
    with pytest.raises(ConvertError, match="norm_topk_prob = False, its default, is not supported"):
        Checkpoint(changed("Qwen3Moe", without=("norm_topk_prob",)))


@pytest.mark.parametrize(
    "key", ["sliding_window", "n_positions", "num_layers", "text_config", "layer_norm_epsilon", "n_group"]
)
def test_a_key_that_the_class_does_not_read_changes_nothing(made, ids, changed, key: str) -> None:
    """llama.cpp's scripts try the names of many architectures."""
    value = {"num_hidden_layers": 1} if key == "text_config" else 1
    assert_same("Olmo2", made("Olmo2")[0], changed("Olmo2", **{key: value}), ids)


# windows

WINDOWS = {
    "Mistral": {},
    "Mixtral": {},
    "Phi3": {},
    "Qwen2": {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None},
    "Qwen3": {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
    "Qwen2Moe": {"use_sliding_window": True},
    "Qwen3Moe": {"use_sliding_window": True},
}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_that_the_context_would_show_is_refused(changed, tmp_path, name: str) -> None:
    def window(tokens: int | None, **options: Any) -> None:
        folder = changed(name, **WINDOWS[name], sliding_window=tokens)
        bpe = ONE_EACH[name][1] != "llama"
        options = {"method": "ntk", "max_factor": 2, "pre_tokenizer": "gpt-2" if bpe else None, **options}
        convert(folder, tmp_path / "out.gguf", outtype="f32", check="none", overwrite=True, **options)

    said = rf"config\.json: layers attend to the last {2 * LENGTH - 1} tokens only .* is to have {2 * LENGTH} tokens"
    with pytest.raises(ConvertError, match=said):
        window(2 * LENGTH - 1)  # longer than the original context: it is the tables that are too long
    with pytest.raises(ConvertError, match=r"sliding_window.* is to have 64 tokens"):
        window(LENGTH - 1, bake=LENGTH)
    window(2 * LENGTH)
    window(LENGTH, bake=LENGTH)
    window(LENGTH, max_factor=1)


@pytest.mark.parametrize("architecture", ["phi3", "llama", "olmo2"])
def test_a_window_that_a_gguf_file_names(tmp_path: Path, architecture: str) -> None:
    keys = {key.replace("llama.", f"{architecture}."): value for key, value in MODEL.items()}
    context = int(keys[f"{architecture}.context_length"])

    def window(tokens: int, **options: Any) -> None:
        named = {"general.architecture": architecture, f"{architecture}.attention.sliding_window": np.uint32(tokens)}
        (tmp_path / "in.gguf").write_bytes(gguf_bytes({**keys, **named}))
        convert(tmp_path / "in.gguf", tmp_path / "out.gguf", method="ntk", check="none", overwrite=True, **options)

    if architecture == "olmo2":  # llama.cpp computes it
        window(2 * context - 1, max_factor=2)
        return
    with pytest.raises(ConvertError, match=rf"in\.gguf: layers attend to the last {2 * context - 1} tokens only"):
        window(2 * context - 1, max_factor=2)
    window(0, max_factor=2)
    window(2 * context, max_factor=2)
    window(context, max_factor=1)


def test_a_window_that_is_not_in_use_is_none() -> None:
    assert read("Qwen2ForCausalLM", sliding_window=8).window is None
    assert read("Qwen2ForCausalLM", sliding_window=8, use_sliding_window=True).window is None  # from layer 28 on
    assert read("Qwen2ForCausalLM", sliding_window=8, use_sliding_window=True, max_window_layers=1).window == 8
    assert read("LlamaForCausalLM", sliding_window=8).window is None
    assert read("MistralForCausalLM", sliding_window=None).window is None
    assert read("MistralForCausalLM").window == 4096  # the class's default


# weights


def failing(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(ConvertError) as error:
        Checkpoint(folder)
    assert str(error.value).startswith(f"{folder}: ")
    return str(error.value)


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_tensor_that_is_missing_is_named(changed, name: str) -> None:
    """Each kind that the class has, the output matrix among them: transformers would draw it at random."""
    folder = changed(name)
    tensors = load_file(folder / "model.safetensors")
    if name == "Falcon":
        (folder / "config.json").write_text(
            json.dumps({**json.loads((folder / "config.json").read_text()), "tie_word_embeddings": False})
        )
    for gone in [key for key in tensors if ".layers.0." not in key and ".h.0." not in key and ".experts.1" not in key]:
        rest = {key: tensor for key, tensor in tensors.items() if key != gone}
        assert f"the weights lack {gone}, which {name}ForCausalLM needs" in failing(folder, rest)


@pytest.mark.parametrize("name", ONE_EACH)
def test_the_tensors_expected_are_those_of_transformers(made, name: str) -> None:
    _, folder = made(name)
    checkpoint = Checkpoint(folder)
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(folder / "model.safetensors").items()}
    assert dict(expected_tensors(checkpoint.model, shapes)) == shapes


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("Llama", "model.layers.0.self_attn.q_proj.bias"),  # attention_bias is false
        ("Llama", "model.layers.1.mlp.up_proj.bias"),
        ("Llama", "model.layers.2.mlp.up_proj.weight"),  # of a third layer
        ("Llama", "lm_head.bias"),
        ("Llama", "v_head.summary.weight"),
        ("Mistral", "model.layers.0.self_attn.q_proj.bias"),
        ("Qwen2", "model.layers.0.self_attn.o_proj.bias"),
        ("Qwen3", "model.layers.0.self_attn.q_proj.bias"),
        ("StableLm parallel", "model.layers.0.post_attention_layernorm.weight"),
    ],
)
def test_a_tensor_that_the_config_has_no_use_for_is_named(changed, name: str, tensor: str) -> None:
    folder = changed(name)
    tensors = {**load_file(folder / "model.safetensors"), tensor: torch.ones(128)}
    assert f"the weights hold {tensor}, which {kind_of(name)}ForCausalLM does not have" in failing(folder, tensors)


def test_buffers_of_older_releases_are_no_weights(made, ids, changed) -> None:
    folder = changed("Llama")
    extra = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    save_file(
        {**load_file(folder / "model.safetensors"), **{name: torch.ones(16) for name in extra}},
        folder / "model.safetensors",
    )
    assert_same("Llama", made("Llama")[0], folder, ids)


def test_shapes_are_those_that_the_config_gives(changed) -> None:
    folder = changed("Llama", num_attention_heads=8, head_dim=32)
    with pytest.raises(ConvertError, match=r"weight is \[128, 128\], and by config\.json it is \["):
        Checkpoint(folder)
    folder = changed("Llama", without=("intermediate_size",))
    with pytest.raises(ConvertError, match=r"by config\.json it is \[.*11008"):
        Checkpoint(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_names_with_a_wrapper_before_them_are_shown(changed, prefix: str) -> None:
    folder = changed("Llama")
    tensors = {prefix + name: tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    assert f"they have {prefix}model.embed_tokens.weight" in failing(folder, tensors)


def test_quantized_tensors_stand_for_those_of_the_config() -> None:
    config = read("LlamaForCausalLM", quantization_config={"quant_method": "gptq"})
    names = dict(expected_tensors(config, ()))
    shapes = {name.replace("_proj.weight", "_proj.qweight"): (1, 1) for name in names}
    check_tensors(config, {**shapes, "model.layers.0.mlp.up_proj.scales": (1,)})
    del shapes["model.layers.0.mlp.up_proj.qweight"]
    with pytest.raises(ConvertError, match=r"lack model\.layers\.0\.mlp\.up_proj\.weight"):
        check_tensors(config, shapes)


# architectures


@pytest.mark.parametrize(
    "kind", ["GPT2", "Bloom", "OPT", "T5", "Mamba", "GPTJ", "Gemma3n", "Bamba", "DeepseekV3", "Qwen2VL", "Phimoe"]
)
def test_the_architecture_is_looked_at_before_its_keys(tmp_path: Path, kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")().to_dict()
    name = {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM")
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [name]}, default=str))
    with pytest.raises(ConvertError, match=f"config.json: the architecture {name} is not supported; supported: Llama"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("adapter_config.json", "a LoRA adapter: .* `lora`"),
        ("params.json", "in the format of the model's authors"),
        ("model_index.json", "a model of diffusers"),
    ],
)
def test_a_folder_of_another_kind_is_called_that(tmp_path: Path, file: str, said: str) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(ConvertError, match=f"not a model folder, it has no config.json; it is {said}"):
        convert(tmp_path, tmp_path / "out.gguf")


def test_a_config_without_its_architecture_is_told_which() -> None:
    with pytest.raises(ConvertError, match=r'architectures is missing or unusable; add it: \["LlamaForCausalLM"\]'):
        read_model_config({"model_type": "llama"}, "config.json")
