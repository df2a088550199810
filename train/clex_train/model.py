"""A CLEX layer in a model of transformers: keys are cached before RoPE, and all of them get the pass's table.

The model's own rotary embedding is replaced by one that changes nothing. An attention function of ours rotates queries
and keys, and hands them on to transformers' own. What a pass rotates by is computed once, before the decoder's forward,
and travels through it as a keyword argument, which is why gradient checkpointing computes with the same table again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clex_convert.checkpoint import Checkpoint
from clex_convert.lora import Adapter
from clex_convert.ode import plain_frequencies
from clex_convert.scaling import kind_of
from clex_convert.transformers_folder import load_config, rope_scaling, rope_theta, set_rope_scaling
from clex_convert.weights import DEFAULT_ACTIVATION, DEFAULT_DYNAMICS, DEFAULT_TIME_DT, settings_from
from clex_local.errors import ClexError, one_line
from clex_local.model_file.architectures import trainable_classes
from clex_train import TrainError
from clex_train.layer import ClexLayer, ClexSettings
from clex_train.options import ATTENTIONS
from clex_train.positions import factor_for


class Rotation(NamedTuple):
    """What one pass rotates its queries and keys by.

    Attributes:
        cos: float32 [1 or B, 1, keys, d/2]; the queries are the last of the keys.
        sin: the same.
        query_scale: [1 or B, 1, 1, 1], the log scale and what goes with the frequencies; None for 1.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    query_scale: torch.Tensor | None


def add_clex(model: PreTrainedModel, settings: ClexSettings, original_context: int | None = None) -> ClexLayer:
    """Adds an untrained CLEX layer to a model of transformers, as ``clex_layer`` of its decoder.

    The decoder then takes one more keyword argument, ``clex_factors`` int64 [B]: the scaling factor t of each row,
    whose positions are `position_ids`, float32 or int64 [B, n]. Without it the positions are 0, 1, ... and t is that
    of the row's tokens, those in the cache included and padding excluded.

    Args:
        model: of a class that `clex_local.model_file.architectures` calls trainable, with plain RoPE.
        settings: of the layer; they go into the model's config.
        original_context: L in tokens; the config's max_position_embeddings becomes it.

    Raises:
        TrainError: another architecture, or RoPE that is scaled already.
    """
    config, name = model.config, type(model).__name__
    if name not in trainable_classes():
        raise TrainError(f"a CLEX layer cannot be added to {name}; supported: {', '.join(trainable_classes())}")
    kind = kind_of(rope_scaling(config))
    if kind != "default":
        raise TrainError(
            f"the model's RoPE is scaled already (rope_scaling is {kind}); a CLEX layer needs plain "
            "RoPE: take the entry out of config.json if the weights were not trained with it"
        )
    decoder: Any = model.base_model
    frequencies: torch.Tensor = decoder.rotary_emb.inv_freq
    context = original_context or config.max_position_embeddings
    layer = ClexLayer(2 * frequencies.numel(), rope_theta(config), context, settings).to(frequencies.device)
    if settings.dynamics == "yarn" and layer.proj_func.dim != _head_dim(config):
        raise TrainError(
            f"only {layer.proj_func.dim} of the {_head_dim(config)} dimensions of a head are rotated, where YaRN's "
            "attention factor cannot be expressed; use `dynamics` ntk"
        )
    if not torch.allclose(plain_frequencies(layer.proj_func, layer.base), frequencies, rtol=1e-5, atol=0):
        raise TrainError("the model's inverse frequencies are not powers of its rope_theta; a CLEX layer begins there")
    decoder.clex_layer = layer
    decoder.rotary_emb = _NoRotation(layer.proj_func.dim)
    decoder.register_forward_pre_hook(_Passes(layer), with_kwargs=True)
    config.max_position_embeddings = context
    settings.put_into(config)
    config._attn_implementation = f"clex_{config._attn_implementation}"
    if config._attn_implementation not in ALL_ATTENTION_FUNCTIONS:
        raise TrainError(f"attention must be one of {', '.join(ATTENTIONS)}")
    return layer


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    scaling: Mapping[str, Any] | None = None,
    from_scratch: bool = False,
    lora: Path | None = None,
) -> PreTrainedModel:
    """A model folder as a model of transformers, with its CLEX layer if it has one.

    Args:
        folder: with config.json and weights.
        dtype: of all weights but the CLEX layer's, which are float32.
        attention: ``sdpa`` or ``eager``.
        scaling: of RoPE, takes the place of what the config names.
        from_scratch: random weights in place of the folder's.
        lora: an adapter, whose CLEX layer the model gets; the rest of the adapter is left alone.

    Raises:
        TrainError: transformers cannot load it.
        ConvertError: its CLEX layer is damaged, or the adapter is of another model.
    """
    settings, weights = None, None
    adapted = None if lora is None else Checkpoint(folder, Adapter(lora))
    try:
        config = load_config(folder)
        if scaling is not None:
            set_rope_scaling(config, scaling)
        if adapted is not None:
            _take_rope(config, adapted)
        if kind_of(rope_scaling(config)) == "clex":
            settings_from(rope_scaling(config), str(folder / "config.json"))  # refuses what is no setting
            settings = _settings(rope_scaling(config), bool(getattr(config, "log_scale", False)))
            set_rope_scaling(config, None)
        if settings is not None and not from_scratch:
            weights = (adapted or Checkpoint(folder)).ode_weights()
        if from_scratch:
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                folder, config=config, attn_implementation=attention, dtype=dtype
            )
    except ClexError:
        raise
    except Exception as error:  # of every format it reads
        raise TrainError(f"{folder}: transformers cannot load the model ({one_line(error)})") from None
    if settings is not None:
        layer = add_clex(model, settings)
        if weights is not None:
            weights.check(layer.proj_func.dim)
            with torch.no_grad():
                layer.proj_func.ode_up_proj.copy_(torch.from_numpy(weights.up))
                layer.proj_func.ode_down_proj.copy_(torch.from_numpy(weights.down))
    return model


def _take_rope(config: PretrainedConfig, adapted: Checkpoint) -> None:
    """Makes a base model's config that of the model that an adapter with a CLEX layer was trained in."""
    if kind_of(adapted.model.scaling) == "clex":
        set_rope_scaling(config, adapted.model.scaling)
        config.max_position_embeddings = adapted.rope.context
        config.log_scale = bool(adapted.rope.settings.log_scale)


def clex_layer(model: torch.nn.Module) -> ClexLayer | None:
    """The CLEX layer somewhere in a model, which may be wrapped."""
    return next((module for module in model.modules() if isinstance(module, ClexLayer)), None)


def _settings(values: dict[str, Any], log_scale: bool) -> ClexSettings:
    return ClexSettings(
        max_factor=int(values["max_factor"]),
        param_factor=int(values.get("param_factor", 1)),
        act=values.get("act") or DEFAULT_ACTIVATION,
        time_dt=float(values.get("time_dt") or DEFAULT_TIME_DT),
        log_scale=log_scale,
        dynamics=values.get("dynamics") or DEFAULT_DYNAMICS,
    )


class _NoRotation(torch.nn.Module):
    """A rotary embedding that turns nothing: cosine 1, sine 0."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.new_ones(1, 1, self.dim), x.new_zeros(1, 1, self.dim)


class _Passes:
    """Runs before the decoder's forward and tells its layers what they rotate by."""

    def __init__(self, layer: ClexLayer) -> None:
        self.layer = layer

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        factors = kwargs.pop("clex_factors", None)
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        cache, mask = kwargs.get("cache", kwargs.get("past_key_values")), kwargs.get("attention_mask")
        cached = 0 if cache is None else cache.get_seq_length()
        total = int(cached) + tokens.shape[1]
        positions = torch.arange(total, device=tokens.device)[None]
        lengths = [total]
        if factors is not None:
            if cached:
                raise ValueError("clex_factors are for training, without a cache")
            lengths *= len(factors)
            positions = kwargs["position_ids"]
        elif mask is not None and mask.dim() == 2 and not bool(mask.all()):
            if mask.shape[1] != total:
                raise ValueError(f"attention_mask must cover all {total} tokens, those in the cache too")
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            lengths = mask.sum(-1).tolist()
        layer = self.layer
        ts = (
            factors.tolist()
            if factors is not None
            else [factor_for(length, layer.context, layer.settings.max_factor) for length in lengths]
        )
        angles = positions[:, None, :, None] * layer.frequencies(ts)[:, None, None, :]
        scales = _query_scales(layer, ts, lengths)
        scale = None if scales is None else torch.tensor(scales, device=angles.device)[:, None, None, None]
        kwargs["clex_rotation"] = Rotation(angles.cos(), angles.sin(), scale)
        return args, kwargs


def _query_scales(layer: ClexLayer, factors: Sequence[int], lengths: Sequence[int]) -> list[float] | None:
    """What the queries of each row are multiplied by: the keys' part of an attention factor as well, as in a GGUF."""
    attention = layer.attention(factors)
    if attention is None and not layer.settings.log_scale:
        return None
    squares = [factor**2 for factor in attention or [1.0] * len(lengths)]
    if not layer.settings.log_scale:
        return squares
    return [
        square * math.log(max(length, 1)) / math.log(layer.context)
        for square, length in zip(squares, lengths, strict=True)
    ]


def _rotated(x: torch.Tensor, rotation: Rotation, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Queries or keys [B, heads, tokens, head_dim], the last of the pass, rotated in float32 at least."""
    cos, sin = (part[:, :, -x.shape[2] :] for part in rotation[:2])
    n = cos.shape[-1]
    x = x.to(torch.promote_types(x.dtype, cos.dtype))
    a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)
    return turned if scale is None else turned * scale


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    clex_rotation: Rotation,
    **kwargs: Any,
) -> Any:
    kind = module.config._attn_implementation.removeprefix("clex_")  # pyright: ignore
    if key.shape[2] > clex_rotation.cos.shape[2]:
        raise ValueError("a CLEX layer needs a cache that grows (DynamicCache), not one of a fixed size")
    query = _rotated(query, clex_rotation, clex_rotation.query_scale).to(value.dtype)
    key = _rotated(key, clex_rotation).to(value.dtype)
    # Every architecture has an eager function of its own, and calls it by name.
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attend = eager if kind == "eager" else ALL_ATTENTION_FUNCTIONS[kind]
    return attend(module, query, key, value, attention_mask, **kwargs)


for _name in ATTENTIONS:
    AttentionInterface.register(f"clex_{_name}", _attend)
    AttentionMaskInterface.register(f"clex_{_name}", ALL_MASK_ATTENTION_FUNCTIONS[_name])
