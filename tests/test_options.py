"""Options that are written once, as fields of a dataclass: as keywords of functions and as options of commands."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from clex_local.commands.command import SETTINGS, Command, Group
from clex_local.commands.command_options import in_options, options_from
from clex_local.commands.options import documented, json_object, option, takes_options
from clex_local.errors import ClexError

pytestmark = pytest.mark.convert


@documented
@dataclass(frozen=True, kw_only=True)
class Brewing:
    """How tea is made."""

    leaf: str | None = option(
        None, "Kind of leaves.", choices=("black", "green"), default_text="black where `cups` > 1"
    )
    cups: int = option(1, "How many, with `leaf=green` at most 3.", minimum=1, metavar="N", short="-n")
    minutes: float = option(2.5, "How long.", above=0)
    sugar: bool = option(False, "With sugar.")
    milk: bool | None = option(None, "With milk.")
    pot: str | os.PathLike[str] | None = option(None, "Where.")
    herbs: Sequence[str] = option((), "What else.")
    degrees: Sequence[float] | None = option(None, "Course.", parse=lambda text: [float(part) for part in text.split()])
    waiter: object = option(None, "Whom to tell.", command=False)


@takes_options(Brewing)
def brew(kettle: str, options: Brewing) -> Brewing:
    """Makes tea.

    Args:
        kettle: of water.
        {options}
    """
    if options.cups > 9:
        raise ClexError(f"{kettle}: too small for `cups={options.cups}`; pass `milk=False`, `sugar=True` or `other=1`")
    return options


def run(*arguments: str) -> tuple[Brewing | None, click.testing.Result]:
    made = []

    @click.command("brew", cls=Command, context_settings=SETTINGS)
    @click.argument("kettle", metavar="KETTLE")
    @options_from(Brewing)
    @click.option("--twice", is_flag=True)
    def main(kettle: str, twice: bool, options: Brewing) -> None:
        made.append(brew(kettle, **vars(options)))

    result = CliRunner().invoke(main, arguments)
    return (made[0] if made else None), result


def test_functions_take_the_fields_as_keywords():
    assert brew("k", cups=3, milk=False) == Brewing(cups=3, milk=False)
    assert brew(kettle="k") == Brewing()
    with pytest.raises(TypeError, match=r"brew\(\) got an unexpected keyword argument 'cup'"):
        brew("k", cup=3)
    parameters = inspect.signature(brew).parameters
    assert list(parameters) == ["kettle", *inspect.signature(Brewing).parameters]
    assert parameters["minutes"].default == 2.5


@pytest.mark.parametrize(
    ("positional", "keywords", "message"),
    [
        (("k", 3), {}, "brew() too many positional arguments"),
        (("k",), {"options": Brewing()}, "brew() got an unexpected keyword argument 'options'"),
        ((), {"cups": 3}, "brew() missing a required argument: 'kettle'"),
    ],
)
def test_a_wrong_call_is_said_of_the_function_and_not_of_what_it_is_made_of(positional, keywords, message):
    with pytest.raises(TypeError) as caught:
        brew(*positional, **keywords)
    assert str(caught.value) == message


def test_help_has_the_meaning_of_every_field():
    for text in (brew.__doc__, Brewing.__doc__):
        assert "leaf: Kind of leaves. Default: black where `cups` > 1." in text
        assert "waiter: Whom to tell." in text
    assert "{options}" not in brew.__doc__


def test_commands_fill_the_dataclass():
    given = "--leaf green -n 3 --minutes 4 --sugar --no-milk --pot blue --herbs a --herbs b"
    made, result = run("k", *given.split(), "--degrees", "9 8")
    assert result.exit_code == 0
    assert made == Brewing(
        leaf="green", cups=3, minutes=4.0, sugar=True, milk=False, pot=Path("blue"), herbs=("a", "b"), degrees=[9, 8]
    )
    assert run("k")[0] == Brewing()


def test_the_help_of_commands_names_options():
    text = " ".join(run("--help")[1].output.split())
    assert "-n, --cups N How many, with --leaf green at most 3. [default: 1; x>=1]" in text
    assert "[default: (black where --cups > 1)]" in text
    assert "waiter" not in text


@pytest.mark.parametrize(
    "wrong", [["--leaf", "red"], ["--cups", "0"], ["--minutes", "0"], ["--degrees", "hot"], ["--milk", "--nothing"]]
)
def test_wrong_values_are_usage_errors_in_one_line(wrong):
    made, result = run("k", *wrong)
    assert (made, result.exit_code, len(result.output.splitlines())) == (None, 2, 1)


def test_errors_of_commands_name_options():
    expected = "brew: error: k: too small for --cups 10; pass --no-milk, --sugar or `other=1`"
    assert run("k", "--cups", "10")[1].output.strip() == expected
    with pytest.raises(ClexError, match="`cups=10`"):
        brew("k", cups=10)


def test_errors_of_a_command_in_a_group_name_its_options():
    @click.command("brew", cls=Command)
    @options_from(Brewing, without=["milk"])
    def command(options: Brewing) -> None:
        brew("k", **vars(options))

    group = Group("tea", commands=[command])
    output = CliRunner().invoke(group, ["brew", "--cups", "10"]).output
    assert output.strip() == "tea: error: k: too small for --cups 10; pass `milk=False`, --sugar or `other=1`"


def test_other_words_in_backticks_stay():
    params = [click.Argument(["model"], metavar="MODEL"), click.Option(["--kv-type", "kind"])]
    text = "`clex-convert MODEL`, `kind` of `model`, `kind='f16'`, `Kind`, `kind=None`, `model=3`, ``"
    assert in_options(text, params) == (
        "`clex-convert MODEL`, --kv-type of MODEL, --kv-type f16, `Kind`, no --kv-type, `model=3`, ``"
    )


@pytest.mark.parametrize("text", ["", "3", "[1]", "{", "[" * 100000])
def test_json_objects(text):
    with pytest.raises(ValueError, match="must be a JSON object"):
        json_object(text)
