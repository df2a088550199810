"""A LLaMA model of a given shape with random q8_0 weights and no vocabulary: as fast as a trained one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

N_VOCAB = 4096


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Those of a model, whose layers have the same numbers; like Llama 3.2 1B, but for heads and vocabulary.

    Experts have a quarter of the width of the feed-forward, and two of them are used.
    """

    width: int = 2048
    feed_forward: int = 8192
    n_head: int = 32
    n_head_kv: int = 8
    head: int = 128
    n_layer: int = 4
    n_expert: int = 0

    @property
    def hidden(self) -> int:
        """Width of the feed-forward, or of each expert."""
        return self.feed_forward // 4 if self.n_expert else self.feed_forward


def random_model(path: Path, **sizes: int) -> Path:
    """Write the model of these `Sizes`."""
    from clex_convert.llama_cpp_scripts import conversion_scripts

    wanted = Sizes(**sizes)
    with conversion_scripts() as (_, gguf):
        writer = gguf.GGUFWriter(path, "llama")
        _add_keys(writer, wanted)
        for name, data in _tensors(gguf, wanted).items():
            raw = gguf.GGMLQuantizationType.Q8_0 if data.dtype == np.uint8 else None
            writer.add_tensor(name, data, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def _add_keys(writer: Any, sizes: Sizes) -> None:
    writer.add_block_count(sizes.n_layer)
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(sizes.width)
    writer.add_feed_forward_length(sizes.hidden)
    writer.add_head_count(sizes.n_head)
    writer.add_head_count_kv(sizes.n_head_kv)
    writer.add_key_length(sizes.head)
    writer.add_value_length(sizes.head)
    writer.add_rope_dimension_count(sizes.head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("none")
    if sizes.n_expert:
        writer.add_expert_count(sizes.n_expert)
        writer.add_expert_used_count(2)


def _tensors(gguf: Any, sizes: Sizes) -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(0)
    width, queries, keys = sizes.width, sizes.n_head * sizes.head, sizes.n_head_kv * sizes.head

    def matrix(*shape: int) -> npt.NDArray[np.uint8]:
        values = rng.standard_normal(shape, np.float32) / np.sqrt(shape[-1], dtype=np.float32)
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)

    layer: dict[str, npt.NDArray[Any]] = {
        "attn_norm": np.ones(width, np.float32),
        "attn_q": matrix(queries, width),
        "attn_k": matrix(keys, width),
        "attn_v": matrix(keys, width),
        "attn_output": matrix(width, queries),
        "ffn_norm": np.ones(width, np.float32),
    }
    experts, suffix = ((sizes.n_expert,), "_exps") if sizes.n_expert else ((), "")
    if sizes.n_expert:
        layer["ffn_gate_inp"] = rng.standard_normal((sizes.n_expert, width), np.float32)
    layer[f"ffn_gate{suffix}"] = matrix(*experts, sizes.hidden, width)
    layer[f"ffn_up{suffix}"] = matrix(*experts, sizes.hidden, width)
    layer[f"ffn_down{suffix}"] = matrix(*experts, width, sizes.hidden)
    outside = {"token_embd.weight": matrix(N_VOCAB, width), "output_norm.weight": np.ones(width, np.float32)}
    return outside | {f"blk.{i}.{name}.weight": data for i in range(sizes.n_layer) for name, data in layer.items()}
