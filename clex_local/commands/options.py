"""Options, each written once: a field of a frozen dataclass with its type, default and meaning.

Functions take them as keywords (`takes_options`), commands as options
(`clex_local.commands.command_options.options_from`). Texts here and the messages of errors name fields, in backticks:
`max_factor`, `bake=32768`, `log_scale=False`. Commands show these as their options.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

Keywords = ParamSpec("Keywords")
Options = TypeVar("Options")
First = TypeVar("First")
Second = TypeVar("Second")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Option:
    """What is known of an option besides its name, type and default.

    Attributes:
        help: what it is, in sentences.
        default_text: what is taken where the default is None or empty.
        metavar: what stands for its value in a command's help.
        choices: the values there are.
        minimum, maximum: bounds of a number.
        above: a number must be larger than this.
        short: its one letter in commands, such as ``-v``.
        parse: makes the value of a command's text; raises ValueError with what it must be.
        command: False for what only Python can give.
    """

    help: str
    default_text: str | None = None
    metavar: str | None = None
    choices: Sequence[str] | None = None
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    short: str | None = None
    parse: Callable[[str], Any] | None = None
    command: bool = True


def option(default: Any, help: str, **more: Any) -> Any:
    """A field of a dataclass of options. See `Option` for `more`."""
    return dataclasses.field(default=default, metadata=about(help, **more))


def about(help: str, **more: Any) -> dict[str, Option]:
    """The metadata of such a field, for one without a default."""
    return {"option": Option(help, **more)}


def options_in(options: type) -> list[tuple[dataclasses.Field[Any], Option]]:
    """The fields of a dataclass of options, each with what is known of it."""
    return [(field, field.metadata["option"]) for field in dataclasses.fields(options)]


def json_object(text: str) -> dict[str, Any]:
    """The value of an option `rope_scaling` in a command, for `Option.parse`.

    Raises:
        ValueError: it is no JSON object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    raise ValueError('must be a JSON object, such as {"rope_type": "yarn", "factor": 4}')


def documented(options: type[Options]) -> type[Options]:
    """Decorates a dataclass of options: its docstring gets the meaning of each field."""
    options.__doc__ = f"{inspect.cleandoc(options.__doc__ or '')}\n\nAttributes:\n{_meanings(options)}"
    return options


def takes_options(options: Callable[Keywords, Options]) -> _TakesOptions[Keywords, Options]:
    """Decorates a function whose last argument is a dataclass of options, so that it takes the fields as keywords.

    Type checkers and ``help()`` see the fields. Where the docstring says ``{options}`` in a line of its own, their
    meanings are put. Whoever has a dataclass already passes ``**vars(options)``.
    """
    return _TakesOptions(options)


class _TakesOptions(Generic[Keywords, Options]):
    def __init__(self, options: Callable[Keywords, Options]) -> None:
        self._options: Callable[..., Options] = options

    @overload
    def __call__(
        self, function: Callable[[First, Options], Result]
    ) -> Callable[Concatenate[First, Keywords], Result]: ...
    @overload
    def __call__(
        self, function: Callable[[First, Second, Options], Result]
    ) -> Callable[Concatenate[First, Second, Keywords], Result]: ...
    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)
        *own, last = signature.parameters.values()
        keywords = inspect.signature(self._options).parameters
        taken = signature.replace(parameters=[*own, *keywords.values()])

        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> Any:
            try:
                taken.bind(*args, **given)
            except TypeError as error:  # of this function, not of the dataclass that its caller does not see
                raise TypeError(f"{function.__name__}() {error}") from None
            options = {name: given.pop(name) for name in keywords if name in given}
            return function(*args[: len(own)], **given, **{last.name: self._options(*args[len(own) :], **options)})

        call.__dict__["__signature__"] = taken
        if call.__doc__ and isinstance(self._options, type):
            call.__doc__ = inspect.cleandoc(call.__doc__).replace("    {options}", _meanings(self._options))
        return call


def _meanings(options: type) -> str:
    lines = []
    for field, known in options_in(options):
        default = f" Default: {known.default_text}." if known.default_text else ""
        meaning = textwrap.wrap(f"{field.name}: {known.help}{default}", 112, break_on_hyphens=False)
        lines += textwrap.indent("\n    ".join(meaning), " " * 4).splitlines()
    return "\n".join(lines)
