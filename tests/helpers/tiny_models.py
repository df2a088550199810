"""Tiny random models of transformers, their GGUF files, and sequences fed to both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers

from clex_convert.llama_cpp_scripts import conversion_scripts
from clex_local.model_file.tables import Tables, read_tables
from helpers.device_error import slack
from helpers.low_level import Context, Model
from helpers.rope_reference import Reference

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
    """A model of transformers with every tensor drawn, saved in a folder, and a tokenizer with it.

    The tokenizer is that of a golden model, or ``glm``: phi2's with three more tokens that llama.cpp's scripts want.
    """
    kind = kind_of(name)
    model_class = getattr(transformers, f"{kind}ForCausalLM", None)
    if model_class is None:  # one that sees images, too
        model_class = getattr(transformers, f"{kind}ForConditionalGeneration")
        parts = {"text_config": {**SIZES, **changes["text_config"]}, "vision_config": changes["vision_config"]}
        config = model_class.config_class(**{**SIZES, **changes, **parts}, attn_implementation="eager")
    else:
        config = model_class.config_class(**{**SIZES, **changes}, attn_implementation="eager")
    torch.manual_seed(0)
    model = model_class(config).eval().float()  # some would compute a part in bfloat16
    with torch.no_grad():
        for parameter in model.parameters():
            # a norm of 1 or a bias of 0 would not show if it were left out
            start = torch.zeros_like(parameter) if parameter.dim() > 1 else parameter.round()
            parameter.copy_(start + 0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    source = tokenizer.with_name("phi2") if tokenizer.name == "glm" else tokenizer
    for file in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        if (source / file).exists():
            shutil.copy(source / file, folder)
    if source != tokenizer:
        add_tokens(folder / "tokenizer.json", ["<|user|>", "[gMASK]", "<|observation|>"])
    return model


def add_tokens(tokenizer: Path, names: list[str]) -> None:
    """Tokens behind those of the vocabulary."""
    values = json.loads(tokenizer.read_text())
    first = values["added_tokens"][0]
    values["added_tokens"] += [{**first, "id": 512 + i, "content": name} for i, name in enumerate(names)]
    tokenizer.write_text(json.dumps(values))


def convert_plainly(folder: Path, architecture: str | None = None) -> Path:
    """The GGUF file that llama.cpp's own conversion makes of a model folder."""
    target = folder / "plain.gguf"
    with conversion_scripts() as (conversion, gguf):
        config = json.loads((folder / "config.json").read_text())
        base = conversion.get_model_class(architecture or config["architectures"][0])

        class Plain(base):
            model_arch = base.model_arch
            no_mtp = True

            def get_vocab_base_pre(self, tokenizer: object) -> str:
                return "gpt-2"  # no one has heard of ours

        Plain(folder, gguf.LlamaFileType.ALL_F32, target).write()
    return target


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
    np.testing.assert_allclose(logits, expected, atol=atol + slack(path), rtol=0)
    assert np.std(expected) > 0.5
