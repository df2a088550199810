"""An inspection as text and tables, for people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from clex_local.errors import escaped
from clex_local.inspection.inspection import Inspection
from clex_local.sizes import readable_size

_MOST_ROWS = 64  # buckets in a table


def show(found: Inspection, console: Console) -> None:
    """Writes an inspection as text and tables."""
    console.print(Text(escaped(found.name or found.path.name), style="bold"))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True, style="dim")
    facts.add_column(overflow="fold")
    for label, text in _facts(found):
        facts.add_row(label, Text(text))
    console.print(facts)
    if found.tables is not None:
        console.print()
        console.print(_bucket_table(found))
    if found.memory:
        console.print()
        console.print(_memory_table(found))
        console.print(
            Text(
                "all: weights, cache and intermediate results with flash attention, for 512 prompt tokens at once",
                style="dim",
            )
        )
    if (provenance := found.provenance) is not None:
        console.print()
        console.print(Text("how the tables were made", style="bold"))
        for line in _provenance_lines(provenance):
            console.print(Text(line))


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "file", f"{escaped(str(found.path))}, {readable_size(found.file_bytes)}"
    if found.part is not None:
        yield "", f"part {found.part[0]} of {found.part[1]}: parameters and sizes are those of this part"
    text, shape = escaped(found.architecture, 60), found.shape
    if shape is not None:
        text += f", {shape.layers} layers"
        if any(shape.heads_kv):
            text += f", {shape.heads} heads"
            if max(shape.heads_kv) != shape.heads:
                text += f" ({max(shape.heads_kv)} for keys and values)"
            text += f" of {shape.key_length}"
        if windows := [cache.window for cache in shape.caches if cache.window]:
            text += f", {len(windows)} layers with a window of {max(windows):,} tokens"
        if states := sum(cache.state > 0 for cache in shape.caches):
            text += f", {states} layers with a state"
    yield "architecture", text
    yield "parameters", _short(found.parameters)
    types = ", ".join(f"{kind.name} {readable_size(kind.bytes)} in {kind.tensors}" for kind in found.tensor_types)
    yield "quantization", f"{found.file_type or 'unknown'}: {types or 'no'} tensors"
    context = f"{found.trained_context:,} tokens" if found.trained_context else "unknown"
    if found.tables is not None:
        context = f"{found.original_context:,} tokens, {found.max_context:,} with the tables"
    elif found.baked is not None:
        context = f"{found.original_context:,} tokens, {found.max_context:,} with the baked table"
    yield "context", context
    rope = found.rope
    base = "unknown" if rope.base is None else f"{rope.base:,.10g}"
    yield "RoPE", f"base {base}, dimension {rope.dimension or 'unknown'}"
    own = [f"{key} = {value}" for key, value in rope.scaling.items()] + list(rope.factor_tensors)
    if own:
        yield "RoPE scaling", ", ".join(map(escaped, own))
    if found.tables is None:
        yield "tables", _no_tables(found)
        return
    source = "in the file" if found.tables_in_file else "made of the LongRoPE factors when the model is loaded"
    yield "tables", f"{len(found.tables.scaling_factors)} {source}, method {escaped(found.tables.method, 40)}"
    if found.tables.log_scale:
        yield "log scale", f"attention times log(tokens) / log({found.original_context:,})"


def _no_tables(found: Inspection) -> str:
    if found.baked is not None:
        what = f"one baked for {found.baked.context_length:,} tokens, method {escaped(found.baked.method, 40)}"
        return f"{what}: runs as in llama.cpp, short prompts too"
    return f"none: runs as in llama.cpp; {found.why_no_tables or 'clex-convert adds some'}"


def _bucket_table(found: Inspection) -> Table:
    table = _table("bucket", "t", "tokens from", "to", "attention scale")
    rows = [
        (str(i), f"{b.factor:g}", f"{b.first:,}" if b.first <= b.last else "none", f"{b.last:,}", f"{b.attn_scale:g}")
        for i, b in enumerate(found.buckets, 1)
    ]
    if len(rows) > _MOST_ROWS:
        rows = [*rows[: _MOST_ROWS - 2], ("...",) * 5, rows[-1]]
    for row in rows:
        table.add_row(*row)
    return table


def _memory_table(found: Inspection) -> Table:
    types = list(found.memory[0].kv)
    table = _table("context", *(f"{name} cache" for name in types), *(f"all, {name}" for name in types))
    for entry in found.memory:
        caches = [entry.kv[name] for name in types]
        other = found.tensor_bytes + entry.compute_flash_attn
        cells = [*caches, *(None if cache is None else cache + other for cache in caches)]
        table.add_row(
            f"{entry.context:,}", *("-" if cell is None else readable_size(cell, memory=True) for cell in cells)
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", header_style="dim", no_wrap=True)
    return table


def _provenance_lines(value: Any, most: int = 60) -> list[str]:
    text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
    lines = [escaped(line) for line in text.splitlines()]
    if not isinstance(value, str):
        lines = lines[1:-1] if len(lines) > 2 else lines
    return lines if len(lines) <= most else [*lines[:most], f"  ... {len(lines) - most} more lines (--json has all)"]


def _short(number: int) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:,}"
