"""An existing GGUF file as a source: what it says of its RoPE, and its copy with tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clex_convert.checkpoint import Rope
from clex_convert.errors import ConvertError, writing
from clex_convert.weights import OdeSettings
from clex_local.gguf_file import GGUFFile
from clex_local.tables import SUPPORTED_ARCHITECTURES, Tables, rope_dimension_count

_CHUNK = 8 << 20
_FLOATS = {0, 1, 30}  # ggml_type: f32, f16, bf16
_DEFAULT_BASE = 10000.0  # llama.cpp's, where the key is absent


class GGUFSource:
    """One GGUF file that tables can be added to."""

    def __init__(self, path: Path) -> None:
        """Reads the header.

        Raises:
            GGUFError: the file is missing, not GGUF, or damaged.
            ConvertError: an architecture that the runtime does not have, a part of a split file, a model with a RoPE
                scaling of its own, or keys without which no tables can be made.
        """
        self.path = path
        self.file = GGUFFile(path)
        try:
            self.architecture = self._check_model()
            self._check_scaling()
            self.rope = self._read_rope()
        except ConvertError:
            self.file.close()
            raise

    @property
    def quantized(self) -> bool:
        """Whether any tensor is of a quantized type."""
        return any(tensor.type not in _FLOATS for tensor in self.file.tensors)

    def _check_model(self) -> str:
        file, architecture = self.file, self.file.get("general.architecture")
        if architecture not in SUPPORTED_ARCHITECTURES:
            raise ConvertError(
                f"{self.path}: the architecture {architecture!r} is not supported; "
                f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
            )
        parts = file.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            raise ConvertError(
                f"{self.path}: one of {parts} parts of a split model; join them first with llama.cpp's "
                "llama-gguf-split --merge"
            )
        kind = file.get("general.type", "model")
        if kind != "model" or not file.tensors:
            what = f"a GGUF file of type {kind!r}" if kind != "model" else "a GGUF file without tensors"
            raise ConvertError(f"{self.path}: {what}, not a model")
        return architecture

    def _number(self, key: str) -> int | float | None:
        value = self.file.get(f"{self.architecture}.{key}")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConvertError(f"{self.path}: {self.architecture}.{key} must be a number, not {str(value)[:40]!r}")
        return value

    def _check_scaling(self) -> None:
        kind = self.file.get(f"{self.architecture}.rope.scaling.type", "none")
        if kind not in ("none", "linear"):
            raise ConvertError(
                f"{self.path}: has RoPE scaling of type {kind!r} ({self.architecture}.rope.scaling.type), which cannot "
                "be combined with tables; start from the model without it"
            )
        for key in ("rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor"):
            # llama.cpp takes a factor of 0 for "none".
            if self._number(key) not in (None, 0, 1):
                raise ConvertError(
                    f"{self.path}: has a RoPE scaling of its own ({self.architecture}.{key} is {self._number(key)}), "
                    "which cannot be combined with tables; start from the model without it"
                )
        scaled = next((tensor.name for tensor in self.file.tensors if "rope_f" in tensor.name), None)
        if scaled is not None:
            raise ConvertError(
                f"{self.path}: has frequency factors of its own (tensor {scaled}), which cannot be combined with tables"
            )

    def _read_rope(self) -> Rope:
        dim, context = rope_dimension_count(self.file), self._number("context_length")
        if not dim:
            raise ConvertError(f"{self.path}: the key {self.architecture}.rope.dimension_count is missing")
        if not isinstance(context, int) or not 0 < context < 2**31:
            raise ConvertError(f"{self.path}: the key {self.architecture}.context_length is missing or unusable")
        base = self._number("rope.freq_base")
        facts: dict[str, Any] = {"architecture": self.architecture, "context_length": context}
        facts["name"] = str(self.file.get("general.name", ""))
        base = _DEFAULT_BASE if base is None else float(base)
        return Rope(dim, base, context, OdeSettings(), facts)

    def write_with(self, tables: Tables, target: Path, shown: Path, *, progress: Callable[[float], None]) -> None:
        """Writes the file with these tables in place of any it has; the tensor data is copied bit for bit.

        Args:
            tables: their ``original_context_length`` becomes the file's context length.
            target: file to write.
            shown: the file that messages speak of.
            progress: called with the part of the data copied, 0 to 1.

        Raises:
            ConvertError: the source changed meanwhile, or the disk cannot hold the copy.
        """
        file = self.file
        start, left = file.data_offset, file.data_size
        for key in file.keys():  # noqa: SIM118
            if key.startswith("clex."):
                file.remove(key)
        context = f"{self.architecture}.context_length"
        if file.get(context) != tables.original_context_length:
            file.set(context, np.uint32(tables.original_context_length))
        for key, value in tables.metadata().items():
            file.set(key, value)
        # The last tensor's padding may be absent from the source; readers differ in whether they want it.
        last = file.tensors[-1]
        left = last.offset + last.size
        padding = file.data_size - left
        total = max(left, 1)
        with self.path.open("rb") as source, writing(shown), target.open("wb") as copy:
            copy.write(file.header())
            source.seek(start)
            while left:
                chunk = source.read(min(_CHUNK, left))
                if not chunk:
                    raise ConvertError(f"{self.path}: became shorter while it was copied; try again")
                copy.write(chunk)
                left -= len(chunk)
                progress(1 - left / total)
            copy.write(bytes(padding))
