"""A decode that is aborted, refused or fails leaves a cache that is known, and the next decode is right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from clex_local.library import llama_clex
from helpers.low_level import F16, F32, Q8_0, Context, Model
from helpers.random_gguf import make_model, random_tokens
from helpers.sanitizers import skip_without_memory

pytestmark = [pytest.mark.native, pytest.mark.sanitize]

CHUNK = 1024  # cells that are re-rotated at a time
LENGTH = 3 * CHUNK
IDS = random_tokens(LENGTH + 16)
LONG = {"n_ctx": LENGTH + 256}


@pytest.fixture(scope="module")
def long_model(tmp_path_factory):
    """Original context of three chunks, so that one crossing takes several."""
    path = make_model(tmp_path_factory.mktemp("failure") / "long.gguf", original=LENGTH, n_buckets=2, head=16)
    loaded = Model(path)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def full(long_model):
    """State at the boundary, logits of the four steps beyond it, and of one inside it after cutting 100 tokens."""
    with Context(long_model, **LONG) as context:
        for start in range(0, LENGTH, 512):
            context.feed(IDS[start : start + 512], start)
        state = context.save()
        beyond = [context.feed(IDS[i : i + 1], i) for i in range(LENGTH, LENGTH + 4)]
    with Context(long_model, **LONG) as context:
        assert context.load(state)
        llama_cpp.llama_memory_seq_rm(context.memory, 0, LENGTH - 100, -1)
        inside = context.feed(IDS[LENGTH - 100 : LENGTH - 99], LENGTH - 100)
    return state, beyond, inside


@pytest.mark.parametrize("count", [1, 2, 3, 4, 10])
def test_abort_during_a_re_rotation(long_model, full, count):
    """The first three questions come before the three chunks, later ones while the token is computed."""
    state, beyond, inside = full
    token = [(IDS[LENGTH], LENGTH, [0], True)]
    with Context(long_model, **LONG) as context:
        assert context.load(state)
        with context.abort_at(count) as asked:
            assert context.try_decode(token) == 2
            assert asked() == count
        assert context.rerotated_cells == min(count - 1, 3) * CHUNK
        assert context.last_position() == LENGTH - 1
        mixed = context.save()
        for i, logits in enumerate(beyond):
            np.testing.assert_allclose(context.feed(IDS[LENGTH + i : LENGTH + i + 1], LENGTH + i), logits, atol=1e-4)
        assert context.rerotated_cells == LENGTH
    # the mixed cache was saved as what it is, and can go the other way as well
    with Context(long_model, **LONG) as context:
        assert context.load(mixed)
        llama_cpp.llama_memory_seq_rm(context.memory, 0, LENGTH - 100, -1)
        logits = context.feed(IDS[LENGTH - 100 : LENGTH - 99], LENGTH - 100)
        np.testing.assert_allclose(logits, inside, atol=1e-4)
        assert context.rerotated_cells == max(0, min(count - 1, 3) * CHUNK - (100 if count > 3 else 0))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_abort_during_a_shift_is_made_up_for(long_model, full, count):
    state = full[0]
    results = []
    for aborted in (False, True):
        with Context(long_model, **LONG) as context:
            assert context.load(state)
            llama_cpp.llama_memory_seq_rm(context.memory, 0, 0, 16)
            llama_cpp.llama_memory_seq_add(context.memory, 0, 16, -1, -16)
            item = [(IDS[LENGTH], LENGTH - 16, [0], True)]
            if aborted:
                with context.abort_at(count):
                    # the shift is taken up again where it stopped
                    assert context.try_decode(item) == 0
                results.append(context.logits(0))
            else:
                context.decode(item)
                results.append(context.logits(0))
    np.testing.assert_allclose(*results, atol=1e-5)


def test_abort_that_does_not_cease_never_loses_a_shift(long_model, full):
    state = full[0]
    always = llama_cpp.ggml_abort_callback(lambda user_data: True)
    with Context(long_model, **LONG) as context:
        assert context.load(state)
        llama_cpp.llama_memory_seq_rm(context.memory, 0, 0, 16)
        llama_cpp.llama_memory_seq_add(context.memory, 0, 16, -1, -16)
        item = [(IDS[LENGTH], LENGTH - 16, [0], True)]
        llama_cpp.llama_set_abort_callback(context.pointer, always, None)
        for _ in range(3):
            assert context.try_decode(item) == 2
        assert context.save() == b""  # not with keys that are elsewhere than their positions say
        llama_cpp.llama_set_abort_callback(context.pointer, llama_cpp.ggml_abort_callback(), None)
        context.decode(item)
        logits = context.logits(0)
    with Context(long_model, **LONG) as context:
        assert context.load(state)
        llama_cpp.llama_memory_seq_rm(context.memory, 0, 0, 16)
        llama_cpp.llama_memory_seq_add(context.memory, 0, 16, -1, -16)
        np.testing.assert_allclose(context.feed(IDS[LENGTH : LENGTH + 1], LENGTH - 16), logits, atol=1e-5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    loaded = Model(make_model(tmp_path_factory.mktemp("failure") / "tiny.gguf"))
    yield loaded
    loaded.close()


@pytest.mark.parametrize("type_k", [F32, F16, Q8_0])
@pytest.mark.parametrize("unified", [False, True])
def test_prompt_of_many_batches_goes_on_after_an_abort_anywhere(model, unified, type_k):
    """Two sequences that cross boundaries, aborted at every stage of the second prompt."""
    options = {"n_seq": 2, "unified": unified, "n_ubatch": 32, "type_k": type_k}
    tolerance = {F32: 5e-5, F16: 5e-3, Q8_0: 0.2}[type_k]
    tokens = IDS[:200]

    def begin(context):
        context.feed(tokens[:50], 0, 0)
        context.feed(tokens[:60], 0, 1)
        llama_clex.seq_reserve(context.pointer, 0, 200)

    with Context(model, **options) as context:
        begin(context)
        expected = context.feed(tokens[50:], 50, 0), context.feed(tokens[60:61], 60, 1)
        with context.abort_at(0) as asked:
            context.feed(tokens[61:62], 61, 1)
            per_token = asked()
    positions = set()
    for count in (1, 2, 3, per_token // 2, per_token, 2 * per_token, 3 * per_token + 7, 4 * per_token + 11):
        with Context(model, **options) as context:
            begin(context)
            batch = [(t, 50 + i, [0], i == 149) for i, t in enumerate(tokens[50:])]
            with context.abort_at(count):
                assert context.try_decode(batch) == 2
            done = context.last_position(0) + 1
            positions.add(done)
            assert 50 <= done < 200
            logits = context.feed(tokens[done:], done, 0)
            np.testing.assert_allclose(logits, expected[0], atol=tolerance)
            np.testing.assert_allclose(context.feed(tokens[60:61], 60, 1), expected[1], atol=tolerance)
    assert len(positions) >= 3


@pytest.mark.parametrize("unified", [False, True])
def test_decode_that_is_refused_changes_nothing(model, unified):
    options = {"n_seq": 2, "unified": unified, "n_ctx": 256}
    with Context(model, **options) as context:
        context.feed(IDS[:60], 0, 0)
        expected = [context.feed(IDS[i : i + 1], i, 0) for i in range(60, 70)]
    with Context(model, **options) as context:
        context.feed(IDS[:60], 0, 0)
        beyond = [(1, 256 + i, [1], False) for i in range(4)]
        no_space = [(t, i, [1], False) for i, t in enumerate(IDS[:250])]
        gap = [(1, 90, [0], True)]
        for i in range(60, 70):
            assert context.try_decode(beyond) == -1
            assert context.try_decode(gap) in (0, -1)
            llama_cpp.llama_memory_seq_rm(context.memory, 0, i, -1)
            if unified:
                assert context.try_decode(no_space) == 1
            np.testing.assert_allclose(context.feed(IDS[i : i + 1], i, 0), expected[i - 60], atol=2e-5)
        assert context.last_position(1) == -1


def test_length_beyond_the_tables_cannot_be_declared(model):
    with Context(model, n_seq=2) as context:
        assert not llama_clex.seq_reserve(context.pointer, 0, 257)
        assert not llama_clex.seq_reserve(context.pointer, -1, 10)
        assert not llama_clex.seq_reserve(context.pointer, 10**6, 10)
        assert llama_clex.seq_reserve(context.pointer, 1, 256)
        assert llama_clex.set_policy(context.pointer, llama_clex.Policy.BY_LENGTH, True)
        assert llama_clex.seq_reserve(context.pointer, 0, 257)


def test_positions_are_not_divided(model):
    with Context(model) as context:
        context.feed(IDS[:60], 0)
        expected = context.feed(IDS[60:61], 60)
        llama_cpp.llama_memory_seq_rm(context.memory, 0, 60, -1)
        llama_cpp.llama_memory_seq_div(context.memory, 0, 0, -1, 2)
        assert context.last_position() == 59
        np.testing.assert_array_equal(context.feed(IDS[60:61], 60), expected)


OUT_OF_MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from helpers.low_level import Context, Model
from helpers.random_gguf import make_model, random_tokens

# Keys wide enough that re-rotating a chunk needs far more memory than the ubatches of 16 tokens ever did.
model = Model(make_model(Path(sys.argv[1]), original=1024, n_buckets=2, head=256, n_head=4, n_head_kv=4, n_layer=1))
ids = random_tokens(1030)
outcomes = []
for short in (False, True):
    with Context(model, n_ctx=1280, n_ubatch=16) as context:
        for start in range(0, 1024, 512):
            context.feed(ids[start : start + 512], start)
        if short:
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**21, hard))
            code = context.try_decode([(ids[1024], 1024, [0], True)])
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
            print("code", code, "rotated", context.rerotated_cells, "last", context.last_position())
        outcomes.append(np.stack([context.feed(ids[i : i + 1], i) for i in range(1024, 1028)]))
        print("rotated", context.rerotated_cells)
print("difference", np.abs(outcomes[0] - outcomes[1]).max())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@skip_without_memory
def test_memory_that_is_not_there_fails_the_decode_and_the_next_one_works(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, str(tmp_path / "wide.gguf")],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"},  # freed memory goes back, so that the limit is felt
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["rotated 1024", "code -2 rotated 0 last 1023", "rotated 1024"]
    assert float(lines[3].removeprefix("difference ")) < 1e-4
