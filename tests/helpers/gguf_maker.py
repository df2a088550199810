"""Small GGUF files, written byte by byte so that they can also be wrong."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.gguf_header import GGUFHeader

_CODES = {
    np.uint8: 0,
    np.int8: 1,
    np.uint16: 2,
    np.int16: 3,
    np.uint32: 4,
    np.int32: 5,
    np.float32: 6,
    np.bool_: 7,
    np.uint64: 10,
    np.int64: 11,
    np.float64: 12,
}

# A model header of the smallest kind that the converter takes: rotary dimension 8, original context 64.
MODEL: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.context_length": np.uint32(64),
    "llama.embedding_length": np.uint32(16),
    "llama.attention.head_count": np.uint32(2),
    "llama.rope.freq_base": np.float32(10000),
}
TENSORS = {"a.weight": np.arange(12, dtype=np.float32), "b.weight": np.arange(5, dtype=np.float32)}


def _string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, (str, bytes)):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", 9, _CODES[value.dtype.type], value.size) + value.tobytes()
    return struct.pack("<I", _CODES[type(value)]) + value.tobytes()


def gguf_fields(
    keys: dict[str, Any],
    tensors: dict[str, np.ndarray] = TENSORS,
    *,
    pad_end: bool = True,
    alignment: int = 32,
) -> dict[str, bytes]:
    """The fields of a GGUF file by name, in order: ``n_kv``, ``KEY`` and ``KEY=`` (type and value), ``TENSOR.dims`` ...

    Args:
        keys: str, bytes that need not be UTF-8, list of str, numpy scalars and arrays.
        tensors: all written as float32.
        pad_end: whether the last tensor is padded too.
        alignment: of the tensors.
    """
    fields = {"magic": b"GGUF", "version": struct.pack("<I", 3)}
    fields |= {"n_tensors": struct.pack("<Q", len(tensors)), "n_kv": struct.pack("<Q", len(keys))}
    for key, value in keys.items():
        fields |= {key: _string(key), f"{key}=": _value(value)}
    data = b""
    for name, tensor in tensors.items():
        data += bytes(-len(data) % alignment)
        shape = tensor.shape[::-1]
        fields |= {name: _string(name), f"{name}.dims": struct.pack(f"<I{len(shape)}Q", len(shape), *shape)}
        fields |= {f"{name}.type": struct.pack("<I", 0), f"{name}.offset": struct.pack("<Q", len(data))}
        data += tensor.astype("<f4").tobytes()
    if pad_end:
        data += bytes(-len(data) % alignment)
    head = sum(map(len, fields.values()))
    return fields | {"padding": bytes(-head % alignment), "data": data}


def gguf_bytes(keys: dict[str, Any], tensors: dict[str, np.ndarray] = TENSORS, **options: Any) -> bytes:
    """A GGUF file of `gguf_fields`, whose arguments these are."""
    return b"".join(gguf_fields(keys, tensors, **options).values())


def write_split(folder: Path, parts: Sequence[tuple[dict[str, Any], dict[str, np.ndarray]]]) -> list[Path]:
    """Write a split model of these keys and tensors into a new folder, and return the paths of its parts."""
    folder.mkdir()
    paths = []
    for index, (keys, tensors) in enumerate(parts):
        place = {
            "split.no": np.uint16(index),
            "split.count": np.uint16(len(parts)),
            "split.tensors.count": np.int32(sum(len(tensors) for _, tensors in parts)),
        }
        paths.append(folder / f"model-{index + 1:05d}-of-{len(parts):05d}.gguf")
        paths[-1].write_bytes(gguf_bytes({**keys, **place}, tensors))
    return paths


def rewrite(source: Path, target: Path, changes: dict[str, Any]) -> Path:
    """A copy of a GGUF file with some keys set, or removed where the value is None."""
    with GGUFFile(source) as file, GGUFHeader(file) as header:
        for key, value in changes.items():
            if value is None:
                header.remove(key)
            else:
                header.set(key, value)
        for tensor in file.tensors:
            header.add_tensor(tensor.name, tensor.shape, tensor.type)
        data = source.read_bytes()[file.data_offset :]
        target.write_bytes(header.encoded() + data)
    return target
