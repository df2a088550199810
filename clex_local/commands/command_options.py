"""Options of commands, made of the fields of `clex_local.commands.options`; texts name fields as commands do."""

from __future__ import annotations

import functools
import os
import re
import typing
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from clex_local.commands.options import Option, options_in

Function = TypeVar("Function", bound=Callable[..., Any])
_FIELD = re.compile(r"`([a-z_][a-z0-9_]*)(?:=([^`\n]*))?`")


def options_from(
    options: type, *, name: str = "options", without: Collection[str] = ()
) -> Callable[[Function], Function]:
    """Decorates a command's function, which gets a dataclass of options that the command's options fill.

    Args:
        options: the dataclass, whose fields are made by `clex_local.commands.options.option`.
        name: the argument by which the function gets it.
        without: fields that stay at their defaults.
    """
    types = typing.get_type_hints(options)
    params = {
        field.name: _click_option(field.name, types[field.name], field.default, known)
        for field, known in options_in(options)
        if known.command and field.name not in without
    }

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **values: Any) -> Any:
            given = {field: values.pop(field) for field in params}
            return function(*args, **values, **{name: options(**given)})

        # As click's own decorators do it, which go from the last to the first.
        call.__dict__.setdefault("__click_params__", []).extend(reversed(params.values()))
        return typing.cast("Function", call)

    return decorate


def given_options(context: click.Context, options: type) -> dict[str, Any]:
    """The fields of a dataclass of options that were given to a command, and are not at their defaults."""
    return {
        field.name: context.params[field.name]
        for field, _ in options_in(options)
        if context.get_parameter_source(field.name) not in (None, click.core.ParameterSource.DEFAULT)
    }


def _click_option(name: str, hint: Any, default: Any, known: Option) -> click.Option:
    flag = "--" + name.replace("_", "-")
    several = typing.get_origin(hint) in (tuple, Sequence) and known.parse is None
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)] or [hint]
    settings: dict[str, Any] = {"type": _click_type(kinds, known), "metavar": known.metavar, "multiple": several}
    if bool in kinds and default is not False:
        flag, settings = f"{flag}/--no-{flag[2:]}", {}
    elif bool in kinds:
        settings = {"is_flag": True}
    elif known.parse is not None:
        settings["callback"] = functools.partial(_parsed, known.parse)
    if known.default_text:
        settings["show_default"] = known.default_text
    letters = [known.short] if known.short else []
    return click.Option([*letters, flag, name], default=default, help=known.help, **settings)


class _Whole(click.IntRange):
    name = "whole number"


class _Number(click.FloatRange):
    name = "number"


def _click_type(kinds: Sequence[Any], known: Option) -> click.ParamType | type:
    bounds: dict[str, Any] = {"min": known.minimum if known.above is None else known.above, "max": known.maximum}
    bounded = any(bound is not None for bound in bounds.values())
    if known.parse is not None:
        return click.UNPROCESSED  # a default is what it would make of a text
    if known.choices is not None:
        return click.Choice(known.choices, case_sensitive=False)
    if any((typing.get_origin(kind) or kind) in (os.PathLike, Path) for kind in kinds):
        return click.Path(path_type=Path)
    if kinds[0] is int:
        return _Whole(**bounds) if bounded else int
    if kinds[0] is float:
        return _Number(**bounds, min_open=known.above is not None) if bounded else float
    return str


def _parsed(parse: Callable[[str], Any], context: click.Context, option: click.Parameter, text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return parse(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def in_options(text: str, params: Iterable[click.Parameter]) -> str:
    """A text with the fields that it names in backticks as a command's options; other backticks stay.

    Args:
        text: such as ``pass `max_factor` or `log_scale=False```.
        params: the command's.
    """
    known = {param.name: param for param in params}

    def spoken(found: re.Match[str]) -> str:
        param, value = known.get(found[1]), found[2]
        if param is None:
            return found[0]
        if isinstance(param, click.Argument):
            return param.human_readable_name if value is None else found[0]
        flag = max(param.opts, key=len)
        if value is None or value == "True":
            return flag
        if value in ("False", "None"):
            return param.secondary_opts[0] if param.secondary_opts else f"no {flag}"
        unquoted = value.strip("'\"")
        return f"{flag} {unquoted}"

    return _FIELD.sub(spoken, text)
