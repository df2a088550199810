"""Sequences in different buckets are computed together, each rotated with its own table."""

from __future__ import annotations

import ctypes

import llama_cpp
import numpy as np
import pytest

from clex_local import library_path
from clex_local.runtime import low_level
from helpers.device_error import slack
from helpers.low_level import Context, Model, context_params
from helpers.random_architectures import make_architecture
from helpers.random_gguf import make_model, random_tokens

pytestmark = [pytest.mark.native, pytest.mark.sanitize]

LENGTHS = (20, 90, 140, 200, 30, 100, 150, 210)  # two of each bucket of 64 tokens
MODELS = {
    "llama": lambda path: make_model(path),
    "log scale": lambda path: make_model(path, log_scale=True),
    **{name: lambda path, name=name: make_architecture(path, name) for name in ("olmo2", "qwen2vl", "lfm2")},
}


class GraphCounter:
    """Counts the graphs that a context computes, by a tensor that each has once."""

    def __init__(self) -> None:
        self.count = 0
        name_of = ctypes.CDLL(str(library_path() / "libggml-base.so")).ggml_get_name
        name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.c_void_p]

        def look(tensor: int, ask: bool, data: object) -> bool:
            self.count += ask and name_of(tensor) == b"result_output"
            return not ask

        self.callback = llama_cpp.ggml_backend_sched_eval_callback(look)


@pytest.mark.parametrize("unified", [False, True], ids=["streams", "unified"])
@pytest.mark.parametrize("kind", MODELS)
def test_eight_sequences_in_four_buckets_share_a_graph_and_equal_each_alone(tmp_path, kind, unified):
    model = Model(MODELS[kind](tmp_path / "m.gguf"))
    texts = [random_tokens(length + 4, seed) for seed, length in enumerate(LENGTHS)]
    alone = []
    for tokens, length in zip(texts, LENGTHS, strict=True):
        with Context(model, n_ctx=256) as context:
            alone.append(context.steps(tokens, length, 4)[1:])
    counter = GraphCounter()
    params = context_params(n_ctx=8 * 256, n_seq=8, unified=unified)
    params.cb_eval = counter.callback
    with low_level.Context(model, params) as context:
        for sequence, (tokens, length) in enumerate(zip(texts, LENGTHS, strict=True)):
            context.decode_sequence(tokens[:length], 0, sequence=sequence)
        for step in range(4):
            counter.count = 0
            # neither the order of the buckets nor that of the lengths
            context.decode((texts[s][LENGTHS[s] + step], LENGTHS[s] + step, (s,), True) for s in range(8))
            assert counter.count == 1
            assert [context.bucket(s) for s in range(8)] == [(length + step) // 64 for length in LENGTHS]
            for s in range(8):
                np.testing.assert_allclose(context.logits(s), alone[s][step], atol=1e-4 + slack(model.path), rtol=0)
    model.close()


@pytest.mark.parametrize("unified", [False, True], ids=["streams", "unified"])
def test_more_buckets_than_a_ubatch_takes(tmp_path, unified):
    """Twelve sequences in twelve buckets: prompts and steps of all of them in one batch, in more than one ubatch."""
    model = Model(make_model(tmp_path / "m.gguf", n_buckets=12))
    n = 12
    texts = [random_tokens(12, seed) for seed in range(n)]
    results = []
    for together in (True, False):
        with Context(model, n_ctx=n * 64, n_seq=n, unified=unified) as context:
            rows = []
            for s in range(n):
                context.declare(64 * (s + 1), s)
            for a, b in ((0, 10), (10, 11), (11, 12)):
                items = [(texts[s][i], i, [s], i == b - 1) for i in range(a, b) for s in range(n)]
                if together:
                    context.decode(items)
                    rows.append([context.logits(i) for i, item in enumerate(items) if item[3]])
                else:
                    rows.append([context.feed(texts[s][a:b], a, s) for s in range(n)])
            results.append(np.array(rows))
    model.close()
    np.testing.assert_allclose(results[0], results[1], atol=1e-4 + slack(model.path), rtol=0)
