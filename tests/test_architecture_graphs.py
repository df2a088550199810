"""Architectures whose logits nobody compares: the library takes their graph, and sees which layers have tables."""

from __future__ import annotations

import pytest

from clex_local.library import llama_clex
from clex_local.model_file.architectures import Architecture, with_tables
from helpers.made_up_models import LAYERS, made_up_model

pytestmark = pytest.mark.native

ROWS = [row for row in with_tables() if not row.compared]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_graph_takes_tables_in_the_layers_that_see_every_token(row: Architecture) -> None:
    with made_up_model(row.name) as model:
        layers, reason = llama_clex.takes_tables(model)
    assert reason == ""
    assert layers.n_table > 0
    assert (layers.n_windowed > 0) == bool(row.sliding_window)
    assert row.recurrent or row.sliding_window or layers.n_table >= LAYERS


@pytest.mark.parametrize("name", ["hunyuan-dense", "maincoder", "gpt2", "mamba"])
def test_graph_that_does_not_take_them_says_why(name: str) -> None:
    with made_up_model(name) as model:
        assert llama_clex.takes_tables(model)[1]
