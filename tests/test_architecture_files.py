"""GGUF files, made by llama.cpp's scripts, of architectures whose folders are not converted, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from clex_convert import convert
from clex_local.model_file.architectures import find, with_tables
from clex_local.model_file.gguf_file import GGUFFile
from helpers.tiny_models import assert_growing, convert_plainly, kind_of, make_model

pytestmark = [pytest.mark.native, pytest.mark.convert, pytest.mark.folders]

EXPERTS = dict(moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2)
# llama.cpp does not read the epsilon of the norms of qwen2vl, and takes 0.
VISION = dict(depth=1, embed_dim=32, hidden_size=128, num_heads=2)
MROPE = dict(type="mrope", mrope_section=[4, 6, 6])
LINEAR = dict(
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)

LFM2_MOE = dict(
    **EXPERTS,
    num_dense_layers=1,
    tie_word_embeddings=True,
    layer_types=["conv", "full_attention", "full_attention"],
    num_hidden_layers=3,
)

# Name of transformers' class, what differs from SIZES, the tokenizer, and the architecture. Release 4 lacks some.
FILES: dict[str, tuple[dict[str, Any], str, str]] = {
    "Qwen2VL": (
        dict(text_config=dict(rope_scaling=MROPE, rms_norm_eps=1e-12), vision_config=VISION, tie_word_embeddings=False),
        *("llama", "qwen2vl"),
    ),
    "Qwen3_5": (
        dict(**LINEAR, head_dim=32, num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2),
        *("phi2", "qwen35"),
    ),
    "Lfm2Moe": (LFM2_MOE, *("phi2", "lfm2moe")),
    "MiniMaxM2": (
        dict(
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=32,
            rotary_dim=16,
            scoring_func="sigmoid",
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5),
        ),
        *("phi2", "minimax-m2"),
    ),
    "Jais2": (dict(num_key_value_heads=4), *("phi2", "jais2")),
    "GraniteSWA": (
        dict(
            num_hidden_layers=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
            sliding_window=24,
            embedding_multiplier=3.0,
            attention_multiplier=0.2,
        ),
        *("llama", "granite_swa"),
    ),
}


@pytest.fixture(scope="module", params=FILES)
def pair(request, golden_dir, tmp_path_factory) -> tuple[transformers.PreTrainedModel, Path]:
    """A model of transformers, and a file with tables made of the file that llama.cpp's scripts make."""
    changes, tokenizer, architecture = FILES[request.param]
    names = [f"{kind_of(request.param)}{end}" for end in ("ForCausalLM", "ForConditionalGeneration")]
    if not any(hasattr(transformers, name) for name in names):
        pytest.skip(f"transformers {transformers.__version__} has no {names[0]}")
    folder = tmp_path_factory.mktemp("model")
    model = make_model(request.param, changes, folder, golden_dir(tokenizer))
    path = folder / "model.gguf"
    convert(convert_plainly(folder, type(model).__name__), path, method="ntk", max_factor=4)
    with GGUFFile(path) as file:
        assert file.get("general.architecture") == architecture
    return model, path


def test_sequence_that_crosses_gives_the_logits_of_transformers(pair, golden_npz) -> None:
    reference, path = pair
    ids = golden_npz("llama")["ids"]
    assert_growing(reference, path, ids, 62, 67, 1e-3)
    assert_growing(reference, path, ids, 190, 194, 1e-3)


def test_rows_say_what_is_compared() -> None:
    """With transformers' class, here or in test_architectures.py, or as LLaMA under another name."""
    compared = {row.name for row in with_tables() if row.compared and not row.classes}
    assert compared == {architecture for _, _, architecture in FILES.values()} | {"mistral3", "internlm2", "xverse"}
    assert not any(find(architecture).classes for _, _, architecture in FILES.values())
