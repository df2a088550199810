"""The native library refuses what breaks a rule of the metadata by itself, with a line that names the key."""

from __future__ import annotations

import llama_cpp
import numpy as np
import pytest

from clex_local.library import llama_clex
from clex_local.library.log import ERROR, logged
from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.tables import ATTN_SCALE_RANGE, INV_FREQ_RANGE, TablesError, read_tables
from helpers.gguf_maker import rewrite
from helpers.low_level import Context, Model

pytestmark = [pytest.mark.native, pytest.mark.sanitize]

F32 = np.float32
INV_FREQ = np.ones(4 * 16, F32)

# The golden model has 4 buckets of 16 frequencies.
BROKEN = {
    "version missing": ({"clex.version": None}, "clex.version is missing"),
    "version type": ({"clex.version": np.int32(1)}, "clex.version must be of type u32"),
    "version newer": ({"clex.version": np.uint32(2)}, "clex.version is 2, this library reads version 1"),
    "method missing": ({"clex.method": None}, "clex.method is missing"),
    "method type": ({"clex.method": np.uint32(1)}, "clex.method must be of type string"),
    "length missing": ({"clex.original_context_length": None}, "clex.original_context_length is missing"),
    "length zero": ({"clex.original_context_length": np.uint32(0)}, "clex.original_context_length must be above 0"),
    "factors missing": ({"clex.scaling_factors": None}, "clex.scaling_factors is missing"),
    "factors type": ({"clex.scaling_factors": np.arange(1.0, 5)}, "clex.scaling_factors must be of type f32 array"),
    "factors scalar": ({"clex.scaling_factors": F32(1)}, "clex.scaling_factors must be of type f32 array"),
    "factors empty": ({"clex.scaling_factors": np.array([], F32)}, "clex.scaling_factors must start with 1.0"),
    "factors start": ({"clex.scaling_factors": np.array([2, 3, 4, 5], F32)}, "clex.scaling_factors must start"),
    "factors equal": ({"clex.scaling_factors": np.array([1, 2, 2, 3], F32)}, "must be strictly ascending"),
    "factors infinite": ({"clex.scaling_factors": np.array([1, 2, 3, np.inf], F32)}, "clex.scaling_factors holds"),
    "factors too far": ({"clex.scaling_factors": np.array([1, 2, 3, 1e9], F32)}, "32-bit position"),
    "frequencies missing": ({"clex.inv_freq": None}, "clex.inv_freq is missing"),
    "frequencies type": ({"clex.inv_freq": INV_FREQ.astype(np.float64)}, "clex.inv_freq must be of type f32 array"),
    "frequencies few": ({"clex.inv_freq": INV_FREQ[:-1]}, "clex.inv_freq has 63 values, 4 buckets of 16 are needed"),
    "frequencies many": ({"clex.inv_freq": np.ones(80, F32)}, "clex.inv_freq has 80 values"),
    "frequency zero": ({"clex.inv_freq": INV_FREQ * np.r_[0, np.ones(63)].astype(F32)}, "clex.inv_freq holds"),
    "frequency below": ({"clex.inv_freq": -INV_FREQ}, "clex.inv_freq holds"),
    "frequency nan": ({"clex.inv_freq": INV_FREQ * F32(np.nan)}, "clex.inv_freq holds"),
    "scale count": ({"clex.attn_scale": np.ones(3, F32)}, "clex.attn_scale has 3 values for 4 buckets"),
    "scale empty": ({"clex.attn_scale": np.array([], F32)}, "clex.attn_scale has 0 values for 4 buckets"),
    "scale zero": ({"clex.attn_scale": np.zeros(4, F32)}, "clex.attn_scale holds"),
    "frequency huge": ({"clex.inv_freq": INV_FREQ * F32(1e38)}, "clex.inv_freq holds 1e+38, its values are from"),
    "scale huge": ({"clex.attn_scale": np.full(4, 1e38, F32)}, "clex.attn_scale holds 1e+38, its values are from"),
    "scale type": ({"clex.attn_scale": np.ones(4)}, "clex.attn_scale must be of type f32 array"),
    "log scale type": ({"clex.log_scale": np.uint8(1)}, "clex.log_scale must be of type bool"),
    "log scale of one token": (
        {"clex.log_scale": np.True_, "clex.original_context_length": np.uint32(1)},
        "clex.log_scale needs an original context above 1",
    ),
    "provenance type": ({"clex.provenance": np.uint32(1)}, "clex.provenance must be of type string"),
}


def load(path):
    """Errors that the library logs while loading, and whether it gave a model."""
    with logged(ERROR) as lines:
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if model:
        count = llama_clex.n_buckets(model)
        llama_cpp.llama_model_free(model)
        return count, lines
    return None, lines


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rule_is_a_failed_load_that_names_the_key(golden_gguf, tmp_path, name):
    changes, message = BROKEN[name]
    count, lines = load(rewrite(golden_gguf("llama"), tmp_path / "m.gguf", changes))
    assert count is None
    assert any(message in line for line in lines), lines


@pytest.mark.parametrize(("key", "limits"), [("clex.inv_freq", INV_FREQ_RANGE), ("clex.attn_scale", ATTN_SCALE_RANGE)])
def test_library_and_python_draw_the_same_limits(golden_gguf, tmp_path, key, limits):
    """The values at the limits are computed with; those beyond are refused by both."""
    with GGUFFile(golden_gguf("llama")) as file:
        size = {"clex.inv_freq": file.get("clex.inv_freq").size, "clex.attn_scale": 4}[key]
    least, most = limits
    values = {F32(1e-45): False, np.nextafter(least, F32(0)): False, least: True, most: True}
    values |= {np.nextafter(most, F32(np.inf)): False, F32(1e38): False}
    for value, good in values.items():
        array = np.ones(size, F32)
        array[-1] = value
        path = rewrite(golden_gguf("llama"), tmp_path / "m.gguf", {key: array})
        assert (load(path)[0] is not None) == good, value
        if good:
            assert read_tables(path) is not None
            model = Model(path)
            with Context(model) as context:
                assert np.isfinite(context.feed(range(3, 203), 0)).all()
            model.close()
        else:
            with pytest.raises(TablesError, match=key):
                read_tables(path)


def test_intact_tables_load_and_so_does_a_model_without(golden_gguf, tmp_path):
    source = golden_gguf("llama")
    assert load(rewrite(source, tmp_path / "same.gguf", {})) == (4, [])
    with GGUFFile(source) as file:
        ours = {key: None for key in file.keys() if key.startswith("clex.")}  # noqa: SIM118
    assert load(rewrite(source, tmp_path / "plain.gguf", ours)) == (0, [])


def test_attention_scale_of_a_bucket_scales_the_logits_before_softmax(golden_gguf, golden_npz, tmp_path):
    """A scale of 1 changes nothing; another changes only its bucket."""
    ids = golden_npz("llama")["ids"]
    results = []
    for scale in ([1, 1, 1, 1], [1, 1.5, 1, 1]):
        path = rewrite(golden_gguf("llama"), tmp_path / "m.gguf", {"clex.attn_scale": np.array(scale, F32)})
        model = Model(path)
        with Context(model) as context:
            results.append((context.feed(ids[:60], 0), context.feed(ids[60:70], 60)))
        model.close()
    golden = golden_npz("llama")["steps"]
    np.testing.assert_allclose(results[0][0], golden[0], atol=5e-4)
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert np.abs(results[0][1] - results[1][1]).max() > 1e-2
