"""How a worker is run, said once: for ``clex-worker``."""

from __future__ import annotations

from dataclasses import dataclass

from clex_local.commands.options import documented, option


@documented
@dataclass(frozen=True)
class WorkerOptions:
    """How a worker is run."""

    host: str = option(
        "127.0.0.1", "Address to listen on, of this machine in a network that only yours are in.", metavar="HOST"
    )
    port: int = option(50052, "Port to listen on.", metavar="N", minimum=1, maximum=65535)
    threads: int | None = option(
        None, "Threads to compute with.", default_text="the physical cores", metavar="N", minimum=1
    )
    device: str | None = option(
        None,
        "Devices to compute on, by llama.cpp's names, and commas between them.",
        default_text="the GPUs, or the CPU where there are none",
        metavar="NAME,...",
    )
    cache: bool = option(False, "Keep large tensors of models on disk, so that they are not sent again the next time.")
