"""Keys of quantized caches: rounded once more when they are first re-rotated, and never again."""

from __future__ import annotations

import llama_cpp
import numpy as np
import pytest

from clex_local.library import llama_clex
from helpers.low_level import F16, F32, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Context, Model
from helpers.random_gguf import make_model, random_tokens

pytestmark = [pytest.mark.native, pytest.mark.sanitize]

IQ4_NL = 20
QUANTIZED = [Q8_0, Q5_1, Q5_0, Q4_1, Q4_0, IQ4_NL]
PREFIX, PROBES = random_tokens(50), random_tokens(24, seed=9)
ROUNDS = 24  # of two crossings each


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    loaded = Model(make_model(tmp_path_factory.mktemp("kept") / "tiny.gguf", head=64))
    yield loaded
    loaded.close()


def context_of(model, kind, **options):
    return Context(model, n_ctx=256, type_k=kind, type_v=F32, flash_attn=1, **options)


def cut(context, position, sequence=0):
    llama_cpp.llama_memory_seq_rm(context.memory, sequence, position, -1)


def cross(context, length, sequence=0, end=50):
    """Bring a sequence to the table of a length."""
    assert llama_clex.seq_reserve(context.pointer, sequence, length)
    context.feed([5], end, sequence)
    cut(context, end, sequence)


def probe(context, length=130, sequence=0, end=50):
    """What the sequence answers to each of some tokens: logits [tokens, n_vocab]."""
    assert llama_clex.seq_reserve(context.pointer, sequence, length)
    out = []
    for token in PROBES:
        out.append(context.feed([token], end, sequence))
        cut(context, end, sequence)
    return np.stack(out)


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def divergence(wanted, got):
    """Mean Kullback-Leibler divergence of `got` from `wanted`, nats."""
    p, q = log_softmax(wanted), log_softmax(got)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


@pytest.fixture(scope="module")
def exact(model):
    """With an F32 cache, which loses nothing worth a mention."""
    with context_of(model, F32) as context:
        context.feed(PREFIX, 0)
        return probe(context)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_error_after_many_crossings_is_a_small_multiple_of_the_first(model, exact, kind):
    with context_of(model, kind) as context:
        assert llama_clex.seq_reserve(context.pointer, 0, 130)
        context.feed(PREFIX, 0)  # in the table that is asked for
        in_place = probe(context)
    with context_of(model, kind) as context:
        context.feed(PREFIX, 0)
        once = probe(context)
        for _ in range(ROUNDS):
            cross(context, 200)
            cross(context, 60)
        often = probe(context)
    np.testing.assert_array_equal(once, often)
    assert divergence(exact, often) <= 4 * divergence(exact, in_place)


@pytest.mark.parametrize("kind", [Q8_0, Q4_0])
def test_growth_through_every_table_is_one_crossing(model, kind):
    with context_of(model, kind) as context:
        context.feed(PREFIX, 0)
        cross(context, 250)
        once = probe(context, 250)
    with context_of(model, kind) as context:
        context.feed(PREFIX, 0)
        for length in (60, 100, 150, 250):
            cross(context, length)
        np.testing.assert_array_equal(once, probe(context, 250))


@pytest.mark.parametrize("kind", [Q8_0, Q4_0, F16])
def test_return_to_the_first_table_returns_the_first_keys(model, kind):
    with context_of(model, kind) as context:
        context.feed(PREFIX, 0)
        before = probe(context, 60)
        cross(context, 250)
        after = probe(context, 60)
    if kind == F16:  # nothing is kept of it: the error of each crossing is a hundredth of that of q8_0
        np.testing.assert_allclose(before, after, atol=1e-2)
    else:
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("kind", [Q8_0, Q4_0])
def test_keys_that_are_shifted_over_and_over_are_rounded_once_more(model, kind):
    """Shifts of one token each, as of a host that makes room for every token, equal one large shift."""

    def shifted(steps, length):
        with context_of(model, kind) as context:
            context.feed(PREFIX, 0)
            cut_first(context, 12, steps)
            cross(context, length, end=38)
            return probe(context, end=38)

    def cut_first(context, count, steps):
        for _ in range(steps):
            size = count // steps
            llama_cpp.llama_memory_seq_rm(context.memory, 0, 0, size)
            llama_cpp.llama_memory_seq_add(context.memory, 0, size, -1, -size)
            llama_clex.seq_reserve(context.pointer, 0, 60)
            context.feed([5], last(context), 0)
            cut(context, last(context) - 1)

    def last(context):
        return context.last_position() + 1

    np.testing.assert_array_equal(shifted(1, 250), shifted(12, 250))


@pytest.mark.parametrize("kind", [Q8_0, Q4_0])
@pytest.mark.parametrize("unified", [False, True])
def test_copies_have_the_kept_keys_too(model, kind, unified):
    with context_of(model, kind) as context:
        context.feed(PREFIX, 0)
        wanted = probe(context)
    with (
        context_of(model, kind, n_seq=3, unified=unified)
        if unified
        else Context(model, n_ctx=3 * 256, n_seq=3, type_k=kind, type_v=F32, flash_attn=1) as context
    ):
        context.feed(PREFIX, 0)
        for source in range(2):
            cross(context, 250, source)
            llama_cpp.llama_memory_seq_cp(context.memory, source, source + 1, -1, -1)
            for length in (100, 200):
                cross(context, length, source + 1)
            llama_cpp.llama_memory_seq_rm(context.memory, source, -1, -1)
        np.testing.assert_array_equal(wanted, probe(context, sequence=2))


@pytest.mark.parametrize("kind", [Q8_0, Q4_0])
@pytest.mark.parametrize("whole", [False, True])
def test_saved_states_are_rounded_no_more_than_the_cache(model, kind, whole):
    """Saving and loading before each of many crossings changes nothing, in either context."""
    with context_of(model, kind) as context:
        context.feed(PREFIX, 0)
        wanted = probe(context)
        data = b""
        for length in (200, 100, 250):
            cross(context, length)
            data = context.save() if whole else context.save_sequence(0)
        np.testing.assert_array_equal(wanted, probe(context))
        for length in (200, 100, 250):
            with context_of(model, kind) as other:
                assert other.load(data) if whole else other.load_sequence(data, 0)
                cross(other, length)
                data = other.save() if whole else other.save_sequence(0)
                np.testing.assert_array_equal(wanted, probe(other))


def test_a_cell_that_is_used_again_keeps_nothing_of_its_last_key(model):
    with context_of(model, Q8_0) as context:
        context.feed(PREFIX, 0)
        wanted = probe(context)
    with context_of(model, Q8_0) as context:
        context.feed(PREFIX[::-1], 0)
        cross(context, 250)
        cut(context, 0)
        llama_clex.seq_reserve(context.pointer, 0, 0)
        context.feed(PREFIX, 0)
        np.testing.assert_array_equal(wanted, probe(context))
        llama_cpp.llama_memory_clear(context.memory, True)
        context.feed(PREFIX, 0)
        np.testing.assert_array_equal(wanted, probe(context))
