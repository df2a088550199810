"""``clex-worker``: compute layers of models that other machines run, until a signal comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import click

from clex_local.commands.command import SETTINGS, Command
from clex_local.commands.command_options import options_from
from clex_local.machine import default_threads
from clex_local.server.process import worker_program
from clex_local.server.worker_options import WorkerOptions


@click.command("clex-worker", cls=Command, context_settings=SETTINGS)
@options_from(WorkerOptions)
@click.version_option(package_name="clex-local")
def main(options: WorkerOptions) -> int:
    """Compute layers of models that clex-chat, clex-serve or a program runs with --rpc on another machine.

    One of them at a time is served. What is sent is neither encrypted nor is anybody asked for a password: listen where
    only machines of yours can connect, or through SSH or WireGuard (docs/rpc.md).
    """
    command = [str(worker_program()), *arguments(options)]
    sys.stdout.flush()
    if os.name == "posix":
        os.execv(command[0], command)  # signals and the exit code are its own
    process = subprocess.Popen(command)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the console's Ctrl-C goes to both
    return process.wait()


def arguments(options: WorkerOptions) -> list[str]:
    """The options of llama.cpp's program."""
    threads = options.threads or default_threads()
    found = ["--host", options.host, "--port", str(options.port), "--threads", str(threads)]
    if options.device is not None:
        found += ["--device", options.device]
    return found + (["--cache"] if options.cache else [])


if __name__ == "__main__":
    main()
