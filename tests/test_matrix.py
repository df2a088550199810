"""Every type of cache, with and without flash attention, unified or per stream, across boundaries."""

from __future__ import annotations

import llama_cpp
import numpy as np
import pytest

from clex_local.library import llama_clex
from helpers.device_error import slack
from helpers.low_level import BF16, F16, F32, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Context, Model, refusal
from helpers.random_gguf import make_model, random_tokens

pytestmark = [pytest.mark.native, pytest.mark.sanitize]

IDS = random_tokens(256)
STEPS = 20

# RMS error of the logits over their standard deviation, mean of 3 sequences and 20 steps around a switch. Measured with
# heads of 32 and of 64 (those of 64 go through a Hadamard rotation when quantized); about 1.5 times the larger of both.
K_BOUNDS = {F32: 2e-5, F16: 6e-4, BF16: 4e-3, Q8_0: 0.012, Q5_1: 0.06, Q5_0: 0.065, Q4_1: 0.12, Q4_0: 0.14}
V_BOUNDS = {F32: 2e-5, F16: 3e-4, BF16: 2e-3, Q8_0: 0.005, Q5_1: 0.035, Q5_0: 0.04, Q4_1: 0.07, Q4_0: 0.08}
FLASH_BOUND = 1.3e-3
NAMES = {F32: "f32", F16: "f16", BF16: "bf16", Q8_0: "q8_0", Q5_1: "q5_1", Q5_0: "q5_0", Q4_1: "q4_1", Q4_0: "q4_0"}


@pytest.fixture(scope="module", params=[32, 64], ids=["head32", "head64"])
def model(request, tmp_path_factory):
    loaded = Model(make_model(tmp_path_factory.mktemp("matrix") / "tiny.gguf", head=request.param))
    yield loaded
    loaded.close()


def run(model, policy=llama_clex.Policy.BY_LENGTH, **options):
    """Logits [STEPS, 3, n_vocab] of sequences that go from 60, 120 and (a copy of the first) 60 tokens."""
    out = []
    with Context(model, n_seq=3, **options) as context:
        llama_clex.set_policy(context.pointer, policy, False)
        context.feed(IDS[:60], 0, 0)
        context.feed(IDS[20:140], 0, 1)
        llama_cpp.llama_memory_seq_cp(context.memory, 0, 2, -1, -1)
        for i in range(STEPS):
            context.decode(
                (IDS[s + 60 + i], p + i, [k], True) for k, (s, p) in enumerate([(0, 60), (80, 120), (40, 60)])
            )
            out.append([context.logits(k) for k in range(3)])
        if policy == llama_clex.Policy.BY_LENGTH:
            # the copy shares its cells with its source where there is one stream
            assert context.rerotated_cells == 64 + 128 + (4 if options.get("unified") else 64)
    return np.array(out)


@pytest.fixture(scope="module")
def exact(model):
    return run(model)


def error(logits, exact):
    assert np.isfinite(logits).all()
    return np.sqrt(np.square(logits - exact).mean(-1)).mean() / exact.std()


@pytest.mark.parametrize("flash_attn", [0, 1], ids=["plain", "flash"])
@pytest.mark.parametrize("type_k", K_BOUNDS, ids=NAMES.get)
def test_every_cache_is_close_to_f32(model, exact, type_k, flash_attn):
    for type_v, bound in V_BOUNDS.items():
        options = {"type_k": type_k, "type_v": type_v, "flash_attn": flash_attn}
        if not flash_attn and type_v not in (F32, F16, BF16):
            assert "quantized V cache requires flash_attn" in refusal(model, **options)
            continue
        limit = K_BOUNDS[type_k] + bound + flash_attn * FLASH_BOUND + slack(model.path) / exact.std()
        errors = [error(run(model, unified=unified, **options), exact) for unified in (False, True)]
        assert max(errors) < limit, (NAMES[type_v], errors, limit)


def test_another_table_is_further_away_than_any_bound(model, exact):
    assert error(run(model, llama_clex.Policy.FIXED), exact) > max(K_BOUNDS.values()) + max(V_BOUNDS.values())


@pytest.mark.parametrize(("head", "n_head_kv"), [(16, 1), (16, 2), (48, 2), (80, 1)])
@pytest.mark.parametrize("flash_attn", [0, 1, -1], ids=["plain", "flash", "auto"])
def test_blocks_that_do_not_divide_the_head_are_refused_by_name(tmp_path, head, n_head_kv, flash_attn):
    odd = Model(make_model(tmp_path / "odd.gguf", head=head, n_head_kv=n_head_kv))
    for quantized in (Q8_0, Q4_0, Q5_1):
        message = refusal(odd, type_k=quantized, flash_attn=flash_attn)
        assert "K cache" in message
        assert NAMES[quantized] in message
        assert f"{head}" in message
        assert refusal(odd, type_v=quantized, flash_attn=flash_attn)
    with Context(odd, type_k=F16, type_v=F16, flash_attn=flash_attn) as context:
        assert np.isfinite(context.steps(IDS, 60, 10)).all()
    odd.close()


@pytest.mark.parametrize("unified", [False, True])
def test_64_sequences_of_all_lengths_equal_each_alone(model, unified):
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 240, 64)
    rows = [np.roll(IDS, int(shift)) for shift in rng.integers(0, 256, 64)]
    n_ctx = 64 * 256
    with Context(model, n_seq=64, unified=unified, n_ctx=n_ctx) as context:
        for s in range(64):
            context.feed(rows[s][: lengths[s]], 0, s)
        for i in range(4):
            context.decode((rows[s][lengths[s] + i], int(lengths[s]) + i, [s], True) for s in range(64))
        together = [context.logits(s) for s in range(64)]
        assert {context.bucket(s) for s in range(64)} == {0, 1, 2, 3}
    for s in range(0, 64, 9):
        with Context(model) as context:
            alone = context.steps(rows[s], int(lengths[s]), 4)[-1]
        np.testing.assert_allclose(together[s], alone, atol=2e-5 + slack(model.path), rtol=0)
