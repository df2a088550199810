"""Saved states: they carry the table of every key, and are refused where they do not belong."""

from __future__ import annotations

import os
import subprocess
import sys

import llama_cpp
import numpy as np
import pytest

from clex_local import Llama
from clex_local.library import llama_clex
from clex_local.runtime.saved_state import StateError
from helpers.device_error import slack
from helpers.gguf_maker import rewrite
from helpers.low_level import BF16, ERROR, F16, Q8_0, Context, Model, logged
from helpers.random_gguf import make_model, random_tokens

pytestmark = [pytest.mark.native, pytest.mark.sanitize]

IDS = random_tokens(256)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("state") / "tiny.gguf")


@pytest.fixture(scope="module")
def open_model():
    models = {}

    def get(path):
        if path not in models:
            models[path] = Model(path)
        return models[path]

    yield get
    for model in models.values():
        model.close()


@pytest.fixture
def model(open_model, path):
    return open_model(path)


@pytest.fixture(scope="module")
def uninterrupted(open_model, path):
    """Logits of steps 100 to 139 after a prompt of 60 tokens and 40 steps."""
    with Context(open_model(path)) as context:
        return context.steps(IDS, 60, 80)[41:]


def store(context, how, tmp_path, sequence):
    if how == "whole":
        return context.save()
    if how == "sequence":
        return context.save_sequence(sequence)
    assert context.save_file(tmp_path / "state", IDS[:100], sequence if how == "sequence file" else None)
    return tmp_path / "state"


def fetch(context, how, state, sequence):
    if how == "whole":
        return context.load(state)
    if how == "sequence":
        return context.load_sequence(state, sequence)
    tokens = context.load_file(state, sequence if how == "sequence file" else None)
    return tokens is not None and (tokens == IDS[:100] or pytest.fail("other tokens"))


@pytest.mark.parametrize("how", ["whole", "sequence", "file", "sequence file"])
@pytest.mark.parametrize("unified", [False, True])
def test_state_goes_on_across_a_boundary(model, uninterrupted, tmp_path, how, unified):
    with Context(model, n_seq=3, unified=unified) as context:
        context.feed(IDS[30:60], 0, 0)
        context.steps(IDS, 60, 40, sequence=1)
        state = store(context, how, tmp_path, 1)
    with Context(model, n_seq=3, unified=unified) as context:
        context.feed(IDS[7:90], 0, 0)
        sequence = 2 if how.startswith("sequence") else 1
        assert fetch(context, how, state, sequence)
        out = [context.feed(IDS[i : i + 1], i, sequence) for i in range(100, 140)]
        assert context.rerotated_cells > 0
        # the other sequence is the state's, or was left alone
        start = 83 if how.startswith("sequence") else 30
        assert context.last_position(0) == start - 1
    np.testing.assert_allclose(np.stack(out), uninterrupted, atol=2e-5 + slack(model.path), rtol=0)


KINDS = [{"type_k": F16, "type_v": F16}, {"type_k": BF16}, {"type_k": Q8_0, "type_v": Q8_0, "flash_attn": 1}]


@pytest.mark.parametrize("options", KINDS)
def test_state_of_another_cache_type_goes_on_as_well(model, options):
    with Context(model, **options) as context:
        context.steps(IDS, 60, 20)
        state = context.save()
        expected = [context.feed(IDS[i : i + 1], i) for i in range(80, 140)]
    with Context(model, **options) as context:
        assert context.load(state)
        for i, logits in zip(range(80, 140), expected, strict=True):
            np.testing.assert_array_equal(context.feed(IDS[i : i + 1], i), logits)


@pytest.mark.parametrize("whole", [True, False])
def test_declared_length_is_part_of_the_state(model, whole):
    with Context(model) as context:
        llama_clex.seq_reserve(context.pointer, 0, 200)
        expected = context.feed(IDS[:200], 0)
    with Context(model) as context:
        llama_clex.seq_reserve(context.pointer, 0, 200)
        context.feed(IDS[:50], 0)
        state = context.save() if whole else context.save_sequence(0)
    with Context(model) as context:
        assert context.load(state) if whole else context.load_sequence(state, 0)
        assert context.bucket() == -1
        np.testing.assert_allclose(context.feed(IDS[50:200], 50), expected, atol=2e-5 + slack(model.path), rtol=0)
        assert context.rerotated_cells == 0


@pytest.mark.parametrize("whole", [True, False])
def test_state_of_an_empty_cache_empties_the_cache(model, whole):
    with Context(model) as context:
        state = context.save() if whole else context.save_sequence(0)
        context.feed(IDS[:60], 0)
        assert context.load(state) if whole else context.load_sequence(state, 0)
        assert context.last_position() == (-1 if whole else 59)  # llama.cpp takes no cells as no change


def test_shift_that_is_pending_is_applied_before_saving(model):
    with Context(model) as context:
        context.feed(IDS[:60], 0)
        llama_cpp.llama_memory_seq_rm(context.memory, 0, 0, 8)
        llama_cpp.llama_memory_seq_add(context.memory, 0, 8, -1, -8)
        state = context.save()
        expected = context.feed(IDS[60:61], 52)
    with Context(model) as context:
        assert context.load(state)
        np.testing.assert_allclose(context.feed(IDS[60:61], 52), expected, atol=1e-5 + slack(model.path), rtol=0)


def test_copy_that_is_pending_is_applied_before_its_source_is_overwritten(model):
    with Context(model, n_seq=2) as context:
        context.feed(IDS[100:140], 0, 0)
        other = context.save_sequence(0)
        llama_cpp.llama_memory_seq_rm(context.memory, 0, -1, -1)
        context.feed(IDS[:50], 0, 0)
        llama_cpp.llama_memory_seq_cp(context.memory, 0, 1, -1, -1)
        assert context.load_sequence(other, 0)
        copied = context.feed(IDS[50:51], 50, 1)
    with Context(model) as context:
        context.feed(IDS[:50], 0)
        np.testing.assert_allclose(copied, context.feed(IDS[50:51], 50), atol=1e-5 + slack(model.path), rtol=0)


def refused(model, state, message, *, whole=True, **options):
    """The state is refused with the message, and what was in the cache goes on as if nothing had happened."""
    results = []
    for attempt in (False, True):
        with Context(model, **options) as context:
            context.feed(IDS[:62], 0)
            if attempt:
                with logged(ERROR) as lines:
                    assert not (context.load(state) if whole else context.load_sequence(state, 0))
                assert any(message in line for line in lines), lines
            results.append([context.feed(IDS[i : i + 1], i) for i in range(62, 67)])
    np.testing.assert_array_equal(*results)


def saved(model, whole=True, length=60, **options):
    with Context(model, **options) as context:
        context.feed(IDS[:length], 0)
        return context.save() if whole else context.save_sequence(0)


@pytest.mark.parametrize("whole", [True, False])
def test_state_of_another_model_is_refused(open_model, model, tmp_path, whole):
    other = open_model(make_model(tmp_path / "other.gguf", seed=1))
    refused(model, saved(other, whole), "the state belongs to another model", whole=whole)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {"clex.scaling_factors": np.array([1, 2, 3, 5], np.float32)},
        {"clex.attn_scale": np.array([1, 1, 1, 2], np.float32)},
        {"clex.log_scale": np.True_},
    ],
)
def test_state_of_other_tables_is_refused(open_model, model, path, tmp_path, whole, change):
    other = open_model(rewrite(path, tmp_path / "other.gguf", change))
    refused(model, saved(other, whole), "the state was saved with other RoPE tables", whole=whole)


@pytest.mark.parametrize("whole", [True, False])
def test_state_of_another_kind_of_cache_is_refused(model, whole):
    refused(model, saved(model, whole, type_k=F16), "another type of cache, this one is f32 for K", whole=whole)
    refused(model, saved(model, whole, type_v=F16), "another type of cache", whole=whole)
    refused(model, saved(model, whole, flash_attn=1), "with flash attention on, this context has it off", whole=whole)
    refused(model, saved(model, whole), "with flash attention off", whole=whole, flash_attn=1)


def test_state_that_does_not_fit_is_refused(open_model, tmp_path, model):
    large = open_model(make_model(tmp_path / "large.gguf", original=256))
    with Context(large, n_ctx=1024) as context:
        context.feed(IDS, 0)
        context.feed(IDS[:100], 256)
        state = context.save()
    refused(large, state, "the state has 356 tokens, the context 256", n_ctx=256)
    with Context(model, n_seq=4, unified=True) as context:
        context.feed(IDS[:20], 0, 3)
        state = context.save()
    refused(model, state, "the state has 4 sequences, the context 2", n_seq=2, unified=True)


@pytest.mark.parametrize("whole", [True, False])
def test_damaged_state_leaves_a_context_that_works(model, whole):
    state = saved(model, whole, 100)
    with Context(model, n_seq=1) as context:
        expected = context.feed(IDS[:70], 0)
    with Context(model, n_seq=1) as context:
        for size in (0, 3, 9, 20, 30, 60, 80, 200, 1000, len(state) // 2, len(state) - 1):
            context.feed(IDS[20:90], 0)
            with logged(ERROR) as lines:
                assert not (context.load(state[:size]) if whole else context.load_sequence(state[:size], 0))
            assert lines
            llama_cpp.llama_memory_seq_rm(context.memory, 0, -1, -1)
            np.testing.assert_allclose(context.feed(IDS[:70], 0), expected, atol=1e-6 + slack(model.path), rtol=0)
            llama_cpp.llama_memory_seq_rm(context.memory, 0, -1, -1)
        # a bucket that does not exist, in the record of one cell: position, number of sequences, x, y, token, bucket
        record = np.array([50, 1, 0, 0, IDS[50], 1], np.int32).tobytes()
        assert state.count(record) == 1
        with logged(ERROR) as lines:
            broken = state.replace(record, np.array([50, 1, 0, 0, IDS[50], 9], np.int32).tobytes())
            assert not (context.load(broken) if whole else context.load_sequence(broken, 0))
        assert any("damaged" in line for line in lines)
        assert context.last_position() == -1
        assert context.load(state) if whole else context.load_sequence(state, 0)
        assert context.last_position() == 99


STOCK = """
import ctypes, sys, llama_cpp
from llama_cpp._logger import set_verbose
set_verbose(False)
assert not hasattr(llama_cpp.llama_cpp._lib, "llama_clex_bucket")
path, out, ours = sys.argv[1:4]
params = llama_cpp.llama_context_default_params()
params.n_ctx, params.type_k, params.type_v, params.flash_attn_type = 1024, 0, 0, 0
model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
ctx = llama_cpp.llama_init_from_model(model, params)
ids = (llama_cpp.llama_token * 50)(*range(10, 60))
assert llama_cpp.llama_decode(ctx, llama_cpp.llama_batch_get_one(ids, 50)) == 0
assert llama_cpp.llama_state_save_file(ctx, (out + ".whole").encode(), ids, 50)
assert llama_cpp.llama_state_seq_save_file(ctx, (out + ".sequence").encode(), 0, ids, 50)
count = ctypes.c_size_t()
space = (llama_cpp.llama_token * 1000)()
print(llama_cpp.llama_state_load_file(ctx, (ours + ".whole").encode(), space, 1000, ctypes.byref(count)),
      llama_cpp.llama_state_seq_load_file(ctx, (ours + ".sequence").encode(), 0, space, 1000, ctypes.byref(count)))
"""


def test_stock_and_patched_library_refuse_each_others_states(model, path, stock_library, tmp_path):
    with Context(model) as context:
        context.feed(IDS[:100], 0)
        context.save_file(tmp_path / "ours.whole", IDS[:100])
        context.save_file(tmp_path / "ours.sequence", IDS[:100], 0)
    command = [sys.executable, "-c", STOCK, str(path), str(tmp_path / "stock"), str(tmp_path / "ours")]
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(stock_library)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "0"]
    with Context(model) as context:
        context.feed(IDS[:70], 0)
        for how, sequence in (("whole", None), ("sequence", 0)):
            with logged(ERROR) as lines:
                assert context.load_file(tmp_path / f"stock.{how}", sequence) is None
            assert any("by a library without RoPE tables" in line for line in lines), lines
        assert context.last_position() == 69


#
# llama-cpp-python
#


@pytest.fixture
def load(path):
    opened = []

    def open_llama(**options):
        opened.append(Llama(str(path), n_ctx=0, type_k=0, type_v=0, verbose=False, n_threads=1, **options))
        return opened[-1]

    yield open_llama
    for llm in opened:
        llm.close()


def test_refused_state_leaves_the_python_object_as_it_was(load, tmp_path):
    llm = load()
    llm.eval(IDS[:70])
    other = Llama(str(make_model(tmp_path / "other.gguf", seed=1)), n_ctx=0, type_k=0, type_v=0, verbose=False)
    other.eval(IDS[100:120])
    with pytest.raises(StateError, match=r"tiny.gguf: .* the state belongs to another model$"):
        llm.load_state(other.save_state())
    other.close()
    assert (llm.n_tokens, list(llm.input_ids[:70])) == (70, IDS[:70])
    broken = llm.save_state()
    broken.llama_state = broken.llama_state[:-100]
    broken.llama_state_size -= 100
    with pytest.raises(StateError):
        llm.load_state(broken)
    assert (llm.n_tokens, list(llm.input_ids[:70])) == (70, IDS[:70])
    llm.eval(IDS[70:140])


@pytest.mark.parametrize("kind", ["ram", "disk"])
@pytest.mark.parametrize("prefix_reuse", ["fast", "exact"])
def test_prompt_caches_work_across_a_boundary(load, tmp_path, kind, prefix_reuse):
    text = "abcdefgh " * 5

    def converse(llm):
        options = {"temperature": 0, "max_tokens": 40, "logprobs": 1}
        first = llm.create_completion(text, **options)["choices"][0]
        # goes on from the first, which something else has pushed out of the context
        llm.reset()
        llm.eval(IDS[:150])
        second = llm.create_completion(text + first["text"] + " ijklmnop" * 6, **options)["choices"][0]
        return [choice["logprobs"]["tokens"] for choice in (first, second)]

    plain = converse(load(prefix_reuse="exact", logits_all=True))
    llm = load(prefix_reuse=prefix_reuse, logits_all=True)
    llm.set_cache(llama_cpp.LlamaRAMCache() if kind == "ram" else llama_cpp.LlamaDiskCache(str(tmp_path / "cache")))
    loads = []
    original = llm.load_state
    llm.load_state = lambda state: (loads.append(state.n_tokens), original(state))
    cached = converse(llm)
    assert loads == [86]
    assert llm.clex.bucket == 2
    assert cached[0] == plain[0]
    if prefix_reuse == "exact":
        assert cached[1] == plain[1]
