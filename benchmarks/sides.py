"""The sides of a comparison: processes that hold a model each, with the patched library or another one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import click

STOCK = Path(__file__).parent.parent / "build" / "stock" / "bin"


def stock_library(folder: Path) -> dict[str, str]:
    """The environment of a process that loads the stock libraries from a folder.

    Raises:
        click.ClickException: they are not there.
    """
    if not folder.is_dir():
        raise click.ClickException(f"{folder}: no such folder; `make stock` builds the stock libraries")
    return {"LLAMA_CPP_LIB_PATH": str(folder.resolve())}


class Server:
    """What a process holds: a model, a context, and a cache as long as the last order left it."""

    def __init__(self, path: str, n_ctx: int, n_gpu_layers: int, options: dict[str, Any]) -> None:
        import numpy as np

        from benchmarks.context import Context, Model

        model = Model(path, n_gpu_layers)
        self.tokens = np.random.default_rng(0).integers(0, model.n_vocab, n_ctx, np.int32)
        self.context = Context(model, n_ctx, **options)
        self.cached = 0

    def fill(self, depth: int) -> float:
        """Have exactly depth tokens in the cache."""
        self.context.forget(depth)
        self.cached = min(self.cached, depth)
        seconds = self.context.prefill(self.tokens[self.cached : depth], self.cached) if self.cached < depth else 0.0
        self.cached = depth
        return seconds

    def threads(self, count: int) -> None:
        """Compute with so many threads from now on."""
        import llama_cpp

        llama_cpp.llama_set_n_threads(self.context.pointer, count, count)

    def prefill(self, depth: int, count: int) -> float:
        """Seconds to prefill count tokens after depth cached ones."""
        self.fill(depth)
        self.cached += count
        return self.context.prefill(self.tokens[depth : depth + count], depth)

    def decode(self, depth: int, count: int) -> float:
        """Seconds to decode count tokens, one at a time, after depth cached ones."""
        self.fill(depth)
        self.cached += count + 1
        # The first builds a graph for its own, since another kind of batch came before.
        return sum([self.context.timed(self.tokens[i : i + 1], i) for i in range(depth, depth + count + 1)][1:])


def serve(connection: Any, kind: type[Server], *arguments: Any) -> None:
    """Carry out orders (method, arguments) until None comes."""
    server = kind(*arguments)
    while order := connection.recv():
        connection.send(getattr(server, order[0])(*order[1]))


@dataclass
class Side:
    """One of the things compared: a process and the way to give it orders."""

    name: str
    process: BaseProcess
    connection: Any

    @classmethod
    def start(cls, name: str, environment: dict[str, str], kind: type[Server], *arguments: Any) -> Side:
        """Start a process with additional variables in its environment; it makes a server of that kind."""
        spawn = get_context("spawn")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=serve, args=(theirs, kind, *arguments), daemon=True)
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()
        return cls(name, process, ours)

    def ask(self, method: str, *arguments: int) -> Any:
        """Let the process do something; what it answers."""
        try:
            self.connection.send((method, arguments))
            return self.connection.recv()
        except (EOFError, OSError) as error:
            raise click.ClickException(f"the process {self.name!r} has died; see above") from error

    def stop(self) -> None:
        """End the process."""
        self.connection.send(None)
        self.process.join()
