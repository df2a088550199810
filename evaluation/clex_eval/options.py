"""Options that the commands share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import click

from clex_eval.models import Policy
from clex_local.commands.options import documented, option, options_in
from clex_local.runtime.run_options import RunOptions

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


def parse_lengths(text: str) -> tuple[Length, ...]:
    """The lengths of a text such as ``1x,2x`` or ``4096,8k``.

    Raises:
        ValueError: one of them is no length.
    """
    return tuple(_length(part.strip()) for part in text.split(","))


def _length(text: str) -> Length:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(x|k?)", text)
    if not found or (found[2] != "x" and "." in found[1]):
        raise ValueError(f"{text!r} is no length: 4096, 4k, or 2x for twice the original context")
    length = Length(factor=float(found[1])) if found[2] == "x" else Length(int(found[1]) * (1024 if found[2] else 1))
    if not 0 < length.of(1 << 24) < 1 << 31:
        raise ValueError(f"{text!r} is no context length")
    return length


class LengthsType(click.ParamType):
    """Comma-separated context lengths, such as ``1x,2x`` or ``4096,8192``."""

    name = "lengths"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Length, ...]:
        """The lengths of a text."""
        try:
            return value if isinstance(value, tuple) else parse_lengths(value)
        except ValueError as error:
            self.fail(str(error))


LENGTHS = LengthsType()
LENGTHS_HELP = "Context lengths: tokens, or multiples of the model's original context, as 2x."


def lengths_option(default: str) -> Callable[[F], F]:
    """``--lengths``."""
    return click.option("--lengths", metavar="N,N,...", type=LENGTHS, default=default, help=LENGTHS_HELP)


def models_argument(command: F) -> F:
    """MODEL... as ``models``."""
    path = click.Path(exists=True, path_type=Path)
    return click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=path)(command)


def _as_to_run(name: str, **changes: Any) -> Any:
    """The field of `RunOptions`, with another default, and more."""
    field, known = next((field, known) for field, known in options_in(RunOptions) if field.name == name)
    default = changes.pop("default", field.default)
    return option(default, **vars(replace(known, **changes)))


@documented
@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """How evaluated models are run.

    Folders are computed in float32 by transformers; only `ctx`, `clamp` and `threads` concern them.
    """

    ctx: int = option(
        0,
        "Tokens the context holds; 0: all that the tables cover, or that the model was trained for. A model without "
        "tables takes any.",
        metavar="N",
        minimum=0,
    )
    kv_type: str | None = _as_to_run("kv_type", default="f16", default_text=None)
    flash_attn: bool | None = _as_to_run("flash_attn")
    policy: Policy = option(
        "by-length",
        "Which table a sequence gets: that of its length, or the last one whatever its length.",
        choices=("by-length", "fixed"),
    )
    clamp: bool = option(False, "Beyond the last table go on with it, instead of refusing.")
    batch: int = _as_to_run("batch")
    threads: int | None = _as_to_run("threads")
    n_gpu_layers: int = _as_to_run("n_gpu_layers", default=0, default_text=None)
    extend: str | None = _as_to_run("extend")

    def of_models(self, ctx: int) -> dict[str, Any]:
        """The keywords of ``open_for_evaluation`` among them, for a context of so many tokens."""
        return {field.name: getattr(self, field.name) for field in fields(EvalOptions)} | {"ctx": ctx}

    def to_run(self, ctx: int) -> RunOptions:
        """Those for the runtime, for a context of so many tokens."""
        return RunOptions(
            ctx=ctx,
            kv_type=self.kv_type,
            flash_attn=self.flash_attn,
            batch=self.batch,
            threads=self.threads,
            n_gpu_layers=self.n_gpu_layers,
            extend=self.extend,
            prompt_lookup=False,  # guesses are computed in batches, which may round otherwise
            store=False,  # whatever is measured is computed
        )

    def settings(self, *without: str) -> dict[str, Any]:
        """How a report's JSON says them, but for those of some names."""
        return json_settings({name: value for name, value in vars(self).items() if name not in without})


def json_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options under the names that a report's JSON has had for them since version 1."""
    return {_JSON_NAMES.get(name, name): value for name, value in options.items()}


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
