"""What of a class of transformers its config decides, and what llama.cpp computes of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelClass:
    """One class of transformers, as far as its config decides what is computed.

    Attributes:
        model_type: its name in configs.
        defaults: keys that the class reads, and what it takes where the config leaves one out.
        accepted: values that llama.cpp computes, for keys with which it computes one thing only.
        tensors: names and shapes outside of the layers, a line each; see `clex_convert.model_tensors`.
        layer: the same of each layer ``{i}``, and of each expert ``{e}`` in it.
        fused: lines in place of those of the experts, for files that have all experts of a layer in one tensor.
        output: name of the output matrix, which is the first tensor where the config ties the two.
        output_needed: whether the runtime wants an output matrix in the file though it is tied.
        own_head_dim: whether a head may have another size than hidden_size / num_attention_heads.
        partial: whether it may rotate only a part of each head.
        window: which layers attend through sliding_window, that llama.cpp does not compute: ``all``, ``switched`` (all
            if use_sliding_window), ``layers`` (those that layer_types or max_window_layers say, if use_sliding_window),
            or none. ``computed``: those that layer_types says, and llama.cpp computes it.
        period: of layers whose last one attends to all tokens, where the config leaves layer_types out and the window
            is computed; 0 where all do.
        names: the names by which the class reads a key that others call otherwise, the first one said counts.
        unread: names that stand in configs of some age or origin, and the key whose value they must not contradict.
        sizes: letters of dimensions that this class alone has, or has by another key; a product as ``a*b``.
        scaled: whether the class scales its RoPE where the config does not say, in one release or both.
        derive: fills in values that follow from others.
        limits: values that llama.cpp computes, for keys where that depends on other values.
        for_scripts: what llama.cpp's scripts read beside the class's keys.
        draft_head: how the names of tensors begin that only guess tokens ahead, and that transformers leaves out;
            ``{n}`` is the number of layers, beyond which there are more.
    """

    model_type: str
    defaults: Mapping[str, Any]
    accepted: Mapping[str, tuple[Any, ...]]
    tensors: str
    layer: str
    fused: str = ""
    output: str = "lm_head.weight"
    output_needed: bool = False
    own_head_dim: bool = False
    partial: bool = False
    window: str = ""
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)
    period: int = 0
    sizes: Mapping[str, str] = field(default_factory=dict)
    scaled: bool = False
    derive: Callable[[dict[str, Any]], None] | None = None
    limits: Callable[[Mapping[str, Any]], Mapping[str, tuple[Any, ...]]] | None = None
    for_scripts: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    draft_head: tuple[str, ...] = ()
