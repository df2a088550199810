"""A LoRA adapter in peft's format, merged into the tensors of its base model as they are read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clex_convert.errors import ConvertError
from clex_convert.model_files import read_array, read_config, read_headers
from clex_convert.weights import NAMES, OdeWeights, find_names
from clex_local.errors import one_line

if TYPE_CHECKING:
    import torch

# Keys of peft's LoraConfig that do not change what a trained adapter means, and those that are minded here.
_NEUTRAL = {
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version"),
    *("qalora_group_size", "revision", "runtime_config", "target_modules", "task_type", "bias", "lora_bias"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config"),  # of an initialisation, which is told by name
    "ensure_weight_tying",  # the file holds the changes of both matrices
    "fan_in_fan_out",  # for layers of GPT-2; peft ignores it for the linear layers that all others have
}
_MINDED = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    "trainable_token_indices",
}
# What a config of the trained model may say of its rotary embedding, in the adapter's own config or beside it.
_ROPE_KEYS = ("rope_scaling", "rope_parameters", "rope_theta", "log_scale", "max_position_embeddings")
# Initialisations that leave the base model as it is; the others take what they put into A and B out of its weights.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

_PARTS = re.compile(r"(.*)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B)")
_ROWS = ".token_adapter.trainable_tokens_delta"
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")
_CHUNK = 32 << 20  # bytes of rows that are changed at a time

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Change:
    """A `Merge` with its tensors read, in float32.

    Attributes:
        replacement: the trained tensor in place of the base model's.
        bias: what is added to a bias.
        factors: (B, A), whose product is added.
        scaling: factor of what is added.
        rows: trained rows, by their numbers.
    """

    replacement: Array | None
    bias: Array | None
    factors: tuple[Array, Array] | None
    scaling: float
    rows: Mapping[int, Array]

    def apply(self, values: Array, numbers: npt.NDArray[np.intp]) -> None:
        """Changes some rows of the tensor in place.

        Args:
            values: [n, ...], rows of the base model's tensor.
            numbers: [n], which ones.
        """
        step = max(1, _CHUNK // max(4 * values[:1].size, 1))
        for start in range(0, len(values), step):
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused where it is written
                self._apply(values[start : start + step], numbers[start : start + step])

    def _apply(self, part: Array, which: npt.NDArray[np.intp]) -> None:
        if self.replacement is not None:
            part[...] = self.replacement[which]
        if self.bias is not None:
            part += self.scaling * self.bias[which]
        if self.factors is not None:
            part += self.scaling * (self.factors[0][which] @ self.factors[1])
        for i in np.flatnonzero(np.isin(which, list(self.rows))):
            part[i] = self.rows[int(which[i])]


@dataclass(frozen=True)
class Merge:
    """What an adapter does to one tensor of its base model; names are of tensors in the adapter's file.

    Attributes:
        path: the adapter's file.
        name: the base model's tensor.
        shape: its shape.
        replacement: the trained tensor in its place.
        added: factors (B, A) whose product is added, or the one tensor (a bias) that is.
        transposed: whether the product is transposed first, as for embeddings.
        scaling: factor of what is added.
        rows: a tensor of rows, and where they go.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    replacement: str | None = None
    added: tuple[str, ...] = ()
    transposed: bool = False
    scaling: float = 1.0
    rows: tuple[str, tuple[int, ...]] | None = None

    @property
    def changes(self) -> bool:
        """Whether anything is done."""
        return bool(self.replacement or self.added or self.rows)

    def apply(self, base: torch.Tensor) -> torch.Tensor:
        """The merged tensor in float32, W + scaling * B @ A.

        Raises:
            ConvertError: the adapter holds values that are not finite.
        """
        import torch

        values = base.to(torch.float32, copy=True).numpy()
        rows = np.atleast_1d(values)
        self.read().apply(rows, np.arange(len(rows)))
        return torch.from_numpy(values)

    def read(self) -> Change:
        """Reads what the adapter has for the tensor.

        Raises:
            ConvertError: it holds values that are not finite.
        """
        bias, factors = None, None
        if len(self.added) == 1:
            bias = self._read(self.added[0])
        elif self.added:
            left, right = map(self._read, self.added)
            factors = (right.T, left.T) if self.transposed else (left, right)
        rows: dict[int, Array] = {}
        if self.rows is not None:
            rows = dict(zip(self.rows[1], self._read(self.rows[0]), strict=True))
        replacement = None if self.replacement is None else self._read(self.replacement)
        return Change(replacement, bias, factors, self.scaling, rows)

    def _read(self, name: str) -> Array:
        values = np.atleast_1d(read_array(self.path, name))
        if not np.isfinite(values).all():
            raise ConvertError(f"{self.path}: {name} holds values that are not finite; the adapter is of no use")
        return values


class Adapter:
    """A folder with ``adapter_config.json`` and ``adapter_model.safetensors`` or ``adapter_model.bin``.

    Source of the rules: peft's LoraModel and its get_peft_model_state_dict, release 0.21.
    """

    def __init__(self, folder: Path) -> None:
        """Reads the config and the headers of the weights.

        Raises:
            ConvertError: no adapter, a damaged one, or one that cannot be merged; the message names why.
        """
        self.path = folder
        if not folder.is_dir():
            raise ConvertError(f"{folder}: no such folder; `lora` takes the folder of an adapter saved by peft")
        self._config_path = folder / "adapter_config.json"
        if not self._config_path.is_file():
            raise ConvertError(f"{folder}: not the folder of a LoRA adapter, it has no adapter_config.json")
        self.config = read_config(self._config_path)
        self._check_config()
        files = [folder / f"adapter_model.{suffix}" for suffix in ("safetensors", "bin")]
        file = next((path for path in files if path.is_file()), None)
        if file is None:
            raise ConvertError(f"{folder}: holds no weights, neither adapter_model.safetensors nor adapter_model.bin")
        self.file = file
        self.tensors = read_headers(file)

    def _refuse(self, what: str) -> ConvertError:
        return ConvertError(
            f"{self._config_path}: {what} cannot be merged; merge it with peft "
            "(merge_and_unload, then save_pretrained) and convert the result"
        )

    def _check_config(self) -> None:
        config = self.config
        if config.get("peft_type") != "LORA":
            raise self._refuse(f"an adapter of the kind {config.get('peft_type')!r}")
        for key, value in config.items():
            if value and key not in _NEUTRAL and key not in _MINDED and key not in _ROPE_KEYS:
                raise self._refuse("DoRA" if key == "use_dora" else f"an adapter with {key} = {one_line(value, 60)}")
        if config.get("init_lora_weights") not in _PLAIN_STARTS:
            raise self._refuse(f"init_lora_weights = {config['init_lora_weights']!r}, which changes the base model,")
        for key in ("rank_pattern", "alpha_pattern"):
            patterns = config.get(key) or {}
            if not isinstance(patterns, dict) or not all(map(_is_positive, patterns.values())):
                raise ConvertError(f"{self._config_path}: {key} must map names to numbers")
        for key in ("r", "lora_alpha"):
            if not _is_positive(config.get(key)):
                raise ConvertError(f"{self._config_path}: {key} must be a number above 0, not {config.get(key)!r}")

    @property
    def rope_config(self) -> dict[str, Any]:
        """What the adapter says of the trained model's rotary embedding: its config's keys, or a config.json's."""
        beside = self.path / "config.json"
        said = {**(read_config(beside) if beside.is_file() else {}), **self.config}
        return {key: said[key] for key in _ROPE_KEYS if said.get(key) is not None}

    @property
    def facts(self) -> dict[str, Any]:
        """The adapter's settings for the provenance."""
        return {key: self.config[key] for key in ("r", "lora_alpha", "use_rslora") if key in self.config}

    def ode_weights(self) -> OdeWeights | None:
        """The matrices of a CLEX layer trained with the adapter; None if it has none.

        Raises:
            ConvertError: only one of the two is there.
        """
        names = find_names(list(self.tensors), str(self.file))
        if names is None:
            return None
        up, down = (read_array(self.file, name) for name in names)
        return OdeWeights(up, down, str(self.file))

    def targets(self) -> dict[str, dict[str, str]]:
        """The base model's tensors that are changed, and for each the adapter's tensors by the parts that they play.

        Raises:
            ConvertError: the adapter holds what cannot be merged.
        """
        found: dict[str, dict[str, str]] = {}
        for key in self.tensors:
            name = key.removeprefix("base_model.model.")
            if name.split(".")[-1] in NAMES or "clex_layer" in name.split("."):
                continue
            if match := _PARTS.fullmatch(name):
                target, part = match[1] + (".bias" if match[2].endswith("bias") else ".weight"), match[2]
            elif name.endswith(_ROWS):
                target, part = name.removesuffix(_ROWS) + ".weight", "rows"
            elif ".lora_" in name:
                raise ConvertError(f"{self.file}: holds {key}, a variant of LoRA that cannot be merged")
            else:
                target, part = _WRAPPERS.sub("", name), "replacement"
            found.setdefault(target, {})[part] = key
        return found

    def merges(self, base: Mapping[str, tuple[str, tuple[int, ...]]], tied: tuple[str, str] | None) -> dict[str, Merge]:
        """What becomes of the base model's tensors.

        Args:
            base: type and shape of each of them.
            tied: names of the embedding and of the output matrix, where the model has one tensor for both.

        Raises:
            ConvertError: the adapter belongs to another model, or holds what cannot be merged.
        """
        if tied is not None:
            base = {**base, tied[1]: base[tied[0]]}
        found = self.targets()
        for target in found:
            if target not in base:
                raise ConvertError(f"{self.file}: changes {target}, which the base model does not have")
            if base[target][0] not in ("f16", "bf16", "f32", "f64"):
                raise ConvertError(f"{self.path}: the base model's {target} is quantized; use the original base model")
        if not found and self.ode_weights() is None:
            raise ConvertError(f"{self.file}: holds nothing that changes the base model")
        merges = {name: self._merge(name, parts, base[name][1]) for name, parts in found.items()}
        if tied is not None and tied[0] in merges and tied[1] not in merges:
            embedding = merges[tied[0]]
            # Trained rows are shared with the output; of other changes the file would hold the output's own.
            if embedding.replacement is None and not embedding.added:
                merges[tied[1]] = embedding
        return merges

    def _merge(self, name: str, parts: dict[str, str], shape: tuple[int, ...]) -> Merge:
        merge = Merge(self.file, name, shape, replacement=parts.get("replacement"))
        if merge.replacement is not None:
            self._check_shape(name, self.tensors[merge.replacement][1], shape)
        if "rows" in parts:
            rows = self._indices(name)
            self._check_shape(f"rows of {name}", self.tensors[parts["rows"]][1], (len(rows), *shape[1:]))
            if not all(0 <= row < shape[0] for row in rows):
                raise ConvertError(f"{self._config_path}: trainable_token_indices go beyond the {shape[0]} tokens")
            merge = replace(merge, rows=(parts["rows"], rows))
        if "lora_B.bias" in parts:
            self._check_shape(name, self.tensors[parts["lora_B.bias"]][1], shape)
            return replace(merge, added=(parts["lora_B.bias"],), scaling=self._scaling(name)[1])
        for b, a in (("lora_B.weight", "lora_A.weight"), ("lora_embedding_B", "lora_embedding_A")):
            if (b in parts) != (a in parts):
                raise ConvertError(f"{self.file}: has only one of {a} and {b} for {name}; save the adapter again")
            if b in parts:
                merge = self._low_rank(merge, parts[b], parts[a], b == "lora_embedding_B")
        return merge

    def _low_rank(self, merge: Merge, b: str, a: str, transposed: bool) -> Merge:
        rank, scaling = self._scaling(merge.name)
        left, right = self.tensors[b][1], self.tensors[a][1]
        if len(left) != 2 or len(right) != 2 or left[1] != right[0]:
            raise ConvertError(f"{self.file}: the factors {list(left)} and {list(right)} of {merge.name} do not fit")
        if left[1] != rank:
            raise ConvertError(
                f"{self.file}: {merge.name} has rank {left[1]}, but adapter_config.json says {rank}; "
                "the two files belong to different adapters"
            )
        product = (left[0], right[1])
        self._check_shape(merge.name, product[::-1] if transposed else product, merge.shape)
        return replace(merge, added=(b, a), transposed=transposed, scaling=scaling)

    def _check_shape(self, name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if shape != wanted:
            raise ConvertError(
                f"{self.file}: {name} is {list(shape)} in the adapter and {list(wanted)} in the base model; "
                "the adapter belongs to another one, or to one whose vocabulary was resized"
            )

    def _scaling(self, name: str) -> tuple[int, float]:
        """Rank and factor for a tensor: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA."""
        module = name.rpartition(".")[0]
        rank, alpha = (
            self._pattern(f"{key}_pattern", module, self.config[default])
            for key, default in (("rank", "r"), ("alpha", "lora_alpha"))
        )
        return int(rank), alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _pattern(self, key: str, module: str, default: float) -> float:
        for pattern, value in (self.config.get(key) or {}).items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                raise ConvertError(f"{self._config_path}: {key}: {pattern!r} is no pattern ({error})") from None
        return default

    def _indices(self, name: str) -> tuple[int, ...]:
        said = self.config.get("trainable_token_indices")
        if isinstance(said, dict):
            module = name.removesuffix(".weight")
            said = next((rows for key, rows in said.items() if f".{module}".endswith(f".{key}")), None)
        if not isinstance(said, list) or not all(isinstance(row, int) for row in said):
            raise ConvertError(f"{self._config_path}: trainable_token_indices do not say which rows of {name} they are")
        return tuple(said)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
