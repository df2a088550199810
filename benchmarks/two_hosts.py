"""A model spread over two hosts, made of network namespaces: answers equal to those of one, and what the network costs.

Linux, as root. Each host is a namespace with an address of its own, a virtual cable to this one, and a worker.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
        self.process: subprocess.Popen[bytes] | None = None
        ip("netns", "add", self.name)
        ip("link", "add", here, "type", "veth", "peer", "name", cable, "netns", self.name)
        ip("addr", "add", f"10.213.{number}.1/24", "dev", here)
        ip("link", "set", here, "up")
        ip("-n", self.name, "addr", "add", f"10.213.{number}.2/24", "dev", cable)
        ip("-n", self.name, "link", "set", cable, "up")
        if delay:
            subprocess.run(["tc", "qdisc", "add", "dev", here, "root", "netem", "delay", f"{delay}ms"], check=True)
        command = [Path(sys.executable).with_name("clex-worker"), "--host", f"10.213.{number}.2", "--threads", threads]
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def close(self) -> None:
        """End the worker, and take the host away."""
        if self.process:
            self.process.kill()
            self.process.wait()
        ip("netns", "del", self.name)


def ip(*words: str) -> None:
    """A command of iproute2."""
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def hosts(delay: float, threads: int) -> Iterator[list[Host]]:
    """Two of them, with workers that listen."""
    with contextlib.ExitStack() as stack:
        found = []
        for number in (1, 2):
            found.append(Host(number, delay, threads))
            stack.callback(found[-1].close)
        time.sleep(2)
        yield found


def generate(llm: Llama, tokens: list[int], count: int) -> tuple[list[int], float, float]:
    """Tokens after a prompt at temperature 0, and seconds for the prompt and for the others."""
    start = time.perf_counter()
    llm.reset()
    llm.eval(tokens)
    read, out = time.perf_counter(), []
    for _ in range(count):
        out.append(int(np.argmax(llm.eval_logits[-1])))
        llm.eval([out[-1]])
    return out, read - start, time.perf_counter() - read


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
    with Llama(model, **options) as llm:
        words = llm.tokenize(text.read_bytes())[:prompt]
        expected, *alone = generate(llm, words, tokens)
    with hosts(delay, threads) as found:
        with Llama(model, rpc=[host.address for host in found], **options) as llm:
            answer, *spread = generate(llm, words, tokens)
            print(row(["", "prompt, tokens/s", "then, tokens/s"]))
            print(row(["---", "---:", "---:"]))
            for name, (read, rest) in (("this host alone", alone), ("two others", spread)):
                print(row([name, f"{len(words) / read:.1f}", f"{tokens / rest:.1f}"]))
            print(f"the same {tokens} tokens: {answer == expected}; tables: {llm.clex}")
            if kill:
                process = found[1].process
                assert process is not None
                process.kill()
                process.wait()
                start = time.perf_counter()
                try:
                    llm.eval(words[:10])
                    sys.exit("it computed without the host")
                except DecodeError as error:
                    print(f"{error} (after {time.perf_counter() - start:.2f} s)")
        if kill:
            with Llama(model, rpc=[found[0].address], **options) as llm:
                print(f"the other host alone, the same tokens: {generate(llm, words, tokens)[0] == expected}")


if __name__ == "__main__":
    main()
