"""What is known of a cache before a model is loaded, against what the library makes."""

from __future__ import annotations

import re
from dataclasses import replace

import llama_cpp
import numpy as np
import pytest

from clex_local.errors import ClexError
from clex_local.model_file.context_plan import plan_context
from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.memory import kv_bytes
from clex_local.model_file.model_shape import ModelShape
from clex_local.server.plan import for_conversations
from helpers.gguf_maker import gguf_bytes
from helpers.low_level import F16, Q4_0, Q8_0, Context, Model, context_params, logged
from helpers.made_up_models import made_up_keys, made_up_model
from helpers.random_architectures import make_architecture
from helpers.random_gguf import N_VOCAB, make_model, model_parts

pytestmark = pytest.mark.runtime

INFO = 2
WINDOW = np.uint32(32)


def with_architecture(keys, architecture):
    keys = {re.sub(r"^llama\.", f"{architecture}.", key): value for key, value in keys.items()}
    return keys | {"general.architecture": architecture}


def write_model(path, architecture, window, **options):
    """A tiny model of an architecture, which is computed as its file says: with a sliding window or without."""
    keys, tensors = model_parts(tables=False, **options)
    keys = with_architecture(keys, architecture)
    if window is not None:
        keys[f"{architecture}.attention.sliding_window"] = window
    for i in range(keys[f"{architecture}.block_count"]):
        layer = {name.removeprefix(f"blk.{i}."): name for name in tensors if name.startswith(f"blk.{i}.")}
        q, k, v = (tensors[layer[f"attn_{part}.weight"]] for part in "qkv")
        width = len(tensors["output_norm.weight"])
        if architecture == "phi3":
            tensors[f"blk.{i}.attn_qkv.weight"] = np.concatenate([q, k, v])
            tensors[layer["ffn_up.weight"]] = np.concatenate(
                [tensors.pop(layer["ffn_gate.weight"]), tensors[layer["ffn_up.weight"]]]
            )
            for part in "qkv":
                del tensors[layer[f"attn_{part}.weight"]]
        elif architecture == "olmo2":
            tensors |= {f"blk.{i}.attn_q_norm.weight": np.ones(len(q), np.float32)}
            tensors |= {f"blk.{i}.attn_k_norm.weight": np.ones(len(k), np.float32)}
            tensors |= {f"blk.{i}.post_attention_norm.weight": np.ones(width, np.float32)}
            tensors |= {f"blk.{i}.post_ffw_norm.weight": np.ones(width, np.float32)}
            del tensors[layer["attn_norm.weight"]], tensors[layer["ffn_norm.weight"]]
        elif architecture in ("gemma2", "gemma3"):
            tensors |= {f"blk.{i}.post_attention_norm.weight": np.ones(width, np.float32)}
            tensors |= {f"blk.{i}.post_ffw_norm.weight": np.ones(width, np.float32)}
            if architecture == "gemma3":
                tensors |= {f"blk.{i}.attn_q_norm.weight": np.ones(64, np.float32)}
                tensors |= {f"blk.{i}.attn_k_norm.weight": np.ones(64, np.float32)}
    if architecture == "gemma2":
        del tensors["output.weight"]  # it is the embedding
    path.write_bytes(gguf_bytes(keys, tensors))
    return path


@pytest.mark.parametrize("swa_full", [True, False])
@pytest.mark.parametrize(
    ("architecture", "window", "windowed"),
    [
        ("phi3", None, False),
        ("phi3", WINDOW, False),
        ("llama", WINDOW, False),
        ("qwen2", WINDOW, False),
        ("olmo2", None, False),
        ("olmo2", np.uint32(0), False),
        ("olmo2", WINDOW, True),
        ("gemma3", None, False),
        ("gemma3", WINDOW, True),
        ("gemma2", WINDOW, True),
        ("gemma2", None, True),
    ],
)
def test_a_window_counts_where_the_library_has_one(tmp_path, architecture, window, windowed, swa_full):
    path = write_model(tmp_path / "m.gguf", architecture, window, head=64, n_head=4, n_head_kv=4, n_layer=4)
    with GGUFFile(path) as file:
        shape = ModelShape.from_metadata(file)
    model = Model(path)
    with logged(INFO) as lines, Context(model, n_ctx=4096, type_k=F16, type_v=F16, swa_full=swa_full) as context:
        assert np.isfinite(context.feed([5, 6, 7], 0)).all()
    model.close()
    assert any("llama_kv_cache_iswa" in line for line in lines) == windowed
    shape = replace(shape, window_batch=None if swa_full else 512)
    assert kv_bytes(shape, 4096) == buffers(lines)


def buffers(lines):
    """Bytes of what a context keeps of sequences, from what the library says of it."""
    sizes = [line for line in lines if re.search("llama_(kv_cache|memory_recurrent): size", line)]
    kept = [line for line in lines if "for keys that re-rotations start from" in line]
    found = [float(re.search(r"size = +([\d.]+) MiB", line)[1]) for line in sizes]
    found += [float(re.search(r"up to ([\d.]+) MiB", line)[1]) for line in kept]
    return sum(found) * 2**20


ROUNDING = 0.011 * 2**20  # of two numbers of the library's

WINDOWED = (
    *("cohere2", "cohere2moe", "gemma3n", "gpt-oss", "granite_swa", "laguna", "llama4", "mellum", "mimo2", "plamo3"),
    *("smallthinker", "spark2_5", "step35", "afmoe", "exaone-moe", "muse-glimmer"),
)
STATEFUL = (
    *("falcon-h1", "granitehybrid", "jamba", "kimi-linear", "lfm2", "lfm2moe", "mamba", "mamba2", "minimax-01"),
    *("nemotron_h", "plamo2", "qwen35", "qwen35moe", "qwen3next", "rwkv7"),
)


@pytest.mark.parametrize("swa_full", [True, False])
@pytest.mark.parametrize("architecture", ["deepseek2", "glm4moe", *WINDOWED, *STATEFUL])
def test_figures_of_windows_states_and_latent_attention(architecture, swa_full):
    """Which layers they are is known, where the file does not say, from the row of the architecture."""
    shape = for_conversations(ModelShape.from_metadata(made_up_keys(architecture)), 2, 256)
    if swa_full:
        shape = replace(shape, window_batch=None)
    options = {"n_ctx": 2048, "n_seq": 2, "n_ubatch": 256, "type_k": F16, "type_v": F16, "flash_attn": swa_full}
    with made_up_model(architecture) as model, logged(INFO) as lines:
        context = llama_cpp.llama_init_from_model(model, context_params(**options, swa_full=swa_full))
        llama_cpp.llama_free(context)
    assert kv_bytes(shape, 1024, flash_attn=swa_full) == pytest.approx(buffers(lines), abs=ROUNDING)
    assert any("llama_kv_cache_iswa" in line for line in lines) == any(cache.window for cache in shape.caches)
    assert any("llama_memory_recurrent" in line for line in lines) == any(cache.state for cache in shape.caches)


def test_heads_of_layers_with_a_window_may_be_smaller_and_later_layers_without_a_cache():
    """As in Gemma 4."""
    own = {
        "attention.key_length": np.uint32(512),
        "attention.value_length": np.uint32(512),
        "attention.key_length_swa": np.uint32(256),
        "attention.value_length_swa": np.uint32(256),
        "attention.sliding_window": np.uint32(512),
        "attention.sliding_window_pattern": np.array([True, True, False, True]),
        "attention.shared_kv_layers": np.uint32(1),
    }
    keys, _ = model_parts(tables=False, n_head=4, n_head_kv=2, n_layer=4)
    keys = with_architecture(keys, "gemma4") | {f"gemma4.{key}": value for key, value in own.items()}
    shape = ModelShape.from_metadata(keys)
    assert shape.heads_kv == (2, 2, 2, 0)
    assert kv_bytes(shape, 4096) == 4096 * (256 + 256 + 512) * 2 * 2 * 2
    served = for_conversations(shape, 1, 512)
    assert kv_bytes(served, 4096) == (1024 * (256 + 256) + 4096 * 512) * 2 * 2 * 2
    assert kv_bytes(shape, 4096, flash_attn=False) == 4096 * (1024 + 3 * 512) * 2 * 2  # values padded to the largest


@pytest.mark.parametrize("architecture", ["deepseek4", "deepseek32", "glm-dsa", "minimax-m3", "qwen4exp"])
def test_other_kinds_of_cache_have_no_figures(architecture):
    keys, _ = model_parts()
    assert ModelShape.from_metadata(with_architecture(keys, architecture)) is None


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("new", {"attention.kv_lora_rank": 512}),
        ("new", {"ssm.state_size": 16}),
        ("gemma2", {"attention.sliding_window_pattern": "all"}),
        ("qwen3next", {"full_attention_interval": 0}),
        ("mamba", {"ssm.state_size": 16, "ssm.inner_size": -64}),
    ],
)
def test_metadata_that_does_not_say_has_none_either(architecture, more):
    keys, _ = model_parts()
    keys = with_architecture(keys, architecture) | {f"{architecture}.{key}": value for key, value in more.items()}
    assert ModelShape.from_metadata(keys) is None


def test_compressed_keys_that_are_cached_expanded_have_figures():
    keys, _ = model_parts()
    assert ModelShape.from_metadata(with_architecture(keys, "minicpm3") | {"minicpm3.attention.kv_lora_rank": 256})


@pytest.mark.parametrize("swa_full", [True, False])
@pytest.mark.parametrize("name", ["gemma2", "olmo2", "lfm2"])
def test_keys_of_windows_are_not_kept_twice(tmp_path, name, swa_full):
    """No table rotates them, however far a quantized cache goes."""
    path = make_architecture(tmp_path / "m.gguf", name, head=64, n_head=4, n_head_kv=4, original=1024)
    with GGUFFile(path) as file:
        shape = replace(ModelShape.from_metadata(file), window_batch=None if swa_full else 512)
    model = Model(path)
    options = {"n_ctx": 4096, "type_k": Q8_0, "type_v": Q8_0, "flash_attn": 1, "swa_full": swa_full}
    with logged(INFO) as lines, Context(model, **options):
        pass
    model.close()
    assert any("for keys that re-rotations start from" in line for line in lines)
    assert kv_bytes(shape, 4096, "q8_0") == pytest.approx(buffers(lines), abs=2 * ROUNDING)


@pytest.mark.parametrize(("kind", "name"), [(F16, "f16"), (Q8_0, "q8_0"), (Q4_0, "q4_0")])
@pytest.mark.parametrize("n_ctx", [4096, 8192])
def test_figures_have_the_keys_that_a_quantized_cache_keeps(tmp_path, kind, name, n_ctx):
    """As soon as the context reaches a second table."""
    path = make_model(tmp_path / "m.gguf", head=64, n_head=4, n_head_kv=4, n_layer=4, original=4096)
    with GGUFFile(path) as file:
        shape = ModelShape.from_metadata(file)
    model = Model(path)
    with logged(INFO) as lines, Context(model, n_ctx=n_ctx, type_k=kind, type_v=kind, flash_attn=1):
        pass
    model.close()
    assert kv_bytes(shape, n_ctx, name) == pytest.approx(buffers(lines), rel=2e-3)
    plain = kv_bytes(replace(shape, first_table=None), n_ctx, name)
    more = {("q8_0", 8192): 1.5, ("q4_0", 8192): 1.5}.get((name, n_ctx), 1)
    assert kv_bytes(shape, n_ctx, name) == more * plain


def test_q4_0_is_no_advice_where_tables_are_crossed():
    keys, _ = model_parts(head=128, n_head=32, n_head_kv=32, n_layer=0, original=4096, n_buckets=16)
    keys |= {"llama.block_count": np.uint32(32), "llama.vocab_size": np.uint32(N_VOCAB)}
    with_tables = ModelShape.from_metadata(keys)
    without = ModelShape.from_metadata({key: value for key, value in keys.items() if not key.startswith("clex.")})
    assert (with_tables.first_table, without.first_table) == (4096, None)
    for shape, advised in ((with_tables, False), (without, True)):
        with pytest.raises(ClexError) as error:
            plan_context(shape, 65536, 65536, kv_type="f16", available=12 * 2**30)
        assert ("`kv_type=q4_0`" in str(error.value)) == advised, str(error.value)
    with pytest.raises(ClexError, match="`kv_type=q8_0`"):
        plan_context(with_tables, 65536, 65536, kv_type="f16", available=30 * 2**30)
