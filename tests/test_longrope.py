"""LongRoPE by the length of each sequence, against Phi-3 of transformers."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch

from clex_convert import ConvertError, convert
from clex_local import ClexError, Llama
from clex_local.library import llama_clex
from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.tables import Tables
from helpers.low_level import F32, WARN, Context, Model, logged
from helpers.tiny_models import LENGTH, assert_growing, convert_plainly, make_model

pytestmark = [pytest.mark.native, pytest.mark.convert]

LONGEST = 4 * LENGTH
SWITCH = "LLAMA_CLEX_LONGROPE_DISABLE"


@pytest.fixture(scope="module", params=[1.0, 0.75], ids=["whole", "partial"])
def pair(request, golden_dir, tmp_path_factory):
    """A Phi-3 of transformers, and the GGUF file that llama.cpp's own conversion makes of it."""
    n = int(32 * request.param) // 2
    scaling = dict(type="longrope", short_factor=np.linspace(1, 1.5, n).tolist())
    changes = dict(
        rope_scaling=dict(**scaling, long_factor=np.linspace(1, 6, n).tolist()),
        original_max_position_embeddings=LENGTH,
        max_position_embeddings=LONGEST,
        partial_rotary_factor=request.param,
        sliding_window=None,
    )
    folder = tmp_path_factory.mktemp("longrope")
    model = make_model("Phi3", changes, folder, golden_dir("llama"))
    return model, convert_plainly(folder)


@pytest.fixture
def ids(golden_npz):
    return golden_npz("llama")["ids"]


def reference_logits(model, tokens: np.ndarray) -> np.ndarray:
    """Of the last token, by transformers alone: it chooses the factors by the length of the pass."""
    with torch.no_grad():
        return model(torch.tensor(tokens[None].astype(np.int64))).logits[0, -1].numpy()


def own_logits(path, tokens: np.ndarray, n_ctx: int = LONGEST) -> np.ndarray:
    model = Model(path)
    with Context(model, n_ctx=n_ctx) as context:
        logits = context.feed(tokens, 0)
    model.close()
    return logits


@pytest.mark.parametrize("n", [20, LENGTH, LENGTH + 1, 200, LONGEST])
def test_prompt_gives_the_logits_of_transformers_whatever_the_context(pair, ids, n):
    model, path = pair
    ids = np.resize(ids, LONGEST)
    np.testing.assert_allclose(own_logits(path, ids[:n], 1024), reference_logits(model, ids[:n]), atol=1e-4, rtol=0)


def test_sequence_that_crosses_has_all_its_keys_rotated_with_the_long_factors(pair, ids):
    model, path = pair
    scaling = model.config.rope_scaling
    dim = 2 * len(scaling["short_factor"])
    plain = 10000.0 ** (-np.arange(0, dim, 2) / dim)
    rows = [plain / np.array(scaling[key]) for key in ("short_factor", "long_factor")]
    tables = Tables("longrope", LENGTH, np.array([1, 4]), np.array(rows))
    assert_growing(model, path, ids, LENGTH - 2, LENGTH + 4, 1e-4, tables)


def test_switch_leaves_the_choice_to_the_context(pair, ids, monkeypatch):
    """Stock takes the long factors for a short prompt when the context is large."""
    model, path = pair
    monkeypatch.setenv(SWITCH, "1")
    assert np.abs(own_logits(path, ids[:20]) - reference_logits(model, ids[:20])).max() > 0.05
    np.testing.assert_allclose(own_logits(path, ids[:200]), reference_logits(model, ids[:200]), atol=1e-4, rtol=0)
    loaded = Model(path)
    assert llama_clex.n_buckets(loaded.pointer) == 0
    loaded.close()


def test_llama_feeds_a_long_prompt_in_pieces_with_one_set_of_factors(pair, ids):
    model, path = pair
    llm = Llama(str(path), n_ctx=0, n_batch=32, type_k=F32, type_v=F32, logits_all=True, verbose=False)
    llm.eval(ids[:200].tolist())
    np.testing.assert_allclose(llm.scores[199], reference_logits(model, ids[:200]), atol=1e-4, rtol=0)
    clex = llm.clex
    assert (clex.method, clex.original_context, clex.max_context) == ("longrope", LENGTH, LONGEST)
    assert clex.buckets == (1, 4)
    llm.close()


def test_factors_of_no_use_are_left_to_stock(pair, tmp_path):
    _, path = pair
    broken = tmp_path / "m.gguf"
    shutil.copy(path, broken)
    with GGUFFile(path) as file:
        offset = next(tensor.offset for tensor in file.tensors if "rope_factors_long" in tensor.name)
        start = file.data_offset + offset
    with broken.open("r+b") as file:
        file.seek(start)
        file.write(np.float32(0).tobytes())
    with logged(WARN) as lines:
        model = Model(broken)
    assert llama_clex.n_buckets(model.pointer) == 0
    model.close()
    assert any("rope_factors_long.weight holds a factor that is of no use" in line for line in lines), lines


def test_state_of_stock_is_refused(pair, ids, monkeypatch):
    _, path = pair
    states = {}
    for switch in ("stock", "ours"):
        with monkeypatch.context() as patch:
            if switch == "stock":
                patch.setenv(SWITCH, "1")
            model = Model(path)
        with Context(model, n_ctx=LONGEST) as context:
            context.feed(ids[:20], 0)
            states[switch] = context.save()
            if switch == "ours":
                assert context.load(states["ours"])
                assert not context.load(states["stock"])
        model.close()


@pytest.mark.parametrize("times", [4, 8])
def test_extending_goes_on_from_the_factors_as_conversion_does(pair, ids, tmp_path, times):
    def logits(path, **options):
        with Llama(path, n_ctx=0, n_threads=1, verbose=False, logits_all=True, **options) as llm:
            assert (llm.clex.method, llm.clex.buckets) == ("longrope", (1.0, float(times)))
            llm.eval(ids[:LONGEST].tolist())
            return llm.scores[: llm.n_tokens].copy()

    try:
        convert(pair[1], tmp_path / "long.gguf", max_factor=times)
    except ConvertError as error:  # for tables that rotate a part of each head
        with pytest.raises(ClexError, match=re.escape(str(error))):
            Llama(pair[1], extend=f"{times}x", verbose=False)
        return
    assert np.array_equal(logits(pair[1], extend=f"{times}x"), logits(tmp_path / "long.gguf"))
    with pytest.raises(ClexError, match="ntk cannot be combined with a model that has the scaling longrope of its own"):
        Llama(pair[1], extend=f"ntk:{times}x", verbose=False)
