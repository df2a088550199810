"""Models of transformers whose RoPE follows tables, for every way in which transformers' classes rotate.

Keys are cached before RoPE, as the authors' code does, and all are rotated with the table of the whole sequence. Layers
with a sliding window keep the model's own RoPE, and layers without one stay without.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from math import log
from typing import Any

import numpy as np
import torch
import transformers

from clex_convert.transformers_folder import cache_argument, since_release_5
from clex_local.model_file.tables import Tables


def tabled_layers(config: Any) -> set[int]:
    """The layers of a model that have a table: those with RoPE that see every token."""
    layers, types = range(config.num_hidden_layers), getattr(config, "layer_types", None)
    found = {i for i in layers if types is None or types[i] in ("full_attention", "attention", "hybrid")}
    if config.model_type == "smollm3":
        return {i for i in found if config.no_rope_layers[i]}
    # Their layers with a window alone have RoPE.
    return set() if config.model_type in ("cohere2", "exaone4") and config.sliding_window else found


def attention_layers(model: transformers.PreTrainedModel) -> Iterator[tuple[int, torch.nn.Module]]:
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and "Attention" in type(module).__name__:
            yield index, module


def _rotated_by(rotate_half: Any) -> Any:
    def apply(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin

    return apply


_EMBEDDINGS = ("rotary_emb", ".pos_emb", "rotary_embs.full_attention")


class Rotation:
    """transformers' rotary embedding of a model, with frequencies that are given in place of its own."""

    def __init__(self, model: transformers.PreTrainedModel, own_scale: bool) -> None:
        """The model's factor on cosine and sine stays if it is its own; the tables say another."""
        module = sys.modules[type(next(attention_layers(model))[1]).__module__]
        self._apply = getattr(module, "apply_rotary_pos_emb", None) or _rotated_by(module.rotate_half)
        found = dict(model.named_modules())
        self._embedding = copy.deepcopy(next(found[name] for name in found if name.endswith(_EMBEDDINGS)))
        self._three = "Qwen2VL" in type(self._embedding).__name__
        self._types = getattr(self._embedding, "layer_types", None)
        if self._types is None:
            self._embedding.rope_type = "default"  # or it would choose frequencies itself
        self._scale = 1.0
        for name in ("attention_scaling", "full_attention_attention_scaling"):
            if hasattr(self._embedding, name):
                self._scale = getattr(self._embedding, name) if own_scale else 1.0
                setattr(self._embedding, name, self._scale)

    def set(self, inv_freq: torch.Tensor) -> None:
        """Takes the inverse frequencies [d/2]."""
        self._width = 2 * inv_freq.numel()
        for name, _ in list(self._embedding.named_buffers()):
            if name.endswith("inv_freq"):
                setattr(self._embedding, name, inv_freq)

    def cos_sin(self, first: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model hands to its layers, of the positions from `first` on."""
        positions = torch.arange(first, first + tokens)[None]
        if self._three:
            positions = positions.expand(3, 1, -1)
        more = ["full_attention"] if self._types else []
        return self._embedding(torch.zeros(1, 1), positions, *more)

    def keys(self, x: torch.Tensor, first: int, *, back: bool = False) -> torch.Tensor:
        """Keys [..., tokens, head_dim] rotated, or rotated back; what the frequencies do not cover stays."""
        cos, sin = self.cos_sin(first, x.shape[-2])
        if cos.dim() == 4:  # of three equal positions
            cos, sin = cos[0], sin[0]
        cos, sin = cos / self._scale, sin / self._scale  # the model has multiplied the keys already
        turned = self._apply(x[..., : self._width], x[..., : self._width], cos, -sin if back else sin)[1]
        return torch.cat((turned, x[..., self._width :]), dim=-1)


def new_cache(model: transformers.PreTrainedModel) -> Any:
    """An empty cache of the kind that the model makes for itself."""
    config = model.config.get_text_config()
    module: Any = sys.modules[type(model).__module__]
    if since_release_5():
        return transformers.DynamicCache(config=config) if has_states(config) else transformers.DynamicCache()
    if config.model_type == "qwen3_next":
        return module.Qwen3NextDynamicCache(config)
    if config.model_type == "lfm2":
        return module.Lfm2HybridConvCache(config, 1, dtype=torch.float32)
    if config.model_type == "falcon_h1":
        return module.FalconHybridMambaAttentionDynamicCache(
            config, 1, torch.float32, ["cpu"] * config.num_hidden_layers
        )
    return transformers.DynamicCache()


def has_states(config: Any) -> bool:
    return config.model_type in ("qwen3_next", "qwen3_5_text", "lfm2", "lfm2_moe", "falcon_h1")


class Reference:
    """A sequence fed to a model of transformers, with the tables' choice of the table."""

    def __init__(self, model: transformers.PreTrainedModel, tables: Tables) -> None:
        self.model, self.tables, self.length, self._config = model, tables, 0, model.config.get_text_config()
        self._layers, self._rotation, self._cache = (
            tabled_layers(self._config),
            Rotation(model, tables.attn_scale is None),
            new_cache(model),
        )
        self._update, self._cache.update = self._cache.update, self._rotated_update

    def _rotated_update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        if layer not in self._layers:
            return self._update(keys, values, layer, *args, **kwargs)
        raw = self._rotation.keys(keys, self._before, back=True)
        keys, values = self._update(raw, values, layer, *args, **kwargs)
        return self._scale * self._rotation.keys(keys, 0), values

    def _positions(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs["position_embeddings"] = self._rotation.cos_sin(self._before, self.length - self._before)
        return args, kwargs

    def feed(self, tokens: np.ndarray) -> np.ndarray:
        """The logits of the last token."""
        self._before, self.length = self.length, self.length + len(tokens)
        tables, bucket = self.tables, self.tables.bucket(self.length)
        self._rotation.set(torch.tensor(tables.inv_freq[bucket]))
        self._scale = 1.0 if tables.attn_scale is None else float(tables.attn_scale[bucket])
        if tables.log_scale:
            self._scale *= log(self.length) / log(tables.original_context_length)
        hooks = [
            attention.register_forward_pre_hook(self._positions, with_kwargs=True)
            for layer, attention in attention_layers(self.model)
            if layer in self._layers
        ]
        try:
            with torch.no_grad():
                ids = torch.tensor(tokens[None].astype(np.int64))
                # Release 4's cache of states does not know its length.
                known = {"cache_position": torch.arange(self._before, self.length)} if has_states(self._config) else {}
                out = self.model(ids, **{cache_argument(self.model): self._cache}, use_cache=True, **known)
        finally:
            for hook in hooks:
                hook.remove()
        return out.logits[0, -1].numpy()
