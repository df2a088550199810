"""Tiny random models of transformers, their GGUF files, and sequences fed to both.

The reference caches keys before RoPE, as the authors' code does, and rotates all of them with the table of the whole
sequence.
"""

from __future__ import annotations

import json
import shutil
from math import log
from pathlib import Path

import numpy as np
import torch
import transformers

from clex_convert.llama_cpp_scripts import conversion_scripts
from clex_convert.transformers_folder import cache_argument
from clex_local.tables import Tables, read_tables
from helpers.low_level import Context, Model

LENGTH = 64  # tokens of the first bucket
SIZES = dict(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=LENGTH,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
    tie_word_embeddings=False,
)


def kind_of(name: str) -> str:
    return name.split()[0]


def make_model(name: str, changes: dict, folder: Path, tokenizer: Path) -> transformers.PreTrainedModel:
    """A model of transformers with every tensor drawn, saved in a folder, and a tokenizer with it."""
    kind = kind_of(name)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes}, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # a norm of 1 or a bias of 0 would not show if it were left out
            start = torch.zeros_like(parameter) if parameter.dim() > 1 else parameter.round()
            parameter.copy_(start + 0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    for file in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        if (tokenizer / file).exists():
            shutil.copy(tokenizer / file, folder)
    return model


def convert_plainly(folder: Path) -> Path:
    """The GGUF file that llama.cpp's own conversion makes of a model folder."""
    target = folder / "plain.gguf"
    with conversion_scripts() as (conversion, gguf):
        model_class = conversion.get_model_class(json.loads((folder / "config.json").read_text())["architectures"][0])
        model_class(folder, gguf.LlamaFileType.ALL_F32, target).write()
    return target


def rotated(x: torch.Tensor, inv_freq: torch.Tensor, first: int) -> torch.Tensor:
    """Keys [..., tokens, head_dim] at the positions from `first` on; what inv_freq does not cover stays."""
    n = inv_freq.numel()
    angles = torch.arange(first, first + x.shape[-2])[:, None] * inv_freq
    cos, sin = angles.cos(), angles.sin()
    a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


class UnrotatedCache(transformers.DynamicCache):
    """Keeps keys as they are before RoPE; all of them get the table, and the scale, of the present pass."""

    inv_freq: torch.Tensor
    scale: float

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        raw = rotated(key_states, -self.inv_freq, self.get_seq_length(layer_idx))
        keys, values = super().update(raw, value_states, layer_idx, *args, **kwargs)
        return self.scale * rotated(keys, self.inv_freq, 0), values


class Reference:
    """A sequence fed to a model of transformers, with the tables' choice of the table."""

    def __init__(self, model: transformers.PreTrainedModel, tables: Tables) -> None:
        self.model, self.tables, self.cache, self.length = model, tables, UnrotatedCache(), 0

    def feed(self, tokens: np.ndarray) -> np.ndarray:
        """The logits of the last token."""
        self.length += len(tokens)
        tables, bucket = self.tables, self.tables.bucket(self.length)
        self.cache.inv_freq = torch.tensor(tables.inv_freq[bucket])
        self.cache.scale = 1.0 if tables.attn_scale is None else float(tables.attn_scale[bucket])
        if tables.log_scale:
            self.cache.scale *= log(self.length) / log(tables.original_context_length)
        for module in self.model.modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq = self.cache.inv_freq
        with torch.no_grad():
            out = self.model(
                torch.tensor(tokens[None].astype(np.int64)), **{cache_argument(self.model): self.cache}, use_cache=True
            )
        return out.logits[0, -1].numpy()


def assert_growing(
    reference_model: transformers.PreTrainedModel,
    path: Path,
    ids: np.ndarray,
    prefill: int,
    to: int,
    atol: float,
    tables: Tables | None = None,
) -> None:
    """A prompt and single tokens after it, by both; the tables are the file's unless others are given."""
    reference, model = Reference(reference_model, tables or read_tables(path)), Model(path)
    ends = [prefill, *range(prefill + 1, to + 1)]
    with Context(model, n_ctx=256) as context:
        logits = [context.feed(ids[a:b], a) for a, b in zip([0, *ends], ends, strict=False)]
    model.close()
    expected = [reference.feed(ids[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    np.testing.assert_allclose(logits, expected, atol=atol, rtol=0)
    assert np.std(expected) > 0.5
