"""How the next token of an answer is drawn."""

from __future__ import annotations

from dataclasses import dataclass

from clex_local.commands.options import documented, option


@documented
@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, under llama.cpp's names and with its defaults."""

    temp: float = option(0.8, "Temperature; 0 takes the likeliest token.", metavar="X", minimum=0)
    top_k: int = option(40, "Likeliest tokens to draw from; 0: all.", metavar="N", minimum=0)
    top_p: float = option(0.95, "Nucleus sampling; 1: off.", metavar="X", minimum=0, maximum=1)
    min_p: float = option(
        0.05,
        "Smallest probability, relative to the likeliest token's; 0: off.",
        metavar="X",
        minimum=0,
        maximum=1,
    )
    repeat_penalty: float = option(1.0, "Penalty on tokens used lately; 1: off.", metavar="X", above=0)
