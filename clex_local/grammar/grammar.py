"""Grammars that constrain an answer: from JSON schemas, and as llama.cpp's sampler."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, floor
from typing import Any

import llama_cpp
from llama_cpp import LlamaGrammar
from llama_cpp.llama_grammar import PRIMITIVE_RULES, RESERVED_NAMES, BuiltinRule, SchemaConverter

from clex_local.errors import LONGEST, ClexError, one_line
from clex_local.grammar.patterns import PatternRules
from clex_local.grammar.schemas import NothingFits, Schema, both, constraints, listed, target
from clex_local.library.log import ERROR, logged

# What says of which kind a value is; a schema with none of them takes any value.
_KINDS = {"$ref", "additionalProperties", "allOf", "anyOf", "const", "enum", "format", "items", "maxLength"} | {
    *("minLength", "oneOf", "pattern", "prefixItems", "properties", "type")
}
_MOST_NESTED, _MOST_RULES = 500, 10_000
_MOST = 10**15 - 1  # of a number, as in llama-cpp-python's rules
_ARRAYS = {"items", "prefixItems", "minItems", "maxItems"}
_FORMATS = {"date", "date-time", "time", "uuid", *(f"uuid{version}" for version in range(1, 6))}
_MOST_JOINED = 100
_MOST_TOLD = 8
_CHUNK, _MOST_REPEATED = 1000, 100_000
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_CHARACTER = BuiltinRule(PRIMITIVE_RULES["char"].content.replace('[^"\\\\]', '[^"\\\\\\x7F\\x00-\\x1F]'))


class GrammarError(ClexError, ValueError):
    """A grammar or a JSON schema that cannot constrain an answer."""


@dataclass(frozen=True)
class _Rule:
    """A property's schema that has become a rule."""

    name: str


@dataclass(frozen=True)
class _Both:
    """An alternative, and what stands beside the choice."""

    rest: Schema
    alternative: Any


class _Converter(SchemaConverter):
    """llama-cpp-python's, without what it takes for something else or lets through."""

    def __init__(self, root: Schema) -> None:
        super().__init__(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
        self._root = root
        self._patterns = PatternRules(
            lambda rule: self._add_rule("part-of-pattern", rule),
            lambda rule, low, high: self._repeated(rule, low, high, "a number in a pattern"),
        )
        self._names: dict[str, str] = {}  # rules of references and of what was combined

    def visit(self, schema: Any, name: str) -> str:
        if isinstance(schema, _Rule):
            return schema.name
        schema = constraints(schema)
        if schema.keys() - {"$ref"} and {"$ref", "allOf", "anyOf", "oneOf"} & schema.keys():
            return self._visit_combined(schema, name)
        rule_name = f"{name}-" if name in RESERVED_NAMES else name or "root"
        if (values := listed(schema)) is not None:
            return self._add_rule(rule_name, " | ".join(map(self._generate_constant_rule, values)))
        kind = schema.get("type")
        if isinstance(kind, list):
            return self._visit_union([{**schema, "type": each} for each in kind], name)
        if name and not _KINDS & schema.keys():
            return self._add_primitive("value", PRIMITIVE_RULES["value"])
        if kind == "integer" and _BOUNDS & schema.keys():
            return self._add_rule(rule_name, _integers(schema))
        if kind in (None, "array") and _ARRAYS & schema.keys():
            return self._add_rule(rule_name, self._array(schema, name))
        if kind in (None, "string"):
            low, high = schema.get("minLength", 0), schema.get("maxLength")
            if "pattern" in schema:
                text = self._patterns.of(schema["pattern"], low, high)
                return self._add_rule(rule_name, rf'"\"" {text} "\"" space')
            if (low or high is not None) and kind and f"{schema.get('format')}" not in _FORMATS:
                text = self._repeated(self._add_primitive("char", _CHARACTER), low, high, "minLength or maxLength")
                return self._add_rule(rule_name, rf'"\"" {text} "\"" space')
        return super().visit(_with_required(schema), name)

    def _array(self, schema: Schema, name: str) -> str:
        items, prefix = schema.get("items", True), schema.get("prefixItems")
        prefix = items if isinstance(items, list) else prefix
        sub = f"{name}-" if name else ""
        if isinstance(prefix, list):
            prefix = prefix[: schema.get("maxItems")]
            if schema.get("minItems", 0) > len(prefix):
                raise ValueError("minItems is more than there are prefixItems")
            rules = [self.visit(each, f"{sub}tuple-{number}") for number, each in enumerate(prefix)]
            together = ' "," space '.join(rules)
            return f'"[" space {together} "]" space'
        try:
            item = self.visit(items, f"{sub}item")
        except NothingFits:
            if schema.get("minItems", 0):
                raise
            return '"[" space "]" space'
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        if high == 0 and not low:
            return '"[" space "]" space'
        more = self._add_rule(f"{sub}more-items", f'"," space {item}')
        most = None if high is None else high - 1
        several = f"{item} {self._repeated(more, max(0, low - 1), most, 'minItems or maxItems')}"
        return f'"[" space {several if low else f"( {several} )?"} "]" space'

    def _repeated(self, rule: str, low: int, high: int | None, what: str) -> str:
        """A rule from a least to a most number of times, which is what asks for them.

        llama.cpp takes a number above 2000 for none, and nests parentheses where the bindings write them.
        """
        if high is not None and low > high:
            raise NothingFits(f"{what} asks for at least {low:,} and at most {high:,}")
        if max(low, high or 0) > _MOST_REPEATED:
            raise ValueError(f"{what} is more than {_MOST_REPEATED:,}, which is too much for a grammar")
        thousand = f"{rule}{{{_CHUNK}}}"
        if max(low, (high or 0) - low) > _CHUNK:
            thousand = self._add_rule(f"{rule}-x{_CHUNK}", thousand)
        parts = [f"{thousand}{{{low // _CHUNK}}}"] if low > _CHUNK else []
        rest = low % _CHUNK if parts else low
        parts += [f"{rule}{{{rest}}}"] if rest else []
        if high is None:
            return " ".join([*parts, f"{rule}*"])
        more, rest = divmod(high - low, _CHUNK)
        if not more and rest:
            parts.append(f"{rule}{{0,{rest}}}")
        elif more:
            last = self._add_rule(f"{rule}-to-{rest}", f"{rule}{{0,{rest}}}" if rest else '""')
            for number in range(1, more + 1):
                # One way only to read each length, or llama.cpp follows all of them at once.
                text = f"{rule}{{0,{_CHUNK - 1}}} | {rule}-x{_CHUNK} {last}"
                last = self._add_rule(f"{rule}-to-{rest + number * _CHUNK}", text)
            parts.append(last)
        return " ".join(parts)

    def _visit_combined(self, schema: Schema, name: str) -> str:
        """What stands beside a reference or a choice holds too; upstream's does not look at it."""
        if not name:
            return self._visit_choice(self._joined(schema), name)
        key = json.dumps(schema)
        # A schema that contains itself comes here again.
        return self._named(key, "combined", lambda name: self._visit_choice(self._joined(schema), name))

    def _named(self, key: str, what: str, visit: Callable[[str], str]) -> str:
        """The rule of what may contain itself, by a name that no property gives."""
        if key not in self._names:
            name = self._names[key] = f"{what}-{len(self._names)}-of-schema"
            try:
                rule = visit(name)
            except Exception:
                del self._names[key]
                raise
            if rule == name and name not in self._rules:
                raise ValueError("a reference leads to itself")
            if rule != name:
                self._rules[name] = rule
        return self._names[key]

    def _joined(self, schema: Schema) -> Schema:
        """A schema without references and ``allOf``, or one of nothing but a reference."""
        for _ in range(_MOST_JOINED):
            if "$ref" in schema and len(schema) > 1:
                rest = {key: value for key, value in schema.items() if key != "$ref"}
                schema = both(constraints(target(self._root, schema["$ref"])), rest)
            elif "allOf" in schema:
                parts = schema["allOf"]
                schema = {key: value for key, value in schema.items() if key != "allOf"}
                for given in parts:
                    part = constraints(given)
                    if part.keys() == {"$ref"} and (schema or len(parts) > 1):  # properties keep their order
                        part = constraints(target(self._root, part["$ref"]))
                    schema = both(schema, part)
            else:
                return schema
        raise ValueError("its references and allOf have no end")

    def _visit_choice(self, schema: Schema, name: str) -> str:
        """As each alternative, with what stands beside the choice."""
        choice = next((key for key in ("anyOf", "oneOf") if key in schema), None)
        if choice is None:
            return self.visit(schema, name)
        rest = {key: value for key, value in schema.items() if key != choice}
        return self._visit_union([_Both(rest, alternative) for alternative in schema[choice]], name)

    def _visit_union(self, alternatives: Sequence[Any], name: str) -> str:
        """Any of the alternatives that a value can fulfil."""
        rules, reason = [], NothingFits("there is no alternative")
        for number, alternative in enumerate(alternatives):
            try:
                if isinstance(alternative, _Both):
                    alternative = both(alternative.rest, constraints(alternative.alternative))
                rules.append(self.visit(alternative, f"{name}-{number}" if name else f"alternative-{number}"))
            except NothingFits as error:
                reason = error
        if not rules:
            raise reason
        return self._add_rule(f"{name}-" if name in RESERVED_NAMES else name or "root", " | ".join(rules))

    def _build_object_rule(
        self, properties: list[tuple[str, Any]], required: set[str], name: str, additional_properties: Any
    ) -> str:
        rules: list[tuple[str, Any]] = []
        for key, schema in properties:
            try:
                rules.append((key, _Rule(self.visit(schema, f"{name}-{key}" if name else key))))
            except Exception as error:
                if not isinstance(error, NothingFits) or key in required:
                    error.__dict__["path"] = [key, *getattr(error, "path", [])]
                    raise
        return super()._build_object_rule(rules, required, name, additional_properties)

    def _format_literal(self, literal: str) -> str:
        text = json.dumps(json.loads(literal), ensure_ascii=False)
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    def _add_primitive(self, name: str, rule: BuiltinRule) -> str:
        # A string with a raw line break is no JSON.
        return super()._add_primitive(name, _CHARACTER if name == "char" else rule)

    def _resolve_ref(self, ref: str) -> str:
        # Upstream's takes a rule of the same name, such as that of a property, for the definition.
        return self._named(f"$ref {ref}", "definition", lambda name: self.visit(target(self._root, ref), name))


def _with_required(schema: Schema) -> Schema:
    """Required properties of which nothing else is said are properties too."""
    properties, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
    missing = [key for key in schema.get("required", ()) if key not in properties]
    if not missing or schema.get("type") not in (None, "object"):
        return schema
    if rest is False:
        raise NothingFits(f"{', '.join(missing)} is required, but is none of the properties")
    added = {**properties, **dict.fromkeys(missing, rest)}
    return {**schema, "properties": added, **({} if "properties" in schema else {"additionalProperties": rest})}


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

    Properties come in the schema's order, the required ones first; no others unless ``additionalProperties`` says so.
    Bounds of numbers that are not whole, and what a grammar cannot say (``uniqueItems`` ...), do not constrain.

    Raises:
        GrammarError: the schema is none, or of a kind that is not known; the message begins with `what`.
    """
    try:
        schema = json.loads(schema if isinstance(schema, str) else json.dumps(schema))  # a copy, it will be changed
        if not isinstance(schema, dict):
            raise ValueError(f"it is {type(schema).__name__}, not an object")
        converter = _Converter(schema)
        converter.visit(schema, "")
        grammar = LlamaGrammar.from_string(converter.format_grammar(), verbose=False)
        llama_cpp.llama_sampler_free(grammar_sampler(None, grammar))  # what llama.cpp refuses is told at once
        return grammar
    except Exception as error:  # the converter raises what it happens to run into, AssertionError among others
        reason = one_line(error, LONGEST)
        path = ".".join(getattr(error, "path", [])[:_MOST_TOLD])
        raise GrammarError(f"{what} cannot be made a grammar: {f'{path}: ' if path else ''}{reason}") from error


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
