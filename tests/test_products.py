"""Products of weights with batches on the CPU against float64: no error larger than that of ggml's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.kernel_libraries import libraries, tiles_in_software, tiles_of_processor
from helpers.products import FLOATS, REPACKED, TYPES, Case, Ggml, Library, Tensors

pytestmark = pytest.mark.native

QUANTIZED = tuple(kind for kind in TYPES if kind not in FLOATS)
# Blocks of so many numbers; their activations have a scale for each of so many.
WIDE = {kind: 256 for kind in TYPES if kind[-2:] == "_K" or kind[:2] in ("iq", "tq")} | {"iq4_nl": 32}
BLOCKS = {kind: 1 if kind in FLOATS else 32 for kind in TYPES} | {"nvfp4": 64, "q2_0": 64, "q1_0": 128} | WIDE
WORK = 3_000_000  # products of two numbers, of one case
WEIGHTS = 1 << 17  # which some types take long to quantize
EXAMPLES = 150


ours, disabled, stock, ggml = libraries(Library, Ggml, GGML_CLEX_MATMUL_DISABLE="1")
tiles = tiles_in_software(Library)
amx = tiles_of_processor(Library)
IN_TILES = tuple(kind for kind in TYPES if kind != "f32")
TILE_TOKENS = st.one_of(st.integers(16, 100), st.sampled_from((16, 17, 32, 33, 64, 577)))

TOKENS = st.one_of(st.integers(9, 70), st.sampled_from((9, 64, 128, 509, 700)))


@st.composite
def cases(draw: st.DrawFn, kinds: tuple[str, ...] = QUANTIZED, tokens: st.SearchStrategy[int] = TOKENS) -> Case:
    kind = draw(st.sampled_from(kinds))
    block = BLOCKS[kind]
    columns = block * draw(st.integers(1, max(1, 1100 // block)))
    if kind in FLOATS and draw(st.booleans()):
        columns = draw(st.sampled_from((64, 80, 128, 256, 512)))
    matrices = draw(st.sampled_from((1, 1, 2, 5)))
    used = draw(st.sampled_from((0, 1, 2, 3))) if matrices == 5 else 0
    n_tokens = draw(tokens)
    batches = 1 if used else draw(st.sampled_from((1, 1, 2, 3)))
    most = min(WORK // (columns * n_tokens * max(used, matrices * batches)), WEIGHTS // (columns * matrices))
    repacked = kind in REPACKED and draw(st.booleans())
    rows = draw(st.integers(1, max(1, min(300, most))))
    together = draw(st.sampled_from((8, 32)))  # those of ggml's repacking, those of AMX
    return Case(
        kind=kind,
        rows=-(-rows // together) * together if repacked else rows,
        columns=columns,
        tokens=n_tokens,
        matrices=matrices,
        batches=batches,
        used=used,
        shared=draw(st.booleans()),
        layout=draw(st.sampled_from(("plain", "padded", "permuted"))),
        repacked=repacked and (matrices == 1 or used > 0),
        seed=draw(st.integers(0, 2**32 - 1)),
        threads=draw(st.sampled_from((1, 2, 3, 5))),
    )


def rounding(ggml: Ggml, tensors: Tensors) -> np.ndarray:
    """The largest error that activations of 8 bits may make: half a step of each, all in the worst direction."""
    case = tensors.case
    weights = np.abs(ggml.dequantize(tensors.weights, case.kind, case.columns))
    blocks = tensors.x.reshape(*tensors.x.shape[:-1], -1, WIDE.get(case.kind, 32))
    steps = np.broadcast_to(np.abs(blocks).max(axis=-1, keepdims=True) / 127, blocks.shape).reshape(tensors.x.shape)
    return ggml.reference(tensors, weights, steps / 2)


def root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def effective_size(errors: np.ndarray) -> float:
    """How many equal errors would vary as much as these: all of them, or one if it is much larger than the others."""
    squares = np.square(errors, dtype=np.float64)
    return float(squares.sum() ** 2 / np.square(squares).sum()) if squares.any() else 1.0


def check(ggml: Ggml, library: Library, disabled: Library, case: Case) -> None:
    """The error of a library is no larger than that of ggml's own products, nor than rounding to 8 bits allows."""
    tensors = ggml.make(case)
    reference = ggml.reference(tensors)
    found = library.multiply(tensors)
    floor = 2e-6 * root_mean_square(reference)  # of sums in F32
    # ggml's products with repacked weights take rows of activations that have gaps for rows without.
    plain = replace(tensors, case=replace(case, layout="plain"))
    ggml_errors = disabled.multiply(plain) - reference
    # Few numbers vary by chance, and so do many of which a few have most of the error.
    slack = 1.02 + 2 / np.sqrt(effective_size(ggml_errors))
    assert root_mean_square(found - reference) <= slack * root_mean_square(ggml_errors) + floor
    if case.kind not in FLOATS:
        assert (np.abs(found - reference) <= 1.001 * rounding(ggml, tensors) + 20 * floor).all()


@given(case=cases(tuple(TYPES)))
@settings(max_examples=EXAMPLES, deadline=None)
def test_batches_are_as_exact_as_with_ggml(ggml, ours, disabled, case):
    check(ggml, ours, disabled, case)


@given(case=cases(IN_TILES, TILE_TOKENS))
@settings(max_examples=EXAMPLES, deadline=None)
def test_batches_in_tiles_are_as_exact_as_with_ggml(ggml, tiles, disabled, case):
    check(ggml, tiles, disabled, case)


@given(case=cases(IN_TILES, TILE_TOKENS))
@settings(max_examples=EXAMPLES, deadline=None)
def test_tiles_of_the_processor_compute_what_those_in_software_do(ggml, amx, tiles, case):
    tensors = ggml.make(case)
    expected = tiles.multiply(tensors)
    difference = np.abs(amx.multiply(tensors) - expected).max()
    assert difference <= 1e-5 * np.abs(expected).max()


def check_independence(library: Library, tensors: Tensors, fewer: int) -> None:
    """Bit for bit the same with other numbers of threads, and for the last tokens alone."""
    case = tensors.case
    found = library.multiply(tensors)
    for threads in (1, 2, 3, 5):
        again = library.multiply(replace(tensors, case=replace(case, threads=threads)))
        np.testing.assert_array_equal(again, found, err_msg=str(threads))
    if tensors.experts is not None:
        part = replace(
            tensors, x=tensors.x[-fewer:], experts=tensors.experts[-fewer:], case=replace(case, tokens=fewer)
        )
        np.testing.assert_array_equal(library.multiply(part), found[-fewer:])
    else:
        part = replace(tensors, x=tensors.x[:, -fewer:], case=replace(case, tokens=fewer))
        np.testing.assert_array_equal(library.multiply(part), found[:, -fewer:])


@given(case=cases(QUANTIZED), fewer=st.integers(30, 60))
@settings(max_examples=60, deadline=None)
def test_results_depend_neither_on_threads_nor_on_other_tokens(ggml, ours, case, fewer):
    check_independence(ours, ggml.make(case), min(fewer, case.tokens))


@given(case=cases(IN_TILES, st.integers(30, 200)), fewer=st.integers(30, 60))
@settings(max_examples=60, deadline=None)
def test_results_in_tiles_depend_neither_on_threads_nor_on_other_tokens(ggml, tiles, case, fewer):
    check_independence(tiles, ggml.make(case), min(fewer, case.tokens))


@given(case=cases(FLOATS, st.integers(64, 200)))
@settings(max_examples=30, deadline=None)
def test_results_with_floats_do_not_depend_on_threads(ggml, ours, case):
    tensors = ggml.make(case)
    found = ours.multiply(tensors)
    for threads in (1, 2, 3, 5):
        again = ours.multiply(replace(tensors, case=replace(case, threads=threads)))
        np.testing.assert_array_equal(again, found, err_msg=str(threads))


@given(case=cases(tuple(TYPES), st.integers(1, 8)))
@settings(max_examples=60, deadline=None)
def test_small_batches_have_the_bits_of_stock(ggml, ours, stock, case):
    tensors = ggml.make(case)
    np.testing.assert_array_equal(ours.multiply(tensors), stock.multiply(tensors))


@given(case=cases(tuple(TYPES), st.integers(1, 40)))
@settings(max_examples=40, deadline=None)
def test_the_variable_selects_the_code_of_stock(ggml, disabled, stock, case):
    tensors = ggml.make(case)
    np.testing.assert_array_equal(disabled.multiply(tensors), stock.multiply(tensors))


@pytest.fixture(params=["ours", "tiles"])
def either(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("kind", [*QUANTIZED, "f16"])
def test_numbers_that_are_none_stay_with_their_token(ggml, either, kind):
    case = Case(kind=kind, rows=40, columns=512, tokens=60, threads=2)
    tensors = ggml.make(case)
    expected = either.multiply(tensors)
    for bad in (np.nan, np.inf, -np.inf):
        tensors.x[0, 7, 300] = bad
        found = either.multiply(tensors)
        assert not np.isfinite(found[0, 7]).any()
        np.testing.assert_array_equal(np.delete(found, 7, axis=1), np.delete(expected, 7, axis=1))


@pytest.mark.parametrize("kind", [*QUANTIZED, "f16"])
def test_tiny_activations_and_zeros(ggml, either, kind):
    case = Case(kind=kind, rows=40, columns=256, tokens=60)
    tensors = ggml.make(case)
    tensors.x[0, :8] *= 1e-42
    tensors.x[0, 8] = 0
    found = either.multiply(tensors)
    assert np.isfinite(found).all()
    assert (np.abs(found[0, :9]) < 1e-30).all()
    assert found[0, 9:].any()
