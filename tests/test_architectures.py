"""Every architecture with hooks against transformers, rotated with the same inverse frequencies.

The models are tiny, random and made on the spot; their tables are the closed form of NTK-aware scaling.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from clex_convert import convert
from clex_convert import tables as make_tables
from clex_convert.errors import ConvertError
from clex_local.library.loading import library_path
from clex_local.model_file.architectures import with_tables
from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.tables import Tables, read_tables
from helpers.device import GPU_LAYERS, ON_WORKER
from helpers.device_error import slack
from helpers.gguf_maker import rewrite
from helpers.low_level import WARN, Context, Model, logged
from helpers.rope_reference import Reference, tabled_layers
from helpers.tiny_models import LENGTH, assert_growing, convert_plainly, kind_of, make_model

pytestmark = [pytest.mark.convert, pytest.mark.native, pytest.mark.folders]

SCALES = [1, 1.25, 0.8, 1.5]

EXPERTS = dict(moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2)
PHI3 = dict(sliding_window=None, original_max_position_embeddings=LENGTH)

LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
WINDOWED = dict(num_hidden_layers=4, layer_types=LAYERS, sliding_window=24)
MULTIPLIERS = dict(
    embedding_multiplier=3.0, logits_scaling=0.5, residual_multiplier=0.7, attention_multiplier=0.2, rope_theta=10000.0
)
GPT_OSS = dict(head_dim=32, num_local_experts=4, num_experts_per_tok=2, **WINDOWED)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, beta_slow=1.0)
GLM = dict(vocab_size=515)  # three more tokens that the scripts look for
GROUPED = dict(
    num_hidden_layers=3,
    moe_intermediate_size=64,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    routed_scaling_factor=1.5,
    norm_topk_prob=True,
)
GEMMA = dict(head_dim=32, query_pre_attn_scalar=32, tie_word_embeddings=True, **WINDOWED)
EXAONE4 = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=64, num_attention_heads=2, num_key_value_heads=1)
EXAONE4 |= dict(sliding_window=24, layer_types=[*["sliding_attention"] * 3, "full_attention"] * 16)
ERNIE = dict(num_hidden_layers=3, moe_intermediate_size=48, moe_num_experts=4, moe_k=2, moe_layer_end_index=2)
QWEN3NEXT = dict(
    **EXPERTS,
    shared_expert_intermediate_size=64,
    num_hidden_layers=4,
    head_dim=32,
    layer_types=["linear_attention", "full_attention"] * 2,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)
FALCON_H1 = dict(
    rope_theta=10000.0,
    mamba_d_ssm=64,
    mamba_n_heads=4,
    mamba_d_head=16,
    mamba_d_state=32,
    mamba_norm_before_gate=False,
    mamba_rms_norm=True,
    key_multiplier=0.7,
    attention_out_multiplier=0.8,
    ssm_multipliers=[0.9, 0.8, 0.7, 0.6, 0.5],
    lm_head_multiplier=0.5,
    embedding_multiplier=2.0,
)

# Name of transformers' class, what differs from SIZES, and the golden model that lends its tokenizer.
MODELS = {
    "Llama": (dict(), "llama"),
    "Mistral": (dict(sliding_window=None, head_dim=48), "llama"),
    "Phi": (dict(num_key_value_heads=4, partial_rotary_factor=0.5), "phi2"),
    "Phi3": (PHI3, "llama"),
    "Phi3 partial": (dict(**PHI3, partial_rotary_factor=0.75), "llama"),
    "GPTNeoX": (dict(rotary_pct=0.25), "phi2"),
    "GPTNeoX sequential": (dict(rotary_pct=0.5, rotary_emb_base=50000, use_parallel_residual=False), "phi2"),
    "Qwen2": (dict(rope_theta=1e6), "phi2"),
    "Qwen2Moe": (dict(**EXPERTS, shared_expert_intermediate_size=64), "phi2"),
    "Qwen3": (dict(head_dim=48), "phi2"),
    "Qwen3Moe": (dict(**EXPERTS, head_dim=48, norm_topk_prob=True), "phi2"),
    "StableLm": (dict(partial_rotary_factor=0.25, use_qkv_bias=True), "phi2"),
    "StableLm parallel": (dict(partial_rotary_factor=0.5, use_parallel_residual=True), "phi2"),
    "Falcon": (dict(multi_query=True), "phi2"),
    "Falcon grouped": (dict(new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=192), "phi2"),
    "Olmo2": (dict(), "phi2"),
    "Olmo3": (dict(rope_theta=500000.0, **WINDOWED), "phi2"),
    "Olmo": (dict(), "phi2"),
    "Olmo clipped": (dict(clip_qkv=0.5, num_key_value_heads=4), "phi2"),
    "Olmoe": (dict(num_experts=4, num_key_value_heads=4, num_experts_per_tok=2, rms_norm_eps=1e-5), "phi2"),
    "SmolLM3": (dict(num_hidden_layers=5), "phi2"),
    "Arcee": (dict(head_dim=48), "llama"),
    "Apertus": (dict(rope_theta=10000.0), "phi2"),
    "Granite": (MULTIPLIERS, "llama"),
    "GraniteMoe": (dict(num_local_experts=4, **MULTIPLIERS), "llama"),
    "GraniteMoeShared": (dict(num_local_experts=4, shared_intermediate_size=96, **MULTIPLIERS), "llama"),
    "Glm": (dict(head_dim=32, **GLM), "glm"),
    "Glm4": (dict(head_dim=48, **GLM), "glm"),
    "Glm4Moe": (dict(**GROUPED, **GLM), "glm"),
    "Glm4Moe normed": (dict(**GROUPED, **GLM, use_qk_norm=True, attention_bias=True, partial_rotary_factor=1.0), "glm"),
    "Dots1": (dict(**GROUPED, num_key_value_heads=4, sliding_window=None, layer_types=["full_attention"] * 3), "phi2"),
    "Gemma": (dict(head_dim=48, tie_word_embeddings=True), "llama"),
    "Gemma2": (GEMMA, "llama"),
    "Gemma2 capped": (dict(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0), "llama"),
    "Gemma3": (GEMMA, "llama"),
    "Gemma3 linear": (dict(**GEMMA, rope_scaling=dict(rope_type="linear", factor=2.0)), "llama"),
    "Cohere": (dict(logit_scale=0.5, tie_word_embeddings=True, rope_theta=10000.0), "phi2"),
    "Cohere2": (dict(logit_scale=0.5, tie_word_embeddings=True, **WINDOWED), "phi2"),
    "GptOss": (dict(**GPT_OSS, rope_scaling=dict(rope_type="default")), "phi2"),
    "GptOss yarn": (dict(**GPT_OSS, rope_scaling=YARN), "phi2"),
    "Exaone4": (dict(sliding_window=None, layer_types=["full_attention"] * 2), "phi2"),
    "Exaone4 windowed": (EXAONE4, "phi2"),
    "Ernie4_5": (dict(head_dim=48), "llama"),
    "Ernie4_5_Moe": (ERNIE, "llama"),
    "Starcoder2": (dict(sliding_window=None), "phi2"),
    "SeedOss": (dict(head_dim=48), "phi2"),
    "Nemotron": (dict(), "llama"),
    "Qwen3Next": (QWEN3NEXT, "phi2"),
    "FalconH1": (FALCON_H1, "phi2"),
    "Lfm2": (dict(layer_types=["conv", "full_attention"], block_multiple_of=32), "phi2"),
}


def tolerance(name: str) -> float:
    """ggml looks GELU up in a table of 16-bit numbers; stock is as far from transformers."""
    return 5e-3 if kind_of(name) in ("Phi", "GPTNeoX", "Falcon", "Gemma", "Gemma2", "Gemma3", "Starcoder2") else 1e-4


@pytest.fixture(scope="module", params=MODELS)
def pair(request, golden_dir, tmp_path_factory):
    """A model of transformers, its GGUF file, and how far the two may differ."""
    changes, tokenizer = MODELS[request.param]
    folder = tmp_path_factory.mktemp("model")
    model = make_model(request.param, changes, folder, golden_dir(tokenizer))
    path = folder / "model.gguf"
    convert(folder, path, outtype="f32", method="ntk", pre_tokenizer=None if tokenizer == "llama" else "gpt-2")
    return model, path, tolerance(request.param)


@pytest.fixture
def ids(golden_npz):
    return golden_npz("llama")["ids"]


@pytest.mark.parametrize("n", [60, 130, 250])
def test_prompt_in_every_bucket_gives_the_logits_of_transformers(pair, ids, n):
    reference, path, atol = pair
    assert_growing(reference, path, ids, n, n, atol)


def test_sequence_that_crosses_gives_the_logits_of_transformers(pair, ids):
    reference, path, atol = pair
    assert_growing(reference, path, ids, 62, 67, atol)
    assert_growing(reference, path, ids, 190, 194, atol)


def test_prompt_in_chunks_gives_the_logits_of_transformers(pair, ids):
    """Each from one bucket to its end, since transformers' layers with a state take single tokens behind the first."""
    reference_model, path, atol = pair
    reference, model = Reference(reference_model, read_tables(path)), Model(path)
    ends = [50, 64, 100, 128, 140]
    with Context(model, n_ctx=256) as context:
        logits = [context.feed(ids[a:b], a) for a, b in zip([0, *ends], ends, strict=False)]
    model.close()
    expected = [reference.feed(ids[: ends[0]])]
    for a, b in itertools.pairwise(ends):
        expected.append([reference.feed(ids[i : i + 1]) for i in range(a, b)][-1])
    np.testing.assert_allclose(logits, expected, atol=atol + slack(path), rtol=0)


def test_query_scales_count_once(pair, ids, tmp_path):
    reference, path, atol = pair
    changes = {"clex.attn_scale": np.array(SCALES, np.float32), "clex.log_scale": np.True_}
    assert_growing(reference, rewrite(path, tmp_path / "m.gguf", changes), ids, 126, 130, atol)


def test_another_table_would_be_noticed(pair, ids):
    """The tolerances mean something: a sequence rotated with the table of its neighbours is far away."""
    reference, path, atol = pair
    tables = read_tables(path)
    wrong = Tables("ntk", LENGTH, tables.scaling_factors, np.roll(tables.inv_freq, 1, axis=0))
    difference = np.abs(Reference(reference, tables).feed(ids[:130]) - Reference(reference, wrong).feed(ids[:130]))
    if tabled_layers(reference.config):
        assert difference.max() > 20 * atol
    else:
        assert difference.max() == 0  # layers that see every token have no RoPE


def test_file_says_of_its_rope_what_the_folder_said(pair, tmp_path):
    """Tables made from the GGUF file are those made from the folder: same base, dimension and context."""
    _, path, _ = pair
    result = convert(path, tmp_path / "m.gguf", method="ntk")
    tables = read_tables(path)
    assert result.tables.original_context_length == tables.original_context_length
    with GGUFFile(path) as file:
        factors = any(tensor.name.startswith("rope_freqs") for tensor in file.tensors)
    rounding = 2e-7 if factors else 0  # the file has the frequencies of the folder's scaling as factors in float32
    np.testing.assert_allclose(result.tables.inv_freq, tables.inv_freq, rtol=rounding, atol=0)


STOCK = """
import sys, numpy as np, llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=256, n_threads=2, type_k=0, type_v=0, verbose=False, logits_all=True)
llm.eval(np.load(sys.argv[2]).tolist())
np.save(sys.argv[3], llm.scores[: llm.n_tokens])
"""


@pytest.mark.skipif(
    GPU_LAYERS != 0 and not ON_WORKER, reason="a library built for a device computes large products there anyway"
)
def test_hooks_change_nothing_without_tables(pair, ids, stock_library, tmp_path):
    """Bit for bit stock, which runs the plain model inside its original context; without our products."""
    reference, path, atol = pair
    tables = read_tables(path)
    plain = rewrite(path, tmp_path / "plain.gguf", dict.fromkeys(tables.metadata()))
    np.save(tmp_path / "ids.npy", ids[:60])
    logits = []
    for library in (library_path(), stock_library):
        out = tmp_path / "out.npy"
        command = [sys.executable, "-c", STOCK, str(plain), str(tmp_path / "ids.npy"), str(out)]
        switches = {"LLAMA_CPP_LIB_PATH": str(library), "GGML_CLEX_MATMUL_DISABLE": "1"}
        subprocess.run(command, env={**os.environ, **switches}, check=True)
        logits.append(np.load(out))
    np.testing.assert_array_equal(*logits)
    np.testing.assert_allclose(logits[1][-1], Reference(reference, tables).feed(ids[:60]), atol=max(atol, 5e-4), rtol=0)


def test_every_class_that_can_be_converted_is_compared():
    classes = {name for row in with_tables() for name in row.classes}
    assert classes - {"MixtralForCausalLM"} == {f"{kind_of(name)}ForCausalLM" for name in MODELS}  # golden: mixtral


# GGUF files with more than the tables


def assert_golden_steps(path: Path, golden: dict) -> None:
    model = Model(path)
    with Context(model, n_ctx=256) as context:
        logits = context.steps(golden["ids"], int(golden["step_prefill"]), len(golden["steps"]) - 1)
    model.close()
    np.testing.assert_allclose(logits, golden["steps"], atol=5e-4 + slack(path), rtol=0)


@pytest.mark.parametrize("architecture", ["mistral3", "internlm2", "xverse"])
def test_llama_under_another_name_has_the_tables(golden_gguf, golden_npz, tmp_path, architecture):
    """No release of transformers that this project supports has a class of these; their mathematics are LLaMA's."""
    source, kinds = golden_gguf("llama"), {"u32": np.uint32, "f32": np.float32}
    with GGUFFile(source) as file:
        copies = {
            architecture + key.removeprefix("llama"): kinds[kind](file.get(key))
            for key in file.keys()  # noqa: SIM118
            if key.startswith("llama.") and (kind := file.kind(key)) in kinds
        }
    path = rewrite(source, tmp_path / "m.gguf", {"general.architecture": architecture, **copies})
    assert_golden_steps(path, golden_npz("llama"))


OTHER_SCALING = {
    "yarn": {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": np.float32(4),
        "llama.rope.scaling.original_context_length": np.uint32(16),
    },
    "linear": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": np.float32(4)},
    "attention factor": {"llama.rope.scaling.attn_factor": np.float32(1.2)},
}


@pytest.mark.parametrize("name", OTHER_SCALING)
def test_tables_win_over_another_scaling_of_the_file_and_say_so(golden_gguf, golden_npz, tmp_path, name):
    path = rewrite(golden_gguf("llama"), tmp_path / "m.gguf", OTHER_SCALING[name])
    with logged(WARN) as lines:
        assert_golden_steps(path, golden_npz("llama"))
    assert sum("the clex.* tables take the place of" in line for line in lines) == 1


def test_tables_win_over_frequency_factors_of_the_file_and_say_so(golden_dir, ids, tmp_path):
    scaling = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    changes = dict(rope_scaling=dict(**scaling, original_max_position_embeddings=LENGTH), max_position_embeddings=512)
    reference = make_model("Llama", changes, tmp_path, golden_dir("llama"))
    tables = make_tables("ntk", dim=32, base=10000.0, original_context=LENGTH)
    path = rewrite(convert_plainly(tmp_path), tmp_path / "m.gguf", tables.metadata())
    with logged(WARN) as lines:
        assert_growing(reference, path, ids, 62, 67, 1e-4)
    assert sum("take the place of the tensor rope_freqs.weight" in line for line in lines) == 1


# what layers with a window, and heads that guess ahead, mean for a conversion


def make_folder(name: str, folder: Path, golden_dir) -> dict[str, str | None]:
    """A model folder, and the option that names its pre-tokenizer."""
    changes, tokenizer = MODELS[name]
    make_model(name, changes, folder, golden_dir(tokenizer))
    return {"pre_tokenizer": None if tokenizer == "llama" else "gpt-2"}


@pytest.mark.parametrize(
    ("name", "tensor"), [("Glm4Moe", "model.layers.3.eh_proj.weight"), ("Qwen3Next", "mtp.fc.weight")]
)
def test_a_head_that_guesses_ahead_is_left_out(golden_dir, tmp_path, name, tensor):
    options = make_folder(name, tmp_path, golden_dir)
    convert(tmp_path, tmp_path / "without.gguf", method="ntk", **options)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, tensor: torch.ones(4, 8)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    convert(tmp_path, tmp_path / "with.gguf", method="ntk", **options)
    assert (tmp_path / "with.gguf").read_bytes() == (tmp_path / "without.gguf").read_bytes()


@pytest.mark.parametrize("name", ["Cohere2", "Exaone4 windowed", "Gemma3"])
def test_tables_that_change_nothing_are_said_to(golden_dir, tmp_path, name):
    result = convert(tmp_path, tmp_path / "m.gguf", method="ntk", **make_folder(name, tmp_path, golden_dir))
    assert any("the tables change nothing" in note for note in result.notes) == (name != "Gemma3")


@pytest.mark.parametrize("name", ["Gemma3", "GptOss yarn"])
def test_windows_keep_what_the_file_says_of_their_rope(golden_dir, tmp_path, name):
    """Also where the tables begin with another scaling than the model's."""
    options = make_folder(name, tmp_path, golden_dir)
    convert(tmp_path, tmp_path / "m.gguf", method="yarn", **options)
    convert(tmp_path / "m.gguf", tmp_path / "again.gguf", method="yarn")
    for path in (tmp_path / "m.gguf", tmp_path / "again.gguf"):
        with GGUFFile(path) as file:
            arch = file.get("general.architecture")
            assert file.get(f"{arch}.attention.sliding_window") == 24
            assert file.get(f"{arch}.rope.freq_base_swa") == (10000.0 if name == "Gemma3" else 150000.0)
            assert file.get(f"{arch}.rope.scaling.factor") == (None if name == "Gemma3" else 4.0)


def test_a_table_cannot_be_baked_beside_windows(golden_dir, tmp_path):
    options = make_folder("Gemma3", tmp_path, golden_dir)
    with pytest.raises(ConvertError, match="`bake`: layers with a sliding window keep the model's own frequencies"):
        convert(tmp_path, tmp_path / "m.gguf", method="ntk", bake=2 * LENGTH, **options)
