"""What is in a model file, read from its header alone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clex_local.errors import ClexError, escaped
from clex_local.model_file.baked import Baked, baked_in
from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.keys import ModelKeys
from clex_local.model_file.kv_types import KV_TYPES
from clex_local.model_file.memory import compute_bytes, kv_bytes, kv_type_fits
from clex_local.model_file.model_shape import ModelShape
from clex_local.model_file.rope import RopeFacts, longrope_tables, read_rope
from clex_local.model_file.table_support import why_no_tables
from clex_local.model_file.tables import Tables, named_tables

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
        why_no_tables: why clex-convert does not add tables to it; empty where it does.
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
    rope: RopeFacts
    tables: Tables | None
    tables_in_file: bool
    baked: Baked | None
    why_no_tables: str
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
        kv_types: types of the key and value cache to estimate it for, names from ``kv_types.KV_TYPES``.

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
        trained = ModelKeys(file).trained_context or None
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
            why_no_tables=why_no_tables(ModelKeys(file)),
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
