"""Grammars that constrain an answer: from JSON schemas, and as llama.cpp's sampler."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import accumulate
from math import ceil, floor
from typing import Any

import llama_cpp
from llama_cpp import LlamaGrammar
from llama_cpp.llama_grammar import PRIMITIVE_RULES, RESERVED_NAMES, BuiltinRule, SchemaConverter

from clex_local.errors import ClexError
from clex_local.log import ERROR, logged

# What says of which kind a value is; a schema with none of them takes any value.
_KINDS = {"$ref", "additionalProperties", "allOf", "anyOf", "const", "enum", "format", "items", "maxLength"} | {
    *("minLength", "oneOf", "pattern", "prefixItems", "properties", "type")
}
_MOST_NESTED, _MOST_RULES = 500, 10_000
_MOST = 10**15 - 1  # of a number, as in llama-cpp-python's rules
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_CHARACTER = BuiltinRule(PRIMITIVE_RULES["char"].content.replace('[^"\\\\]', '[^"\\\\\\x7F\\x00-\\x1F]'))


class GrammarError(ClexError, ValueError):
    """A grammar or a JSON schema that cannot constrain an answer."""


class _Converter(SchemaConverter):
    """llama-cpp-python's, without what it takes for something else or lets through."""

    def __init__(self) -> None:
        super().__init__(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
        self._names: dict[str, str] = {}  # rules of references

    def visit(self, schema: Any, name: str) -> str:
        schema = {} if schema is True else schema
        if not isinstance(schema, dict):
            raise TypeError(f"{schema!r} is no schema")
        if schema.get("items") in ({}, True):
            schema = {"type": "array", **{key: value for key, value in schema.items() if key != "items"}}
        parts = schema.get("allOf")
        if isinstance(parts, list) and len(parts) == 1 and "properties" not in schema:
            return self.visit({**{key: value for key, value in schema.items() if key != "allOf"}, **parts[0]}, name)
        if name and not _KINDS & schema.keys():
            return self._add_primitive("value", PRIMITIVE_RULES["value"])
        if schema.get("type") == "integer" and _BOUNDS & schema.keys() and not {"const", "enum"} & schema.keys():
            return self._add_rule(f"{name}-" if name in RESERVED_NAMES else name or "root", _integers(schema))
        return super().visit(schema, name)

    def _format_literal(self, literal: str) -> str:
        text = json.dumps(json.loads(literal), ensure_ascii=False)
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    def _add_primitive(self, name: str, rule: BuiltinRule) -> str:
        # A string with a raw line break is no JSON.
        return super()._add_primitive(name, _CHARACTER if name == "char" else rule)

    def _resolve_ref(self, ref: str) -> str:
        # Upstream's takes a rule of the same name, such as that of a property, for the definition.
        if ref not in self._names:
            self._names[ref] = f"definition-{len(self._names)}-of-schema"
            self._names[ref] = self.visit(self._refs[ref], self._names[ref])
        return self._names[ref]


def _integers(schema: dict[str, Any]) -> str:
    """The rule of the whole numbers between the bounds of a schema."""
    low = max(ceil(schema.get("minimum", -_MOST)), floor(schema.get("exclusiveMinimum", -_MOST - 1)) + 1)
    high = min(floor(schema.get("maximum", _MOST)), ceil(schema.get("exclusiveMaximum", _MOST + 1)) - 1)
    if low > high:
        raise ValueError(f"no whole number lies between {low} and {high}")
    alternatives = []
    if low < 0:
        alternatives.append(f'"-" ({_naturals(max(1, -high), -low)})')
    if high >= 0:
        alternatives.append(_naturals(max(0, low), high))
    return f"({' | '.join(alternatives)}) space"


def _naturals(low: int, high: int) -> str:
    lengths = range(len(str(low)), len(str(high)) + 1)
    return " | ".join(
        _digits(str(low) if n == lengths[0] else "1" + "0" * (n - 1), str(high) if n == lengths[-1] else "9" * n)
        for n in lengths
    )


def _digits(low: str, high: str) -> str:
    """The rule of the numbers between two of as many digits."""
    if not low:
        return '""'
    rest = len(low) - 1
    if low == "0" * len(low) and high == "9" * len(high):
        return f"[0-9]{{{len(low)}}}"
    if low[0] == high[0]:
        return f'"{low[0]}" ({_digits(low[1:], high[1:])})' if rest else f'"{low[0]}"'
    if not rest:
        return f"[{low}-{high}]"
    first, last = int(low[0]), int(high[0])
    alternatives = [f'"{first}" ({_digits(low[1:], "9" * rest)})', f'"{last}" ({_digits("0" * rest, high[1:])})']
    if last - first > 1:
        alternatives.append(f"[{first + 1}-{last - 1}] [0-9]{{{rest}}}")
    return " | ".join(alternatives)


def grammar_of_schema(schema: Any, what: str) -> LlamaGrammar:
    """The grammar of the JSON texts that a schema describes, a dict or its JSON.

    Bounds of numbers that are not whole, and what a grammar cannot say (``uniqueItems`` ...), do not constrain.

    Raises:
        GrammarError: the schema is none, or of a kind that is not known; the message begins with `what`.
    """
    try:
        schema = json.loads(schema if isinstance(schema, str) else json.dumps(schema))  # a copy, it will be changed
        if not isinstance(schema, dict):
            raise ValueError(f"it is {type(schema).__name__}, not an object")
        if "$ref" in schema:  # what stands beside a reference is not looked at
            schema["allOf"] = [{"$ref": schema.pop("$ref")}]
        converter = _Converter()
        converter.visit(converter.resolve_refs(schema, "schema"), "")
        return LlamaGrammar.from_string(converter.format_grammar(), verbose=False)
    except Exception as error:  # the converter raises what it happens to run into, AssertionError among others
        reason = " ".join(str(error).split()) or type(error).__name__
        raise GrammarError(f"{what} cannot be made a grammar: {reason}") from error


def grammar_of_response_format(request: Any) -> LlamaGrammar | None:
    """The grammar that a ``response_format`` asks for, None for any text.

    llama-cpp-python's chat handlers ignore ``{"type": "json_schema", "json_schema": {"schema": ...}}``, which OpenAI's
    clients send (llama-cpp-python's #1677), and every type that they do not know; where they cannot convert a schema,
    any JSON will do.

    Raises:
        GrammarError: it is of another type, or its schema cannot be converted.
    """
    kind = request.get("type") if isinstance(request, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        schema = request.get("schema")
        schema = {"type": "object"} if schema is None else schema
    elif kind == "json_schema":
        inner = request.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if schema is None:
            raise GrammarError('response_format of type json_schema needs {"json_schema": {"schema": ...}}')
    else:
        raise GrammarError(f"response_format must be of type text, json_object or json_schema, not {kind!r}")
    return grammar_of_schema(schema, "the schema of response_format")


def grammar_sampler(vocab: Any, grammar: Any) -> Any:
    """llama.cpp's sampler of a grammar, to be freed by the caller.

    The bindings put into their chain whatever they get, which is a null pointer for an invalid grammar (since
    llama.cpp's #12628), and a sampler that does nothing for an empty one.

    Raises:
        GrammarError: it is no ``LlamaGrammar``, or llama.cpp does not take it.
    """
    text, root = getattr(grammar, "_grammar", None), getattr(grammar, "_root", "root")
    if not isinstance(text, str) or not isinstance(root, str):
        raise GrammarError(
            f"a grammar must be a LlamaGrammar of llama-cpp-python {llama_cpp.__version__}, not "
            f"{type(grammar).__name__}; LlamaGrammar.from_string makes one"
        )
    if not text.strip():
        raise GrammarError("the grammar is empty")
    if "\0" in text:
        raise GrammarError("the grammar contains a null character")
    # llama.cpp calls itself for each of them, and ends the process where its stack does.
    depth = max(accumulate({"(": 1, ")": -1}.get(character, 0) for character in text))
    if depth > _MOST_NESTED or text.count("::=") > _MOST_RULES:
        raise GrammarError(
            f"the grammar has more than {_MOST_NESTED} parentheses in each other, or more than {_MOST_RULES:,} rules"
        )
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise GrammarError(f"the grammar is no Unicode text: {error.reason}") from None
    with logged(ERROR) as errors:
        sampler = llama_cpp.llama_sampler_init_grammar(vocab, data, root.encode())
    if not sampler:
        # The first says why; what is wrong is quoted up to the end of the grammar.
        reason = errors[0].split("error parsing grammar: ")[-1].splitlines()[0] if errors else "llama.cpp refuses it"
        raise GrammarError(f"the grammar is not valid: {reason}")
    return sampler
