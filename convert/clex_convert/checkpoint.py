"""A Hugging Face model folder: what its config says, which files it has, and its CLEX layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from clex_convert.errors import ConvertError, one_line
from clex_convert.gguf_parts import first_parts
from clex_convert.lora import Adapter, Merge
from clex_convert.model_files import read_config, read_headers, read_tensor
from clex_convert.scaling import Scaling, kind_of, read_scaling
from clex_convert.weights import OdeSettings, OdeWeights, find_names, settings_from
from clex_local.tables import SUPPORTED_ARCHITECTURES, Tables

CLEX_LAYER = ".clex_layer."
# What llama.cpp's conversion and the tables cannot do without.
_NEEDED = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "max_position_embeddings")
# Keys of the rotary embedding, by the names that some architectures have for them.
_RENAMED = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor", "rope_pct": "partial_rotary_factor"}
# What transformers takes for a key that a config leaves out, where configs do leave it out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "FalconForCausalLM": {"max_position_embeddings": 2048, "rope_theta": 10000.0, "tie_word_embeddings": True},
    "GPTNeoXForCausalLM": {"rope_theta": 10000, "partial_rotary_factor": 0.25},
    "Phi3ForCausalLM": {"original_max_position_embeddings": 4096},
    "PhiForCausalLM": {"partial_rotary_factor": 0.5},
    "StableLmForCausalLM": {"partial_rotary_factor": 0.25},
}

# The embedding and the output matrix, which are one tensor where the config ties them.
_EMBEDDING = {
    "GPTNeoXForCausalLM": "gpt_neox.embed_in.weight",
    "FalconForCausalLM": "transformer.word_embeddings.weight",
}
_OUTPUT = {"GPTNeoXForCausalLM": "embed_out.weight"}
# The runtime takes the embedding for an output matrix that is not there, but not for these.
_OUTPUT_NEEDED = {
    *("GPTNeoXForCausalLM", "Olmo2ForCausalLM", "PhiForCausalLM", "Qwen2MoeForCausalLM", "StableLmForCausalLM"),
}


@dataclass(frozen=True)
class Rope:
    """What a source model says of its rotary embedding.

    Attributes:
        dim: rotary dimension d of a head.
        head_dim: the whole dimension of a head.
        base: RoPE base.
        context: original context length in tokens.
        settings: of its CLEX layer, empty where there is none.
        facts: the same in the source's own words, for the provenance.
        scaling: the one it names.
    """

    dim: int
    head_dim: int
    base: float
    context: int
    settings: OdeSettings
    facts: dict[str, Any]
    scaling: Scaling = field(default_factory=Scaling)

    def is_scaled_in(self, tables: Tables) -> bool:
        """Whether the first bucket of the tables is what the source's own scaling gives, which may then stay."""
        return self.scaling.is_first_of(tables, self.dim, self.base)


class Checkpoint:
    """A model folder with ``config.json`` and weights as safetensors or ``pytorch_model*.bin``.

    With an adapter it is the model that the adapter makes of the folder's: `merges` says what becomes of its tensors.
    """

    def __init__(
        self, folder: Path, adapter: Adapter | None = None, rope_scaling: Mapping[str, Any] | None = None
    ) -> None:
        """Reads the config and checks that every file of weights is there and complete.

        Args:
            folder: the model folder.
            adapter: what is merged into it.
            rope_scaling: takes the place of what the config names.

        Raises:
            ConvertError: not a model folder, a config without a needed key, an architecture that the runtime does
                not have, weights that are missing or damaged, or an adapter of another model.
        """
        self.path = folder
        self.adapter = adapter
        self.config = self._read_config()
        if adapter is not None:
            said = adapter.rope_config
            if "rope_scaling" in said or "rope_parameters" in said:
                self._replace_scaling({})  # which the base model may have by the other name
            self.config.update(said)
        if rope_scaling is not None:
            self._replace_scaling(rope_scaling)
        architectures = self.config.get("architectures")
        if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
            raise self._missing("architectures")
        self.architecture: str = architectures[0]
        for old, new in _RENAMED.items():
            if old in self.config:
                self.config.setdefault(new, self.config[old])
        for key, value in _DEFAULTS.get(self.architecture, {}).items():
            self.config.setdefault(key, value)
        self.rope = self._read_rope()
        self._check_architecture()
        self.parts = self._find_parts()
        # Name of every tensor: its file, its type, its shape.
        self.tensors: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
        for part in self.parts:
            self.tensors.update({name: (part, *header) for name, header in read_headers(part).items()})
        self._check_index()
        self.merges: dict[str, Merge] = {}
        if adapter is not None:
            self.rope.facts["lora"] = adapter.facts
            self.merges = adapter.merges({name: header[1:] for name, header in self.tensors.items()}, self.tied)

    # config.json

    def _read_config(self) -> dict[str, Any]:
        path = self.path / "config.json"
        if not path.is_file():
            models = [model.name for model in first_parts(self.path)]
            hint = f"; convert {self.path / models[0]} in it" if len(models) == 1 else ""
            raise ConvertError(f"{self.path}: not a model folder, it has no config.json{hint}")
        return read_config(path)

    def _replace_scaling(self, scaling: Mapping[str, Any]) -> None:
        said = self.config.pop("rope_parameters", None)
        if isinstance(said, dict):
            for key in ("rope_theta", "partial_rotary_factor"):
                if key in said:
                    self.config[key] = said[key]
        self.config["rope_scaling"] = dict(scaling)

    def _missing(self, key: str) -> ConvertError:
        return ConvertError(f"{self.path / 'config.json'}: the key {key} is missing or unusable; add it")

    def _integer(self, key: str) -> int:
        value = self.config.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self._missing(key)
        return value

    def _read_rope(self) -> Rope:
        config = self.config
        for key in _NEEDED:
            self._integer(key)
        # Newer releases of transformers write rope_parameters, with rope_theta inside.
        name = "rope_parameters" if isinstance(config.get("rope_parameters"), dict) else "rope_scaling"
        scaling = config.get(name) or {}
        if not isinstance(scaling, dict):
            raise self._missing(name)
        base = scaling.get("rope_theta", config.get("rope_theta"))
        if isinstance(base, bool) or not isinstance(base, (int, float)) or not base > 1:
            raise self._missing("rope_theta")
        head_dim = config.get("head_dim")
        if head_dim is None:
            head_dim = self._integer("hidden_size") // self._integer("num_attention_heads")
        elif isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim <= 0:
            raise self._missing("head_dim")
        partial = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        if isinstance(partial, bool) or not isinstance(partial, (int, float)) or not 0 < partial <= 1:
            raise self._missing("partial_rotary_factor")
        facts: dict[str, Any] = {"architecture": self.architecture, "rope_theta": base}
        dim, context, where = int(partial * head_dim), config["max_position_embeddings"], self.path / "config.json"
        settings, own = OdeSettings(), Scaling()
        if scaling.get("rope_type", scaling.get("type")) == "clex":
            settings = settings_from({**scaling, "log_scale": config.get("log_scale")}, f"{where}: {name}")
        else:
            own = self._own_scaling(scaling, f"{where}: {name}", context, dim)
        if scaling.get("rope_type", scaling.get("type")) == "clex" or own.kind != "default":
            facts["rope_scaling"] = {key: value for key, value in scaling.items() if key != "rope_theta"}
        facts["max_position_embeddings"] = context
        return Rope(dim, head_dim, float(base), context, settings, facts, own)

    def _own_scaling(self, values: dict[str, Any], where: str, context: int, dim: int) -> Scaling:
        original = 0
        if self.architecture == "Phi3ForCausalLM":
            original = self._integer("original_max_position_embeddings")
            # Its first releases say yarn or su where transformers takes the factors as those of LongRoPE.
            if "short_factor" in values and kind_of(values) == "yarn":
                values = {**values, "rope_type": "longrope"}
        elif kind_of(values) == "longrope" and "original_max_position_embeddings" in self.config:
            original = self._integer("original_max_position_embeddings")
        return read_scaling(values, where, context=context, dim=dim, longrope_original=original)

    def _check_architecture(self) -> None:
        classes = [name for names in SUPPORTED_ARCHITECTURES.values() for name in names]
        if self.architecture not in classes:
            raise ConvertError(
                f"{self.path}: the architecture {self.architecture} is not supported; supported: {', '.join(classes)}"
            )
        if self.config.get("alibi"):
            raise ConvertError(
                f"{self.path}: the model has ALiBi in place of a rotary embedding; tables need the latter"
            )

    @property
    def gguf_architecture(self) -> str:
        """Name of the model's architecture in GGUF."""
        return next(name for name, classes in SUPPORTED_ARCHITECTURES.items() if self.architecture in classes)

    # weights

    def _find_parts(self) -> list[Path]:
        for start, end in (("model", ".safetensors"), ("pytorch_model", ".bin")):
            parts = sorted(path for path in self.path.iterdir() if path.name.startswith(start) and path.suffix == end)
            if parts or (self.path / f"{start}{end}.index.json").is_file():
                self._index = self.path / f"{start}{end}.index.json"
                return parts
        raise ConvertError(f"{self.path}: holds no weights, neither model*.safetensors nor pytorch_model*.bin")

    def _check_index(self) -> None:
        if not self._index.is_file():
            return
        try:
            weight_map = json.loads(self._index.read_text(encoding="utf-8"))["weight_map"]
            listed = {str(name): str(part) for name, part in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConvertError(f"{self._index}: cannot be read ({one_line(error)}); download it again") from None
        for name, part in listed.items():
            if name not in self.tensors:
                state = "does not hold it" if (self.path / part).is_file() else "is missing"
                raise ConvertError(f"{self.path}: the index places {name} in {part}, which {state}; download it again")

    @cached_property
    def precision(self) -> str:
        """Smallest of ``f16``, ``bf16`` and ``f32`` that holds every matrix of the model without loss."""
        if any(len(merge.shape) >= 2 for merge in self.merges.values()):
            return "f32"
        matrices = {
            dtype for name, (_, dtype, shape) in self.tensors.items() if len(shape) >= 2 and CLEX_LAYER not in name
        }
        if matrices <= {"f16"}:
            return "f16"
        return "bf16" if matrices <= {"bf16"} else "f32"

    @property
    def tied(self) -> tuple[str, str] | None:
        """Names of the embedding and of the output matrix, where the config says that they are one tensor."""
        embedding = _EMBEDDING.get(self.architecture, "model.embed_tokens.weight")
        if not self.config.get("tie_word_embeddings") or embedding not in self.tensors:
            return None
        return embedding, _OUTPUT.get(self.architecture, "lm_head.weight")

    @property
    def needs_output(self) -> bool:
        """Whether a tied output matrix must be written beside the embedding all the same."""
        if self.tied is None:
            return False
        embedding, output = (self.merges.get(name) for name in self.tied)
        return embedding is not output or self.architecture in _OUTPUT_NEEDED

    def ode_weights(self) -> OdeWeights | None:
        """The matrices of the CLEX layer, an adapter's before the folder's; None if neither has one.

        Raises:
            ConvertError: only one of the two is there, or it cannot be read.
        """
        weights = None if self.adapter is None else self.adapter.ode_weights()
        if weights is not None:
            return weights
        names = find_names(list(self.tensors), str(self.path))
        if names is None:
            return None
        up, down = (read_tensor(self.tensors[name][0], name).float().numpy() for name in names)
        return OdeWeights(up, down, str(self.path))
