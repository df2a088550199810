"""Which layers of an architecture are rotated with the tables is read from its graph; only those are re-rotated."""

from __future__ import annotations

import llama_cpp
import numpy as np
import pytest

from clex_local.errors import ModelError
from clex_local.library import llama_clex
from clex_local.library.log import logged
from clex_local.runtime import low_level
from helpers.low_level import ERROR, F32, Q8_0, Context, Model, refusal
from helpers.random_architectures import KINDS, make_architecture
from helpers.random_gguf import random_tokens

pytestmark = [pytest.mark.native, pytest.mark.sanitize]

# Of each architecture, the layers that see everything and have RoPE.
ROTATED = {"smollm3": {0, 1, 2}, "gemma2": {1, 3}, "olmo2": {3}, "lfm2": {1, 3}, "qwen2vl": {0, 1}, "talkie": {0, 1}}
LAYERS = [(name, layer) for name in ROTATED for layer in range(KINDS[name]["n_layer"])]
PIECES = ((0, 60), (60, 61), (61, 130), (130, 200))  # buckets of 64 tokens


@pytest.fixture
def load(tmp_path):
    """Makes and loads models of an architecture; they are closed at the end."""
    models = []

    def make(name, **options):
        models.append(Model(make_architecture(tmp_path / f"{len(models)}.gguf", name, **options)))
        return models[-1]

    yield make
    for model in models:
        model.close()


@pytest.mark.parametrize("key_type", [F32, Q8_0], ids=["f32", "q8_0"])
@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_keys_of_a_layer_follow_the_length_where_it_sees_everything_and_has_rope(load, name, layer, key_type):
    """Where one layer alone adds to the residual stream, its keys after a re-rotation are those of one prompt."""
    tokens, logits = random_tokens(200), {}
    for tables in (True, False):
        model = load(name, only=layer, tables=tables)
        with Context(model, type_k=key_type) as context:
            logits[tables] = context.feed(tokens, 0)
        with Context(model, type_k=key_type) as context:
            pieces = [context.feed(tokens[a:b], a) for a, b in PIECES]
        np.testing.assert_allclose(pieces[-1], logits[tables], atol=2e-5 if key_type == F32 else 5e-2, rtol=0)
    if layer in ROTATED[name]:
        assert np.abs(logits[True] - logits[False]).max() > 1e-2
    else:
        np.testing.assert_array_equal(logits[True], logits[False])


@pytest.mark.parametrize("name", ROTATED)
def test_the_query_scale_is_for_the_layers_that_the_tables_rotate(load, name):
    tokens = random_tokens(100)
    for layer in range(KINDS[name]["n_layer"]):
        logits = []
        for log_scale in (False, True):
            with Context(load(name, only=layer, log_scale=log_scale)) as context:
                logits.append(context.feed(tokens, 0))
        assert (np.abs(logits[0] - logits[1]).max() > 1e-3) == (layer in ROTATED[name]), layer


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize("tables", [True, False])
def test_a_model_says_how_its_layers_are_rotated(load, name, tables):
    layers, reason = llama_clex.takes_tables(load(name, tables=tables).pointer)
    n_layer = KINDS[name]["n_layer"]
    windows = {"gemma2": 2, "olmo2": 3}.get(name, 0)
    recurrent = {"lfm2": 2}.get(name, 0)
    assert reason == ""
    assert layers.n_table == len(ROTATED[name])
    assert layers.n_windowed == windows
    assert layers.n_unrotated == n_layer - recurrent - windows - layers.n_table


def test_a_file_says_so_without_its_weights(tmp_path):
    path = make_architecture(tmp_path / "m.gguf", "smollm3", tables=False)
    no_mode = 0
    model = low_level.Model(path, no_alloc=True, load_mode=no_mode)
    layers, reason = llama_clex.takes_tables(model.pointer)
    model.close()
    assert (layers.n_table, layers.n_windowed, layers.n_unrotated, reason) == (3, 0, 1, "")


REFUSED = {
    "hunyuan-dense": "its keys are not what RoPE leaves (layer 0)",
    "deepseek2": "layer 0 caches no keys as RoPE leaves them (latent attention)",
    "gpt2": "no layer has RoPE",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_cached_keys_are_not_those_of_rope_is_refused_by_name(load, name):
    line = f"RoPE tables cannot be used with the architecture '{name}': {REFUSED[name]}"
    assert refusal(load(name)) == f"llama_init_from_model: failed to initialize the context: {line}"
    stock = load(name, tables=False)
    assert refusal(stock) is None
    for model, reason in ((load(name), line), (stock, REFUSED[name])):
        assert llama_clex.takes_tables(model.pointer)[1] == reason


def test_a_model_whose_layers_all_have_a_window_is_refused(load):
    pattern = {"gemma2.attention.sliding_window_pattern": np.uint32(8)}
    assert "all layers have a sliding window" in (refusal(load("gemma2", more=pattern)) or "")
    assert refusal(load("gemma2", more=pattern, tables=False)) is None


def test_images_are_refused_with_one_line_and_text_goes_on(load):
    model, tokens = load("qwen2vl"), random_tokens(80)
    batch = llama_cpp.llama_batch_init(4, llama_cpp.llama_model_n_embd(model.pointer), 1)
    batch.n_tokens = 4
    for i in range(4):
        batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 60, 1, 0, i == 3
    with Context(model) as context, Context(model) as other:
        context.feed(tokens[:60], 0)
        with logged(ERROR) as lines:
            assert llama_cpp.llama_decode(context.pointer, batch) != 0
        assert lines[0].endswith("a model with RoPE tables and M-RoPE takes text only, no images")
        other.feed(tokens[:60], 0)
        np.testing.assert_array_equal(context.feed(tokens[60:], 60), other.feed(tokens[60:], 60))
    llama_cpp.llama_batch_free(batch)


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "lfm2", "qwen2vl"])
@pytest.mark.parametrize("key_type", [F32, Q8_0], ids=["f32", "q8_0"])
def test_a_saved_state_has_the_buckets_whatever_the_memory(load, tmp_path, name, key_type):
    """Saved in the second bucket, read in other contexts, whole, of one sequence and from files; then in the third."""
    model, tokens = load(name), random_tokens(160)
    with Context(model, type_k=key_type) as context:
        for a, b in ((0, 60), (60, 100)):
            context.feed(tokens[a:b], a)
        whole, one = context.save(), context.save_sequence(0)
        assert context.save_file(tmp_path / "whole", tokens[:100])
        assert context.save_file(tmp_path / "one", tokens[:100], 0)
        wanted = [context.feed(tokens[100:120], 100), context.feed(tokens[120:], 120)]
    reads = [
        lambda c: c.load(whole),
        lambda c: c.load_sequence(one, 0),
        lambda c: c.load_file(tmp_path / "whole") == tokens[:100],
        lambda c: c.load_file(tmp_path / "one", 0) == tokens[:100],
    ]
    for read in reads:
        with Context(model, type_k=key_type) as context:
            context.feed(tokens[::-1][:30], 0)
            assert read(context)
            result = [context.feed(tokens[100:120], 100), context.feed(tokens[120:], 120)]
        np.testing.assert_allclose(result, wanted, atol=2e-5 if key_type == F32 else 1e-3, rtol=0)
    damaged = bytearray(one)
    damaged[len(one) // 2] ^= 1
    with Context(model, type_k=key_type) as context, logged(ERROR) as lines:
        assert not context.load_sequence(bytes(damaged), 0)
        assert len(lines) == 1


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "lfm2"])
def test_a_state_of_windows_or_recurrent_layers_alone_is_read_again(load, name):
    """What llama.cpp's server keeps at checkpoints of a prompt."""
    sequence, partial_only = llama_cpp.llama_seq_id(0), llama_cpp.llama_state_seq_flags(1)
    model, tokens = load(name), random_tokens(100)
    with Context(model) as context:
        context.feed(tokens[:80], 0)
        size = llama_cpp.llama_state_seq_get_size_ext(context.pointer, sequence, partial_only)
        data = (llama_cpp.ctypes.c_uint8 * size)()
        assert llama_cpp.llama_state_seq_get_data_ext(context.pointer, data, size, sequence, partial_only) == size
        wanted = context.feed(tokens[80:], 80)
        assert llama_cpp.llama_state_seq_set_data_ext(context.pointer, data, size, sequence, partial_only) == size
        llama_cpp.llama_memory_seq_rm(context.memory, 0, 80, -1)
        np.testing.assert_allclose(context.feed(tokens[80:], 80), wanted, atol=2e-5, rtol=0)


def test_without_tables_a_state_is_that_of_stock(load):
    """The bucket of a cell is written where there are tables alone: cells of M-RoPE have the words of stock."""
    model, count = load("qwen2vl", tables=False), 7
    with Context(model) as context:
        context.feed(random_tokens(count), 0)
        state = context.save_sequence(0)
    front, cell = 8 + 4 + 4, 4 + 4 + 12 + 4
    positions = np.frombuffer(state, np.int32, count * cell // 4, front).reshape(count, -1)
    np.testing.assert_array_equal(positions[:, 0], range(count))


@pytest.mark.parametrize("tables", [True, False])
@pytest.mark.parametrize(
    ("name", "key", "value", "says"),
    [
        ("gemma2", "rope.dimension_count_swa", np.uint32(0), "RoPE cannot rotate 0 of the 32 dimensions of a head"),
        ("gemma2", "rope.dimension_count_swa", np.uint32(33), "RoPE cannot rotate 33 of the 32 dimensions of a head"),
        ("qwen2vl", "rope.dimension_sections", np.array([0, 0, 0, 0], np.int32), "not 1 to 65536"),
        ("qwen2vl", "rope.dimension_sections", np.array([4, -4, 0, 0], np.int32), "is negative"),
        ("qwen2vl", "rope.dimension_sections", np.array([2**30, 2**30, 6, 0], np.int32), "not 1 to 65536"),
    ],
)
def test_dimensions_that_rope_cannot_rotate_are_refused(tmp_path, tables, name, key, value, says):
    path = make_architecture(tmp_path / "m.gguf", name, more={f"{name}.{key}": value}, tables=tables)
    with logged(ERROR) as lines, pytest.raises(ModelError):
        Model(path)
    assert any(says in line for line in lines)
