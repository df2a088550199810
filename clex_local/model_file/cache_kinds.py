"""What llama.cpp keeps of a sequence in each layer of a model, known from the metadata of its file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from clex_local.model_file import architectures
from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.keys import ModelKeys, is_list

MAX_LAYERS = 512  # llama.cpp's LLAMA_MAX_LAYERS


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps of a sequence.

    Attributes:
        heads: keys, and values, of each token; 0 where none are kept.
        key_length: numbers of a key.
        value_length: numbers of a value; 0 where it is a part of the key (latent attention).
        window: tokens that the layer looks back at; 0 for all.
        state: bytes that it keeps whatever the length.
    """

    heads: int = 0
    key_length: int = 0
    value_length: int = 0
    window: int = 0
    state: int = 0


def layer_caches(keys: ModelKeys) -> tuple[LayerCache, ...] | None:
    """What each layer keeps; None where that is unknown.

    Raises:
        TypeError, ValueError, OverflowError: a key is missing or no number.
    """
    row = architectures.find(keys.architecture)
    layers = int(keys.get("block_count"))
    latent = keys.has("attention.key_length_mla") and keys.has("attention.value_length_mla")
    compressed = keys.has("attention.kv_lora_rank") and not (latent or row.expands_keys)
    stateful = keys.has("ssm.state_size") or keys.has("wkv.head_size")
    if not 0 < layers <= MAX_LAYERS or row.own_cache or compressed or (stateful and not row.recurrent):
        return None
    heads = _per_layer(keys.get("attention.head_count", 0 if row.recurrent else None), layers)
    heads_kv = _per_layer(keys.get("attention.head_count_kv", heads), layers)
    length = int(keys.get("embedding_length")) // max(heads) if max(heads) > 0 else 0
    lengths = [int(keys.get(f"attention.{part}_length", length)) for part in ("key", "value")]
    windowed_lengths = [
        int(keys.get(f"attention.{part}_length_swa", default))
        for part, default in zip(("key", "value"), lengths, strict=True)
    ]
    window = int(keys.get("attention.sliding_window") or row.window)
    windowed, recurrent = _windowed_layers(keys, layers), _recurrent_layers(keys, heads_kv)
    state = _state_bytes(keys, max(heads), lengths[0]) if any(recurrent) else 0
    with_cache = row.layers_with_cache or layers - int(keys.get("attention.shared_kv_layers", 0))
    if row.recurrent not in ("headless", "bare"):
        # Those that guess tokens ahead (MTP) keep nothing of what is computed without them.
        with_cache = min(with_cache, layers - int(keys.get("nextn_predict_layers", 0)))
    caches = []
    for i in range(layers):
        keeps = i < with_cache and (not recurrent[i] or row.recurrent == "beside")
        key_length, value_length = windowed_lengths if windowed[i] else lengths
        caches.append(
            LayerCache(
                heads=heads_kv[i] if keeps else 0,
                key_length=key_length,
                value_length=0 if latent else value_length,
                window=window if windowed[i] else 0,
                state=state if recurrent[i] else 0,
            )
        )
    return tuple(caches)


def _per_layer(value: Any, layers: int) -> list[int]:
    """A metadata value that may be one number or one per layer, as one per layer."""
    found = [int(n) for n in value] if is_list(value) else [int(value)] * layers
    if len(found) != layers:
        raise ValueError(f"{len(found)} numbers for {layers} layers")
    return found


def _windowed_layers(keys: ModelKeys, layers: int) -> list[bool]:
    """Which layers have a sliding window, as load_swa_pattern finds them."""
    row = architectures.find(keys.architecture)
    if not has_windows(keys):
        return [False] * layers
    pattern = keys.get("attention.sliding_window_pattern", row.window_pattern)
    if is_list(pattern):
        return ([bool(flag) for flag in pattern] + [False] * layers)[:layers]
    period = int(pattern)
    without = 0 if row.first_sees_all else period - 1
    return [period == 0 or i % period != without for i in range(layers)]


def _recurrent_layers(keys: ModelKeys, heads_kv: list[int]) -> list[bool]:
    """Which layers keep a state."""
    row, layers = architectures.find(keys.architecture), len(heads_kv)
    if row.recurrent == "headless":
        return [heads == 0 for heads in heads_kv]
    if row.recurrent == "bare":
        feed_forward = _per_layer(keys.get("feed_forward_length", 0), layers)
        return [heads == size == 0 for heads, size in zip(heads_kv, feed_forward, strict=True)]
    if row.recurrent == "between":
        named = keys.get("attention.recurrent_layers")
        if named is not None:
            return [bool(flag) for flag in _per_layer(named, layers)]
        interval = int(keys.get("full_attention_interval", row.attention_interval))
        trunk = layers - int(keys.get("nextn_predict_layers", 0))
        return [i < trunk and (i + 1) % interval != 0 for i in range(layers)]
    return [bool(row.recurrent)] * layers


def _state_bytes(keys: ModelKeys, heads: int, key_length: int) -> int:
    """Bytes of the state of a layer, float32: llama_hparams::n_embd_r and n_embd_s."""

    def number(name: str, default: int = 0) -> int:
        return int(keys.get(name, default))

    width, state = number("embedding_length"), number("ssm.state_size")
    inner, steps = number("ssm.inner_size"), max(number("ssm.conv_kernel") - 1, 0)
    if size := number("wkv.head_size"):  # RWKV
        count = number("token_shift_count", 2) * width + width * size
    elif kernel := number("shortconv.l_cache"):  # LFM2
        count = width * (kernel - 1)
    elif size := number("kda.head_dim"):  # Kimi
        count = 3 * (steps or 3) * heads * size + heads * size * size
    elif inner:  # Mamba, gated delta rule
        count = steps * (inner + 2 * number("ssm.group_count") * state) + state * inner
    else:  # linear attention
        count = heads * key_length * key_length
    return 4 * count


def has_windows(keys: ModelKeys) -> bool:
    """Whether layers attend through a sliding window, as llama.cpp computes the model."""
    row = architectures.find(keys.architecture)
    if not row.sliding_window or row.windowed_layers not in (0, keys.get("block_count")):
        return False
    if row.sliding_window == "always" and keys.get("attention.sliding_window") is None:
        return True
    return keys.has("attention.sliding_window")


def recurrent_width(keys: ModelKeys) -> int:
    """Numbers that a token takes on its way through a layer with a state, an estimate from above; 0 without them."""
    if not architectures.find(keys.architecture).recurrent:
        return 0
    inner = int(keys.get("ssm.inner_size", 0))
    convolved = inner + 2 * int(keys.get("ssm.group_count", 0)) * int(keys.get("ssm.state_size", 0))
    # It is projected, convolved and activated; then there are input, step, gate and output of the state.
    return 3 * convolved + 4 * inner


def first_table(keys: ModelKeys) -> int | None:
    """Tokens that the first RoPE table covers, where there are more: ``clex.*`` tables, or LongRoPE's sets of factors.

    Raises:
        TypeError, ValueError: a length is no number.
    """
    metadata = keys.metadata
    factors: Any = metadata.get("clex.scaling_factors")
    if hasattr(factors, "__len__") and len(factors) > 1:
        return int(metadata.get("clex.original_context_length") or 0) or None
    tensors = metadata.tensors if isinstance(metadata, GGUFFile) else ()
    longrope = any(tensor.name == "rope_factors_long.weight" for tensor in tensors)
    if not longrope or "LLAMA_CLEX_LONGROPE_DISABLE" in os.environ:
        return None
    return keys.original_context if 0 < keys.original_context < keys.trained_context else None
