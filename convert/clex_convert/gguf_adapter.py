"""An adapter merged into the tensors of a GGUF file, which is read and written a few rows at a time, without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clex_convert import ggml_rows
from clex_convert.errors import ConvertError, NotFiniteError
from clex_convert.gguf_writer import TensorData, became_shorter, reading
from clex_convert.llama_cpp_scripts import tensor_names
from clex_convert.lora import Adapter, Merge
from clex_convert.scaling import kind_of, read_scaling
from clex_convert.source_rope import SourceRope
from clex_convert.weights import settings_from
from clex_local.model_file import architectures
from clex_local.model_file.gguf_api import tensor_types
from clex_local.model_file.keys import ModelKeys

_CHUNK = 16 << 20  # bytes of rows as float32
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
_IN_FOLDER = "merge it into the model folder: clex-convert FOLDER OUT.gguf --lora"


class GGUFAdapter:
    """What an adapter makes of the tensors of one file."""

    def __init__(self, adapter: Adapter, path: Path, keys: ModelKeys, tensors: Sequence[TensorData]) -> None:
        """Finds the tensors that it changes.

        Args:
            adapter: with names of transformers.
            path: the file, for messages.
            keys: of the model.
            tensors: of all its parts.

        Raises:
            ConvertError: the adapter belongs to another model, or changes what does not stand in a GGUF file as in
                transformers.
        """
        self._adapter, self._path, self._keys = adapter, path, keys
        self._row = architectures.find(keys.architecture)
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._merges = self._find()

    def _find(self) -> dict[str, Merge]:
        """What becomes of the tensors, by their names in the file; of an output that is not there yet, too."""
        names = self._names()
        for target, name in names.items():
            self._check(target, name)
        base = {target: ("f32", self._source(name).shape[::-1]) for target, name in names.items()}
        merges = {names[target]: merge for target, merge in self._adapter.merges(base, None).items()}
        embedding = merges.get(_EMBEDDING)
        if embedding is not None and _OUTPUT not in merges:
            shared = embedding.replacement is None and not embedding.added  # trained rows are shared with the output
            if shared and _OUTPUT in self._tensors:
                raise self._refused(f"rows of {embedding.name}", "may stand in the output, too")
            if not shared and _OUTPUT not in self._tensors:
                merges[_OUTPUT] = Merge(embedding.path, embedding.name, embedding.shape)
        return merges

    def _names(self) -> dict[str, str]:
        """The tensors that are changed, by their names in transformers, and their names here."""
        layers = self._keys.count("block_count")
        if layers is None or layers > len(self._tensors):
            raise ConvertError(f"{self._path}: the key {self._keys.key('block_count')} is missing or unusable")
        if not self._row.classes:
            able = [row.name for row in architectures.with_tables() if row.classes]
            raise ConvertError(
                f"{self._path}: an adapter cannot be merged into a GGUF file of the architecture {self._row.name}, "
                f"only into those of {architectures.shortened(able)}; {_IN_FOLDER}"
            )
        name_of, names = tensor_names(self._row.name, layers), {}
        for target in self._adapter.targets():
            name = name_of(target)
            if name is None or (name not in self._tensors and not (name == _OUTPUT and _EMBEDDING in self._tensors)):
                known = f"it has no {name}" if name else "it has no tensor of that name"
                raise ConvertError(
                    f"{self._adapter.file}: changes {target}, which {self._path} does not have as transformers does "
                    f"({known}): if the adapter belongs to this model, {_IN_FOLDER}"
                )
            if name in names.values():
                raise ConvertError(f"{self._adapter.file}: changes {name} by two names, one of them {target}")
            names[target] = name
        return names

    def _refused(self, what: str, why: str) -> ConvertError:
        return ConvertError(
            f"{self._adapter.file}: changes {what}, which in a GGUF file of {self._row.name} {why}; {_IN_FOLDER}"
        )

    def _check(self, target: str, name: str) -> None:
        """Refuses a tensor that cannot be changed."""
        if any(part in name for part in self._row.rewritten):
            raise self._refused(target, "does not hold what it does in transformers")
        stem = name.rpartition(".")[0]
        if any(f"{stem}.{factor}" in self._tensors for factor in ("scale", "input_scale")):
            raise ConvertError(f"{self._path}: {name} has factors of its own ({stem}.scale); {_IN_FOLDER}")
        source = self._source(name)
        if len(source.shape) > 2 or 0 in source.shape:
            raise self._refused(target, "has another number of dimensions, or nothing in it")
        if not ggml_rows.can_change(source.type):
            kind = ggml_rows.type_name(source.type)
            raise ConvertError(f"{self._path}: {name} is of the type {kind}, which cannot be changed; {_IN_FOLDER}")

    def _source(self, name: str) -> TensorData:
        """Where a tensor comes from; the output of a file that has none is the embedding."""
        return self._tensors[_EMBEDDING if name == _OUTPUT and _OUTPUT not in self._tensors else name]

    def tensors(self, *, unquantized: bool) -> Iterator[TensorData]:
        """All tensors of the file, those that are changed with what makes them.

        Args:
            unquantized: whether these are float32, to be quantized by others; otherwise each keeps its type where it
                can be made.
        """
        for tensor in self._tensors.values():
            yield self._changed(tensor.name, unquantized) if tensor.name in self._merges else tensor
        if _OUTPUT in self._merges and _OUTPUT not in self._tensors:
            yield self._changed(_OUTPUT, unquantized)

    def _changed(self, name: str, unquantized: bool) -> TensorData:
        source, merge = self._source(name), self._merges[name]
        if not merge.changes:  # the output that the embedding was, too
            return replace(source, name=name)
        kind = tensor_types()["f32"] if unquantized else _written(source.type)
        changed = _ChangedTensor(source, merge, kind, self._order(name, source.shape[-1]))
        size = ggml_rows.row_size(kind, source.shape[0]) * math.prod(source.shape[1:])
        return replace(source, name=name, type=kind, source=changed.parts, offset=0, size=size)

    def _order(self, name: str, rows: int) -> npt.NDArray[np.intp]:
        """Which row in transformers each row is."""
        part = name.split(".")[2] if name.startswith("blk.") else ""
        if not self._row.paired or part not in ("attn_q", "attn_k"):
            return np.arange(rows)
        heads = self._heads("head_count", name)
        if part == "attn_k" and self._keys.get("attention.head_count_kv") is not None:
            heads = self._heads("head_count_kv", name)
        if not heads or rows % (2 * heads):
            raise ConvertError(f"{self._path}: {name} has {rows} rows, which are not of {heads} heads")
        return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)

    def _heads(self, key: str, name: str) -> int:
        """Heads of the layer of a tensor, 0 where the file does not say."""
        heads, layer = self._keys.get(f"attention.{key}"), int(name.split(".")[1])
        if isinstance(heads, np.ndarray):  # of each layer
            return int(heads[layer]) if layer < len(heads) else 0
        return self._keys.count(f"attention.{key}") or 0

    def notes(self, *, unquantized: bool) -> tuple[str, ...]:
        """What the user should know of the result of `tensors`, a sentence each."""
        changed = [name for name, merge in self._merges.items() if merge.changes]
        kinds = [] if unquantized else [self._source(name).type for name in changed]
        quantized = [kind for kind in kinds if ggml_rows.is_quantized(kind)]
        notes = []
        if quantized:
            notes.append(
                f"{len(quantized)} tensors that the adapter changes were quantized already and are quantized again, "
                "which costs some quality; merging it into the model folder does not"
            )
        if larger := sorted({ggml_rows.type_name(kind) for kind in kinds if _written(kind) != kind}):
            notes.append(
                f"those of {', '.join(larger)}, which need an importance matrix, became q8_0; pass `outtype` and "
                "`imatrix_from=TEXT` for smaller ones"
            )
        return tuple(notes)


def adapted_rope(adapter: Adapter, path: Path, rope: SourceRope, *, given: bool) -> SourceRope:
    """What a file says of its rotary embedding, with what the adapter says of the model that was trained.

    Args:
        adapter: with its config, or one beside it.
        path: the file, for messages.
        rope: the file's.
        given: whether its scaling was given by the user, who is right.

    Raises:
        ConvertError: the two contradict each other.
    """
    said, where = adapter.rope_config, str(adapter.path)
    scaling = said.get("rope_scaling") or said.get("rope_parameters") or {}
    context = said.get("max_position_embeddings", rope.context)
    if not isinstance(scaling, dict) or isinstance(context, bool) or not isinstance(context, int) or context < 1:
        raise ConvertError(f"{where}: what its config says of the rotary embedding is unusable")
    base = scaling.get("rope_theta", said.get("rope_theta", rope.base))
    scaling = {key: value for key, value in scaling.items() if key != "rope_theta" and value is not None}
    if not isinstance(base, (int, float)) or not math.isclose(base, rope.base, rel_tol=1e-6):
        raise ConvertError(f"{where}: was trained with a rope_theta of {base}, but {path} has {rope.base:g}")
    facts = {**rope.facts, "context_length": context, "lora": adapter.facts}
    rope = replace(rope, context=context, facts=facts)
    if given or not scaling:
        return rope
    if kind_of(scaling) == "clex":
        settings = settings_from({**scaling, "log_scale": said.get("log_scale")}, where)
        return replace(rope, settings=settings, facts={**facts, "rope_scaling": scaling})
    own = read_scaling(scaling, where, context=context, dim=rope.dim)
    if rope.scaling.kind == "default":
        return replace(rope, scaling=own, facts={**facts, "rope_scaling": scaling})
    if own.kind != {"rope_freqs": "llama3"}.get(rope.scaling.kind, rope.scaling.kind):
        raise ConvertError(
            f"{where}: was trained with the RoPE scaling {own.kind}, but {path} has {rope.scaling.kind}; {_IN_FOLDER}"
        )
    return rope


def _written(kind: int) -> int:
    """The type in which a changed tensor of this one is written."""
    return tensor_types()["q8_0"] if ggml_rows.needs_imatrix(kind) else kind


@dataclass(frozen=True)
class _ChangedTensor:
    """One tensor with what the adapter changes in it.

    Attributes:
        source: as it is in the file.
        merge: what is changed.
        type: number of the ``ggml_type`` that is written.
        order: which row in transformers each row is.
    """

    source: TensorData
    merge: Merge
    type: int
    order: npt.NDArray[np.intp]

    def parts(self) -> Iterator[bytes]:
        """Its data, a few rows at a time."""
        source, change = self.source, self.merge.read()
        assert isinstance(source.source, Path)  # it is in a file
        width, rows = source.shape[0], math.prod(source.shape[1:])
        size, step = ggml_rows.row_size(source.type, width), max(1, _CHUNK // (4 * width))
        with reading(source.source), source.source.open("rb") as file:
            file.seek(source.offset)
            for start in range(0, rows, step):
                data = file.read(size * min(step, rows - start))
                if len(data) != size * min(step, rows - start):
                    raise became_shorter(source.source)
                values = ggml_rows.dequantized(source.type, data, width)
                lines = values if len(source.shape) > 1 else values[0]  # of a bias each element is a row
                change.apply(lines, self.order[start : start + len(lines)])
                yield ggml_rows.quantized(self.type, self._checked(values))

    def _checked(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        name = f"{self.source.source}: {self.source.name}"
        if not np.isfinite(values).all():
            raise NotFiniteError(
                f"{name} holds values that are not finite (NaN or infinite), or the adapter makes them"
            )
        if self.type == tensor_types()["f16"] and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
            raise ConvertError(f"{name} with the adapter has values beyond those of f16; choose another `outtype`")
        return values
