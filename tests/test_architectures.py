"""Every architecture with hooks against transformers, rotated with the same inverse frequencies.

The models are tiny, random and made on the spot; their tables are the closed form of NTK-aware scaling.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clex_convert import convert
from clex_convert import tables as make_tables
from clex_local._library import library_path
from clex_local.architectures import with_tables
from clex_local.gguf_file import GGUFFile
from clex_local.tables import Tables, read_tables
from helpers.gguf_maker import rewrite
from helpers.low_level import WARN, Context, Model, logged
from helpers.tiny_models import LENGTH, Reference, assert_growing, convert_plainly, kind_of, make_model

pytestmark = [pytest.mark.convert, pytest.mark.native, pytest.mark.folders]

SCALES = [1, 1.25, 0.8, 1.5]

EXPERTS = dict(moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2)
PHI3 = dict(sliding_window=None, original_max_position_embeddings=LENGTH)

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
}


def tolerance(name: str) -> float:
    """ggml looks GELU up in a table of 16-bit numbers; stock is as far from transformers."""
    return 5e-3 if kind_of(name) in ("Phi", "GPTNeoX", "Falcon") else 1e-4


@pytest.fixture(scope="module", params=MODELS)
def pair(request, golden_dir, tmp_path_factory):
    """A model of transformers, its GGUF file, and how far the two may differ."""
    changes, tokenizer = MODELS[request.param]
    folder = tmp_path_factory.mktemp("model")
    model = make_model(request.param, changes, folder, golden_dir(tokenizer))
    path = folder / "model.gguf"
    convert(folder, path, outtype="f32", method="ntk", pre_tokenizer="gpt-2" if tokenizer == "phi2" else None)
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
    assert difference.max() > 20 * atol


def test_file_says_of_its_rope_what_the_folder_said(pair, tmp_path):
    """Tables made from the GGUF file are those made from the folder: same base, dimension and context."""
    _, path, _ = pair
    result = convert(path, tmp_path / "m.gguf", method="ntk")
    tables = read_tables(path)
    assert result.tables.original_context_length == tables.original_context_length
    np.testing.assert_array_equal(result.tables.inv_freq, tables.inv_freq)


STOCK = """
import sys, numpy as np, llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=256, n_threads=2, type_k=0, type_v=0, verbose=False, logits_all=True)
llm.eval(np.load(sys.argv[2]).tolist())
np.save(sys.argv[3], llm.scores[: llm.n_tokens])
"""


def test_hooks_change_nothing_without_tables(pair, ids, stock_library, tmp_path):
    """Bit for bit stock, which runs the plain model inside its original context."""
    reference, path, atol = pair
    tables = read_tables(path)
    plain = rewrite(path, tmp_path / "plain.gguf", dict.fromkeys(tables.metadata()))
    np.save(tmp_path / "ids.npy", ids[:60])
    logits = []
    for library in (library_path(), stock_library):
        out = tmp_path / "out.npy"
        command = [sys.executable, "-c", STOCK, str(plain), str(tmp_path / "ids.npy"), str(out)]
        subprocess.run(command, env={**os.environ, "LLAMA_CPP_LIB_PATH": str(library)}, check=True)
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
    np.testing.assert_allclose(logits, golden["steps"], atol=5e-4, rtol=0)


def test_mistral3_has_the_tables(golden_gguf, golden_npz, tmp_path):
    """No release of transformers that this project supports has the class; its mathematics are LLaMA's."""
    source, kinds = golden_gguf("llama"), {"u32": np.uint32, "f32": np.float32}
    with GGUFFile(source) as file:
        copies = {
            "mistral3" + key.removeprefix("llama"): kinds[kind](file.get(key))
            for key in file.keys()  # noqa: SIM118
            if key.startswith("llama.") and (kind := file.kind(key)) in kinds
        }
    path = rewrite(source, tmp_path / "m.gguf", {"general.architecture": "mistral3", **copies})
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
