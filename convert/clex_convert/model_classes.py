"""The classes of transformers that can be converted: what each reads of a config, and what llama.cpp computes of it.

Data alone: `clex_convert.model_config` reads a config by it, `clex_convert.model_tensors` checks the weights. Of
transformers' releases 4.57 and 5.24, which agree where nothing else is said; written down here, a conversion means the
same whichever of them is installed. What is accepted was compared with the graphs in src/models/ of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# llama.cpp has one function for the kinds of GELU, whose values differ by less than its own table is exact.
_SILU = ("silu", "swish")
_GELU = (
    *("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python", "gelu_python_tanh"),
    "gelu_accurate",
)


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
        window: which layers attend through sliding_window: ``all``, ``switched`` (all if use_sliding_window),
            ``layers`` (those that layer_types or max_window_layers say, if use_sliding_window), or none.
        names: the names by which the class reads a key that others call otherwise, the first one said counts.
        unread: names that stand in configs of some age or origin, and the key whose value they must not contradict.
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


def _where(lines: str, condition: str) -> str:
    """The lines, for tensors that are there only if the config says so."""
    return "".join(f"{line}  {condition}\n" for line in lines.strip().splitlines())


_LLAMA_BIAS = """
model.layers.{i}.self_attn.q_proj.bias                   q  attention_bias=true
model.layers.{i}.self_attn.k_proj.bias                   k  attention_bias=true
model.layers.{i}.self_attn.v_proj.bias                   k  attention_bias=true
model.layers.{i}.self_attn.o_proj.bias                   h  attention_bias=true
model.layers.{i}.mlp.gate_proj.bias                      f  mlp_bias=true
model.layers.{i}.mlp.up_proj.bias                        f  mlp_bias=true
model.layers.{i}.mlp.down_proj.bias                      h  mlp_bias=true
"""

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
        _NORMS
        + _ATTENTION
        + _where(_QKV_BIAS, "qkv_bias=true")
        + _EXPERTS
        + """
model.layers.{i}.mlp.shared_expert.gate_proj.weight      s h
model.layers.{i}.mlp.shared_expert.up_proj.weight        s h
model.layers.{i}.mlp.shared_expert.down_proj.weight      h s
model.layers.{i}.mlp.shared_expert_gate.weight           1 h
""",
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
        _ATTENTION
        + _GATED
        + """
model.layers.{i}.self_attn.q_norm.weight                 q
model.layers.{i}.self_attn.k_norm.weight                 k
model.layers.{i}.post_attention_layernorm.weight         h
model.layers.{i}.post_feedforward_layernorm.weight       h
""",
        output_needed=True,
    ),
}
