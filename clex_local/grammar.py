"""Grammars that constrain an answer: from JSON schemas, and as llama.cpp's sampler."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import llama_cpp
from llama_cpp import LlamaGrammar
from llama_cpp.llama_grammar import JSON_GBNF

from clex_local.errors import ClexError
from clex_local.log import ERROR, logged

# What says of which kind a value is; a schema with none of them takes any value.
_KINDS = {"$ref", "additionalProperties", "allOf", "anyOf", "const", "enum", "format", "items", "maxLength"} | {
    *("minLength", "oneOf", "pattern", "prefixItems", "properties", "type")
}
_MOST_NESTED, _MOST_RULES = 500, 10_000
_ANY = {"anyOf": [{"type": kind} for kind in ("string", "number", "boolean", "null", "object", "array")]}


class GrammarError(ClexError, ValueError):
    """A grammar or a JSON schema that cannot constrain an answer."""


def plain_schema(schema: Any, *, top: bool = True) -> Any:
    """A JSON schema without what llama-cpp-python's converter fails on: values, and lists of values, of any kind."""
    if schema is True:
        return _ANY
    if not isinstance(schema, dict):
        return schema
    if not top and not _KINDS & schema.keys():
        return _ANY
    plain = dict(schema)
    if plain.get("items") in ({}, True):
        del plain["items"]
        plain.setdefault("type", "array")
    for key in ("items", "additionalProperties"):
        if isinstance(plain.get(key), dict):
            plain[key] = plain_schema(plain[key], top=False)
    for key in ("allOf", "anyOf", "oneOf", "prefixItems"):
        if isinstance(plain.get(key), list):
            plain[key] = [plain_schema(part, top=False) for part in plain[key]]
    for key in ("properties", "$defs", "definitions"):
        if isinstance(plain.get(key), dict):
            plain[key] = {name: plain_schema(part, top=False) for name, part in plain[key].items()}
    return plain


def grammar_of_schema(schema: Any, what: str) -> LlamaGrammar:
    """The grammar of the JSON texts that a schema describes, a dict or its JSON.

    Raises:
        GrammarError: the schema is none, or asks for what a grammar cannot say; the message begins with `what`.
    """
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(schema, dict):
            raise ValueError(f"it is {type(schema).__name__}, not an object")
        return LlamaGrammar.from_json_schema(json.dumps(plain_schema(schema)), verbose=False)
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
        if schema is None:
            return LlamaGrammar.from_string(JSON_GBNF, verbose=False)
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
