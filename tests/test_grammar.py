"""Which JSON texts a schema's grammar lets through."""

from __future__ import annotations

import json
from typing import Any

import llama_cpp
import numpy as np
import pytest
from random_gguf import make_model

from clex_local import Llama
from clex_local.grammar import grammar_of_schema
from clex_local.sampler import Sampler, SamplerOptions, SamplingError

N = {"type": "integer"}


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    llm = Llama(str(make_model(tmp_path_factory.mktemp("grammar") / "tiny.gguf")), vocab_only=True, verbose=False)
    yield llm._model.vocab
    llm.close()


def accepts(vocab: Any, schema: Any, text: str) -> bool:
    """Whether the whole text, byte after byte, and then the end of it can be drawn."""
    ids = [3 + byte for byte in text.encode()] + [int(llama_cpp.llama_vocab_eos(vocab))]
    options = SamplerOptions(grammar=grammar_of_schema(schema, "the schema"), temp=0)
    sampler = Sampler(vocab, options, seed=0, last_n=0, history=[])
    try:
        for token in ids:
            logits = np.full(int(llama_cpp.llama_vocab_n_tokens(vocab)), -np.inf, np.single)
            logits[token] = 0
            sampler.sample(logits, np.array([], np.intc))
    except SamplingError:  # no token is left
        return False
    finally:
        sampler.close()
    return True


def with_a(schema) -> dict:
    return {"type": "object", "properties": {"a": schema}, "required": ["a"]}


@pytest.mark.parametrize(
    "bounds",
    [
        {"minimum": 1, "maximum": 5},
        {"minimum": 0, "maximum": 0},
        {"minimum": 7, "maximum": 123},
        {"minimum": 95, "maximum": 1005},
        {"minimum": -12, "maximum": 7},
        {"minimum": -130, "maximum": -4},
        {"exclusiveMinimum": -2, "exclusiveMaximum": 10},
        {"minimum": 0},
        {"minimum": -8},
        {"maximum": 17},
        {"exclusiveMaximum": 0},
        {"minimum": 1.5, "maximum": 20.5},
    ],
)
def test_bounds_of_whole_numbers(vocab, bounds):
    low = max(bounds.get("minimum", -np.inf), bounds.get("exclusiveMinimum", -np.inf) + 0.5)
    high = min(bounds.get("maximum", np.inf), bounds.get("exclusiveMaximum", np.inf) - 0.5)
    edges = [value for value in (low, high) if np.isfinite(value)]
    values = {int(edge) + step for edge in edges for step in (-11, -10, -9, -2, -1, 0, 1, 2, 9, 10, 11)} | {
        0,
        3,
        -3,
        99,
    }
    values |= {10**14, -(10**14), 100, 1000, 1001}
    for value in values:
        assert accepts(vocab, {**N, **bounds}, str(value)) == (low <= value <= high), value
    assert not accepts(vocab, {**N, **bounds}, "01")
    assert not accepts(vocab, {**N, **bounds}, "1.5")


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (with_a({"const": 'é\n"\\'}), ['é\n"\\'], ["x"]),
        (with_a({"enum": ["C:\\x", 5, None, "ü"]}), ["C:\\x", 5, None, "ü"], ["C:x", 6]),
        (with_a({"type": "string"}), ["", "ü\n\t\"\\", "a"], [5, None]),
        (with_a({"allOf": [{"$ref": "#/$defs/E"}], "default": "x"}) | {"$defs": {"E": {"enum": ["x"]}}}, ["x"], [{}]),
        # as a definition has the name of a kind or of a property
        (with_a({"$ref": "#/$defs/string"}) | {"$defs": {"string": N}}, [5], ["x"]),
        (with_a({"$ref": "#/$defs/a"}) | {"$defs": {"a": N}}, [5], ["x"]),
        (with_a({}), [5, "x", None, [1], {"b": 1}], []),
        (with_a(True), [5, "x"], []),
        (with_a({"title": "A"}), [5, "x"], []),
        (with_a({"type": "array", "items": {}}), [[], [1, "x"]], [5]),
        (with_a({"type": "array", "items": True}), [[], [1, "x"]], [5]),
        (with_a({"type": "array", "items": N, "minItems": 1, "maxItems": 2}), [[1], [1, 2]], [[], [1, 2, 3], ["x"]]),
        (with_a({"type": ["integer", "null"]}), [5, None], ["x"]),
        (with_a({"anyOf": [N, {"type": "boolean"}]}), [5, True], ["x", None]),
        (with_a({"type": "object", "additionalProperties": N}), [{}, {"x": 1}], [{"x": "y"}]),
        (with_a({"type": "string", "pattern": "^[a-c]{2}$"}), ["ab"], ["a", "abc", "xy"]),
        (with_a({"type": "string", "maxLength": 2}), ["", "ab"], ["abc"]),
        (with_a({"$ref": "#/$defs/E"}) | {"$defs": {"E": {**N, "minimum": 3}}}, [3], [2]),
    ],
)  # fmt: skip
def test_schemas(vocab, schema, right, wrong):
    for value in [*right, *wrong]:
        assert accepts(vocab, schema, json.dumps({"a": value}, ensure_ascii=False)) == (value in right), value
    assert not accepts(vocab, schema, "{}")


def test_a_schema_may_be_a_definition_that_contains_itself(vocab):
    node = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}}}
    schema = {"$defs": {"Node": {**node, "required": ["next"]}}, "$ref": "#/$defs/Node"}
    assert accepts(vocab, schema, '{"next": null}')
    assert accepts(vocab, schema, '{"next": {"next": {"next": null}}}')
    assert not accepts(vocab, schema, '{"next": {}}')


def test_names_of_properties_are_json(vocab):
    schema = {"type": "object", "properties": {'ü "q"\\': N}, "required": ['ü "q"\\']}
    assert accepts(vocab, schema, json.dumps({'ü "q"\\': 1}, ensure_ascii=False))


def test_strings_are_json(vocab):
    for schema in (with_a({"type": "string"}), with_a({"type": "string", "minLength": 1}), {"type": "object"}):
        assert not accepts(vocab, schema, '{"a": "\n"}')
        assert accepts(vocab, schema, '{"a": "\\n"}')


def test_the_callers_schema_is_left_as_it_is():
    schema = with_a({"$ref": "#/$defs/E"}) | {"$defs": {"E": N}}
    before = json.dumps(schema)
    grammar_of_schema(schema, "the schema")
    assert json.dumps(schema) == before
