"""A LLaMA model of a given shape with random q8_0 weights and no vocabulary: as fast as a trained one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

N_VOCAB = 4096


def random_model(
    path: Path,
    *,
    width: int = 2048,
    feed_forward: int = 8192,
    n_head: int = 32,
    n_head_kv: int = 8,
    head: int = 128,
    n_layer: int = 4,
    n_expert: int = 0,
) -> Path:
    """Write the model; its layers have the same numbers.

    Without sizes it is like Llama 3.2 1B, but for heads and vocabulary. Experts have a quarter of the
    width of the feed-forward, and two of them are used.
    """
    from clex_convert.llama_cpp_scripts import conversion_scripts

    rng = np.random.default_rng(0)
    with conversion_scripts() as (_, gguf):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(n_layer)
        writer.add_context_length(1 << 20)
        writer.add_embedding_length(width)
        writer.add_feed_forward_length(feed_forward // 4 if n_expert else feed_forward)
        writer.add_head_count(n_head)
        writer.add_head_count_kv(n_head_kv)
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_rope_dimension_count(head)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(500000.0)
        writer.add_vocab_size(N_VOCAB)
        writer.add_tokenizer_model("none")

        if n_expert:
            writer.add_expert_count(n_expert)
            writer.add_expert_used_count(2)

        def matrix(*shape: int) -> np.ndarray:
            values = rng.standard_normal(shape, np.float32) / np.sqrt(shape[-1], dtype=np.float32)
            return gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)

        def add(name: str, data: np.ndarray) -> None:
            raw = gguf.GGMLQuantizationType.Q8_0 if data.dtype == np.uint8 else None
            writer.add_tensor(name, data, raw_dtype=raw)

        layer = {
            "attn_norm": np.ones(width, np.float32),
            "attn_q": matrix(n_head * head, width),
            "attn_k": matrix(n_head_kv * head, width),
            "attn_v": matrix(n_head_kv * head, width),
            "attn_output": matrix(width, n_head * head),
            "ffn_norm": np.ones(width, np.float32),
        }
        if n_expert:
            size = feed_forward // 4
            layer["ffn_gate_inp"] = rng.standard_normal((n_expert, width), np.float32)
            layer["ffn_gate_exps"] = matrix(n_expert, size, width)
            layer["ffn_up_exps"] = matrix(n_expert, size, width)
            layer["ffn_down_exps"] = matrix(n_expert, width, size)
        else:
            layer["ffn_gate"] = matrix(feed_forward, width)
            layer["ffn_up"] = matrix(feed_forward, width)
            layer["ffn_down"] = matrix(width, feed_forward)
        add("token_embd.weight", matrix(N_VOCAB, width))
        add("output_norm.weight", np.ones(width, np.float32))
        for i in range(n_layer):
            for name, data in layer.items():
                add(f"blk.{i}.{name}.weight", data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path
