"""What is known of a cache before a model is loaded, against what the library makes."""

from __future__ import annotations

import re

import numpy as np
import pytest

from clex_local.errors import ClexError
from clex_local.gguf_file import GGUFFile
from clex_local.memory import ModelShape, kv_bytes, plan_context
from helpers.gguf_maker import gguf_bytes
from helpers.low_level import F16, Q4_0, Q8_0, Context, Model, logged
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


@pytest.mark.parametrize(
    ("architecture", "window", "plain"),
    [
        ("phi3", None, True),
        ("phi3", WINDOW, True),
        ("llama", WINDOW, True),
        ("qwen2", WINDOW, True),
        ("olmo2", None, True),
        ("olmo2", np.uint32(0), True),
        ("olmo2", WINDOW, False),
        ("gemma3", None, True),
        ("gemma3", WINDOW, False),
        ("gemma2", WINDOW, False),
        ("gemma2", None, False),
    ],
)
def test_a_window_counts_where_the_library_has_one(tmp_path, architecture, window, plain):
    path = write_model(tmp_path / "m.gguf", architecture, window, head=64, n_head=4, n_head_kv=4, n_layer=4)
    with GGUFFile(path) as file:
        shape = ModelShape.from_metadata(file)
    assert (shape is not None) == plain
    model = Model(path)
    with logged(INFO) as lines, Context(model, n_ctx=4096, type_k=F16, type_v=F16) as context:
        assert np.isfinite(context.feed([5, 6, 7], 0)).all()
    model.close()
    assert any("llama_kv_cache_iswa" in line for line in lines) != plain
    if shape is not None:
        assert kv_bytes(shape, 4096) == buffers(lines)


def buffers(lines):
    """Bytes of the keys and values of a context, from what the library says of it."""
    sizes = [line for line in lines if "llama_kv_cache: size" in line]
    kept = [line for line in lines if "for keys that re-rotations start from" in line]
    found = [float(re.search(r"size = +([\d.]+) MiB", line)[1]) for line in sizes]
    found += [float(re.search(r"up to ([\d.]+) MiB", line)[1]) for line in kept]
    return sum(found) * 2**20


HYBRIDS = {
    "lfm2": {"lfm2.shortconv.l_cache": 3},
    "kimi-linear": {},
    "mamba": {"mamba.ssm.state_size": 16},
    "deepseek2": {"deepseek2.attention.kv_lora_rank": 512},
    "llama4": {},
}


@pytest.mark.parametrize("architecture", HYBRIDS)
def test_other_kinds_of_cache_have_no_figures(architecture):
    keys, _ = model_parts()
    assert ModelShape.from_metadata(with_architecture(keys, architecture) | HYBRIDS[architecture]) is None


def test_compressed_keys_that_are_cached_expanded_have_figures():
    keys, _ = model_parts()
    assert ModelShape.from_metadata(with_architecture(keys, "minicpm3") | {"minicpm3.attention.kv_lora_rank": 256})


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
    plain = kv_bytes(ModelShape(**{**vars(shape), "first_table": None}), n_ctx, name)
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
