"""Importance matrices: how much each column of a matrix matters, which the quantizer weighs its errors by."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clex_convert.child_process import report, request, run_child
from clex_convert.errors import ConvertError, disk_full
from clex_local.model_file.gguf_file import GGUFError, GGUFFile, TensorInfo

CHUNK = 512  # tokens, as llama.cpp's llama-imatrix has it
_BATCH = 128
_F32 = 0
_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class ImportanceMatrix:
    """What an importance matrix file holds.

    Attributes:
        path: the file.
        weights: of each tensor, the mean square of each column of its input: float32 [experts * columns].
        chunks: parts of a text that it was computed from; 0 if the file does not say.
        dataset: the text's name; empty if the file does not say.
    """

    path: Path
    weights: dict[str, npt.NDArray[np.float32]]
    chunks: int
    dataset: str

    @classmethod
    def to_come(cls, text: Path) -> ImportanceMatrix:
        """One that will be computed from a text: without weights, but the file will say the same of it."""
        return cls(text, {}, 1, text.name)

    def check_fits(self, tensors: tuple[TensorInfo, ...]) -> None:
        """Checks that it was computed from a model with these tensors.

        Raises:
            ConvertError: it has weights for tensors that the model lacks or that differ in size, or none for a layer.
        """
        wrong = f"{self.path}: is the importance matrix of another model"
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        for name, weights in self.weights.items():
            shape = shapes.get(name)
            if shape is None:
                if _layer(name) is not None:
                    raise ConvertError(f"{wrong}: this one has no tensor {name}")
                continue
            columns = shape[0] * math.prod(shape[2:])
            if weights.size != columns:
                raise ConvertError(f"{wrong}: it has {weights.size} weights for {name}, whose columns are {columns}")
        known = {_layer(name) for name in self.weights}
        missing = sorted({_layer(name) for name in shapes} - known - {None}, key=lambda layer: layer or 0)
        if missing:
            raise ConvertError(f"{wrong}: it has nothing for layer {missing[0]}")


def _layer(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[1]) if len(parts) > 2 and parts[0] == "blk" and parts[1].isdecimal() else None


# Files


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Reads a file of llama.cpp's llama-imatrix: GGUF, or the older binary format.

    Raises:
        ConvertError: the file is missing, of another kind, or damaged.

    Source: ``common_imatrix_load`` and, for the mean values, ``load_imatrix`` of llama.cpp's tools/quantize.
    """
    if not path.is_file():
        raise ConvertError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        imatrix = _read_gguf(path) if is_gguf else _read_legacy(path)
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read ({error.strerror})") from None
    except GGUFError as error:
        raise ConvertError(str(error)) from None
    for name, weights in imatrix.weights.items():
        if not np.isfinite(weights).all() or (weights < 0).any():
            raise ConvertError(f"{path}: damaged importance matrix, {name} has weights that are no mean squares")
    return imatrix


def _read_gguf(path: Path) -> ImportanceMatrix:
    with GGUFFile(path) as file, path.open("rb") as data:
        kind = file.get("general.type", "model")
        sums = {tensor.name.removesuffix(_SUMS): tensor for tensor in file.tensors if tensor.name.endswith(_SUMS)}
        if kind != "imatrix" or not sums:
            raise ConvertError(f"{path}: not an importance matrix but a GGUF file of type {kind!r}")
        counts = {tensor.name.removesuffix(_COUNTS): tensor for tensor in file.tensors if tensor.name.endswith(_COUNTS)}

        def values(tensor: TensorInfo) -> npt.NDArray[np.float32]:
            data.seek(file.data_offset + tensor.offset)
            return np.frombuffer(data.read(tensor.size), np.float32)

        weights: dict[str, npt.NDArray[np.float32]] = {}
        for name, tensor in sums.items():
            count = counts.get(name)
            if count is None or tensor.type != _F32 or count.type != _F32:
                raise ConvertError(f"{path}: damaged importance matrix, {name} has no counts or another type than f32")
            total, rows = values(tensor), values(count)
            if total.size % rows.size:
                raise ConvertError(f"{path}: damaged importance matrix, {name} has {rows.size} counts")
            total, rows = total.reshape(rows.size, -1), rows[:, None]
            # An expert that the text never chose: all of its columns matter alike.
            mean = np.where(rows > 0, total / np.maximum(rows, 1), 1)
            weights[name] = mean.reshape(-1).astype(np.float32)
        datasets = file.get("imatrix.datasets", [])
        chunks = file.get("imatrix.chunk_count", 0)
    first = datasets[0] if isinstance(datasets, list) and datasets else ""
    return ImportanceMatrix(path, weights, chunks if isinstance(chunks, int) else 0, first)


def _read_legacy(path: Path) -> ImportanceMatrix:
    data = path.read_bytes()
    position = 0

    def take(count: int) -> bytes:
        nonlocal position
        if count < 0 or position + count > len(data):
            raise ValueError
        position += count
        return data[position - count : position]

    def number() -> int:
        return struct.unpack("<i", take(4))[0]

    weights: dict[str, npt.NDArray[np.float32]] = {}
    try:
        for _ in range(max(number(), 1)):
            name, calls, size = take(number()).decode(), number(), number()
            if not name or size < 1:
                raise ValueError
            weights[name] = (np.frombuffer(take(4 * size), np.float32) / max(calls, 1)).astype(np.float32)
    except ValueError:
        raise ConvertError(f"{path}: not an importance matrix, or a damaged one (llama.cpp's GGUF or .dat)") from None
    chunks, dataset = 0, ""
    if len(data) - position >= 8:  # files of the first years end here
        chunks, length = struct.unpack_from("<ii", data, position)
        dataset = data[position + 8 : position + 8 + max(length, 0)].decode("utf-8", "replace")
    return ImportanceMatrix(path, weights, max(chunks, 0), dataset)


# Computing one


def compute_imatrix(
    model: Path,
    text: Path,
    target: Path,
    *,
    chunks: int | None = None,
    verbose: bool = False,
    progress: Callable[[float], None] = lambda part: None,
) -> ImportanceMatrix:
    """Computes the importance matrix of a model from a text and writes it as GGUF.

    Args:
        model: GGUF file, best one that is not quantized.
        text: UTF-8 file, read in chunks of `CHUNK` tokens or, if that is less, of the model's original context.
        target: file to write.
        chunks: how many of them to read; all of them if None.
        verbose: show llama.cpp's log.
        progress: called with the part of the text that is done, 0 to 1.

    Raises:
        ConvertError: the text is missing, empty or too short, the model cannot be computed with, or the disk is full.

    Source: ``compute_imatrix`` of llama.cpp's tools/imatrix, whose matrices of the same text these equal.
    """
    check_text(text)
    found: dict[str, Any] = {}

    def reported(value: dict[str, Any]) -> None:
        found.update(value)
        if "done" in value:
            progress(value["done"])

    wanted = {"model": str(model), "text": str(text), "target": str(target), "chunks": chunks}
    reason = run_child("clex_convert.imatrix", wanted, verbose=verbose, reported=reported)
    if "short" in found:
        tokens, least = found["short"]
        raise ConvertError(f"{text}: has {tokens} tokens, an importance matrix needs at least {least}")
    if found.get("unsaved"):
        raise disk_full(target)
    if reason is not None:
        raise ConvertError(f"{model}: the importance matrix could not be computed: {reason}")
    return read_imatrix(target)


def check_text(path: Path) -> None:
    """Checks that a text can be read.

    Raises:
        ConvertError: it is missing, empty, or not UTF-8.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConvertError(f"{path}: is not a text in UTF-8") from None
    if not text.strip():
        raise ConvertError(f"{path}: is empty")


def main() -> None:
    """The child."""
    wanted = request()
    import ctypes

    from clex_convert.decoder import Decoder
    from clex_local.library import llama_clex

    imatrix = ctypes.c_void_p(llama_clex.imatrix_init())
    decoder = Decoder(
        Path(wanted["model"]),
        CHUNK,
        n_batch=_BATCH,
        callback=llama_clex.imatrix_collect,
        user_data=imatrix,
    )
    tokens, size = decoder.tokenize(Path(wanted["text"]).read_bytes()), decoder.n_ctx
    chunks = len(tokens) // size
    if chunks == 0:
        report({"short": (len(tokens), size)})
        raise SystemExit(1)
    chunks = min(chunks, wanted["chunks"] or chunks)
    for chunk in range(chunks):
        decoder.clear()
        part = tokens[chunk * size : (chunk + 1) * size].copy()
        if decoder.bos is not None:
            part[0] = decoder.bos
        for start in range(0, size, decoder.n_batch):
            decoder.decode(part[start : start + decoder.n_batch], start)
        report({"done": (chunk + 1) / chunks})
    dataset = os.path.basename(wanted["text"]).encode(errors="replace")
    if not llama_clex.imatrix_save(imatrix, os.fsencode(wanted["target"]), dataset, chunks, size):
        report({"unsaved": True})
        raise SystemExit(1)


if __name__ == "__main__":
    main()
