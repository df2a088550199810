"""Whether a model file can have tables: what clex-convert would say of it, known from its header."""

from __future__ import annotations

from clex_local.model_file import architectures
from clex_local.model_file.cache_kinds import has_windows
from clex_local.model_file.keys import ModelKeys


def why_no_tables(keys: ModelKeys) -> str:
    """Why clex-convert adds no tables to a model file, in words that follow "none:"; empty where it does."""
    row = architectures.find(keys.architecture)
    if row.unrotated and has_windows(keys):
        return "its layers that see every token have no RoPE, so it needs none"
    if not row.tables:
        return "clex-convert has none for this architecture"
    window, context = keys.number("attention.sliding_window"), keys.trained_context
    if not row.sliding_window and window and window < context:
        return f"its layers attend to the last {window:,.0f} tokens only, which llama.cpp does not compute"
    return ""
