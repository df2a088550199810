"""How models are served, said once: for ``serve`` and ``clex-serve``."""

from __future__ import annotations

from dataclasses import dataclass

from clex_local.commands.options import documented, option
from clex_local.runtime.run_options import RunOptions

PARALLEL = 4  # conversations at once, where memory holds them


@documented
@dataclass(frozen=True)
class ServeOptions(RunOptions):
    """How models are served."""

    ctx: int | None = option(
        None,
        "Tokens that one conversation may have, whatever `parallel`; 0: all that the model covers.",
        default_text="as many of them as fit in memory",
        metavar="N",
        minimum=0,
    )
    parallel: int | None = option(
        None,
        "Conversations computed at once, each with a context of its own; more wait.",
        default_text=f"{PARALLEL}, or as many as fit in memory",
        metavar="N",
        minimum=1,
        maximum=256,
    )
    host: str = option(
        "127.0.0.1", "Address to listen on; one that other machines reach needs `api_key`.", metavar="HOST"
    )
    port: int = option(8080, "Port to listen on; 0: a free one.", metavar="N", minimum=0, maximum=65535)
    api_key: str | None = option(
        None, "Key that clients must send.", default_text="that of LLAMA_API_KEY, or none", metavar="KEY"
    )
    prefix_reuse: str = option(
        "fast",
        "What to reuse of a conversation that was computed with the table of another length: all of it (fast), or "
        "nothing, so that answers are those of the prompt alone (exact).",
        choices=["fast", "exact"],
    )
    server_args: tuple[str, ...] = option((), "Other options of llama-server; the last one counts.", command=False)
