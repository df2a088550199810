"""An existing GGUF file, or a split one, as a source: what it says of its RoPE, and its copy with tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clex_convert.errors import ConvertError
from clex_convert.gguf_adapter import GGUFAdapter, adapted_rope
from clex_convert.gguf_parts import open_parts
from clex_convert.gguf_writer import GGUFWriter, TensorData, tensors_of
from clex_convert.layout import Layout
from clex_convert.lora import Adapter
from clex_convert.rope_metadata import RopeMetadata
from clex_convert.scaling import FREQUENCY_TENSORS, Scaling, read_gguf_scaling, read_scaling
from clex_convert.source_rope import SourceRope
from clex_convert.weights import OdeSettings, OdeWeights
from clex_local.errors import ClexError, escaped
from clex_local.model_file import architectures
from clex_local.model_file.baked import baked_in
from clex_local.model_file.cache_kinds import has_windows
from clex_local.model_file.keys import DEFAULT_BASE, ModelKeys
from clex_local.model_file.tables import MAX_DIMENSION, Tables, TablesError, tables_of

_F32, _F16, _BF16 = 0, 1, 30  # ggml_type
_FLOATS = {_F32, _F16, _BF16}
_CHUNK = 8 << 20  # bytes


class GGUFSource:
    """One GGUF model that tables can be added to, to be used in ``with``; see `Source`.

    Attributes:
        path: the file, or the part of a split model, that was given.
        file: the header that holds the model's keys.
        keys: those of them under the name of its architecture.
        paths: the files that the model consists of.
        tensors: where the data of its tensors lie.
        gguf_architecture: its architecture's name in GGUF.
        rope: what the model says of its rotary embedding.
    """

    default_outtype = "copy"
    layout_types = ("copy",)

    def __init__(
        self, path: Path, rope_scaling: Mapping[str, Any] | None = None, adapter: Adapter | None = None
    ) -> None:
        """Reads the headers.

        Args:
            path: the file, or any part of a split model.
            rope_scaling: takes the place of what the file's keys name, or the adapter.
            adapter: what is merged into it.

        Raises:
            GGUFError: a file is missing, not GGUF, or damaged.
            ConvertError: an architecture that the runtime does not have, a split model whose parts are not all
                there, a RoPE scaling that is not understood, keys without which no tables can be made, or an adapter
                that cannot be merged.
        """
        self.path, self._adapter = path, adapter
        parts = open_parts(path)
        self.file, self.paths = parts[0], [part.path for part in parts]
        self.keys = ModelKeys(self.file)
        self.tensors: list[TensorData] = [tensor for part in parts for tensor in tensors_of(part)]
        for part in parts[1:]:
            part.close()
        try:
            self._check_unbaked()
            self.gguf_architecture = self._check_model()
            self.rope = self._read_rope(rope_scaling)
            self._merged: GGUFAdapter | None = None
            if adapter is not None:
                self.rope = adapted_rope(adapter, path, self.rope, given=rope_scaling is not None)
                self._merged = GGUFAdapter(adapter, path, self.keys, self.tensors)
        except ClexError:
            self.file.close()
            raise

    def __enter__(self) -> GGUFSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    @property
    def precision(self) -> str:
        """``copy``; with an adapter f32 for what it changes, so that this is quantized once."""
        return "copy" if self._merged is None else "f32"

    @property
    def quantized(self) -> bool:
        """Whether any tensor is of a quantized type."""
        return any(tensor.type not in _FLOATS for tensor in self.tensors)

    def _check_unbaked(self) -> None:
        baked = baked_in(self.file)
        if baked is None:
            return
        raise ConvertError(
            f"{self.path}: has the frequencies of one table already, baked for {baked.context_length} tokens (method "
            f"{escaped(baked.method, 40)}, {baked.original_context_length} without it), and tables would scale them "
            "twice; convert the model that it was made of"
        )

    def _check_model(self) -> str:
        file, architecture = self.file, self.file.get("general.architecture")
        if not isinstance(architecture, str) or not architectures.find(architecture).tables:
            raise ConvertError(
                f"{self.path}: the architecture {str(architecture)[:40]!r} is not supported; "
                f"supported: {architectures.names_with_tables()}"
            )
        kind = str(file.get("general.type", "model"))[:40]
        if kind != "model" or not self.tensors:
            what = f"a GGUF file of type {kind!r}" if kind != "model" else "a GGUF file without tensors"
            raise ConvertError(f"{self.path}: {what}, not a model")
        return architecture

    def _number(self, name: str, default: float | None = None) -> float | None:
        """Value of a key that must be a number where it is there."""
        number, value = self.keys.number(name, default), self.keys.get(name)
        if number is None and value is not None:
            raise ConvertError(f"{self.path}: {self.keys.key(name)} must be a number, not {str(value)[:40]!r}")
        return number

    def _floats(self, name: str) -> tuple[float, ...] | None:
        """Values of a tensor of frequency factors; None if the file has none of this name."""
        info = next((tensor for tensor in self.tensors if tensor.name == name), None)
        if info is None:
            return None
        half = (self.keys.rope_dimension or 0) // 2
        if info.type != _F32 or info.shape != (half,):
            raise ConvertError(f"{self.path}: the tensor {name} must hold {half} f32 values, one for each frequency")
        assert isinstance(info.source, Path)  # those in memory are tensors to be written
        with info.source.open("rb") as file:
            file.seek(info.offset)
            values = np.frombuffer(file.read(info.size), "<f4").astype(np.float64)
        if not (np.isfinite(values) & (values > 0)).all():
            raise ConvertError(f"{self.path}: the tensor {name} holds a factor that is not finite and above 0")
        return tuple(values.tolist())

    def _read_scaling(self, context: int, dim: int, rope_scaling: Mapping[str, Any] | None) -> Scaling:
        if rope_scaling is None:
            keys = {name: self.keys.get(name) for name in self.keys.names("rope.scal")}
            return read_gguf_scaling(keys, self._floats, str(self.path), context=context)
        tensor = next((tensor.name for tensor in self.tensors if tensor.name in FREQUENCY_TENSORS), None)
        if tensor is not None:
            raise ConvertError(
                f"{self.path}: has frequency factors of its own (tensor {tensor}), whose place another RoPE scaling "
                "cannot take; leave `rope_scaling` out"
            )
        return read_scaling(rope_scaling, "`rope_scaling`", context=context, dim=dim)

    def _read_rope(self, rope_scaling: Mapping[str, Any] | None) -> SourceRope:
        dim, context = self.keys.rope_dimension, self._number("context_length")
        if not dim:
            raise ConvertError(f"{self.path}: the key {self.keys.key('rope.dimension_count')} is missing")
        if dim % 2 or not 4 <= dim <= MAX_DIMENSION:
            raise ConvertError(f"{self.path}: the rotary dimension must be even and 4 to {MAX_DIMENSION}, not {dim}")
        if not isinstance(context, int) or not 0 < context < 2**31:
            raise ConvertError(f"{self.path}: the key {self.keys.key('context_length')} is missing or unusable")
        facts: dict[str, Any] = {"architecture": self.gguf_architecture, "context_length": context}
        facts["name"] = str(self.file.get("general.name", ""))
        base = self._number("rope.freq_base", DEFAULT_BASE)
        if base is None or base <= 1:
            raise ConvertError(f"{self.path}: the RoPE base (rope_theta) must be above 1, not {base}")
        scaling = self._read_scaling(context, dim, rope_scaling)
        if scaling.kind != "default":
            said = {key: value for key, value in vars(scaling).items() if value != getattr(Scaling, key)}
            facts["rope_scaling"] = said
        windowed = has_windows(self.keys)
        return SourceRope(dim, self._head_dim() or dim, float(base), context, OdeSettings(), facts, scaling, windowed)

    def _head_dim(self) -> int | None:
        # As llama.cpp finds it.
        if length := self._number("attention.key_length"):
            return int(length)
        heads = self.keys.get("attention.head_count")
        if hasattr(heads, "__len__"):  # of each layer
            return None
        width, heads = self._number("embedding_length"), self._number("attention.head_count")
        return int(width // heads) if width and heads else None

    def check_window(self, context: int) -> None:
        """Refuses a window that a context of so many tokens would show.

        Raises:
            ConvertError: the file names one that llama.cpp does not compute.
        """
        row = architectures.find(self.gguf_architecture)
        window = 0 if row.sliding_window else self._number("attention.sliding_window")
        if 0 < (window or 0) < context:
            raise ConvertError(
                f"{self.path}: layers attend to the last {window:g} tokens only "
                f"({self.keys.key('attention.sliding_window')}), which cannot be combined with tables, and the "
                f"result is to have {context} tokens"
            )

    def files(self) -> list[Path]:
        """The parts of a split model, or the file; and the adapter's, GGUF files excepted."""
        folder = [] if self._adapter is None else self._adapter.path.iterdir()
        return [*self.paths, *(path for path in folder if path.suffix != ".gguf")]

    def ode_weights(self) -> OdeWeights | None:
        """Those of the adapter: a GGUF file has no CLEX layer, only the tables that come of one."""
        return None if self._adapter is None else self._adapter.ode_weights()

    def not_finite(self) -> str | None:
        """Name of the first tensor of floats that holds NaN or infinity; None if none does."""
        for tensor in self.tensors:
            if tensor.type in _FLOATS and isinstance(tensor.source, Path) and not all(map(_is_finite, _chunks(tensor))):
                return tensor.name
        return None

    def own_tables(self) -> Tables | None:
        """The tables that the file has already; None if it has none.

        Raises:
            ConvertError: they break a rule of the metadata.
        """
        try:
            return tables_of(self.file)
        except TablesError as error:
            raise ConvertError(f"{self.path}: {error}; pass `method` to make new tables") from None

    def changed_keys(self, metadata: RopeMetadata) -> tuple[list[str], dict[str, Any]]:
        """The keys that go, and those that come, where the file says of its rotary embedding what `metadata` does."""
        context = {self.keys.key("context_length"): np.uint32(metadata.context_length)}
        return [key for key in self.file.keys() if metadata.replaces(key)], {**context, **metadata.keys}  # noqa: SIM118

    @contextmanager
    def layout(self, metadata: RopeMetadata, outtype: str) -> Iterator[Layout]:
        """The model as one file; the tensor data are copied bit for bit, but for those that an adapter changes.

        Args:
            metadata: what takes the place of the tables, if any, that the file has.
            outtype: ``copy``, or `precision`.
        """
        assert outtype in (*self.layout_types, self.precision)
        unquantized = outtype != "copy"
        removed, keys = self.changed_keys(metadata)
        with GGUFWriter(self.file) as writer:
            for key in [*removed, *(key for key in self.file.keys() if key.startswith("split."))]:  # noqa: SIM118
                writer.header.remove(key)
            writer.set(keys)
            merged = self._merged
            for tensor in self.tensors if merged is None else merged.tensors(unquantized=unquantized):
                if not metadata.replaces(tensor.name):
                    writer.add(tensor)
            for name, values in metadata.tensors.items():
                writer.add(TensorData.of(name, values))
            layout = writer.layout()
            yield layout if merged is None else replace(layout, notes=merged.notes(unquantized=unquantized))


def _chunks(tensor: TensorData) -> Iterator[npt.NDArray[np.floating[Any]]]:
    assert isinstance(tensor.source, Path)
    with tensor.source.open("rb") as file:
        file.seek(tensor.offset)
        left = tensor.size
        while left:
            data = file.read(min(left, _CHUNK))
            if not data:
                return  # the file was checked when it was copied
            left -= len(data)
            if tensor.type == _BF16:  # the upper half of a float32
                yield (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
            else:
                yield np.frombuffer(data, "<f4" if tensor.type == _F32 else "<f2")


def _is_finite(values: npt.NDArray[np.floating[Any]]) -> bool:
    return bool(np.isfinite(values).all())
