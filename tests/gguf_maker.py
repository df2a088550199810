"""Small GGUF files, written byte by byte so that they can also be wrong."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from clex_local.gguf_file import GGUFFile, GGUFHeader

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


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", 9, _CODES[value.dtype.type], value.size) + value.tobytes()
    return struct.pack("<I", _CODES[type(value)]) + value.tobytes()


def gguf_bytes(
    keys: dict[str, Any],
    tensors: dict[str, np.ndarray] = TENSORS,
    *,
    pad_end: bool = True,
    alignment: int = 32,
) -> bytes:
    """A GGUF file with these keys (str, list of str, numpy scalars and arrays) and float32 tensors."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    head += b"".join(_string(key) + _value(value) for key, value in keys.items())
    data = b""
    for name, tensor in tensors.items():
        data += bytes(-len(data) % alignment)
        shape = tensor.shape[::-1]
        head += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", 0, len(data))
        data += tensor.astype("<f4").tobytes()
    if pad_end:
        data += bytes(-len(data) % alignment)
    return head + bytes(-len(head) % alignment) + data


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
