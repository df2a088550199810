"""A saved state that is damaged, cut, foreign or made by hand is refused, and leaves everything as it was."""

from __future__ import annotations

import copy
import ctypes
import pickle
import resource
from contextlib import contextmanager

import llama_cpp
import numpy as np
import pytest

from clex_local import Llama
from clex_local.model_file.tables import ContextError
from clex_local.runtime.saved_state import StateError
from helpers.gguf_maker import gguf_bytes
from helpers.low_level import ERROR, F16, Context, Model, logged
from helpers.random_gguf import make_model, model_parts, random_tokens
from helpers.state_bytes import StateBytes, checksum

pytestmark = [pytest.mark.native, pytest.mark.sanitize]

IDS = random_tokens(256)
ON_DEVICE = 2
HOWS = ["whole", "sequence", "file", "sequence file"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture(scope="module", params=["tables", "plain", "window"])
def model(request, folder):
    """With tables, without, and with a second cache for layers of a sliding window."""
    path = folder / f"{request.param}.gguf"
    if request.param == "window":
        path.write_bytes(gguf_bytes(*windowed_parts()))
    else:
        make_model(path, tables=request.param == "tables", original=64 if request.param == "tables" else 512)
    loaded = Model(path)
    loaded.kind = request.param
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def with_tables(folder):
    loaded = Model(make_model(folder / "with-tables.gguf"))
    yield loaded
    loaded.close()


def windowed_parts():
    """Three of four layers see the last 32 tokens."""
    keys, tensors = model_parts(n_layer=4, tables=False, original=512)
    keys = {name.replace("llama.", "cohere2."): value for name, value in keys.items()}
    keys["general.architecture"] = "cohere2"
    keys["cohere2.attention.sliding_window"] = np.uint32(32)
    keys["cohere2.attention.layer_norm_epsilon"] = np.float32(1e-5)
    keys["cohere2.logit_scale"] = np.float32(1)
    del tensors["output.weight"]
    return keys, {name: tensor for name, tensor in tensors.items() if "ffn_norm" not in name}


def take(context, how, state, path, sequence=1):
    """Whether the context accepts the bytes."""
    if how == "whole":
        return context.load(state)
    if how == "sequence":
        return context.load_sequence(state, sequence)
    path.write_bytes(state)
    return context.load_file(path, sequence if how == "sequence file" else None) is not None


def give(context, how, path, sequence=0, n=6):
    if how == "whole":
        return context.save()
    if how == "sequence":
        return context.save_sequence(sequence)
    assert context.save_file(path, IDS[:n], sequence if how == "sequence file" else None)
    return path.read_bytes()


@contextmanager
def unchanged(model, **options):
    """A context with two sequences, in which nothing that happens inside the block may leave a trace."""
    options = {"n_ctx": 256, "n_seq": 2, "unified": True, **options}
    results = []

    def go_on(context):
        for i in range(62, 66):
            results.append(context.feed(IDS[i : i + 1], i, 0))
        results.append(context.feed(IDS[100:140], 40, 1))

    for attempt in (False, True):
        with Context(model, **options) as context:
            context.feed(IDS[:62], 0, 0)
            context.feed(IDS[:40], 0, 1)
            if attempt:
                before = context.save()
                with logged(ERROR) as lines:
                    yield context, lines
                assert context.save() == before
            go_on(context)
    half = len(results) // 2
    assert np.isfinite(results).all()
    np.testing.assert_array_equal(results[:half], results[half:])


def small_state(model, how, path, n=6, **options):
    with Context(model, **{"n_ctx": 256, "n_seq": 2, "unified": True, **options}) as context:
        context.feed(IDS[:n], 0, 0)
        return give(context, how, path, n=n)


@pytest.mark.parametrize("how", HOWS)
def test_no_flipped_bit_is_accepted(with_tables, folder, how):
    """The format of llama.cpp, which models without tables have, knows no checksum."""
    model, path = with_tables, folder / how
    state = small_state(model, how, path, type_k=F16, type_v=F16)
    rng = np.random.default_rng(0)
    places = {*range(200), *rng.integers(200, len(state), 300).tolist(), *range(len(state) - 20, len(state))}
    with unchanged(model, type_k=F16, type_v=F16) as (context, _):
        for place in places:
            broken = bytearray(state)
            broken[place] ^= 1 << int(rng.integers(8))
            assert not take(context, how, bytes(broken), path), place
    with Context(model, n_ctx=256, n_seq=2, unified=True, type_k=F16, type_v=F16) as context:
        assert take(context, how, state, path)


@pytest.mark.parametrize("how", HOWS)
def test_no_cut_and_no_surplus_is_accepted(model, folder, how):
    path = folder / how
    state = small_state(model, how, path)
    sizes = {*range(0, 120), *range(120, len(state), len(state) // 60), *range(len(state) - 9, len(state))}
    with unchanged(model) as (context, lines):
        for size in sorted(sizes):
            assert not take(context, how, state[:size], path), size
        for surplus in (1, 3, 4, 8, 1000):
            assert not take(context, how, state + bytes(surplus), path), surplus
        assert len(lines) >= len(sizes) + 5
    with Context(model, n_ctx=256, n_seq=2, unified=True) as context:
        assert take(context, how, state, path)


# name of the word: its offset, its type, values that it cannot have
WORDS = {
    "streams": (lambda s: s.streams, "<i", [0, 2, 2**31 - 1]),
    "tokens": (lambda s: s.count, "<i", [5, 7, 257, -1, 2**31 - 1]),
    "position": (lambda s: s.cells, "<i", [-1, -(2**31), 2**31 - 1, 2**30]),
    "last position": (lambda s: s.cells + 5 * s.cell_size, "<i", [-1, 2**31 - 1]),
    "sequences of a token": (lambda s: s.cells + 4, "<i", [0, 2, 3, -1, 2**31 - 1]),
    "sequence": (lambda s: s.sequence_at(0), "<i", [-1, 1000, 2**31 - 1]),
    "transposition": (lambda s: s.layers, "<I", [0, 2]),
    "layers": (lambda s: s.layers + 4, "<i", [0, 7, -1]),
    "type of keys": (lambda s: s.layers + 8, "<i", [1, -1, 1000]),
    "bytes of a key": (lambda s: s.layers + 12, "<q", [0, 1, -1, 2**40]),
}
TABLE_WORDS = {
    "cells in the tag": (lambda s: s.tag + 36, "<I", [0, 5, 7]),
    "sequences in the tag": (lambda s: s.tag + 40, "<I", [0, 2]),
    "declared lengths": (lambda s: s.tag + 44, "<I", [0, 2, 2**32 - 1]),
    "declared length": (lambda s: s.declared, "<q", [-1, 2**31, 2**62]),
    "position beyond the tables": (lambda s: s.cells, "<i", [256]),
    "first word of a cell": (lambda s: s.cells + 8, "<i", [1]),
    "second word of a cell": (lambda s: s.cells + 12, "<i", [1]),
    "token": (lambda s: s.cells + 16, "<i", [-2, 288]),
    "bucket": (lambda s: s.cells + 20, "<i", [-1, 4]),
}


@pytest.mark.parametrize("whole", [True, False])
def test_every_word_is_checked(model, folder, whole):
    """With the checksum that belongs to the changed state: somebody may make one by hand."""
    if model.kind == "window":
        words = {name: word for name, word in WORDS.items() if name != "layers"}
    else:
        words = {**WORDS, **(TABLE_WORDS if model.kind == "tables" else {})}
    how = "whole" if whole else "sequence"
    raw = small_state(model, how, None)
    state = StateBytes(raw, whole=whole, tables=model.kind == "tables", n_tokens=6)
    if state.tables:
        assert raw[-8:] == checksum(raw[:-8])
    with unchanged(model) as (context, lines):
        for name, (offset, kind, values) in words.items():
            for value in values:
                n_lines = len(lines)
                assert not take(context, how, state.changed(offset(state), kind, value), None), (name, value)
                assert len(lines) == n_lines + 1, (name, value)  # one line, by us


def test_size_words_allocate_nothing(model, folder):
    state = small_state(model, "whole", None)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with unchanged(model) as (context, _):
        for size in (2**32 - 1, 2**32 - 2**24, 2**31, 1000):
            broken = size.to_bytes(4, "little") + state[4:]
            for how in ("whole", "file"):
                header = small_state(model, "file", folder / "size")[:36] if how == "file" else b""
                assert not take(context, how, header + broken, folder / "size")
        # the number of tokens in front of the state
        file = small_state(model, "sequence file", folder / "size")
        for size in (2**32 - 1, 2**31, 4000):
            assert not take(
                context, "sequence file", file[:8] + size.to_bytes(4, "little") + file[12:], folder / "size"
            )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 2**20  # KiB


@pytest.mark.parametrize("how", HOWS)
def test_not_a_number_of_a_refused_state_poisons_nothing(model, folder, how):
    """llama.cpp #27068: attention multiplies the values of free cells by 0, which leaves NaN what it is."""
    path = folder / how
    state = small_state(model, how, path, n=60)
    start = 2000 if model.kind == "tables" else 1200  # behind the words of the cells
    with unchanged(model) as (context, _):
        poisoned = state[:start] + b"\xff" * (len(state) - start - 8)
        for broken in (poisoned, poisoned + state[-8:], state[:-9] + b"\xff"):
            assert not take(context, how, broken, path)


def test_state_without_room_changes_nothing(model, folder):
    """Cells that others have cannot be taken; those of the sequence itself are given up."""
    state = small_state(model, "sequence", None, n=200)
    with unchanged(model) as (context, lines):
        assert not context.load_sequence(state, 1)
        assert "the state has 200 tokens, the context room for 194" in lines[-1]
    with Context(model, n_ctx=256, n_seq=2, unified=True) as context:
        context.feed(IDS[:56], 0, 0)
        context.feed(IDS[:190], 0, 1)
        assert context.load_sequence(state, 1)
        assert context.last_position(1) == 199


def test_sequence_that_does_not_exist_is_refused(model, folder):
    state, file = (small_state(model, how, folder / "file") for how in ("sequence", "sequence file"))
    with unchanged(model) as (context, lines):
        for sequence in (-2, 256, 10**6, 2**31 - 1):
            assert not context.load_sequence(state, sequence)
            assert context.save_sequence(sequence) == b""
            assert not context.save_file(folder / "file", IDS[:6], sequence)
            assert not take(context, "sequence file", file, folder / "file", sequence)
            assert f"there is no sequence {sequence}" in lines[-1]


def test_older_version_is_refused_in_one_line(with_tables):
    model = with_tables
    state = StateBytes(small_state(model, "whole", None), whole=True, tables=True, n_tokens=6)
    old = state.changed(state.tag + 4, "<I", 1)
    with unchanged(model) as (context, lines):
        assert not context.load(old)
        assert not context.load(old[:-8])  # had no checksum
        assert len(lines) == 2
        assert all(line.endswith("the state has version 1, this library reads 3") for line in lines)


#
# keys and values that stay on the device
#


def save_on_device(context, sequence):
    size = llama_cpp.llama_state_seq_get_size_ext(context.pointer, sequence, ON_DEVICE)
    data = (ctypes.c_uint8 * size)()
    written = llama_cpp.llama_state_seq_get_data_ext(context.pointer, data, size, sequence, ON_DEVICE)
    assert written == size
    return bytes(data)


def load_on_device(context, state, sequence, flags=ON_DEVICE):
    data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
    return llama_cpp.llama_state_seq_set_data_ext(context.pointer, data, len(state), sequence, flags)


def test_state_on_the_device_goes_on(model):
    with Context(model, n_ctx=256, n_seq=2) as context:
        context.feed(IDS[:30], 0, 0)
        expected = context.feed(IDS[30:31], 30, 0)
        llama_cpp.llama_memory_seq_rm(context.memory, 0, 30, -1)
        state = save_on_device(context, 0)
        context.feed(IDS[50:80], 30, 0)
        assert load_on_device(context, state, 0) == len(state)
        np.testing.assert_array_equal(context.feed(IDS[30:31], 30, 0), expected)


def test_damaged_state_on_the_device_is_refused(model):
    with unchanged(model) as (context, _):
        state = save_on_device(context, 0)
        for size in range(len(state)):
            assert load_on_device(context, state[:size], 0) == 0
        assert load_on_device(context, state + b"0", 0) == 0
        if model.kind == "tables":
            for place in range(len(state)):
                broken = bytearray(state)
                broken[place] ^= 4
                assert load_on_device(context, bytes(broken), 0) == 0, place


def test_state_that_is_no_longer_on_the_device_is_refused(model):
    with unchanged(model, unified=False) as (context, lines):
        host = context.save_sequence(0)
        assert load_on_device(context, host, 0) == 0  # nothing was saved there
        state = save_on_device(context, 0)
        assert load_on_device(context, host, 0) == 0
        assert load_on_device(context, state, 0, flags=0) == 0
        context.feed(IDS[62:63], 62, 0)
        save_on_device(context, 0)
        assert load_on_device(context, state, 0) == 0
        assert lines
        llama_cpp.llama_memory_seq_rm(context.memory, 0, 62, -1)
    with Context(model, n_ctx=256, n_seq=2) as other:
        assert load_on_device(other, state, 0) == 0


#
# llama-cpp-python
#


@pytest.fixture(scope="module", params=[True, False], ids=["tables", "plain"])
def open_llama(request, folder):
    path = make_model(
        folder / f"python-{request.param}.gguf", tables=request.param, original=64 if request.param else 512
    )
    opened = []

    def get(**options):
        options = {"n_ctx": 256, "type_k": 0, "type_v": 0, "verbose": False, "n_threads": 1, **options}
        opened.append(Llama(str(path), **options))
        return opened[-1]

    yield get
    for llm in opened:
        llm.close()


def cut(state):
    state.llama_state = state.llama_state[:-5]


def cut_with_its_size(state):
    state.llama_state = state.llama_state[:-5]
    state.llama_state_size -= 5


def add(state):
    state.llama_state += b"\0"
    state.llama_state_size += 1


def forget_tokens(state):
    state.input_ids = state.input_ids[:20]


def exchange_a_token(state):
    state.input_ids[3] += 1


def lengthen(state):
    state.n_tokens += 1


def shorten(state):
    state.n_tokens -= 1


def negate(state):
    state.n_tokens = -1


def narrow(state):
    state.scores = state.scores[:, :-1]


def change_logits(state):
    state.scores[3, 5] += 1


def change_tables(state):
    state.clex_computed[2] += 1


def unseal(state):
    state.clex_checksum = None


def strange_tokens(number):
    def change(state):
        unseal(state)
        state.input_ids[:] = number

    return change


def count_more(state):
    """Twice the tokens that llama.cpp's part has."""
    unseal(state)
    state.n_tokens = 100
    state.clex_computed = np.zeros(100, np.int64)


def replace(name, make):
    def change(state):
        setattr(state, name, make(getattr(state, name)))

    return change


def nothing(value):
    return None


OTHER_KINDS = {
    **{
        f"{name} is None": replace(name, nothing)
        for name in ("n_tokens", "input_ids", "scores", "llama_state", "llama_state_size", "seed", "clex_computed")
    },
    "list of tokens": replace("input_ids", np.ndarray.tolist),
    "column of tokens": replace("input_ids", lambda ids: ids[:, None]),
    "fractions of tokens": replace("input_ids", lambda ids: ids.astype(float)),
    "three dimensions of logits": replace("scores", lambda scores: scores[None]),
    "fraction for a count": replace("n_tokens", float),
    "text for a count": replace("n_tokens", str),
    "text for bytes": replace("llama_state", lambda data: "x" * len(data)),
    "every second byte": replace("llama_state", lambda data: memoryview(data * 2)[::2]),
    "large seed": replace("seed", lambda seed: 2**64),
    "column of tables": replace("clex_computed", lambda computed: computed[:, None]),
    "text for a checksum": replace("clex_checksum", lambda pair: "z"),
}


@pytest.mark.parametrize(
    "change",
    [
        *(cut, cut_with_its_size, add, forget_tokens, exchange_a_token, lengthen, shorten, negate, narrow),
        *(change_logits, change_tables, count_more),
        *(pytest.param(strange_tokens(number), id=f"token {number}") for number in (-5, 10**6)),
        *(pytest.param(change, id=name) for name, change in OTHER_KINDS.items()),
    ],
)
def test_damaged_state_of_python_is_refused_whole(open_llama, change):
    llm = open_llama(logits_all=True)
    other = open_llama(logits_all=True)
    other.eval(IDS[100:150])
    state = pickle.loads(pickle.dumps(other.save_state()))
    llm.eval(IDS[:60])
    change(state)
    refused_whole(llm, state)
    llm.load_state(other.save_state())
    assert llm.n_tokens == 50


@pytest.mark.parametrize("state", [None, "x", b"abc", {"n_tokens": 3}, object])
def test_what_is_no_state_is_refused(open_llama, state):
    llm = open_llama()
    llm.eval(IDS[:60])
    refused_whole(llm, state)


def refused_whole(llm, state):
    before = llm.save_state()
    with pytest.raises(StateError, match=r"python-\w+\.gguf: cannot load the saved state: "):
        llm.load_state(state)
    after = llm.save_state()
    assert (after.n_tokens, after.llama_state, after.seed) == (before.n_tokens, before.llama_state, before.seed)
    for name in ("input_ids", "clex_computed", "scores"):
        kept = slice(None, 60)
        np.testing.assert_array_equal(getattr(after, name)[kept], getattr(before, name)[kept])


def test_state_of_llama_cpp_python_is_accepted(open_llama):
    """Which has no checksum of ours."""
    llm = open_llama()
    llm.eval(IDS[:60])
    state = llama_cpp.Llama.save_state(llm)
    llm.reset()
    llm.load_state(copy.copy(state))
    assert llm.n_tokens == 60


def test_state_that_is_too_long_is_refused_with_both_numbers(open_llama):
    """A context of 200 has 256 cells, which the state fits into."""
    large, small = open_llama(), open_llama(n_ctx=200)
    large.eval(IDS[:220])
    small.eval(IDS[:60])
    before = small.save_state()
    with pytest.raises(ContextError, match=r"^220 tokens do not fit in a context of 200$"):
        small.load_state(large.save_state())
    assert small.n_tokens == 60
    assert small.save_state().llama_state == before.llama_state
