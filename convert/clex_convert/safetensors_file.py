"""Files of safetensors: their headers, and tensors of floats as numpy's float32, with numpy alone."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clex_convert.errors import ConvertError
from clex_local.errors import one_line

_MAX_HEADER = 100_000_000  # bytes, the format's own limit
# Bytes of an element; 0 for those that share bytes, which nothing here reads.
_SIZES = {
    **dict.fromkeys(("F4", "F6_E2M3", "F6_E3M2"), 0),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_FLOATS = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}


class DamagedFileError(Exception):
    """A file that is not what the format says; the message says why."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file.

    Attributes:
        type: in the format's words, such as ``BF16``.
        shape: the contiguous dimension last.
        offset: first byte in the file.
        size: bytes.
    """

    type: str
    shape: tuple[int, ...]
    offset: int
    size: int


def read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file, none of them read, and its metadata.

    Raises:
        OSError: the file cannot be read.
        DamagedFileError: its header breaks a rule of the format, or the file has another length than it says.

    Source: the format's description, https://github.com/huggingface/safetensors#format
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise DamagedFileError(f"{size} bytes are too few for its header")
        text = file.read(length)
    try:
        header = json.loads(text.decode())
        metadata = header.pop("__metadata__", None) or {}
        tensors = {name: _stored(said, 8 + length) for name, said in header.items()}
        metadata = {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFileError(f"its header cannot be read: {one_line(error, 80)}") from None
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size)):
        if tensor.offset != end:
            raise DamagedFileError(f"the tensor {one_line(name, 60)} does not follow the one before it")
        end += tensor.size
    if end != size:
        raise DamagedFileError(f"its tensors end at byte {end}, the file at {size}")
    return tensors, metadata


def _stored(said: Any, start: int) -> StoredTensor:
    kind, shape, (begin, end) = said["dtype"], tuple(said["shape"]), said["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)) or end < begin:
        raise ValueError("a shape or an offset is no number from 0")
    if kind not in _SIZES:
        raise ValueError(f"the type {kind} is unknown")
    if _SIZES[kind] and end - begin != _SIZES[kind] * math.prod(shape):
        raise ValueError(f"{end - begin} bytes are not {list(shape)} of {kind}")
    return StoredTensor(str(kind), shape, start + begin, end - begin)


def read_floats(path: Path, tensor: StoredTensor) -> npt.NDArray[np.float32]:
    """One tensor of f16, bf16, f32 or f64 as float32.

    Raises:
        ConvertError: it is of another type, or the file cannot be read any more.
    """
    if tensor.type not in _FLOATS:
        raise ConvertError(f"{path}: holds a tensor of {one_line(tensor.type, 20)} where floats are expected")
    try:
        values = np.fromfile(path, _FLOATS[tensor.type], math.prod(tensor.shape), offset=tensor.offset)
        values = values.reshape(tensor.shape)
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from None
    except ValueError:
        raise ConvertError(f"{path}: became shorter while it was read; try again") from None
    if tensor.type == "BF16":  # the upper half of a float32
        return (values.astype("<u4") << 16).view(np.float32)
    with np.errstate(over="ignore"):  # what is infinite is refused where it is used
        return values.astype(np.float32)
