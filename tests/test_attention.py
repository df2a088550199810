"""Flash attention on the CPU against float64: no error larger than that of stock llama.cpp."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.flash_attention import QUANTIZED, TYPES, Case, Ggml, Library
from helpers.kernel_libraries import in_pairs, libraries, tiles_in_software, tiles_of_processor

pytestmark = pytest.mark.native

SIZES = (64, 80, 96, 128, 192, 256)
MASKS = ("none", "causal", "causal", "random", "blocks", "rows", "all")
WORK = 2_000_000  # products of two numbers, of one case; as much again for V
EXAMPLES = 120
# Rounding of F32, which remains where stock computes in F32 as well; logits are up to about 16, values about 1.
FLOORS = {np.mean: 2e-6, np.max: 3e-5}


ours, disabled, stock, ggml = libraries(Library, Ggml, GGML_CLEX_ATTN_DISABLE="1")
tiles = tiles_in_software(Library)
amx = tiles_of_processor(Library)
pairs = in_pairs(Library)


@st.composite
def cases(draw: st.DrawFn, queries: st.SearchStrategy[int]) -> Case:
    same = draw(st.booleans())
    size_k = draw(st.sampled_from(SIZES))
    size_v = size_k if same else draw(st.sampled_from(SIZES))

    def kind(size: int) -> str:
        # A row of a quantized type is made of blocks of 32.
        return draw(st.sampled_from([t for t in TYPES if size % 32 == 0 or t not in QUANTIZED]))

    type_k = kind(size_k)
    type_v = type_k if size_v % 32 == size_k % 32 and draw(st.booleans()) else kind(size_v)
    n_q, n_head_kv = draw(queries), draw(st.sampled_from((1, 1, 2, 3)))
    group, n_stream = draw(st.sampled_from((1, 2, 3, 4, 5, 8, 12))), draw(st.sampled_from((1, 1, 2, 3)))
    most = WORK // (n_q * n_head_kv * group * n_stream * size_k)
    mask = draw(st.sampled_from(MASKS))
    return Case(
        seed=draw(st.integers(0, 2**32 - 1)),
        n_q=n_q,
        n_kv=draw(st.integers(1, max(1, min(1500, most)))),
        n_head_kv=n_head_kv,
        group=group,
        n_stream=n_stream,
        size_k=size_k,
        size_v=size_v,
        type_k=type_k,
        type_v=type_v,
        mask=mask,
        mask_heads=draw(st.booleans()),
        max_bias=0.0 if mask == "none" else draw(st.sampled_from((0.0, 0.0, 8.0))),
        softcap=draw(st.sampled_from((0.0, 0.0, 5.0, 50.0))),
        sinks=draw(st.booleans()),
        sharpness=draw(st.sampled_from((0.1, 1.0, 4.0))),
        cache_layout=draw(st.booleans()),
        threads=draw(st.integers(1, 3)),
    )


DECODE = st.integers(1, 8)
PREFILL = st.one_of(st.integers(9, 70), st.sampled_from((64, 65, 128, 200)))


def check(ggml: Ggml, ours: Library, stock: Library, case: Case, *, floors: int = 1) -> np.ndarray:
    """Hold our errors against those of stock and so many times the floors; gives ours, for another limit."""
    tensors = ggml.make(case)
    reference = ggml.reference(tensors)
    ours_error, stock_error = (np.abs(library.attend(tensors) - reference) for library in (ours, stock))
    for measure, floor in FLOORS.items():
        assert measure(ours_error) <= measure(stock_error) + floors * floor
    return ours_error


def check_floors(ggml: Ggml, library: Library, case: Case, floors: int) -> None:
    """Hold errors against so many times the floors alone."""
    tensors = ggml.make(case)
    error = np.abs(library.attend(tensors) - ggml.reference(tensors))
    for measure, floor in FLOORS.items():
        assert measure(error) <= floors * floor


def check_threads(ggml: Ggml, library: Library, case: Case) -> None:
    """Any number of threads computes the same."""
    tensors = ggml.make(case)
    found = library.attend(tensors)
    for threads in (1, 2, 3):
        again = replace(tensors, case=replace(case, threads=threads))
        np.testing.assert_array_equal(library.attend(again), found, err_msg=str(threads))


@given(case=cases(DECODE))
@settings(max_examples=EXAMPLES, deadline=None)
def test_decode_is_as_exact_as_stock(ggml, ours, stock, case):
    check(ggml, ours, stock, case)


@given(case=cases(PREFILL))
@settings(max_examples=EXAMPLES, deadline=None)
def test_prefill_is_as_exact_as_stock_and_as_f32(ggml, ours, stock, case):
    error = check(ggml, ours, stock, case)
    # Whatever stock does: an F16 somewhere in the sums would be a hundred times as far off.
    for measure, floor in FLOORS.items():
        assert measure(error) <= floor


@given(case=cases(st.integers(9, 63)))
@settings(max_examples=EXAMPLES, deadline=None)
def test_prefill_in_tiles_is_as_exact_as_stock(ggml, tiles, stock, case):
    check(ggml, tiles, stock, case)


@given(case=cases(st.integers(9, 150)))
@settings(max_examples=EXAMPLES, deadline=None)
def test_prefill_in_tiles_has_sixteen_bits_of_each_factor(ggml, tiles, case):
    """Stock computes 64 queries and more in F32, as vectors do. An F16 would be a hundred times as far off."""
    check_floors(ggml, tiles, case, 10)


@given(case=cases(st.integers(9, 150)))
@settings(max_examples=EXAMPLES, deadline=None)
def test_prefill_in_tiles_of_the_processor_is_that_in_software(ggml, amx, tiles, case):
    tensors = ggml.make(case)
    np.testing.assert_allclose(amx.attend(tensors), tiles.attend(tensors), rtol=1e-4, atol=1e-5)


@given(case=cases(st.integers(9, 100)))
@settings(max_examples=30, deadline=None)
def test_prefill_in_tiles_does_not_depend_on_threads(ggml, tiles, case):
    check_threads(ggml, tiles, case)


@pytest.mark.parametrize("kind", ["f16", "q8_0", "f32"])
def test_prefill_in_pairs_is_in_use(ggml, ours, pairs, kind):
    """Without it the tests below would see F32. A cache of F32 is computed in F32."""
    tensors = ggml.make(Case(n_q=20, n_kv=100, type_k=kind, type_v=kind))
    assert np.array_equal(pairs.attend(tensors), ours.attend(tensors)) == (kind == "f32")


def test_prefill_in_pairs_depends_on_nothing_that_is_not_seen(ggml, pairs):
    tensors = ggml.make(Case(n_q=40, n_kv=100, n_head_kv=2, group=3, mask="causal"))
    k, v = tensors.k.copy(), tensors.v.copy()
    for rows in (k, v):
        rows[:, :, 99] = 0x77  # 30,000 as F16, at a position that the last query alone sees
    before, after = pairs.attend(tensors), pairs.attend(replace(tensors, k=k, v=v))
    np.testing.assert_array_equal(after[:, :-1], before[:, :-1])
    assert (after[:, -1] != before[:, -1]).all()


@given(case=cases(st.integers(9, 63)))
@settings(max_examples=EXAMPLES, deadline=None)
def test_prefill_in_pairs_is_as_exact_as_stock_with_f16(ggml, pairs, stock, case):
    """So few queries stock computes with F16. The floors are for a value alone, which it leaves as it is."""
    check(ggml, pairs, stock, case, floors=50)


@given(case=cases(PREFILL))
@settings(max_examples=EXAMPLES, deadline=None)
def test_prefill_in_pairs_is_nearer_to_f32_than_f16_is(ggml, pairs, case):
    check_floors(ggml, pairs, case, 100)


@given(case=cases(st.integers(9, 100)))
@settings(max_examples=30, deadline=None)
def test_prefill_in_pairs_does_not_depend_on_threads(ggml, pairs, case):
    check_threads(ggml, pairs, case)


@given(case=cases(st.one_of(DECODE, PREFILL)))
@settings(max_examples=30, deadline=None)
def test_the_variable_selects_the_code_of_stock(ggml, disabled, stock, case):
    tensors = ggml.make(case)
    np.testing.assert_array_equal(disabled.attend(tensors), stock.attend(tensors))
