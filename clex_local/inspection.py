"""``clex-inspect``: what is in a model file, read from its header alone."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clex_local import architectures
from clex_local.baked import Baked, baked_in
from clex_local.command import SETTINGS, Command
from clex_local.errors import ClexError, escaped
from clex_local.gguf_file import GGUFFile
from clex_local.memory import KV_TYPES, ModelShape, compute_bytes, gib, kv_bytes, kv_type_fits
from clex_local.rope import Rope, count, longrope_tables, read_rope
from clex_local.tables import Tables, named_tables

KV_SHOWN = ("f16", "q8_0", "q4_0")
_MOST_ROWS = 64  # buckets in a table for people
_MOST_PROVENANCE = 1 << 16  # characters that are worth parsing


@dataclass(frozen=True)
class Bucket:
    """Tokens ``first`` to ``last`` use scaling factor ``factor`` and multiply attention logits by ``attn_scale``."""

    first: int
    last: int
    factor: float
    attn_scale: float


@dataclass(frozen=True)
class TensorType:
    """How much of a file is of one tensor type."""

    name: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class ContextMemory:
    """Bytes that a context takes besides the weights.

    Attributes:
        context: tokens.
        kv: key and value cache, by its type; None where the model's heads do not fit the type.
        compute: intermediate results, an estimate from above, for 512 prompt tokens at once.
        compute_flash_attn: the same with flash attention, which quantized caches need.
    """

    context: int
    kv: dict[str, int | None]
    compute: int
    compute_flash_attn: int


@dataclass(frozen=True)
class Inspection:
    """What is in one model file.

    Attributes:
        path: the file.
        file_bytes: its size.
        architecture: ``general.architecture``.
        name: ``general.name``, or None.
        part: (this part, parts) of a split model, from 1; None for a whole one.
        file_type: main type of its tensors, named as clex-convert's ``--outtype``; None if the file does not say.
        parameters: elements of all tensors.
        tensor_types: one entry per tensor type, the largest first.
        trained_context: ``context_length`` of the file, of a baked one that of the model it was made of; or None.
        original_context: tokens covered without scaling, or None.
        max_context: tokens that the last table, or the baked one, covers; or the trained context.
        rope: RoPE base, dimension, and any scaling that is not one of tables.
        tables: the file's, or those that the runtime makes of LongRoPE factors; None if there are none.
        tables_in_file: whether the tables are the file's.
        baked: the one table that the file's frequencies are, or None.
        shape: what decides the memory; None for a kind of cache that the estimate does not cover.
        memory: what each context takes; empty where that is unknown.
    """

    path: Path
    file_bytes: int
    architecture: str
    name: str | None
    part: tuple[int, int] | None
    file_type: str | None
    parameters: int
    tensor_types: tuple[TensorType, ...]
    trained_context: int | None
    original_context: int | None
    max_context: int | None
    rope: Rope
    tables: Tables | None
    tables_in_file: bool
    baked: Baked | None
    shape: ModelShape | None
    memory: tuple[ContextMemory, ...]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(kind.bytes for kind in self.tensor_types)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """What each table covers; empty without tables."""
        if self.tables is None:
            return ()
        lengths = self.tables.context_lengths
        scales = [1.0] * len(lengths) if self.tables.attn_scale is None else self.tables.attn_scale.tolist()
        first, found = 1, []
        for last, factor, scale in zip(lengths, self.tables.scaling_factors.tolist(), scales, strict=True):
            found.append(Bucket(first, last, factor, scale))
            first = last + 1
        return tuple(found)

    @property
    def provenance(self) -> Any:
        """How the tables were made: what their JSON text holds, the text itself if it is none, or None."""
        text = self.tables.provenance if self.tables else ""
        if not text:
            return None
        if len(text) <= _MOST_PROVENANCE:
            try:
                value = json.loads(text)
                json.dumps(value, allow_nan=False)
                return value
            except (ValueError, RecursionError):
                pass
        return escaped(text, _MOST_PROVENANCE)

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints; every key is always there, and described in docs/inspect.md."""
        return {
            "version": 1,
            "path": str(self.path),
            "file_bytes": self.file_bytes,
            "architecture": self.architecture,
            "name": self.name,
            "part": None if self.part is None else {"number": self.part[0], "of": self.part[1]},
            "parameters": self.parameters,
            "file_type": self.file_type,
            "tensor_types": [asdict(kind) for kind in self.tensor_types],
            "context": {
                "trained": self.trained_context,
                "original": self.original_context,
                "maximum": self.max_context,
            },
            "rope": {
                "dimension": self.rope.dimension,
                "base": self.rope.base,
                "scaling": self.rope.scaling,
                "factor_tensors": list(self.rope.factor_tensors),
            },
            "tables": self.tables
            and {
                "in_file": self.tables_in_file,
                "method": self.tables.method,
                "log_scale": self.tables.log_scale,
                "buckets": [asdict(bucket) for bucket in self.buckets],
                "provenance": self.provenance,
            },
            "baked": self.baked and asdict(self.baked),
            "memory": {
                "weights_bytes": self.tensor_bytes,
                "contexts": [
                    {
                        "context": entry.context,
                        "kv_bytes": entry.kv,
                        "compute_bytes": entry.compute,
                        "compute_flash_attn_bytes": entry.compute_flash_attn,
                    }
                    for entry in self.memory
                ],
            },
        }


def inspect(path: str | os.PathLike[str], *, ctx: Sequence[int] = (), kv_types: Sequence[str] = KV_SHOWN) -> Inspection:
    """Reads what is in a model file; only its header is read, so that it takes little time and memory.

    Args:
        path: a GGUF file.
        ctx: contexts in tokens to estimate the memory of; by default the original context and its doublings, up to
            the longest that the model covers.
        kv_types: types of the key and value cache to estimate it for, names from ``memory.KV_TYPES``.

    Raises:
        GGUFError: the file is missing, not GGUF, or damaged.
        TablesError: its tables break a rule of the metadata.
        ClexError: it is no model, or a context or a type is none.
    """
    for kv_type in kv_types:
        if kv_type not in KV_TYPES:
            raise ClexError(f"{kv_type!r} is no type of cache; there are {', '.join(KV_TYPES)}")
    for length in ctx:
        if not 0 < length < 2**31:
            raise ClexError(f"a context cannot have {length} tokens")
    path = Path(path)
    with GGUFFile(path) as file:
        part = _part(file)
        architecture = file.get("general.architecture")
        if part is not None and part[0] > 1 and architecture is None:
            raise ClexError(f"{path}: part {part[0]} of {part[1]} of a split model; inspect its first part")
        if not isinstance(architecture, str):
            raise ClexError(f"{path}: not a model (general.architecture is {file.kind('general.architecture')})")
        tables = named_tables(file, path)
        tables_in_file = tables is not None
        tables = tables or longrope_tables(file)
        trained = count(file, f"{architecture}.context_length")
        longest = tables.max_context_length if tables else trained
        baked = None if tables else baked_in(file)
        if baked:
            trained = baked.original_context_length
        original = tables.original_context_length if tables else trained
        shape = ModelShape.from_metadata(file)
        name = file.get("general.name")
        return Inspection(
            path=path,
            file_bytes=path.stat().st_size,
            architecture=architecture,
            name=name if isinstance(name, str) else None,
            part=part,
            file_type=_file_type(file),
            parameters=sum(math.prod(tensor.shape) for tensor in file.tensors),
            tensor_types=_tensor_types(file),
            trained_context=trained,
            original_context=original,
            max_context=longest,
            rope=read_rope(file),
            tables=tables,
            tables_in_file=tables_in_file,
            baked=baked,
            shape=shape,
            memory=_memory(shape, ctx or _doublings(original, longest), kv_types),
        )


def _part(file: GGUFFile) -> tuple[int, int] | None:
    number, parts = file.get("split.no", 0), file.get("split.count", 1)
    if not isinstance(number, int) or not isinstance(parts, int) or not 0 <= number < parts or parts == 1:
        return None
    return number + 1, parts


def _file_type(file: GGUFFile) -> str | None:
    from llama_cpp import llama_cpp

    code = file.get("general.file_type")
    if isinstance(code, bool) or not isinstance(code, int):
        return None
    names = [name for name in dir(llama_cpp) if name.startswith(("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_"))]
    found = next((name for name in names if getattr(llama_cpp, name) == code), None)
    return found and found.split("_", 3)[3].lower()


def _tensor_types(file: GGUFFile) -> tuple[TensorType, ...]:
    sums: dict[str, list[int]] = {}
    for tensor in file.tensors:
        entry = sums.setdefault(tensor.type_name, [0, 0])
        entry[0] += 1
        entry[1] += tensor.size
    found = [TensorType(name, tensors, size) for name, (tensors, size) in sums.items()]
    return tuple(sorted(found, key=lambda kind: (-kind.bytes, kind.name)))


def _doublings(original: int | None, longest: int | None) -> list[int]:
    if not original or not longest:
        return []
    lengths = []
    while original < longest:
        lengths.append(original)
        original *= 2
    return [*lengths, longest]


def _memory(shape: ModelShape | None, lengths: Sequence[int], kv_types: Sequence[str]) -> tuple[ContextMemory, ...]:
    if shape is None:
        return ()
    return tuple(
        ContextMemory(
            context=length,
            kv={name: kv_bytes(shape, length, name) if kv_type_fits(shape, name) else None for name in kv_types},
            compute=compute_bytes(shape, length),
            compute_flash_attn=compute_bytes(shape, length, flash_attn=True),
        )
        for length in lengths
    )


#
# what people see
#


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
    yield "file", f"{escaped(str(found.path))}, {_size(found.file_bytes)}"
    if found.part is not None:
        yield "", f"part {found.part[0]} of {found.part[1]}: parameters and sizes are those of this part"
    text, shape = escaped(found.architecture, 60), found.shape
    if shape is not None:
        heads = f"{shape.heads} heads"
        if max(shape.heads_kv) != shape.heads:
            heads += f" ({max(shape.heads_kv)} for keys and values)"
        text += f", {shape.layers} layers, {heads} of {shape.key_length}"
    yield "architecture", text
    yield "parameters", _short(found.parameters)
    types = ", ".join(f"{kind.name} {_size(kind.bytes)} in {kind.tensors}" for kind in found.tensor_types)
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
    if architectures.find(found.architecture).tables:
        return "none: runs as in llama.cpp; clex-convert adds some"
    return "none: runs as in llama.cpp; clex-convert has none for this architecture"


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
        table.add_row(f"{entry.context:,}", *("-" if cell is None else gib(cell) for cell in cells))
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


def _size(size: int) -> str:
    """Bytes as disks and downloads count them."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def _short(number: int) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:,}"


@click.command("clex-inspect", cls=Command, context_settings=SETTINGS)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--ctx",
    metavar="N",
    type=click.IntRange(1, 2**31 - 1),
    multiple=True,
    show_default="the original context and its doublings",
    help="Context in tokens to show the memory of. Repeatable.",
)
@click.option(
    "--kv-type",
    "kv_types",
    metavar="TYPE",
    type=click.Choice(list(KV_TYPES)),
    multiple=True,
    default=KV_SHOWN,
    help=f"Type of the key and value cache to show it for: {', '.join(KV_TYPES)}. Repeatable.",
)
@click.option(
    "--plot",
    "picture",
    metavar="OUT",
    type=click.Path(path_type=Path),
    help="Draw the inverse frequencies of every bucket into OUT.png or OUT.svg; several files side by side.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each FILE, a line each.")
@click.version_option(package_name="clex-local")
def main(
    files: tuple[Path, ...], ctx: tuple[int, ...], kv_types: tuple[str, ...], picture: Path | None, as_json: bool
) -> None:
    """Show what is in a GGUF FILE: model, memory that a context needs, tables and what they cover.

    Only the header is read.
    """
    found = [inspect(path, ctx=ctx, kv_types=kv_types) for path in files]
    if picture is not None:
        from clex_local.plot import plot

        plot(found, picture)
    # A pipe takes lines of any length.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    for number, inspection in enumerate(found):
        if as_json:
            click.echo(json.dumps(inspection.to_json(), allow_nan=False))
            continue
        with console.capture() as text:
            show(inspection, console)
        lines = "".join(f"{line.rstrip()}\n" for line in text.get().splitlines())
        click.echo("\n" * (number > 0) + lines, nl=False)


if __name__ == "__main__":
    main()
