"""Options that the commands share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from clex_local.memory import KV_TYPES

F = TypeVar("F", bound=Callable[..., Any])
_JSON_NAMES = {"ctx": "context", "kv_type": "cache_type"}


@dataclass(frozen=True)
class Length:
    """A context length: tokens, or a multiple of a model's original context length."""

    tokens: int = 0
    factor: float = 0.0

    def of(self, original: int) -> int:
        """Tokens of it for a model of this original context length."""
        return self.tokens or max(int(self.factor * original), 1)

    def __str__(self) -> str:
        return f"{self.factor:g}x" if self.factor else str(self.tokens)


class LengthsType(click.ParamType):
    """Comma-separated context lengths, such as ``1x,2x`` or ``4096,8192``."""

    name = "lengths"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Length, ...]:
        """The lengths of a text."""
        return value if isinstance(value, tuple) else tuple(self._length(part.strip()) for part in value.split(","))

    def _length(self, text: str) -> Length:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(x|k?)", text)
        if not found or (found[2] != "x" and "." in found[1]):
            self.fail(f"{text!r} is no length: 4096, 4k, or 2x for twice the original context")
        length = (
            Length(factor=float(found[1])) if found[2] == "x" else Length(int(found[1]) * (1024 if found[2] else 1))
        )
        if not 0 < length.of(1 << 24) < 1 << 31:
            self.fail(f"{text!r} is no context length")
        return length


LENGTHS = LengthsType()


def lengths_option(default: str | None = None) -> Callable[[F], F]:
    """``--lengths``, with a default; without one None stands for what the tables cover of 1x, 2x, 4x and 8x."""
    return click.option(
        "--lengths",
        metavar="N,N,...",
        type=LENGTHS,
        default=default,
        show_default=True if default else "1x,2x,4x,8x, as far as the tables go",
        help="Context lengths: tokens, or multiples of the model's original context, as 2x.",
    )


def model_options(command: F) -> F:
    """MODEL... as ``models``, and how they are run: keyword arguments of ``open_for_evaluation``, without ``ctx``."""
    return _all(
        command,
        click.argument(
            "models", metavar="MODEL...", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path)
        ),
        click.option(
            "--kv-type",
            metavar="TYPE",
            type=click.Choice(list(KV_TYPES)),
            default="f16",
            help=f"Type of the key and value cache: {', '.join(KV_TYPES)}.",
        ),
        click.option(
            "--flash-attn/--no-flash-attn",
            default=None,
            show_default="where it is faster or needed",
            help="Flash attention.",
        ),
        click.option(
            "--policy",
            type=click.Choice(["by-length", "fixed"]),
            default="by-length",
            help="Which table a sequence gets: that of its length, or the last one whatever its length.",
        ),
        click.option("--clamp", is_flag=True, help="Beyond the last table go on with it, instead of refusing."),
        click.option(
            "--batch", metavar="N", type=click.IntRange(min=1), default=512, help="Prompt tokens computed at once."
        ),
        click.option(
            "--threads",
            metavar="N",
            type=click.IntRange(min=1),
            show_default="the physical cores",
            help="Threads to compute with.",
        ),
        click.option(
            "--n-gpu-layers",
            metavar="N",
            type=click.IntRange(min=-1),
            default=0,
            help="Layers computed on a GPU; -1: all.",
        ),
    )


def output_options(command: F) -> F:
    """``--plot`` as ``picture``, ``--json`` as ``as_json``."""
    return _all(
        command,
        click.option(
            "--plot",
            "picture",
            metavar="OUT",
            type=click.Path(path_type=Path, dir_okay=False),
            help="Draw the result into OUT.png or OUT.svg.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object in place of the table."),
    )


def json_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """How a report's JSON says with which options it was measured, under the names that it has had since version 1."""
    return {_JSON_NAMES.get(name, name): value for name, value in options.items()}


def _all(command: F, *decorators: Callable[[F], F]) -> F:
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def names(models: Sequence[Path]) -> list[str]:
    """A name for each model: that of the file or folder, with as much of the path as tells them apart."""
    for parts in range(1, max(len(path.parts) for path in models) + 1):
        found = [str(Path(*path.parts[-parts:])).removesuffix(".gguf") for path in models]
        if len(set(found)) == len(set(models)):
            break
    return found
