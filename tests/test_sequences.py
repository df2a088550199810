"""Several sequences, shared prefixes, shifts and saved states against each sequence alone."""

from __future__ import annotations

import llama_cpp
import numpy as np
import pytest

from clex_local.library import llama_clex
from helpers.device import GPU_LAYERS
from helpers.device_error import slack
from helpers.low_level import F16, F32, Q8_0, Context, Model

pytestmark = [pytest.mark.native, pytest.mark.sanitize]

STARTS = (60, 30, 126)
STEPS = 20


@pytest.fixture(scope="module")
def model(golden_gguf):
    loaded = Model(golden_gguf("llama"))
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def golden(golden_npz):
    return golden_npz("llama")


@pytest.fixture(scope="module")
def streams(golden):
    ids = golden["ids"]
    return [ids[:200], np.roll(ids, 37)[:200], np.roll(ids, 91)[:200]]


@pytest.fixture(scope="module")
def alone(model, streams):
    """Logits of each stream decoded in a context of its own."""
    out = []
    for tokens, start in zip(streams, STARTS, strict=True):
        with Context(model) as context:
            out.append(context.steps(tokens, start, STEPS))
    return out


@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("n_ubatch", [512, 3, 2])
def test_three_sequences_in_three_buckets_equal_each_alone(model, streams, alone, unified, n_ubatch):
    with Context(model, n_seq=4, unified=unified, n_ubatch=n_ubatch) as context:
        items = [
            (streams[s][i], i, [s], i == STARTS[s] - 1) for i in range(max(STARTS)) for s in range(3) if i < STARTS[s]
        ]
        context.decode(items)
        together = [[], [], []]
        for k, (_, _, (s,), wanted) in enumerate(items):
            if wanted:
                together[s].append(context.logits(k))
        buckets = set()
        for step in range(STEPS):
            context.decode((streams[s][STARTS[s] + step], STARTS[s] + step, [s], True) for s in range(3))
            for s in range(3):
                together[s].append(context.logits(s))
            buckets.add(tuple(context.bucket(s) for s in range(3)))
    assert buckets == {(0, 0, 1), (0, 0, 2), (1, 0, 2)}
    for s in range(3):
        np.testing.assert_allclose(np.stack(together[s]), alone[s], atol=1e-5 + slack(model.path), rtol=0)


def test_one_decodes_while_another_prefills(model, streams, alone):
    with Context(model, n_seq=2) as context:
        context.feed(streams[0][:60], 0, 0)
        prompt = streams[2][:126]
        context.decode(
            [(streams[0][60], 60, [0], True)] + [(t, i, [1], i == 125) for i, t in enumerate(prompt)],
        )
        np.testing.assert_allclose(context.logits(0), alone[0][1], atol=1e-5 + slack(model.path), rtol=0)
        np.testing.assert_allclose(context.logits(126), alone[2][0], atol=1e-5 + slack(model.path), rtol=0)


def test_copy_in_a_stream_of_its_own_keeps_its_own_bucket(model, golden):
    ids, steps = golden["ids"], golden["steps"]
    with Context(model, n_seq=2) as context:
        context.feed(ids[:60], 0, 0)
        llama_cpp.llama_memory_seq_cp(context.memory, 0, 1, -1, -1)
        first = [context.feed(ids[60 + i : 61 + i], 60 + i, 0) for i in range(10)]
        np.testing.assert_allclose(np.stack(first), steps[1:11], atol=5e-4 + slack(model.path), rtol=0)
        assert context.bucket(0) == 1
        np.testing.assert_allclose(context.feed(ids[60:61], 60, 1), steps[1], atol=5e-4 + slack(model.path), rtol=0)
        assert context.bucket(1) == 0
        np.testing.assert_allclose(context.feed(ids[70:71], 70, 0), steps[11], atol=5e-4 + slack(model.path), rtol=0)
        context.decode([(ids[71], 71, [0], True), (ids[61], 61, [1], True)])
        np.testing.assert_allclose(context.logits(0), steps[12], atol=5e-4 + slack(model.path), rtol=0)
        np.testing.assert_allclose(context.logits(1), steps[2], atol=5e-4 + slack(model.path), rtol=0)


def copy(context, source, target, first=-1, end=-1):
    llama_cpp.llama_memory_seq_cp(context.memory, source, target, first, end)


def declared_alone(model, pieces):
    """Logits of the last token of each piece (tokens, declared length) of a sequence in a context of its own."""
    out, position = [], 0
    with Context(model) as context:
        for tokens, declared in pieces:
            assert llama_clex.seq_reserve(context.pointer, 0, declared)
            out.append(context.feed(tokens, position))
            position += len(tokens)
    return out


@pytest.mark.parametrize("longest", ["decoding", "idle", "declared"])
def test_sequences_that_share_cells_agree_on_the_bucket_of_the_longest(model, golden, longest):
    """Also one that shares with the longest through a third only, and whether or not the longest is in the batch."""
    ids = golden["ids"]
    with Context(model, n_seq=4, unified=True) as context:
        context.feed(ids[:40], 0, 0)
        copy(context, 0, 1)
        context.feed(ids[40:50], 40, 1)
        copy(context, 1, 2, 40, 50)  # nothing that sequence 0 has
        if longest == "declared":
            assert llama_clex.seq_reserve(context.pointer, 0, 90)
            context.feed(ids[40:41], 40, 0)
        else:
            context.feed(ids[40:90], 40, 0)
        assert context.bucket(0) == 1
        items = [(ids[50], 50, [1], True), (ids[50], 50, [2], True)]
        if longest == "decoding":
            items.append((ids[90], 90, [0], True))
        context.decode(items)
        assert (context.bucket(1), context.bucket(2)) == (1, 1)
        want = declared_alone(model, [(ids[:40], 0), (ids[40:50], 0), (ids[50:51], 90)])[-1]
        np.testing.assert_allclose(context.logits(0), want, atol=1e-5 + slack(model.path), rtol=0)

        # nothing is re-rotated any more, whoever is decoded
        cells = context.rerotated_cells
        for i in range(51, 54):
            for s in (1, 2):
                context.feed(ids[i : i + 1], i, s)
            if longest == "decoding":
                context.feed(ids[i + 40 : i + 41], i + 40, 0)
        assert context.rerotated_cells == cells

        # without the longest, each has a table by its own length again
        llama_cpp.llama_memory_seq_rm(context.memory, 0, -1, -1)
        context.feed(ids[54:55], 54, 1)
        assert context.bucket(1) == 0
        pieces = [(ids[:40], 0), (ids[40:50], 0), *((ids[i : i + 1], 90) for i in range(50, 54)), (ids[54:55], 0)]
        np.testing.assert_allclose(
            context.logits(0), declared_alone(model, pieces)[-1], atol=1e-5 + slack(model.path), rtol=0
        )


@pytest.mark.parametrize("cut", ["removed", "kept", "shifted away"])
def test_sequences_that_share_no_cell_any_more_go_separate_ways(model, golden, cut):
    ids = golden["ids"]
    with Context(model, n_seq=2, unified=True) as context:
        context.feed(ids[:30], 0, 0)
        copy(context, 0, 1)
        context.feed(ids[30:90], 30, 0)
        context.feed(ids[30:50], 30, 1)
        assert context.bucket(1) == 1
        if cut == "removed":
            llama_cpp.llama_memory_seq_rm(context.memory, 0, 0, 30)
        elif cut == "kept":
            llama_cpp.llama_memory_seq_keep(context.memory, 1)
        else:
            llama_cpp.llama_memory_seq_rm(context.memory, 0, 0, 30)
            llama_cpp.llama_memory_seq_add(context.memory, 0, 30, -1, -30)
        context.feed(ids[50:51], 50, 1)
        assert context.bucket(1) == 0


@pytest.mark.parametrize("unified", [False, True])
def test_copy_of_a_whole_sequence_has_its_declared_length(model, golden, unified):
    ids = golden["ids"]
    pieces = [(ids[:40], 100), (ids[40:50], 100)]
    with Context(model, n_seq=3, unified=unified) as context:
        assert llama_clex.seq_reserve(context.pointer, 0, 100)
        assert llama_clex.seq_reserve(context.pointer, 2, 150)
        context.feed(ids[:40], 0, 0)
        copy(context, 0, 1)
        copy(context, 0, 2)
        if unified:  # so that what sequence 1 has is its own
            llama_cpp.llama_memory_seq_rm(context.memory, 0, -1, -1)
            llama_cpp.llama_memory_seq_rm(context.memory, 2, -1, -1)
            copy(context, 1, 0, 0, 30)
            llama_cpp.llama_memory_seq_rm(context.memory, 1, 50, -1)
        logits = context.feed(ids[40:50], 40, 1)
        np.testing.assert_allclose(logits, declared_alone(model, pieces)[-1], atol=1e-5 + slack(model.path), rtol=0)
        assert context.bucket(1) == 1
        if not unified:
            context.feed(ids[40:50], 40, 2)
            assert context.bucket(2) == 2  # the longer of the two lengths
        # what is removed in part keeps it, clearing forgets it
        llama_cpp.llama_memory_seq_rm(context.memory, 1, 20, -1)
        context.feed(ids[20:21], 20, 1)
        assert context.bucket(1) == 1
        llama_cpp.llama_memory_clear(context.memory, True)
        context.feed(ids[:20], 0, 1)
        assert context.bucket(1) == 0


def test_copy_of_a_part_does_not_have_the_declared_length(model, golden):
    ids = golden["ids"]
    with Context(model, n_seq=2, unified=True) as context:
        assert llama_clex.seq_reserve(context.pointer, 0, 100)
        context.feed(ids[:40], 0, 0)
        copy(context, 0, 1, 0, 20)
        context.feed(ids[20:21], 20, 1)
        assert context.bucket(1) == 1  # it shares cells
        llama_cpp.llama_memory_seq_rm(context.memory, 0, -1, -1)
        context.feed(ids[21:22], 21, 1)
        assert context.bucket(1) == 0


def removed(context: Context, s: int) -> None:
    llama_cpp.llama_memory_seq_rm(context.memory, s, -1, -1)


def only_the_other_kept(context: Context, s: int) -> None:
    llama_cpp.llama_memory_seq_keep(context.memory, 1 - s)


def moved_below_zero(context: Context, s: int) -> None:
    llama_cpp.llama_memory_seq_add(context.memory, s, 0, -1, -100)


def removed_in_two_parts(context: Context, s: int) -> None:
    llama_cpp.llama_memory_seq_rm(context.memory, s, 20, -1)
    llama_cpp.llama_memory_seq_rm(context.memory, s, 0, 20)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("empty", [removed, only_the_other_kept, moved_below_zero, removed_in_two_parts])
def test_sequence_that_is_used_again_does_not_have_the_length_declared_for_its_last_text(model, golden, empty, copied):
    ids = golden["ids"]
    with Context(model, n_seq=2, unified=True) as context:
        assert llama_clex.seq_reserve(context.pointer, 0, 200)
        context.feed(ids[50:80], 0, 0)
        assert context.bucket(0) == 3
        empty(context, 0)
        if copied:
            context.feed(ids[:30], 0, 1)
            copy(context, 1, 0)
            logits = context.feed(ids[30:40], 30, 0)
        else:
            logits = context.feed(ids[:40], 0, 0)
        assert context.bucket(0) == 0
    pieces = [(ids[:30], 0), (ids[30:40], 0)] if copied else [(ids[:40], 0)]
    np.testing.assert_allclose(logits, declared_alone(model, pieces)[-1], atol=1e-5 + slack(model.path), rtol=0)


@pytest.mark.skipif(GPU_LAYERS != 0, reason="of llama.cpp's devices only the CPU can be told to abort")
def test_length_declared_for_an_empty_sequence_outlasts_a_removal_and_an_aborted_decode(model, golden):
    """A host removes what there may be before a prompt, and tries a decode again that it has aborted."""
    ids = golden["ids"]
    with Context(model) as context:
        assert llama_clex.seq_reserve(context.pointer, 0, 200)
        removed(context, 0)
        with context.abort_at(5):
            assert context.try_decode([(t, i, [0], i == 39) for i, t in enumerate(ids[:40])]) == 2
        assert context.last_position(0) == -1
        context.feed(ids[:40], 0)
        assert context.bucket(0) == 3


def test_token_of_two_sequences_takes_the_longer_ones_table(model, golden):
    ids, steps = golden["ids"], golden["steps"]
    with Context(model, n_seq=2, unified=True) as context:
        context.decode((t, i, [0, 1], i == 59) for i, t in enumerate(ids[:60]))
        out = [context.logits(59)]
        for i in range(60, 70):
            context.decode([(ids[i], i, [0, 1], True)])
            out.append(context.logits(0))
        assert context.bucket(0) == context.bucket(1) == 1
    np.testing.assert_allclose(np.stack(out), steps[:11], atol=5e-4 + slack(model.path), rtol=0)


def test_truncated_sequence_returns_to_the_smaller_bucket(model, golden):
    ids, steps = golden["ids"], golden["steps"]
    with Context(model) as context:
        context.steps(ids, 60, 80)
        assert context.bucket() == 2
        llama_cpp.llama_memory_seq_rm(context.memory, 0, 50, -1)
        logits = context.feed(ids[50:60], 50)
        assert context.bucket() == 0
    np.testing.assert_allclose(logits, steps[0], atol=5e-4 + slack(model.path), rtol=0)


@pytest.mark.parametrize("whole", [True, False])
def test_saved_state_crosses_a_boundary(model, golden, whole):
    ids, steps = golden["ids"], golden["steps"]
    with Context(model, n_seq=2) as context:
        context.steps(ids, 60, 40)
        state = context.save() if whole else context.save_sequence(0)
    with Context(model, n_seq=2) as context:
        sequence = 0 if whole else 1
        assert context.load(state) if whole else context.load_sequence(state, sequence)
        out = [context.feed(ids[i : i + 1], i, sequence) for i in range(100, 140)]
        assert context.rerotated_cells > 0
    np.testing.assert_allclose(np.stack(out), steps[41:81], atol=5e-4 + slack(model.path), rtol=0)


def test_state_of_other_tables_is_refused(model, golden, golden_gguf):
    other = Model(golden_gguf("llama-log-scale"))
    with Context(model) as context:
        context.feed(golden["ids"][:60], 0)
        state = context.save()
    with Context(other) as context:
        assert not context.load(state)
    other.close()


@pytest.mark.parametrize("type_k", [F32, F16, Q8_0])
def test_shift_rotates_each_key_with_its_own_table(model, golden, type_k):
    """Dropping 16 tokens and shifting the rest equals keys cached at the shifted positions to begin with."""
    ids = golden["ids"]
    tolerance = {F32: 5e-4, F16: 5e-2, Q8_0: 0.5}[type_k]
    with Context(model, type_k=type_k) as context:
        context.feed(ids[:100], 0)
        llama_cpp.llama_memory_seq_rm(context.memory, 0, 0, 16)
        llama_cpp.llama_memory_seq_add(context.memory, 0, 16, -1, -16)
        shifted = context.feed(ids[100:101], 84)
        assert context.bucket() == 1
    with Context(model, type_k=type_k) as context:
        context.feed(ids[:100], 0)
        llama_cpp.llama_memory_seq_rm(context.memory, 0, 0, 16)
        plain = context.feed(ids[100:101], 100)
    # RoPE is relative: within a bucket the shift must not change anything.
    np.testing.assert_allclose(shifted, plain, atol=tolerance + slack(model.path), rtol=0)


def test_sequence_beyond_the_last_bucket_is_refused_before_anything_is_computed(model, golden):
    ids = np.tile(golden["ids"], 2)
    with Context(model) as context:
        context.feed(ids[:256], 0)
        assert context.try_decode([(ids[256], 256, [0], True)]) == -1
        assert llama_cpp.llama_memory_seq_pos_max(context.memory, 0) == 255
        llama_cpp.llama_memory_seq_rm(context.memory, 0, 200, -1)
        assert context.try_decode([(ids[200], 200, [0], True)]) == 0
