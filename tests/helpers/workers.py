"""Workers, which compute layers of a model for others, as processes of this machine."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Worker:
    """A clex-worker, which takes connections once it is made."""

    def __init__(self, *options: str) -> None:
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        options = ("--port", str(port), "--threads", "1", *options)
        command = [sys.executable, "-m", "clex_local.server.worker_cli", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self._wait(port)

    def _wait(self, port: int) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            assert self.process.poll() is None, self.process.communicate()[1]
            try:
                # What is served meanwhile is this connection, which ends at once.
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                return
            except OSError:
                time.sleep(0.05)
        raise AssertionError("the worker does not listen")

    @property
    def lives(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stderr:
            self.process.stderr.close()


@contextmanager
def workers(count: int = 2, *options: str) -> Iterator[list[Worker]]:
    started: list[Worker] = []
    try:
        for _ in range(count):
            started.append(Worker(*options))
        yield started
    finally:
        for worker in started:
            worker.kill()
