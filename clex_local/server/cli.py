"""``clex-serve``: serve models over HTTP until a signal comes."""

from __future__ import annotations

if __name__ == "__main__":  # before the rest is imported, for Ctrl-C there
    from clex_local import start

    start.clex_serve()

import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

import click

from clex_local.commands.command import SETTINGS, Command, say
from clex_local.commands.command_options import options_from
from clex_local.server.options import ServeOptions
from clex_local.server.plan import ServePlan
from clex_local.server.process import Server, server_program
from clex_local.server.serving import plan_models, start_service

_TOLD_AT_ONCE = {"-h", "--help", "--usage", "--version", "--list-devices"}  # options that llama-server answers and ends


class _ServeCommand(Command):
    """What follows ``--`` is llama-server's."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        ctx.obj = tuple(args[at + 1 :])
        return super().parse_args(ctx, args[:at])


@click.command("clex-serve", cls=_ServeCommand, context_settings=SETTINGS, options_metavar="[OPTIONS]")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...", type=click.Path(path_type=Path))
@options_from(ServeOptions)
@click.version_option(package_name="clex-local")
@click.pass_context
def main(context: click.Context, models: tuple[Path, ...], options: ServeOptions) -> int:
    """Serve MODEL, a GGUF file, to programs that speak OpenAI's or Anthropic's API, and to a browser.

    Several models or a folder of them: each is loaded when a request names it. What follows -- goes to llama-server,
    whose options `clex-serve MODEL -- --help` lists.
    """
    if _TOLD_AT_ONCE.intersection(context.obj):
        return subprocess.run([server_program(), *context.obj]).returncode
    options = replace(options, server_args=context.obj)
    plans = plan_models(models, options)
    with _Signals() as signals, start_service(plans, options) as server:
        signals.server = server
        for line in _lines(plans, options, server):
            say(line, err=True)
        return server.wait()


def _lines(plans: Sequence[ServePlan], options: ServeOptions, server: Server) -> list[str]:
    """What may be asked of the server, what it keeps, and where it is, in four lines."""
    from clex_local.store.documents import store_wanted  # with the library, which a build without the server may lack

    store = store_wanted(options.store)
    last = [f"what is read is kept in {store}: clex-cache shows it, --no-store keeps nothing"]
    if not store or not any(plan.storable for plan in plans):
        last = []
    page = f"page: {server.url}" if server.has_page else "page: not built (it needs npm, see docs/serve.md)"
    last.append(f"{page}  API: {server.url}/v1")
    if len(plans) == 1:
        return [*plans[0].lines(), *last]
    names = ", ".join(Path(plan.path).stem for plan in plans)
    least = min(plan.context.n_ctx for plan in plans)
    most = max(plan.context.n_ctx for plan in plans)
    contexts = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    return [f"models, one at a time: {names}", f"one conversation: {contexts} tokens, by model", *last]


class _Signals:
    """Signals that would end this process go to the server, once there is one."""

    def __init__(self) -> None:
        self.server: Server | None = None
        names = ("SIGINT", "SIGTERM", "SIGHUP")
        self._before = {number: signal.getsignal(number) for name in names if (number := getattr(signal, name, None))}

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self.server:
            self.server.signal(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            sys.exit(128 + number)  # what is being started ends with it

    def __enter__(self) -> _Signals:
        for number in self._before:
            signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
