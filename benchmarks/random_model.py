"""A LLaMA model of a given shape with random q8_0 weights and no vocabulary: as fast as a trained one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

N_VOCAB, WIDTH, FEED_FORWARD = 4096, 2048, 8192  # beside the vocabulary, those of Llama 3.2 1B


def random_model(
    path: Path, *, n_head: int = 32, n_head_kv: int = 8, head: int = 128, n_layer: int = 4, n_expert: int = 0
) -> Path:
    """Write the model; its layers have the same numbers.

    Experts have a quarter of the width of the feed-forward, and two of them are used.
    """
    from clex_convert.llama_cpp_scripts import conversion_scripts

    rng = np.random.default_rng(0)
    with conversion_scripts() as (_, gguf):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(n_layer)
        writer.add_context_length(1 << 20)
        writer.add_embedding_length(WIDTH)
        writer.add_feed_forward_length(FEED_FORWARD)
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
            "attn_norm": np.ones(WIDTH, np.float32),
            "attn_q": matrix(n_head * head, WIDTH),
            "attn_k": matrix(n_head_kv * head, WIDTH),
            "attn_v": matrix(n_head_kv * head, WIDTH),
            "attn_output": matrix(WIDTH, n_head * head),
            "ffn_norm": np.ones(WIDTH, np.float32),
        }
        if n_expert:
            size = FEED_FORWARD // 4
            layer["ffn_gate_inp"] = rng.standard_normal((n_expert, WIDTH), np.float32)
            layer["ffn_gate_exps"] = matrix(n_expert, size, WIDTH)
            layer["ffn_up_exps"] = matrix(n_expert, size, WIDTH)
            layer["ffn_down_exps"] = matrix(n_expert, WIDTH, size)
        else:
            layer["ffn_gate"] = matrix(FEED_FORWARD, WIDTH)
            layer["ffn_up"] = matrix(FEED_FORWARD, WIDTH)
            layer["ffn_down"] = matrix(WIDTH, FEED_FORWARD)
        add("token_embd.weight", matrix(N_VOCAB, WIDTH))
        add("output_norm.weight", np.ones(WIDTH, np.float32))
        for i in range(n_layer):
            for name, data in layer.items():
                add(f"blk.{i}.{name}.weight", data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path
