"""Tensors of llama.cpp's conversion scripts, made and written a few rows at a time.

The scripts describe each tensor of the output as a tree of operations and evaluate it whole, as float32, to write it:
that takes several times the memory of the largest tensor. Where rows do not depend on each other, which holds for all
that are large (embeddings, outputs, stacks of experts), they are made one range after the other here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from clex_convert.model_files import read_tensor

_CHUNK = 32 << 20  # bytes of a chunk as float32

Chunk = Callable[[], torch.Tensor]


class NotFiniteWeights(Exception):
    """A tensor holds NaN or infinity."""


def chunks_of(tensor: Any) -> list[Chunk]:
    """Functions that make a lazy tensor, one range of its rows after the other.

    Args:
        tensor: ``LazyTorchTensor`` of the scripts; its operations are read off as ``LazyBase`` keeps them.
    """
    function, arguments = tensor._func, tensor._args
    if function is torch.stack and tensor._kwargs == {"dim": 0}:
        return [chunk for part in arguments[0] for chunk in chunks_of(part)]
    if len(arguments) == 2 and arguments[1] is torch.float32 and arguments[0].shape == tensor.shape:
        return [lambda chunk=chunk: chunk().to(torch.float32) for chunk in chunks_of(arguments[0])]
    # What is asked of a lazy tensor beside its shape and type makes it.
    rows, row = tensor.shape[0], 4 * math.prod(tensor.shape[1:])
    step = max(1, _CHUNK // max(row, 1))
    ranges = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    if function is read_tensor:
        return [lambda start=start, stop=stop: read_tensor(*arguments)[start:stop] for start, stop in ranges]
    if len(arguments) == 1 and hasattr(arguments[0], "data_range"):
        return [lambda start=start, stop=stop: _read(arguments[0], tensor, start, stop) for start, stop in ranges]
    return [lambda: type(tensor).to_eager(tensor)]


def _read(stored: Any, tensor: Any, start: int, stop: int) -> torch.Tensor:
    """Rows of a tensor in a safetensors file (``LocalTensor`` of the scripts)."""
    place = stored.data_range
    row = place.size // tensor.shape[0]
    data = np.fromfile(place.filename, np.uint8, (stop - start) * row, offset=place.offset + start * row)
    return torch.from_numpy(data).view(tensor.dtype).reshape(stop - start, *tensor.shape[1:])


def write_chunks(tensor: Any, file: Any) -> Iterator[int]:
    """Writes a ``LazyChunkedTensor`` whose chunks are `chunks_of` a tensor; yields the bytes of each.

    Args:
        tensor: its ``_qtype`` is F32, F16 or BF16.
        file: file to write to.

    Source: ``LazyChunkedTensor.tofile``; torch rounds to bfloat16 as ``gguf.quants.BF16`` does, ten times as fast.
    """
    for make in tensor._chunks:
        chunk = make()
        if not bool(torch.isfinite(chunk).all()):
            raise NotFiniteWeights
        array = _array(chunk, tensor)
        file.write(array.data)
        yield array.nbytes
        del chunk, array  # before the next one is made


def _array(chunk: torch.Tensor, tensor: Any) -> np.ndarray[Any, Any]:
    """A chunk in the type that the tensor has in the file."""
    if tensor._qtype.name == "BF16":
        return np.ascontiguousarray(chunk.to(torch.bfloat16).view(torch.int16).numpy())
    return np.ascontiguousarray(chunk.numpy(), tensor.dtype)
