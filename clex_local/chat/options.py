"""How ``clex-chat`` answers, beside how the model is run and tokens are drawn."""

from __future__ import annotations

from dataclasses import dataclass

from clex_local.commands.options import documented, option
from clex_local.session.full_context import POLICIES

TEMPLATES = ("model", "chatml", "plain")
SCRIPT_TOKENS = 4096  # of an answer that nobody watches


@documented
@dataclass(frozen=True)
class ChatOptions:
    """How ``clex-chat`` answers."""

    system: str | None = option(None, "System message.", metavar="TEXT")
    max_tokens: int | None = option(
        None,
        "End an answer after N tokens; 0: when the model ends it.",
        default_text=f"{SCRIPT_TOKENS:,}, and 0 in a conversation",
        metavar="N",
        minimum=0,
    )
    on_full: str = option(
        "refuse",
        "What to do when a conversation fills the context: refuse the message, drop-oldest (leave out the oldest "
        "turns) or summarize (the model sums them up). It is said what was left out.",
        choices=POLICIES,
    )
    chat_template: str = option(
        "model",
        "How messages become a prompt: model (its own template), chatml, or plain (the text is continued).",
        metavar="NAME",
        choices=TEMPLATES,
    )
    plain: bool = option(False, "Show answers as they are, and not as Markdown. A pipe gets them so in any case.")
