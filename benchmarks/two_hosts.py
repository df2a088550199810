"""A model spread over two hosts, made of network namespaces: answers equal to those of one, and what the network costs.

Linux, as root. Each host is a namespace with an address of its own, a virtual cable to this one, and a worker.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from benchmarks.markdown import row
from clex_local.commands.command import SETTINGS, Command
from clex_local.library.decoding import DecodeError
from clex_local.runtime.llama import Llama

PORT = 50052


class Host:
    """A network namespace with a worker in it.

    Args:
        number: 1, 2, ...: its address is 10.213.NUMBER.2.
        delay: milliseconds that a packet takes.
        threads: of the worker.
    """

    def __init__(self, number: int, delay: float, threads: int) -> None:
        self.name, cable, here = f"clex-host-{number}", f"clexn{number}", f"clexh{number}"
        self.address = f"10.213.{number}.2:{PORT}"
        ip("netns", "add", self.name)
        try:
            ip("link", "add", here, "type", "veth", "peer", "name", cable, "netns", self.name)
            ip("addr", "add", f"10.213.{number}.1/24", "dev", here)
            ip("link", "set", here, "up")
            ip("-n", self.name, "addr", "add", f"10.213.{number}.2/24", "dev", cable)
            ip("-n", self.name, "link", "set", cable, "up")
            if delay:
                run("tc", "qdisc", "add", "dev", here, "root", "netem", "delay", f"{delay}ms")
        except click.ClickException:
            ip("netns", "del", self.name)
            raise
        command = [Path(sys.executable).with_name("clex-worker"), "--host", f"10.213.{number}.2", "--threads", threads]
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def wait(self) -> None:
        """Wait until the worker takes connections.

        Raises:
            TimeoutError: it did not within a minute.
        """
        host, port = self.address.split(":")
        for _ in range(600):
            try:
                # What is served meanwhile is this connection, which ends at once.
                return socket.create_connection((host, int(port)), timeout=5).close()
            except OSError:
                time.sleep(0.1)
        raise TimeoutError(f"no worker listens at {self.address}")

    def end(self) -> None:
        """End the worker."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End the worker, and take the host away."""
        self.end()
        ip("netns", "del", self.name)


def ip(*words: str) -> None:
    """A command about addresses, links or namespaces."""
    run("ip", *words)


def run(*command: str) -> None:
    """A command of iproute2.

    Raises:
        click.ClickException: it failed, for one because the kernel lacks what it is about.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)}: {done.stderr.strip()}")


@contextlib.contextmanager
def hosts(delay: float, threads: int) -> Iterator[list[Host]]:
    """Two of them, with workers that listen."""
    with contextlib.ExitStack() as stack:
        found = []
        for number in (1, 2):
            found.append(Host(number, delay, threads))
            stack.callback(found[-1].close)
        for host in found:
            host.wait()
        yield found


class Generated(NamedTuple):
    """What a model made of a prompt at temperature 0."""

    tokens: list[int]
    logits: np.ndarray  # (tokens, vocabulary): those that each was taken from
    prompt_seconds: float
    seconds: float  # of the tokens


def generate(llm: Llama, prompt: list[int], count: int) -> Generated:
    """Read a prompt, and compute tokens after it."""
    start = time.perf_counter()
    llm.reset()
    llm.eval(prompt)
    read = time.perf_counter()
    tokens, logits = extend(llm, count)
    return Generated(tokens, logits, read - start, time.perf_counter() - read)


def extend(llm: Llama, count: int) -> tuple[list[int], np.ndarray]:
    """Compute tokens after what is there."""
    tokens, logits = [], []
    for _ in range(count):
        logits.append(np.array(llm.eval_logits[-1]))
        tokens.append(int(np.argmax(logits[-1])))
        llm.eval([tokens[-1]])
    return tokens, np.array(logits)


def resume(llm: Llama, state: Any, expected: list[int]) -> bool:
    """Whether the same tokens follow a saved prompt."""
    llm.load_state(state)
    llm.eval(expected[:1])  # a state has no logits to take it from
    return extend(llm, len(expected) - 1)[0] == expected[1:]


def compare(model: Path, rpc: list[str], prompt: list[int], count: int, options: Any) -> None:
    """Print the speed of this host alone and of others, and whether they computed the same."""
    with Llama(model, **options) as llm:
        alone = generate(llm, prompt, count)
        llm.reset()
        llm.eval(prompt)
        state = llm.save_state()
    with Llama(model, rpc=rpc, **options) as llm:
        spread = generate(llm, prompt, count)
        print(row(["", "prompt, tokens/s", "then, tokens/s"]))
        print(row(["---", "---:", "---:"]))
        for name, found in (("this host alone", alone), ("two others", spread)):
            print(row([name, f"{len(prompt) / found.prompt_seconds:.1f}", f"{count / found.seconds:.1f}"]))
        difference = np.abs(spread.logits - alone.logits).max()
        print(f"the same {count} tokens: {spread.tokens == alone.tokens}; logits differ by at most {difference:.2g}")
        print(f"tables: {llm.clex}")
        print(f"a state of this host, the same tokens there: {resume(llm, state, alone.tokens)}")
        llm.reset()
        llm.eval(prompt)
        state = llm.save_state()
    with Llama(model, **options) as llm:
        print(f"a state of those hosts, the same tokens here: {resume(llm, state, alone.tokens)}")


def end_one(model: Path, found: list[Host], prompt: list[int], count: int, options: Any) -> None:
    """End the worker of the second host, and print what that does to the model and to the first."""
    with Llama(model, **options) as llm:
        expected = generate(llm, prompt, count)
    with Llama(model, rpc=[host.address for host in found], **options) as llm:
        llm.eval(prompt)
        found[1].end()
        start = time.perf_counter()
        try:
            llm.eval(prompt[:10])
            sys.exit("it computed without the host")
        except DecodeError as error:
            print(f"{error} (after {time.perf_counter() - start:.2f} s)")
    with Llama(model, rpc=[found[0].address], **options) as llm:
        print(f"the other host alone, the same tokens: {generate(llm, prompt, count).tokens == expected.tokens}")


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), required=True, help="A text to read.")
@click.option("--prompt", type=int, default=1000, help="Tokens of it.")
@click.option("--tokens", type=int, default=32, help="Tokens to compute after them.")
@click.option("--ctx", type=int, default=4096, help="Tokens the context holds.")
@click.option("--delay", type=float, default=0, help="Milliseconds that a packet to a host takes.")
@click.option("--threads", type=int, default=1, help="Threads of each worker, and of this process.")
@click.option("--kill", is_flag=True, help="End one host's worker at the end, and show what happens.")
def main(model: Path, text: Path, prompt: int, tokens: int, ctx: int, delay: float, threads: int, kill: bool) -> None:
    """Compare MODEL on this host alone with MODEL on two others."""
    options: Any = dict(n_ctx=ctx, n_threads=threads, verbose=False, flash_attn=True, type_k=1, type_v=1)
    with Llama(model, vocab_only=True, verbose=False) as llm:
        words = llm.tokenize(text.read_bytes())[:prompt]
    with hosts(delay, threads) as found:
        compare(model, [host.address for host in found], words, tokens, options)
        if kill:
            end_one(model, found, words, tokens, options)


if __name__ == "__main__":
    main()
