"""A Hugging Face model folder: what its config says, which files it has, and its CLEX layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from clex_convert.errors import ConvertError
from clex_convert.gguf_parts import first_parts
from clex_convert.lora import Adapter, Merge
from clex_convert.model_config import ModelConfig, read_model_config
from clex_convert.model_files import read_array, read_config, read_headers, read_tensor
from clex_convert.model_tensors import check_tensors
from clex_convert.scaling import Scaling, kind_of, read_scaling
from clex_convert.source_rope import SourceRope
from clex_convert.weight_files import first_choice, no_weights, read_index, shards_without_index
from clex_convert.weights import OdeSettings, OdeWeights, find_names, settings_from

CLEX_LAYER = ".clex_layer."


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
        self.model = self._read_model(rope_scaling)
        self.architecture = self.model.architecture
        self.rope = self._read_rope()
        self.parts = self._find_parts()
        # Name of every tensor: its file, its type, its shape.
        self.tensors: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
        for part in self.parts:
            self.tensors.update({name: (part, *header) for name, header in read_headers(part).items()})
        self._check_index()
        self._check_tensors()
        self.merges: dict[str, Merge] = {}
        if adapter is not None:
            self.rope.facts["lora"] = adapter.facts
            self.merges = adapter.merges({name: header[1:] for name, header in self.tensors.items()}, self.tied)

    # config.json

    def _read_model(self, rope_scaling: Mapping[str, Any] | None) -> ModelConfig:
        path = self.path / "config.json"
        if not path.is_file():
            raise ConvertError(f"{self.path}: not a model folder, it has no config.json{self._other_kind()}")
        changes = [] if self.adapter is None else [self.adapter.rope_config]
        return read_model_config(read_config(path), str(path), *changes, scaling=rope_scaling)

    def _other_kind(self) -> str:
        """What the folder is instead, where that can be told."""
        models = [model.name for model in first_parts(self.path)]
        if len(models) == 1:
            return f"; convert {self.path / models[0]} in it"
        kinds = {
            "adapter_config.json": "it is a LoRA adapter: convert the model that it was trained on, with `lora`",
            "params.json": "it is in the format of the model's authors: take the one of transformers",
            "model_index.json": "it is a model of diffusers",
        }
        return next((f"; {kind}" for name, kind in kinds.items() if (self.path / name).is_file()), "")

    def _read_rope(self) -> SourceRope:
        model, values, scaling = self.model, self.model.values, self.model.scaling
        where, context, dim = f"{model.path}: {model.scaling_key}", values["max_position_embeddings"], model.rotary_dim
        facts: dict[str, Any] = {"architecture": model.architecture, "rope_theta": values["rope_theta"]}
        settings, own = OdeSettings(), Scaling()
        clex = kind_of(scaling) == "clex"
        if clex:
            settings = settings_from({**scaling, "log_scale": values.get("log_scale")}, where)
        else:
            own = self._own_scaling(scaling, where, context, dim)
        if clex or own.kind != "default":
            facts["rope_scaling"] = dict(scaling)
        facts["max_position_embeddings"] = context
        windowed = bool(model.windowed_layers)
        base = float(values["rope_theta"])
        return SourceRope(dim, values["head_dim"], base, context, settings, facts, own, windowed)

    def _own_scaling(self, said: Mapping[str, Any], where: str, context: int, dim: int) -> Scaling:
        kind, key = kind_of(said), "original_max_position_embeddings"
        if self.architecture == "Phi3ForCausalLM" and "short_factor" in said and kind == "yarn":
            # Its first releases say yarn or su where transformers takes the factors as those of LongRoPE.
            said, kind = {**said, "rope_type": "longrope"}, "longrope"
        outside = self.model.values.get(key)
        if outside is None or kind not in ("longrope", "yarn", "llama3"):
            return read_scaling(said, where, context=context, dim=dim)
        if isinstance(outside, bool) or not isinstance(outside, int) or outside <= 0:
            raise ConvertError(f"{self.model.path}: the key {key} is missing or unusable; add it")
        if kind == "longrope":
            return read_scaling(said, where, context=context, dim=dim, longrope_original=outside)
        # Here release 5 prefers the one outside, and release 4 does not read it.
        if said.get(key) not in (None, outside):
            raise ConvertError(f"{where}: {key} is {said[key]!r} here and {outside} beside it; leave the wrong one out")
        return read_scaling({**said, key: outside}, where, context=context, dim=dim)

    def check_window(self, context: int) -> None:
        """Refuses a sliding window that a context of so many tokens would show; see `ModelConfig.check_window`."""
        self.model.check_window(context)

    @property
    def gguf_architecture(self) -> str:
        """Name of the model's architecture in GGUF."""
        return self.model.gguf_architecture

    # weights

    def _find_parts(self) -> list[Path]:
        names = {path.name for path in self.path.iterdir() if path.is_file()}
        said = self.model.values.get("transformers_weights")  # a name of its own, which transformers goes by
        chosen = said if isinstance(said, str) and said in names else first_choice(names)
        self._listed: dict[str, str] = {}
        if chosen is None:
            shards = shards_without_index(names, str(self.path))
            if not shards:
                raise no_weights(str(self.path), names)
            return [self.path / name for name in shards]
        if not chosen.endswith(".index.json"):
            return [self.path / chosen]
        self._listed = read_index(self.path / chosen)
        if not self._listed:
            raise ConvertError(f"{self.path / chosen}: lists no weights; download it again")
        for name, part in self._listed.items():
            if not (self.path / part).is_file():
                raise ConvertError(
                    f"{self.path}: the index places {name} in {part}, which is missing; download it again"
                )
        return [self.path / part for part in sorted(set(self._listed.values()))]

    def _check_index(self) -> None:
        if not self._listed:
            return
        for name, part in self._listed.items():
            if name not in self.tensors:
                raise ConvertError(
                    f"{self.path}: the index places {name} in {part}, which does not hold it; download it again"
                )
        for name, (part, *_) in self.tensors.items():
            if name not in self._listed:
                raise ConvertError(
                    f"{part}: holds {name}, which the index does not list; the two are of different models: "
                    "download both again"
                )

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
        known = self.model.model_class
        embedding = known.tensors.split()[0]
        if not self.model.values["tie_word_embeddings"] or embedding not in self.tensors:
            return None
        return embedding, known.output

    @property
    def needs_output(self) -> bool:
        """Whether a tied output matrix must be written beside the embedding all the same."""
        if self.tied is None:
            return False
        embedding, output = (self.merges.get(name) for name in self.tied)
        return embedding is not output or self.model.model_class.output_needed

    def _check_tensors(self) -> None:
        ignored = {name for name in self.tensors if CLEX_LAYER in name or self.model.is_left_out(name)}
        if self.tied is not None:
            embedding, output = self.tied
            ignored.add(output)
            if output in self.tensors and not self._same(embedding, output):
                raise ConvertError(
                    f"{self.path}: config.json ties {output} to {embedding}, but the weights hold both, and they "
                    "differ: transformers 4 takes the latter for both, transformers 5 does not; correct "
                    "tie_word_embeddings"
                )
        check_tensors(self.model, {name: header[2] for name, header in self.tensors.items()}, ignored)

    def _same(self, left: str, right: str) -> bool:
        """Whether two tensors of the model are equal."""
        if self.tensors[left][2] != self.tensors[right][2]:
            return False
        a, b = (read_tensor(self.tensors[name][0], name) for name in (left, right))
        return a.equal(b) if a.dtype == b.dtype else bool((a == b).all())

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
        up, down = (read_array(self.tensors[name][0], name) for name in names)
        return OdeWeights(up, down, str(self.path))
