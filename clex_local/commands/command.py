"""What the commands of this package have in common."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from contextlib import suppress
from typing import Any, NoReturn

import click

from clex_local.commands.command_options import in_options
from clex_local.commands.line_breaks import window_width, wrapped
from clex_local.errors import LONGEST, ClexError, escaped, shown

INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended
_NOT_WRITTEN = {getattr(errno, name, 0) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EBADF")}
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}


def say(text: str, *, err: bool = False) -> None:
    """Print a line; what controls a terminal is escaped, because it came out of a file."""
    width = window_width(sys.stderr if err else sys.stdout)
    click.echo(wrapped(shown(text), width) if width else shown(text), err=err)


class Lines(logging.Formatter):
    """Lines of a log as `say` prints them."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        return shown(super().format(record))


def _open_standard_streams() -> None:
    """Have nothing that is opened from now on take the number of a closed stream, which libraries in C write to."""
    while (number := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass
    os.close(number)
    if sys.stdout is None:  # an error for what writes to it, as it is for other programs
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def _forget_output() -> None:
    """Have Python not try once more to write what is left, at its end."""
    with suppress(OSError, ValueError):
        number = os.open(os.devnull, os.O_WRONLY)
        os.dup2(number, sys.stdout.fileno())
        os.close(number)


class _Interrupted(Exception):
    """Ctrl-C, and what it left."""


class Command(click.Command):
    """A command whose every error is one line on stderr.

    Texts of the library name options by their fields, in backticks; help and errors show them as the command's options.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for param in self.params:
            if isinstance(param, click.Option):
                param.help = in_options(param.help or "", self.params)
                if isinstance(param.show_default, str):
                    param.show_default = in_options(param.show_default, self.params)

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run and leave with an exit code: 1 for an error, 2 for wrong usage, 130 for Ctrl-C."""
        kwargs["standalone_mode"] = False
        try:
            _open_standard_streams()
            code = super().main(*args, **kwargs) or 0
        except click.UsageError as error:
            code = self.fail(f"{error.format_message()} (--help lists the options)", error.exit_code)
        except (ClexError, click.ClickException) as error:
            code = self.fail(str(error))
        except MemoryError:
            code = self.fail("there is not enough memory")
        except OSError as error:
            if error.errno not in _NOT_WRITTEN:
                raise
            code = self.fail(f"{error.filename or 'standard output'}: {error.strerror}")
            _forget_output()
        except (_Interrupted, KeyboardInterrupt, click.Abort) as interrupt:
            code = self.fail("; ".join(["interrupted", *map(str, interrupt.args)]), INTERRUPTED)
        sys.exit(code)

    def invoke(self, ctx: click.Context) -> Any:
        """As click's, which would answer Ctrl-C with an empty line."""
        try:
            return super().invoke(ctx)
        except ClexError as error:  # worded here, because a group does not know the options of its commands
            raise click.ClickException(in_options(str(error), self.params)) from error
        except KeyboardInterrupt as interrupt:
            raise _Interrupted(*interrupt.args) from None

    def fail(self, message: str, code: int = 1) -> int:
        """Print an error as every command does; returns the exit code."""
        say(f"{self.name}: error: {escaped(in_options(message, self.params), LONGEST)}", err=True)
        return code


class Group(Command, click.Group):
    """Commands under one name, whose every error is one line on stderr."""


def json_line(value: Any) -> str:
    """A line of JSON that controls no terminal either."""
    text = json.dumps(value, ensure_ascii=False)
    # JSON itself escapes only the first 32 of them.
    return text.translate({code: f"\\u{code:04x}" for code in range(127, 160)}) + "\n"
