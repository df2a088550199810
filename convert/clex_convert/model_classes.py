"""The classes of transformers that can be converted: what each reads of a config, and what llama.cpp computes of it.

Data alone: `clex_convert.model_config` reads a config by it, `clex_convert.model_tensors` checks the weights. Of
transformers' releases 4.57 and 5.24, which agree where nothing else is said; written down here, a conversion means the
same whichever of them is installed. What is accepted was compared with the graphs in src/models/ of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from clex_convert.model_class import ModelClass

# llama.cpp has one function for the kinds of GELU, whose values differ by less than its own table is exact.
_SILU = ("silu", "swish")
_GELU = (
    "gelu",
    "gelu_new",
    "gelu_fast",
    "gelu_pytorch_tanh",
    "gelu_python",
    "gelu_python_tanh",
    "gelu_accurate",
)


_USUAL = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}
_WINDOW = {"use_sliding_window": False, "sliding_window": 4096}
_LAYERS = {"max_window_layers": 28, "layer_types": None}

_OUTSIDE = """
model.embed_tokens.weight                                v h
model.norm.weight                                        h
lm_head.weight                                           v h
"""
_NORMS = """
model.layers.{i}.input_layernorm.weight                  h
model.layers.{i}.post_attention_layernorm.weight         h
"""
_ATTENTION = """
model.layers.{i}.self_attn.q_proj.weight                 q h
model.layers.{i}.self_attn.k_proj.weight                 k h
model.layers.{i}.self_attn.v_proj.weight                 k h
model.layers.{i}.self_attn.o_proj.weight                 h q
"""
_GATED = """
model.layers.{i}.mlp.gate_proj.weight                    f h
model.layers.{i}.mlp.up_proj.weight                      f h
model.layers.{i}.mlp.down_proj.weight                    h f
"""
_QKV_BIAS = """
model.layers.{i}.self_attn.q_proj.bias                   q
model.layers.{i}.self_attn.k_proj.bias                   k
model.layers.{i}.self_attn.v_proj.bias                   k
"""
_HEAD_NORMS = """
model.layers.{i}.self_attn.q_norm.weight                 d
model.layers.{i}.self_attn.k_norm.weight                 d
"""
_EXPERTS = """
model.layers.{i}.mlp.gate.weight                         e h
model.layers.{i}.mlp.experts.{e}.gate_proj.weight        x h
model.layers.{i}.mlp.experts.{e}.up_proj.weight          x h
model.layers.{i}.mlp.experts.{e}.down_proj.weight        h x
"""
_FUSED = """
model.layers.{i}.mlp.experts.gate_up_proj                e 2x h
model.layers.{i}.mlp.experts.down_proj                   e h x
"""

_FUSED_GATED = """
model.layers.{i}.mlp.gate_up_proj.weight                 2f h
model.layers.{i}.mlp.down_proj.weight                    h f
"""
_SHARED_EXPERTS = """
model.layers.{i}.mlp.shared_experts.gate_proj.weight     S h
model.layers.{i}.mlp.shared_experts.up_proj.weight       S h
model.layers.{i}.mlp.shared_experts.down_proj.weight     h S
"""
_CORRECTED = """
model.layers.{i}.mlp.gate.e_score_correction_bias        e
"""
_SHARED_EXPERT = """
model.layers.{i}.mlp.shared_expert.gate_proj.weight      s h
model.layers.{i}.mlp.shared_expert.up_proj.weight        s h
model.layers.{i}.mlp.shared_expert.down_proj.weight      h s
model.layers.{i}.mlp.shared_expert_gate.weight           1 h
"""
_GEMMA_NORMS = """
model.layers.{i}.pre_feedforward_layernorm.weight        h
model.layers.{i}.post_feedforward_layernorm.weight       h
"""
_OLMO2_NORMS_OF_LAYERS = """
model.layers.{i}.post_attention_layernorm.weight         h
model.layers.{i}.post_feedforward_layernorm.weight       h
"""
_OLMO2_NORMS = (
    _OLMO2_NORMS_OF_LAYERS
    + """
model.layers.{i}.self_attn.q_norm.weight                 q
model.layers.{i}.self_attn.k_norm.weight                 k
"""
)
_GRANITE_EXPERTS = """
model.layers.{i}.block_sparse_moe.router.layer.weight    e h
model.layers.{i}.block_sparse_moe.input_linear.weight    e 2f h
model.layers.{i}.block_sparse_moe.output_linear.weight   e h f
"""
_GRANITE = {
    "attention_bias": False,
    **dict.fromkeys(("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"), 1.0),
}
_GEMMA = {"attention_bias": (False,), "tie_word_embeddings": (True,), "use_bidirectional_attention": (None, False)}
_FULL = "layer_types=full_attention"


def _where(lines: str, condition: str) -> str:
    """The lines, for tensors that are there only if the config says so."""
    return "".join(f"{line}  {condition}\n" for line in lines.splitlines() if line)


_LLAMA_BIAS = """
model.layers.{i}.self_attn.q_proj.bias                   q  attention_bias=true
model.layers.{i}.self_attn.k_proj.bias                   k  attention_bias=true
model.layers.{i}.self_attn.v_proj.bias                   k  attention_bias=true
model.layers.{i}.self_attn.o_proj.bias                   h  attention_bias=true
model.layers.{i}.mlp.gate_proj.bias                      f  mlp_bias=true
model.layers.{i}.mlp.up_proj.bias                        f  mlp_bias=true
model.layers.{i}.mlp.down_proj.bias                      h  mlp_bias=true
"""


def _falcon(values: dict[str, Any]) -> None:
    if values["ffn_hidden_size"] is None:
        values["ffn_hidden_size"] = 4 * values["hidden_size"]
    if values["num_kv_heads"] is None:
        values["num_kv_heads"] = values["num_attention_heads"]
    if values["num_ln_in_parallel_attn"] is None:
        values["num_ln_in_parallel_attn"] = 2 if values["new_decoder_architecture"] else 1
    if not values["new_decoder_architecture"]:
        # The class does not look at the number here; llama.cpp's scripts do.
        values["num_kv_heads"] = 1 if values["multi_query"] else values["num_attention_heads"]


def _dense_then_experts(dense: str, sparse: str) -> Callable[[dict[str, Any]], None]:
    """Says of each layer whether its network is dense or has experts, as ``mlp_types``."""

    def derive(values: dict[str, Any]) -> None:
        first = values[dense]
        values["mlp_types"] = ["dense" if i < first else sparse for i in range(values["num_hidden_layers"])]

    return derive


# transformers' classes whose every head scales its scores by query_pre_attn_scalar, and the number of layers of the one
# model where llama.cpp takes the width of a head from elsewhere.
def _gemma_scale(layers: int) -> Callable[[Mapping[str, Any]], Mapping[str, tuple[Any, ...]]]:
    def limits(values: Mapping[str, Any]) -> Mapping[str, tuple[Any, ...]]:
        one = values["hidden_size"] // values["num_attention_heads"]
        return {"query_pre_attn_scalar": (one if values["num_hidden_layers"] == layers else values["head_dim"],)}

    return limits


def _one_base(values: Mapping[str, Any]) -> Mapping[str, tuple[Any, ...]]:
    # llama.cpp's graph gives layers with a window the base of the others.
    return {"rope_local_base_freq": (values["rope_theta"],)}


def _one_key_per_query(values: Mapping[str, Any]) -> Mapping[str, tuple[Any, ...]]:
    return {"num_key_value_heads": (values["num_attention_heads"],)}


def _every(step: int, values: Mapping[str, Any]) -> list[int]:
    return [int((i + 1) % step != 0) for i in range(values["num_hidden_layers"])]


def _smollm3(values: dict[str, Any]) -> None:
    if values["no_rope_layers"] is None:
        values["no_rope_layers"] = _every(values["no_rope_layer_interval"], values)


def _exaone4(values: Mapping[str, Any]) -> Mapping[str, tuple[Any, ...]]:
    # llama.cpp knows the model with windows, whose other layers have no RoPE, by its 64 layers.
    windowed = "sliding_attention" in values["layer_types"]
    if values["num_hidden_layers"] == 64:
        return {**_one_base(values), "sliding_window": () if not windowed else (values["sliding_window"],)}
    return {"sliding_window": (None,)}


def _ernie4_5_moe(values: Mapping[str, Any]) -> Mapping[str, tuple[Any, ...]]:
    # The scripts work out the width of the shared expert from the number of heads, rounded down.
    shared = values["moe_intermediate_size"] * values["moe_num_shared_experts"]
    heads, width = values["num_key_value_heads"], values["intermediate_size"]
    return {
        "moe_layer_end_index": (values["num_hidden_layers"] - 1, -1),
        "intermediate_size": (width if width // heads == shared else shared * heads,),
    }


def _dots1(values: dict[str, Any]) -> None:
    _dense_then_experts("first_k_dense_replace", "sparse")(values)
    values["use_sliding_window"] = True


def _qwen3_next(values: dict[str, Any]) -> None:
    if values["layer_types"] is None:
        full = _every(values.get("full_attention_interval", 4), values)
        values["layer_types"] = ["linear_attention" if linear else "full_attention" for linear in full]


def _falcon_h1(values: dict[str, Any]) -> None:
    if values["mamba_d_ssm"] is None:
        values["mamba_d_ssm"] = values["mamba_expand"] * values["hidden_size"]
    if values["mamba_d_head"] in (None, "auto"):
        values["mamba_d_head"] = values["mamba_d_ssm"] // values["mamba_n_heads"]
    for key, count in (("mlp_multipliers", 2), ("ssm_multipliers", 5)):
        values[key] = values[key] or [1.0] * count
    for key in ("attention_out", "attention_in", "key", "ssm_in", "ssm_out"):
        values[f"{key}_multiplier"] = 1.0 if values[f"{key}_multiplier"] is None else values[f"{key}_multiplier"]


def _lfm2(values: dict[str, Any]) -> None:
    layers = range(values["num_hidden_layers"])
    if values["layer_types"] is None:
        full = layers if values["full_attn_idxs"] is None else values["full_attn_idxs"]
        values["layer_types"] = ["full_attention" if i in full else "conv" for i in layers]
    width = values["intermediate_size"]
    if values["block_auto_adjust_ff_dim"]:
        width = int(2 * width / 3)
        if values["block_ffn_dim_multiplier"] is not None:
            width = int(values["block_ffn_dim_multiplier"] * width)
        multiple = values["block_multiple_of"]
        width = multiple * ((width + multiple - 1) // multiple)
    values["ffn_hidden_size"] = width


# What Glm and Glm4 have where the config says nothing.
_GLM = {
    **_USUAL,
    "rms_norm_eps": 1.5625e-7,
    "partial_rotary_factor": 0.5,
    "intermediate_size": 13696,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "attention_bias": True,
}

MODEL_CLASSES: dict[str, ModelClass] = {
    "LlamaForCausalLM": ModelClass(
        "llama",
        {
            **_USUAL,
            "intermediate_size": 11008,
            "max_position_embeddings": 2048,
            "num_key_value_heads": None,
            "head_dim": None,
            "attention_bias": False,
            "mlp_bias": False,
        },
        {"hidden_act": _SILU},
        _OUTSIDE,
        _NORMS + _ATTENTION + _GATED + _LLAMA_BIAS,
        own_head_dim=True,
    ),
    "MistralForCausalLM": ModelClass(
        "mistral",
        {
            **_USUAL,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "head_dim": None,
            "sliding_window": 4096,
        },
        {"hidden_act": _SILU},
        _OUTSIDE,
        _NORMS + _ATTENTION + _GATED,
        own_head_dim=True,
        window="all",
    ),
    "MixtralForCausalLM": ModelClass(
        "mixtral",
        {
            **_USUAL,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "head_dim": None,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        {"hidden_act": _SILU},
        _OUTSIDE,
        _NORMS
        + _ATTENTION
        + """
model.layers.{i}.block_sparse_moe.gate.weight            e h
model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight  f h
model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight  h f
model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight  f h
""",
        own_head_dim=True,
        window="all",
        names={"num_local_experts": ("num_local_experts", "num_experts")},
    ),
    "PhiForCausalLM": ModelClass(
        "phi",
        {
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "tie_word_embeddings": False,
            "intermediate_size": 8192,
            "max_position_embeddings": 2048,
            "num_key_value_heads": None,
            "qk_layernorm": False,
        },
        {"hidden_act": _GELU, "qk_layernorm": (False,)},
        """
model.embed_tokens.weight                                v h
model.final_layernorm.weight                             h
model.final_layernorm.bias                               h
lm_head.weight                                           v h
lm_head.bias                                             v
""",
        _QKV_BIAS
        + """
model.layers.{i}.self_attn.q_proj.weight                 q h
model.layers.{i}.self_attn.k_proj.weight                 k h
model.layers.{i}.self_attn.v_proj.weight                 k h
model.layers.{i}.self_attn.dense.weight                  h q
model.layers.{i}.self_attn.dense.bias                    h
model.layers.{i}.input_layernorm.weight                  h
model.layers.{i}.input_layernorm.bias                    h
model.layers.{i}.mlp.fc1.weight                          f h
model.layers.{i}.mlp.fc1.bias                            f
model.layers.{i}.mlp.fc2.weight                          h f
model.layers.{i}.mlp.fc2.bias                            h
""",
        output_needed=True,
        partial=True,
    ),
    "Phi3ForCausalLM": ModelClass(
        "phi3",
        {
            **_USUAL,
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 1.0,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "num_key_value_heads": None,
            "sliding_window": None,
        },
        {"hidden_act": _SILU},
        _OUTSIDE,
        _NORMS
        + """
model.layers.{i}.self_attn.qkv_proj.weight               q+2k h
model.layers.{i}.self_attn.o_proj.weight                 h q
model.layers.{i}.mlp.gate_up_proj.weight                 2f h
model.layers.{i}.mlp.down_proj.weight                    h f
""",
        partial=True,
        window="all",
    ),
    "GPTNeoXForCausalLM": ModelClass(
        "gpt_neox",
        {
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "tie_word_embeddings": False,
            "intermediate_size": 24576,
            "max_position_embeddings": 2048,
            "use_parallel_residual": True,
            "attention_bias": True,
        },
        {"hidden_act": _GELU, "attention_bias": (True,)},
        """
gpt_neox.embed_in.weight                                 v h
gpt_neox.final_layer_norm.weight                         h
gpt_neox.final_layer_norm.bias                           h
embed_out.weight                                         v h
""",
        """
gpt_neox.layers.{i}.attention.query_key_value.weight     3h h
gpt_neox.layers.{i}.attention.query_key_value.bias       3h
gpt_neox.layers.{i}.attention.dense.weight               h h
gpt_neox.layers.{i}.attention.dense.bias                 h
gpt_neox.layers.{i}.input_layernorm.weight               h
gpt_neox.layers.{i}.input_layernorm.bias                 h
gpt_neox.layers.{i}.post_attention_layernorm.weight      h
gpt_neox.layers.{i}.post_attention_layernorm.bias        h
gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight             f h
gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias               f
gpt_neox.layers.{i}.mlp.dense_4h_to_h.weight             h f
gpt_neox.layers.{i}.mlp.dense_4h_to_h.bias               h
""",
        output="embed_out.weight",
        output_needed=True,
        partial=True,
        names={
            "rope_theta": ("rotary_emb_base", "rope_theta"),
            "partial_rotary_factor": ("rotary_pct", "partial_rotary_factor"),
        },
        unread={"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"},
        for_scripts=lambda values: {"rotary_pct": values["partial_rotary_factor"]},
    ),
    "Qwen2ForCausalLM": ModelClass(
        "qwen2",
        {
            **_USUAL,
            **_WINDOW,
            **_LAYERS,
            "intermediate_size": 22016,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
        },
        {"hidden_act": _SILU},
        _OUTSIDE,
        _NORMS + _ATTENTION + _QKV_BIAS + _GATED,
        window="layers",
    ),
    "Qwen2MoeForCausalLM": ModelClass(
        "qwen2_moe",
        {
            **_USUAL,
            **_WINDOW,
            **_LAYERS,
            "intermediate_size": 5632,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 16,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts_per_tok": 4,
            "num_experts": 60,
            "norm_topk_prob": False,
            "qkv_bias": True,
        },
        {
            "hidden_act": _SILU,
            "norm_topk_prob": (False,),
            "decoder_sparse_step": (1,),
            "mlp_only_layers": (None, []),
        },
        _OUTSIDE,
        _NORMS + _ATTENTION + _where(_QKV_BIAS, "qkv_bias=true") + _EXPERTS + _SHARED_EXPERT,
        fused=_FUSED,
        output_needed=True,
        window="switched",
        names={"num_experts": ("num_experts", "num_local_experts")},
    ),
    "Qwen3ForCausalLM": ModelClass(
        "qwen3",
        {
            **_USUAL,
            **_WINDOW,
            **_LAYERS,
            "intermediate_size": 22016,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "attention_bias": False,
        },
        {"hidden_act": _SILU, "attention_bias": (False,)},
        _OUTSIDE,
        _NORMS + _ATTENTION + _HEAD_NORMS + _GATED,
        own_head_dim=True,
        window="layers",
    ),
    "Qwen3MoeForCausalLM": ModelClass(
        "qwen3_moe",
        {
            **_USUAL,
            **_WINDOW,
            "intermediate_size": 6144,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "head_dim": None,
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "num_experts": 128,
            "norm_topk_prob": False,
        },
        {
            "hidden_act": _SILU,
            "attention_bias": (False,),
            "norm_topk_prob": (True,),
            "decoder_sparse_step": (1,),
            "mlp_only_layers": (None, []),
        },
        _OUTSIDE,
        _NORMS + _ATTENTION + _HEAD_NORMS + _EXPERTS,
        fused=_FUSED,
        own_head_dim=True,
        window="switched",
        names={"num_experts": ("num_experts", "num_local_experts")},  # the second one is release 5's
    ),
    "StableLmForCausalLM": ModelClass(
        "stablelm",
        {
            "hidden_act": "silu",
            "layer_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "tie_word_embeddings": False,
            "intermediate_size": 6912,
            "max_position_embeddings": 4096,
            "num_key_value_heads": 32,
            "use_qkv_bias": False,
            "qk_layernorm": False,
            "use_parallel_residual": False,
        },
        {"hidden_act": _SILU},
        _OUTSIDE + "model.norm.bias h\n",
        _ATTENTION
        + _GATED
        + _where(_QKV_BIAS, "use_qkv_bias=true")
        + """
model.layers.{i}.input_layernorm.weight                  h
model.layers.{i}.input_layernorm.bias                    h
model.layers.{i}.post_attention_layernorm.weight         h  use_parallel_residual=false
model.layers.{i}.post_attention_layernorm.bias           h  use_parallel_residual=false
model.layers.{i}.self_attn.q_layernorm.norms.{q}.weight  d  qk_layernorm=true
model.layers.{i}.self_attn.k_layernorm.norms.{k}.weight  d  qk_layernorm=true
""",
        output_needed=True,
        partial=True,
        unread={"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"},  # of StableLMEpoch
    ),
    "FalconForCausalLM": ModelClass(
        "falcon",
        {
            "activation": "gelu",
            "layer_norm_epsilon": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "ffn_hidden_size": None,
            "max_position_embeddings": 2048,
            "num_kv_heads": None,
            "alibi": False,
            "new_decoder_architecture": False,
            "multi_query": True,
            "parallel_attn": True,
            "bias": False,
            "num_ln_in_parallel_attn": None,
        },
        {"activation": _GELU, "bias": (False,), "parallel_attn": (True,)},
        """
transformer.word_embeddings.weight                       v h
transformer.ln_f.weight                                  h
transformer.ln_f.bias                                    h
lm_head.weight                                           v h
""",
        """
transformer.h.{i}.self_attention.query_key_value.weight  q+2k h
transformer.h.{i}.self_attention.dense.weight            h h
transformer.h.{i}.mlp.dense_h_to_4h.weight               f h
transformer.h.{i}.mlp.dense_4h_to_h.weight               h f
transformer.h.{i}.input_layernorm.weight                 h  num_ln_in_parallel_attn=1
transformer.h.{i}.input_layernorm.bias                   h  num_ln_in_parallel_attn=1
transformer.h.{i}.ln_attn.weight                         h  num_ln_in_parallel_attn=2
transformer.h.{i}.ln_attn.bias                           h  num_ln_in_parallel_attn=2
transformer.h.{i}.ln_mlp.weight                          h  num_ln_in_parallel_attn=2
transformer.h.{i}.ln_mlp.bias                            h  num_ln_in_parallel_attn=2
""",
        names={"hidden_size": ("n_embed", "hidden_size")},
        derive=_falcon,
    ),
    "Olmo2ForCausalLM": ModelClass(
        "olmo2",
        {
            **_USUAL,
            "rms_norm_eps": 1e-5,
            "intermediate_size": 11008,
            "max_position_embeddings": 2048,
            "num_key_value_heads": None,
            "attention_bias": False,
        },
        {"hidden_act": _SILU, "attention_bias": (False,)},
        _OUTSIDE,
        _ATTENTION + _GATED + _OLMO2_NORMS,
        output_needed=True,
    ),
    "SmolLM3ForCausalLM": ModelClass(
        "smollm3",
        {
            **_USUAL,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "intermediate_size": 11008,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "head_dim": None,
            "attention_bias": False,
            "mlp_bias": False,
            "use_sliding_window": False,
            "sliding_window": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
        {"hidden_act": _SILU, "attention_bias": (False,), "mlp_bias": (False,)},
        _OUTSIDE,
        _NORMS + _ATTENTION + _GATED,
        own_head_dim=True,
        window="switched",
        derive=_smollm3,
        limits=lambda values: {"no_rope_layers": (_every(4, values),)},
    ),
    "ArceeForCausalLM": ModelClass(
        "arcee",
        {
            **_USUAL,
            "hidden_act": "relu2",
            "rms_norm_eps": 1e-5,
            "intermediate_size": 18432,
            "max_position_embeddings": 4096,
            "num_key_value_heads": None,
            "head_dim": None,
            "attention_bias": False,
            "mlp_bias": False,
        },
        {"hidden_act": ("relu2",), "attention_bias": (False,), "mlp_bias": (False,)},
        _OUTSIDE,
        _NORMS
        + _ATTENTION
        + """
model.layers.{i}.mlp.up_proj.weight                      f h
model.layers.{i}.mlp.down_proj.weight                    h f
""",
        own_head_dim=True,
    ),
    "ApertusForCausalLM": ModelClass(
        "apertus",
        {
            **_USUAL,
            "hidden_act": "xielu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 12e6,
            "intermediate_size": 14336,
            "max_position_embeddings": 65536,
            "num_key_value_heads": None,
            "attention_bias": False,
        },
        {"hidden_act": ("xielu",), "attention_bias": (False,)},
        _OUTSIDE,
        _ATTENTION
        + _HEAD_NORMS
        + """
model.layers.{i}.attention_layernorm.weight              h
model.layers.{i}.feedforward_layernorm.weight            h
model.layers.{i}.mlp.up_proj.weight                      f h
model.layers.{i}.mlp.down_proj.weight                    h f
model.layers.{i}.mlp.act_fn.alpha_n                      1
model.layers.{i}.mlp.act_fn.alpha_p                      1
model.layers.{i}.mlp.act_fn.beta
model.layers.{i}.mlp.act_fn.eps
""",
        scaled=True,
    ),
    "GraniteForCausalLM": ModelClass(
        "granite",
        {
            **_USUAL,
            **_GRANITE,
            "intermediate_size": 11008,
            "max_position_embeddings": 2048,
            "num_key_value_heads": None,
            "mlp_bias": False,
        },
        {"hidden_act": _SILU},
        _OUTSIDE,
        _NORMS + _ATTENTION + _GATED + _LLAMA_BIAS,
    ),
    "GraniteMoeForCausalLM": ModelClass(
        "granitemoe",
        {
            **_USUAL,
            **_GRANITE,
            "intermediate_size": 11008,
            "max_position_embeddings": 2048,
            "num_key_value_heads": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        {"hidden_act": _SILU, "attention_bias": (False,)},
        _OUTSIDE,
        _NORMS + _ATTENTION + _GRANITE_EXPERTS,
    ),
    "GraniteMoeSharedForCausalLM": ModelClass(
        "granitemoeshared",
        {
            **_USUAL,
            **_GRANITE,
            "intermediate_size": 11008,
            "max_position_embeddings": 2048,
            "num_key_value_heads": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 0,
        },
        {"hidden_act": _SILU, "attention_bias": (False,)},
        _OUTSIDE,
        _NORMS
        + _ATTENTION
        + _GRANITE_EXPERTS
        + """
model.layers.{i}.shared_mlp.input_linear.weight          2S h  has_shared=true
model.layers.{i}.shared_mlp.output_linear.weight         h S  has_shared=true
""",
        sizes={"S": "shared_intermediate_size"},
        derive=lambda values: values.update(has_shared=bool(values["shared_intermediate_size"])),
    ),
    "GlmForCausalLM": ModelClass(
        "glm",
        _GLM,
        {"hidden_act": _SILU},
        _OUTSIDE,
        _NORMS + _ATTENTION + _where(_QKV_BIAS, "attention_bias=true") + _FUSED_GATED,
        partial=True,
        for_scripts=lambda values: {"layernorm_epsilon": values["rms_norm_eps"]},
    ),
    "Glm4ForCausalLM": ModelClass(
        "glm4",
        _GLM,
        {"hidden_act": _SILU},
        _OUTSIDE,
        _NORMS
        + _ATTENTION
        + _where(_QKV_BIAS, "attention_bias=true")
        + _FUSED_GATED
        + """
model.layers.{i}.post_self_attn_layernorm.weight         h
model.layers.{i}.post_mlp_layernorm.weight               h
""",
        own_head_dim=True,
        partial=True,
    ),
    "Glm4MoeForCausalLM": ModelClass(
        "glm4_moe",
        {
            **_USUAL,
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "intermediate_size": 10944,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "head_dim": None,
            "attention_bias": False,
            "use_qk_norm": False,
            "moe_intermediate_size": 1408,
            "num_experts_per_tok": 8,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "n_routed_experts": 128,
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
        },
        {"hidden_act": _SILU, "n_group": (1,), "topk_group": (1,), "n_shared_experts": (1,)},
        _OUTSIDE,
        _NORMS
        + _ATTENTION
        + _where(_QKV_BIAS, "attention_bias=true")
        + _where(_HEAD_NORMS, "use_qk_norm=true")
        + _where(_GATED, "mlp_types=dense")
        + _where(_EXPERTS + _SHARED_EXPERTS + _CORRECTED, "mlp_types=sparse"),
        fused=_where(_FUSED, "mlp_types=sparse"),
        own_head_dim=True,
        partial=True,
        sizes={"e": "n_routed_experts", "S": "moe_intermediate_size*n_shared_experts"},
        derive=_dense_then_experts("first_k_dense_replace", "sparse"),
        draft_head=("model.layers.{n}",),
    ),
    "Dots1ForCausalLM": ModelClass(
        "dots1",
        {
            **_USUAL,
            "intermediate_size": 10944,
            "max_position_embeddings": 2048,
            "num_key_value_heads": 32,
            "head_dim": None,
            "attention_bias": False,
            "moe_intermediate_size": 1408,
            "num_experts_per_tok": None,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": None,
            "n_routed_experts": None,
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
            "sliding_window": 4096,
            "max_window_layers": 62,
            "layer_types": None,
        },
        {"hidden_act": _SILU, "attention_bias": (False,), "n_group": (1,), "topk_group": (1,)},
        _OUTSIDE,
        _NORMS
        + _ATTENTION
        + _HEAD_NORMS
        + _where(_GATED, "mlp_types=dense")
        + _where(_EXPERTS + _SHARED_EXPERTS + _CORRECTED, "mlp_types=sparse"),
        fused=_where(_FUSED, "mlp_types=sparse"),
        output_needed=True,
        own_head_dim=True,
        window="layers",
        sizes={"e": "n_routed_experts", "S": "moe_intermediate_size*n_shared_experts"},
        derive=_dots1,
        limits=_one_key_per_query,
        for_scripts=lambda values: {"scoring_func": "sigmoid"},
    ),
    "GemmaForCausalLM": ModelClass(
        "gemma",
        {
            **_USUAL,
            "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "intermediate_size": 24576,
            "max_position_embeddings": 8192,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "attention_bias": False,
            "use_bidirectional_attention": None,
        },
        {"hidden_act": _GELU, **_GEMMA},
        _OUTSIDE,
        _NORMS + _ATTENTION + _GATED,
        own_head_dim=True,
    ),
    "Gemma2ForCausalLM": ModelClass(
        "gemma2",
        {
            "rms_norm_eps": 1e-6,
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "intermediate_size": 9216,
            "max_position_embeddings": 8192,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "attention_bias": False,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "layer_types": None,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
            "use_bidirectional_attention": None,
        },
        {"hidden_activation": _GELU, **_GEMMA},
        _OUTSIDE,
        _NORMS + _ATTENTION + _GATED + _GEMMA_NORMS,
        own_head_dim=True,
        window="computed",
        period=2,
        limits=_gemma_scale(46),
    ),
    "Gemma3ForCausalLM": ModelClass(
        "gemma3_text",
        {
            "rms_norm_eps": 1e-6,
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0,
            "intermediate_size": 9216,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "attention_bias": False,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "layer_types": None,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
            "use_bidirectional_attention": None,
        },
        {"hidden_activation": _GELU, "attn_logit_softcapping": (None,), **_GEMMA},
        _OUTSIDE,
        _NORMS + _ATTENTION + _HEAD_NORMS + _GATED + _GEMMA_NORMS,
        own_head_dim=True,
        window="computed",
        period=6,
        limits=_gemma_scale(62),
    ),
    "CohereForCausalLM": ModelClass(
        "cohere",
        {
            "hidden_act": "silu",
            "layer_norm_eps": 1e-5,
            "rope_theta": None,  # 10,000 or 500,000, depending on the release
            "logit_scale": 0.0625,
            "tie_word_embeddings": True,
            "intermediate_size": 22528,
            "max_position_embeddings": 8192,
            "num_key_value_heads": None,
            "attention_bias": False,
            "use_qk_norm": False,
        },
        {"hidden_act": _SILU, "attention_bias": (False,), "tie_word_embeddings": (True,)},
        _OUTSIDE,
        """
model.layers.{i}.input_layernorm.weight                  h
model.layers.{i}.self_attn.q_norm.weight                 A d  use_qk_norm=true
model.layers.{i}.self_attn.k_norm.weight                 K d  use_qk_norm=true
"""
        + _ATTENTION
        + _GATED,
        sizes={"A": "num_attention_heads", "K": "num_key_value_heads"},
        limits=lambda values: {"use_qk_norm": (values["num_hidden_layers"] >= 64,)},
    ),
    "Cohere2ForCausalLM": ModelClass(
        "cohere2",
        {
            "hidden_act": "silu",
            "layer_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "logit_scale": 0.0625,
            "tie_word_embeddings": True,
            "intermediate_size": 22528,
            "max_position_embeddings": 8192,
            "num_key_value_heads": None,
            "attention_bias": False,
            "sliding_window": 4096,
            "layer_types": None,
        },
        {"hidden_act": _SILU, "attention_bias": (False,), "tie_word_embeddings": (True,)},
        _OUTSIDE,
        "model.layers.{i}.input_layernorm.weight h\n" + _ATTENTION + _GATED,
        window="computed",
        period=4,
        limits=_one_base,
        for_scripts=lambda values: {"rotary_pct": 1.0},
    ),
    "OlmoForCausalLM": ModelClass(
        "olmo",
        {
            "hidden_act": "silu",
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "intermediate_size": 11008,
            "max_position_embeddings": 2048,
            "num_key_value_heads": None,
            "attention_bias": False,
            "clip_qkv": None,
        },
        {"hidden_act": _SILU, "attention_bias": (False,)},
        "model.embed_tokens.weight v h\nlm_head.weight v h\n",
        _ATTENTION + _GATED,
    ),
    "Olmo3ForCausalLM": ModelClass(
        "olmo3",
        {
            **_USUAL,
            "rope_theta": None,  # 10,000 or 500,000, depending on the release
            "rms_norm_eps": 1e-5,
            "intermediate_size": 11008,
            "max_position_embeddings": 2048,
            "num_key_value_heads": None,
            "attention_bias": False,
            "sliding_window": 4096,
            "layer_types": None,
        },
        {"hidden_act": _SILU, "attention_bias": (False,)},
        _OUTSIDE,
        _ATTENTION + _GATED + _OLMO2_NORMS,
        output_needed=True,
        window="computed",
        period=4,
        limits=_one_base,
    ),
    "OlmoeForCausalLM": ModelClass(
        "olmoe",
        {
            **_USUAL,
            "rms_norm_eps": 1e-5,
            "intermediate_size": 2048,
            "max_position_embeddings": 4096,
            "num_key_value_heads": None,
            "attention_bias": False,
            "clip_qkv": None,
            "num_experts_per_tok": 8,
            "num_experts": 64,
            "norm_topk_prob": False,
        },
        {
            "hidden_act": _SILU,
            "attention_bias": (False,),
            "clip_qkv": (None,),
            "norm_topk_prob": (False,),
            "rms_norm_eps": (1e-5,),
        },
        _OUTSIDE,
        _NORMS
        + _ATTENTION
        + """
model.layers.{i}.self_attn.q_norm.weight                 q
model.layers.{i}.self_attn.k_norm.weight                 k
"""
        + _EXPERTS,
        fused=_FUSED,
        output_needed=True,
        sizes={"x": "intermediate_size"},
        limits=_one_key_per_query,
        names={"num_experts": ("num_experts", "num_local_experts")},
    ),
    "GptOssForCausalLM": ModelClass(
        "gpt_oss",
        {
            **_USUAL,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
            "intermediate_size": 2880,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "attention_bias": True,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "layer_types": None,
        },
        {"hidden_act": _SILU, "attention_bias": (True,), "swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
        _OUTSIDE,
        _NORMS
        + _ATTENTION
        + _QKV_BIAS
        + """
model.layers.{i}.self_attn.o_proj.bias                   h
model.layers.{i}.self_attn.sinks                         A
model.layers.{i}.mlp.router.weight                       e h
model.layers.{i}.mlp.router.bias                         e
model.layers.{i}.mlp.experts.gate_up_proj                e h 2f
model.layers.{i}.mlp.experts.gate_up_proj_bias           e 2f
model.layers.{i}.mlp.experts.down_proj                   e f h
model.layers.{i}.mlp.experts.down_proj_bias              e h
""",
        output_needed=True,
        own_head_dim=True,
        window="computed",
        period=2,
        scaled=True,
        sizes={"A": "num_attention_heads"},
        names={"num_local_experts": ("num_local_experts", "num_experts")},
    ),
    "Exaone4ForCausalLM": ModelClass(
        "exaone4",
        {
            **_USUAL,
            "rms_norm_eps": 1e-5,
            "intermediate_size": 16384,
            "max_position_embeddings": 2048,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "layer_types": None,
        },
        {"hidden_act": _SILU},
        _OUTSIDE,
        _ATTENTION + _HEAD_NORMS + _GATED + _OLMO2_NORMS_OF_LAYERS,
        window="computed",
        limits=_exaone4,
    ),
    "Ernie4_5ForCausalLM": ModelClass(
        "ernie4_5",
        {
            **_USUAL,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "intermediate_size": 3072,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "use_bias": False,
        },
        {"hidden_act": _SILU, "use_bias": (False,)},
        _OUTSIDE,
        _NORMS + _ATTENTION + _GATED,
        own_head_dim=True,
    ),
    "Ernie4_5_MoeForCausalLM": ModelClass(
        "ernie4_5_moe",
        {
            **_USUAL,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "intermediate_size": 12288,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 4,
            "head_dim": None,
            "use_bias": False,
            "moe_intermediate_size": 1536,
            "moe_k": 6,
            "moe_num_experts": 64,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 27,
            "moe_layer_interval": 1,
            "moe_norm_min": 1e-12,
        },
        {"hidden_act": _SILU, "use_bias": (False,), "moe_layer_interval": (1,)},
        _OUTSIDE,
        _NORMS
        + _ATTENTION
        + _where(_GATED, "mlp_types=dense")
        + _where(_EXPERTS + _SHARED_EXPERTS, "mlp_types=sparse")
        + "model.layers.{i}.mlp.moe_statics.e_score_correction_bias 1 e  mlp_types=sparse\n",
        fused=_where(_FUSED, "mlp_types=sparse"),
        own_head_dim=True,
        sizes={"e": "moe_num_experts", "S": "moe_intermediate_size*moe_num_shared_experts"},
        derive=_dense_then_experts("moe_layer_start_index", "sparse"),
        limits=_ernie4_5_moe,
        draft_head=("model.mtp_",),
    ),
    "Starcoder2ForCausalLM": ModelClass(
        "starcoder2",
        {
            "hidden_act": "gelu_pytorch_tanh",
            "norm_epsilon": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "intermediate_size": 12288,
            "max_position_embeddings": 4096,
            "num_key_value_heads": 2,
            "sliding_window": None,
            "use_bias": True,
        },
        {"hidden_act": _GELU, "use_bias": (True,)},
        _OUTSIDE + "model.norm.bias h\n",
        _NORMS
        + _ATTENTION
        + _QKV_BIAS
        + """
model.layers.{i}.input_layernorm.bias                    h
model.layers.{i}.post_attention_layernorm.bias           h
model.layers.{i}.self_attn.o_proj.bias                   h
model.layers.{i}.mlp.c_fc.weight                         f h
model.layers.{i}.mlp.c_fc.bias                           f
model.layers.{i}.mlp.c_proj.weight                       h f
model.layers.{i}.mlp.c_proj.bias                         h
""",
        window="all",
    ),
    "SeedOssForCausalLM": ModelClass(
        "seed_oss",
        {
            **_USUAL,
            "intermediate_size": 27648,
            "max_position_embeddings": 524288,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
            "attention_out_bias": False,
            "mlp_bias": False,
        },
        {"hidden_act": _SILU, "attention_out_bias": (False,), "mlp_bias": (False,)},
        _OUTSIDE,
        _NORMS + _ATTENTION + _where(_QKV_BIAS, "attention_bias=true") + _GATED,
        own_head_dim=True,
    ),
    "NemotronForCausalLM": ModelClass(
        "nemotron",
        {
            "hidden_act": "relu2",
            "norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "tie_word_embeddings": False,
            "intermediate_size": 24576,
            "max_position_embeddings": 4096,
            "num_key_value_heads": None,
            "head_dim": None,
            "attention_bias": False,
            "mlp_bias": False,
        },
        {"hidden_act": ("relu2",), "attention_bias": (False,), "mlp_bias": (False,)},
        _OUTSIDE + "model.norm.bias h\n",
        _NORMS
        + _ATTENTION
        + """
model.layers.{i}.input_layernorm.bias                    h
model.layers.{i}.post_attention_layernorm.bias           h
model.layers.{i}.mlp.up_proj.weight                      f h
model.layers.{i}.mlp.down_proj.weight                    h f
""",
        output_needed=True,
        partial=True,
    ),
    "Qwen3NextForCausalLM": ModelClass(
        "qwen3_next",
        {
            **_USUAL,
            "partial_rotary_factor": 0.25,
            "intermediate_size": 5632,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "attention_bias": False,
            "layer_types": None,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_experts_per_tok": 10,
            "num_experts": 512,
            "norm_topk_prob": True,
        },
        {
            "hidden_act": _SILU,
            "attention_bias": (False,),
            "norm_topk_prob": (True,),
            "decoder_sparse_step": (1,),
            "mlp_only_layers": (None, []),
        },
        _OUTSIDE,
        _NORMS
        + _where(_ATTENTION.replace("q_proj.weight                 q", "q_proj.weight                 2q"), _FULL)
        + _where(_HEAD_NORMS, _FULL)
        + _where(
            """
model.layers.{i}.linear_attn.dt_bias                     V
model.layers.{i}.linear_attn.A_log                       V
model.layers.{i}.linear_attn.conv1d.weight               2Q+W 1 C
model.layers.{i}.linear_attn.in_proj_qkvz.weight         2Q+2W h
model.layers.{i}.linear_attn.in_proj_ba.weight           2V h
model.layers.{i}.linear_attn.norm.weight                 D
model.layers.{i}.linear_attn.out_proj.weight             h W
""",
            "layer_types=linear_attention",
        )
        + _EXPERTS
        + _SHARED_EXPERT,
        fused=_FUSED,
        own_head_dim=True,
        partial=True,
        sizes={
            "V": "linear_num_value_heads",
            "D": "linear_value_head_dim",
            "W": "linear_num_value_heads*linear_value_head_dim",
            "Q": "linear_num_key_heads*linear_key_head_dim",
            "C": "linear_conv_kernel_dim",
        },
        names={"num_experts": ("num_experts", "num_local_experts")},
        derive=_qwen3_next,
        draft_head=("mtp.", "model.mtp."),
    ),
    "FalconH1ForCausalLM": ModelClass(
        "falcon_h1",
        {
            **_USUAL,
            "rms_norm_eps": 1e-5,
            "rope_theta": None,  # 10,000 or 100,000, depending on the release
            "intermediate_size": 14336,
            "max_position_embeddings": 8192,
            "num_key_value_heads": 8,
            "head_dim": None,
            "attention_bias": False,
            "mlp_bias": False,
            "projectors_bias": False,
            "mamba_d_ssm": 1024,
            "mamba_n_heads": 128,
            "mamba_d_head": None,
            "mamba_n_groups": 1,
            "mamba_d_state": 256,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_conv_bias": True,
            "mamba_proj_bias": False,
            "mamba_norm_before_gate": True,
            "mamba_rms_norm": False,
            "lm_head_multiplier": 1.0,
            "embedding_multiplier": 1.0,
            "mlp_multipliers": None,
            "attention_out_multiplier": None,
            "attention_in_multiplier": None,
            "key_multiplier": None,
            "ssm_multipliers": None,
            "ssm_in_multiplier": None,
            "ssm_out_multiplier": None,
        },
        {
            "hidden_act": _SILU,
            **dict.fromkeys(("attention_bias", "mlp_bias", "projectors_bias", "mamba_proj_bias"), (False,)),
            "mamba_norm_before_gate": (False,),
            "mamba_conv_bias": (True,),
            "time_step_limit": (None, [0.0, math.inf], [0.0, {"__float__": "Infinity"}]),  # as release 5 writes it
        },
        """
model.embed_tokens.weight                                v h
model.final_layernorm.weight                             h
lm_head.weight                                           v h
""",
        _ATTENTION
        + _GATED.replace(".mlp.", ".feed_forward.")
        + """
model.layers.{i}.input_layernorm.weight                  h
model.layers.{i}.pre_ff_layernorm.weight                 h
model.layers.{i}.mamba.dt_bias                           M
model.layers.{i}.mamba.A_log                             M
model.layers.{i}.mamba.D                                 M
model.layers.{i}.mamba.conv1d.weight                     I+2G 1 C
model.layers.{i}.mamba.conv1d.bias                       I+2G
model.layers.{i}.mamba.in_proj.weight                    2I+2G+M h
model.layers.{i}.mamba.norm.weight                       I  mamba_rms_norm=true
model.layers.{i}.mamba.out_proj.weight                   h I
""",
        own_head_dim=True,
        sizes={
            "M": "mamba_n_heads",
            "I": "mamba_d_ssm",
            "G": "mamba_n_groups*mamba_d_state",
            "C": "mamba_d_conv",
        },
        derive=_falcon_h1,
    ),
    "Lfm2ForCausalLM": ModelClass(
        "lfm2",
        {
            "norm_eps": 1e-5,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "intermediate_size": 12288,
            "max_position_embeddings": 128000,
            "num_key_value_heads": 8,
            "conv_bias": False,
            "conv_L_cache": 3,
            "block_multiple_of": 256,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": True,
            "full_attn_idxs": None,
            "layer_types": None,
        },
        {"conv_bias": (False,)},
        """
model.embed_tokens.weight                                v h
model.embedding_norm.weight                              h
lm_head.weight                                           v h
""",
        """
model.layers.{i}.operator_norm.weight                    h
model.layers.{i}.ffn_norm.weight                         h
model.layers.{i}.feed_forward.w1.weight                  f h
model.layers.{i}.feed_forward.w2.weight                  h f
model.layers.{i}.feed_forward.w3.weight                  f h
"""
        + _where(
            """
model.layers.{i}.self_attn.q_proj.weight                 q h
model.layers.{i}.self_attn.k_proj.weight                 k h
model.layers.{i}.self_attn.v_proj.weight                 k h
model.layers.{i}.self_attn.out_proj.weight               h q
model.layers.{i}.self_attn.q_layernorm.weight            d
model.layers.{i}.self_attn.k_layernorm.weight            d
""",
            _FULL,
        )
        + _where(
            """
model.layers.{i}.conv.conv.weight                        h 1 C
model.layers.{i}.conv.in_proj.weight                     3h h
model.layers.{i}.conv.out_proj.weight                    h h
""",
            "layer_types=conv",
        ),
        names={
            "rope_theta": ("rope_theta", "theta"),
            "intermediate_size": ("intermediate_size", "block_ff_dim"),
            "tie_word_embeddings": ("tie_word_embeddings", "tie_embedding"),
        },
        sizes={"C": "conv_L_cache"},
        derive=_lfm2,
    ),
}
