"""JSON schemas as sets of values: what several of them that all hold have in common."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote

Schema = dict[str, Any]

# What says nothing of a value.
_REMARKS = {"$anchor", "$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description"} | {
    *("discriminator", "example", "examples", "nullable", "readOnly", "title", "writeOnly")
}
_LARGEST = {"minimum", "exclusiveMinimum", "minLength", "minItems"}
_SMALLEST = {"maximum", "exclusiveMaximum", "maxLength", "maxItems"}
_CHOICES = ("anyOf", "oneOf")
_KINDS: dict[str, tuple[type, ...]] = {
    "array": (list,),
    "boolean": (bool,),
    "integer": (int,),
    "null": (type(None),),
    "number": (int, float),
    "object": (dict,),
    "string": (str,),
}


class NothingFits(ValueError):
    """Schemas that no value fulfils all of."""


def constraints(schema: Any) -> Schema:
    """A schema as an object, without remarks; with numbers for bounds that draft 4 marks as exclusive.

    Raises:
        NothingFits: it is false.
        TypeError: it is no schema.
    """
    if schema is False:
        raise NothingFits("no value fulfils the schema false")
    if schema is True:
        return {}
    if not isinstance(schema, Mapping):
        raise TypeError(f"{schema!r} is no schema")
    result = {key: value for key, value in schema.items() if key not in _REMARKS}
    for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(result.get(exclusive), bool) and result.pop(exclusive):
            if bound not in result:
                raise ValueError(f"{exclusive} is true, but there is no {bound}")
            result[exclusive] = result.pop(bound)
    for name in ("properties", "$ref", "enum", "allOf", *_CHOICES):
        kind = {"properties": Mapping, "$ref": str}.get(name, list)
        if name in result and (not isinstance(result[name], kind) or (kind is list and not result[name])):
            raise ValueError(f"{name} cannot be {result[name]!r}")
    for name in sorted((_LARGEST | _SMALLEST) & result.keys()):
        value = result[name]
        if isinstance(value, bool) or not isinstance(
            value, int if name.endswith(("Length", "Items")) else (int, float)
        ):
            raise ValueError(f"{name} cannot be {value!r}")
        if kind == "integer":
            result[name] = int(value)
    for kind in types(result) or ():
        if kind not in _KINDS:
            raise ValueError(f"type cannot be {kind!r}")
    return result


def target(root: Any, reference: str) -> Any:
    """What a reference within a schema stands for, which is a JSON pointer (RFC 6901) as the fragment of a URL.

    Raises:
        ValueError: there is no such thing.
    """
    if reference != "#" and not reference.startswith("#/"):
        raise ValueError(f'the $ref "{reference}" is none to a place in the schema, such as "#/$defs/name"')
    for part in unquote(reference).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        try:
            root = root[int(key) if isinstance(root, list) else key]
        except (KeyError, IndexError, TypeError, ValueError):
            raise ValueError(f'the $ref "{reference}" is to nothing in the schema') from None
    return root


def types(schema: Schema) -> list[str] | None:
    """The types that a schema names, None where it names none."""
    kinds = schema.get("type")
    return kinds if isinstance(kinds, list) else None if kinds is None else [kinds]


def possible(values: Iterable[Any], schema: Schema) -> list[Any]:
    """Those of the values that are of the schema's types, in its enumeration and within its bounds."""
    return [value for value in values if _fits(value, schema)]


def _fits(value: Any, schema: Schema) -> bool:
    if (kinds := types(schema)) is not None and not any(_is_of(value, kind) for kind in kinds):
        return False
    if any(_text(value) not in map(_text, listed) for listed in _listed(schema)):
        return False
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (
            value >= schema.get("minimum", value)
            and value <= schema.get("maximum", value)
            and not value <= schema.get("exclusiveMinimum", value - 1)
            and not value >= schema.get("exclusiveMaximum", value + 1)
        )
    if isinstance(value, (str, list)):
        unit = "Length" if isinstance(value, str) else "Items"
        return schema.get(f"min{unit}", 0) <= len(value) <= schema.get(f"max{unit}", len(value))
    return True


def _listed(schema: Schema) -> list[list[Any]]:
    return ([schema["enum"]] if "enum" in schema else []) + ([[schema["const"]]] if "const" in schema else [])


def listed(schema: Schema) -> list[Any] | None:
    """The values that ``enum`` and ``const`` leave, None where neither is given.

    Raises:
        NothingFits: the other keywords exclude all of them.
    """
    lists = _listed(schema)
    if not lists:
        return None
    values = possible(lists[0], schema)
    if not values:
        raise NothingFits(f"none of the values {_text(lists[0])} fulfils the other keywords")
    return values


def _is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _KINDS[kind])


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def both(one: Schema, other: Schema) -> Schema:
    """The schema of what fulfils two schemas, as `constraints` gives them.

    Raises:
        NothingFits: nothing does.
        ValueError: a keyword that both have cannot be said once.
    """
    result: Schema = {**one, **other}
    for key in one.keys() & other.keys():
        mine, theirs = one[key], other[key]
        if key == "type":
            result[key] = _common_types(types(one) or [], types(other) or [])
        elif key in _LARGEST:
            result[key] = max(mine, theirs)
        elif key in _SMALLEST:
            result[key] = min(mine, theirs)
        elif key == "required":
            result[key] = list(dict.fromkeys([*mine, *theirs]))
        elif key == "allOf":
            result[key] = [*mine, *theirs]
        elif key == "enum":
            result[key] = [value for value in mine if _text(value) in map(_text, theirs)]
            if not result[key]:
                raise NothingFits("two lists of values have none in common")
        elif key in ("items", "additionalProperties"):
            result[key] = _together(mine, theirs)
        elif key in _CHOICES:
            result[key] = [{"allOf": [this, that]} for this in mine for that in theirs]
        elif key == "$ref" and mine != theirs:
            result["allOf"] = [*result.get("allOf", []), {key: mine}]
        elif key == "const" and _text(mine) != _text(theirs):
            raise NothingFits(f"no value is both {_text(mine)} and {_text(theirs)}")
        elif key != "properties" and mine != theirs:
            raise ValueError(f"{key} is given twice, as {_text(mine)} and {_text(theirs)}")
    if "properties" in one or "properties" in other:
        result["properties"] = _common_properties(one, other)
    return result


def _common_types(mine: list[str], theirs: list[str]) -> list[str] | str:
    kinds = [kind for kind in mine if kind in theirs or (kind == "integer" and "number" in theirs)]
    kinds += [kind for kind in theirs if kind == "integer" and "number" in mine and kind not in kinds]
    if not kinds:
        raise NothingFits(f"no value is of the types {' or '.join(mine)} and {' or '.join(theirs)}")
    return kinds[0] if len(kinds) == 1 else kinds


def _common_properties(one: Schema, other: Schema) -> Schema:
    """As one says nothing of a property, what it says of additional ones holds."""
    sides = [(side.get("properties", {}), side.get("additionalProperties", True)) for side in (one, other)]
    names = dict.fromkeys(name for properties, _ in sides for name in properties)
    return {name: _together(*(properties.get(name, rest) for properties, rest in sides)) for name in names}


def _together(mine: Any, theirs: Any) -> Any:
    if mine is True or mine == theirs:
        return theirs
    if theirs is True:
        return mine
    if False in (mine, theirs):
        return False
    return {"allOf": [mine, theirs]}
