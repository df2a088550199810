"""Which JSON texts a schema's grammar lets through."""

from __future__ import annotations

import json
from typing import Any

import llama_cpp
import numpy as np
import pytest

from clex_local import Llama
from clex_local.grammar.grammar import GrammarError, grammar_of_schema
from clex_local.runtime.sampler import Sampler, SamplerOptions, SamplingError
from helpers.random_gguf import make_model

pytestmark = pytest.mark.runtime

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


S = {"type": "string"}
DATE = {"type": ["string", "null"], "format": "date"}
CLOSED = {"properties": {"q": N}, "required": ["q"], "additionalProperties": False}
OPTIONAL_PATTERN = {"type": ["string", "null"], "pattern": "^[a-c]+$"}
NEXT = {"type": "object", "properties": {"a": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["a"]}
Q = {"properties": {"q": N}, "required": ["q"]}
R = {"properties": {"r": S}, "required": ["r"]}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        # a list of types
        (with_a({"type": ["string", "null"], "enum": ["x", None]}), ["x", None], ["y", 1]),
        (with_a({"type": ["string", "null"], "enum": ["x", 1]}), ["x"], [1, None]),
        (with_a({"type": ["string"], "const": "x"}), ["x"], ["y"]),
        (with_a({"type": ["integer", "null"], "minimum": 1, "maximum": 5}), [1, 5, None], [0, 6]),
        (with_a({"type": ["string", "integer"], "maxLength": 2, "minimum": 7}), ["ab", 7], ["abc", 6]),
        (with_a(OPTIONAL_PATTERN), ["abc", None], ["zzz", ""]),
        (with_a(DATE), ["2024-01-01", None], ["zzz"]),
        (with_a({"type": ["array", "null"], "items": N, "maxItems": 2}), [[], [1, 2], None], [["s"], [1, 2, 3]]),
        (with_a({"type": ["object", "null"], **CLOSED}), [{"q": 1}, None], [{"z": 1}, {}]),
        # an enumeration beside what else excludes of it
        (with_a({**N, "enum": [1, 2, 3, "x", True], "minimum": 2}), [2, 3], [1, "x", True]),
        # a choice, a reference or allOf beside other keywords
        (with_a({"type": "object", **Q, "anyOf": [{"required": ["q"]}]}), [{"q": 1}], [{"z": 1}, {}]),
        (with_a({**Q, "oneOf": [R, {"required": ["s"]}]}), [{"q": 1, "r": "x"}, {"q": 1, "s": [0]}], [{"q": 1}]),
        (with_a({"minimum": 3, "anyOf": [N, {"type": "null"}]}), [3, None], [2]),
        (with_a({"enum": ["x", 1], "anyOf": [N, {"type": "null"}]}), [1], ["x", None]),
        (with_a({"anyOf": [N, S], "oneOf": [S, {"type": "null"}]}), ["x"], [1, None]),
        (with_a({"type": "object", "anyOf": [{"anyOf": [Q, R]}, {"const": {}}]}), [{"q": 1}, {"r": "x"}, {}], [[], 5]),
        (with_a({"$ref": "#/$defs/D", "maximum": 4}) | {"$defs": {"D": {**N, "minimum": 2}}}, [2, 4], [1, 5]),
        (with_a({"allOf": [Q, {"$ref": "#/$defs/D"}]}) | {"$defs": {"D": R}}, [{"q": 1, "r": "x"}], [{"q": 1}]),
        (with_a({"allOf": [Q, {"properties": {"q": {"minimum": 5}}}]}), [{"q": 5}], [{"q": 4}, {}]),
        (with_a({"allOf": [{**N, "minimum": 2}, {"maximum": 4}]}), [2, 4], [1, 5, "x"]),
        (with_a({**CLOSED, "anyOf": [{"required": ["q"]}, R]}), [{"q": 1}], [{"q": 1, "r": "x"}]),
        (with_a({"type": "object", "required": ["q"]}), [{"q": [1]}, {"q": 1, "z": 2}], [{}, {"z": 1}]),
        # draft 4
        (with_a({**N, "minimum": 0, "exclusiveMinimum": True}), [1, 99], [0, -1]),
        (with_a({**N, "minimum": 0, "exclusiveMinimum": False}), [0, 1], [-1]),
        (with_a({**N, "maximum": 9, "exclusiveMaximum": True}), [8, -3], [9]),
        # arrays and strings
        (with_a({"type": "array", "minItems": 1, "maxItems": 2}), [[1], ["x", {}]], [[], [1, 2, 3]]),
        (with_a({"type": "array", "prefixItems": [N, S], "items": False}), [[1, "x"]], [["x", 1], [1, "x", 2]]),
        (with_a({**S, "maxLength": 2500}), ["", "x" * 999, "x" * 1000, "x" * 2001, "x" * 2500], ["x" * 2501]),
        (with_a({**S, "minLength": 2100, "maxLength": 4200}), ["x" * 2100, "x" * 4200], ["x" * 2099, "x" * 4201]),
        (with_a({**S, "minLength": 2001}), ["x" * 2001, "x" * 3000], ["x" * 2000]),
        (with_a({"type": "array", "items": N, "maxItems": 2100}), [[], [1] * 2100], [[1] * 2101]),
        # references
        (NEXT, [None, {"a": None}, {"a": {"a": None}}], [{}, 5]),
        (with_a({"$ref": "#/$defs/a~1b"}) | {"$defs": {"a/b": N}}, [1], ["x"]),
        (with_a({"$ref": "#/$defs/a~0b"}) | {"$defs": {"a~b": N}}, [1], ["x"]),
        (with_a({"$ref": "#/$defs/F%5Bint%5D"}) | {"$defs": {"F[int]": N}}, [1], ["x"]),
        (with_a({"$ref": "#/anyOf/0"}) | {"anyOf": [{}], "$defs": {}}, [1, "x"], []),
    ],
)  # fmt: skip
def test_every_keyword_of_a_schema_holds(vocab, schema, right, wrong):
    for value in [*right, *wrong]:
        text = json.dumps({"a": value}, ensure_ascii=False)
        assert accepts(vocab, schema, text) == (value in right), text[:99]


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        (r"^\d{5}(-\d{4})?$", ["12345", "12345-6789"], ["1234", "12345-", "x"]),
        (r"^(\d{1,3}\.){3}\d{1,3}$", ["1.22.333.4"], ["1.2.3", "1x2.3.4"]),
        (r"^\+?[1-9]\d{1,14}$", ["+4912", "49"], ["+0", "+49123456789012345"]),
        (r"^[\w.-]+@\w+$", ["a_Z9.-@b"], ["a b@c", "@b"]),
        (r"^[A-Z]{2,3}\s[^a-z]*$", ["AB X", 'ABC\t\n"\\é'], ["A X", "AB x"]),
        (r"^\S\D\W$", ["ab!", '""\\'], [" b!", "a1!", "abc"]),
        (r"^[a-z]+", ["a", "abC 1", "a\n"], ["", "1a"]),
        (r"[a-z]$", ["a", "1 2a"], ["a1"]),
        ("abc", ["abc", "xabcx", "ababc"], ["ab", "axbc"]),
        ("^a|b$", ["a", "ax", "xb"], ["xa", "bx"]),
        ("^(a|b|)$", ["a", "b", ""], ["c", "ab"]),
        (r"^(?:x|(?P<n>y))+?\u0041\x42$", ["xyAB", "yAB"], ["AB"]),
        (r'^"\\\n$', ['"\\\n'], ['"\\n']),
        (r"^[^\]\-a]$", ["^", "b"], ["]", "-", "a"]),
        ("^.$", ["x", '"', "é"], ["\n", "xx"]),
        ("^x{0,2500}$", ["", "x" * 2500], ["x" * 2501]),
        ("^{}]$", ["{}]"], ["{}"]),
    ],
)
def test_patterns(vocab, pattern, right, wrong):
    for text in [*right, *wrong]:
        schema = with_a({"type": "string", "pattern": pattern})
        assert accepts(vocab, schema, json.dumps({"a": text}, ensure_ascii=False)) == (text in right), text[:99]


def test_patterns_with_a_length(vocab):
    schema = with_a({"type": "string", "pattern": "^[a-z][a-z0-9_]*$", "minLength": 2, "maxLength": 4})
    for text in ("a", "ab", "a_0b", "abcde", "0a"):
        assert accepts(vocab, schema, json.dumps({"a": text})) == (text in ("ab", "a_0b"))
    assert accepts(vocab, with_a({**S, "pattern": r"^\d{3}$", "maxLength": 9}), '{"a": "123"}')


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({**S, "pattern": r"^(?=x)"}, "a: the pattern"),
        ({**S, "pattern": r"^\bx"}, "a: the pattern"),
        ({**S, "pattern": r"^(a*)*$"}, "a: the pattern .* empty"),
        ({**S, "pattern": "^(a"}, "a: the pattern"),
        ({**S, "pattern": "^a)"}, "a: the pattern"),
        ({**S, "pattern": "^[a"}, "a: the pattern"),
        ({**S, "pattern": "^a*b*$", "maxLength": 3}, "a: the pattern .*maxLength"),
        ({**S, "maxLength": 10**9}, "a: .*maxLength"),
        ({**S, "maxLength": "5"}, "a: maxLength"),
        ({**N, "exclusiveMinimum": True}, "a: exclusiveMinimum"),
        ({**N, "minimum": "1"}, "a: minimum"),
        ({"type": ["string", "text"]}, "a: type"),
        ({"anyOf": []}, "a: anyOf"),
        ({**S, "enum": [1, 2]}, "a: none of the values"),
        ({"allOf": [N, S]}, "a: no value"),
        ({**CLOSED, "allOf": [R]}, r"a(\.r)?: "),
        ({"properties": {"b": {"items": {"$ref": "#/$defs/none"}}}}, r"a\.b: .*\$defs/none"),
        ({"$ref": "https://example.org/x"}, "a: .*example.org"),
        ({"$ref": "#/properties/a"}, "the schema cannot"),
        ({"anyOf": [{"$ref": "#/properties/a"}, N]}, "the schema cannot"),
        ({"allOf": [{"$ref": "#/properties/a"}, N]}, "a: "),
    ],
)
def test_what_cannot_be_a_grammar_is_refused_at_once(schema, message):
    with pytest.raises(GrammarError, match=f"^the schema cannot be made a grammar: .*{message}|^{message}"):
        grammar_of_schema(with_a(schema), "the schema")


def test_a_schema_that_contains_itself_beside_other_keywords(vocab):
    node = {"type": "object", "properties": {"next": {"required": ["v"], "anyOf": [{"$ref": "#/$defs/Node"}]}, "v": N}}
    schema = {"$defs": {"Node": node}, "$ref": "#/$defs/Node"}
    assert accepts(vocab, schema, '{"next": {"v": 1, "next": {"v": 2}}}')
    assert not accepts(vocab, schema, '{"next": {"next": {"v": 2}}}')


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
