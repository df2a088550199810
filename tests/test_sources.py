"""Model folders as they come: types and layouts of weights, tied embeddings, tokenizers, chat templates."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import clex_convert
from clex_local.model_file.gguf_file import GGUFFile
from helpers.tiny_models import assert_growing, make_model
from test_architectures import MODELS, tolerance

pytestmark = [pytest.mark.convert, pytest.mark.folders]

LLAMA = Path(__file__).parent / "data" / "llama"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden LLaMA."""
    return Path(shutil.copytree(LLAMA, tmp_path / "llama"))


def converted(folder: Path, **options: Any) -> Path:
    return clex_convert.convert(folder, folder.parent / "out.gguf", outtype="f32", overwrite=True, **options).path


def tensors(path: Path) -> dict[str, bytes]:
    with GGUFFile(path) as file:
        data = path.read_bytes()[file.data_offset :]
        return {info.name: data[info.offset : info.offset + info.size] for info in file.tensors}


class Hostile:
    """What runs a command where its pickle is trusted."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("place", ["base", "adapter"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_runs_nothing(folder: Path, place: str, zipped: bool) -> None:
    ran, path = folder.parent / "ran", folder / "pytorch_model.bin"
    options: dict[str, Any] = {}
    if place == "base":
        (folder / "model.safetensors").unlink()
    else:
        path = folder / "adapter_model.bin"
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
        options = {"lora": folder}
    torch.save({"x": Hostile(f"touch {ran}")}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(clex_convert.ConvertError, match="not plain weights" if zipped else "torch before 1.6") as error:
        converted(folder, **options)
    assert len(str(error.value).splitlines()) == 1
    assert not ran.exists()
    torch.load(path, weights_only=False)
    assert ran.exists()


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_types_may_be_mixed(folder: Path, layout: str) -> None:
    types = [torch.float32, torch.bfloat16, torch.float16]
    mixed = {
        name: tensor if "clex" in name else tensor.to(types[number % 3])
        for number, (name, tensor) in enumerate(load_file(folder / "model.safetensors").items())
    }
    save_file({name: tensor.float() for name, tensor in mixed.items()}, folder / "model.safetensors")
    wanted = tensors(converted(folder))
    if layout == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(mixed, folder / "pytorch_model.bin")
    else:
        save_file(mixed, folder / "model.safetensors")
    assert tensors(converted(folder)) == wanted


@pytest.mark.parametrize("name", ["Llama", "Phi", "GPTNeoX", "Qwen2Moe", "StableLm", "Olmo2", "Falcon"])
def test_tied_embeddings_are_the_output(golden_dir, golden_npz, tmp_path: Path, name: str) -> None:
    changes, tokenizer = MODELS[name]
    model = make_model(name, {**changes, "tie_word_embeddings": True}, tmp_path / "model", golden_dir(tokenizer))
    pre_tokenizer = "gpt-2" if tokenizer == "phi2" else None
    path = converted(tmp_path / "model", method="ntk", max_factor=2, pre_tokenizer=pre_tokenizer)
    with GGUFFile(path) as file:
        written = "output.weight" in {info.name for info in file.tensors}
    assert written == (name not in ("Llama", "Falcon"))  # which llama.cpp takes the embedding for
    assert_growing(model, path, golden_npz("llama")["ids"], 62, 66, tolerance(name))


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_an_output_beside_the_embedding_that_it_is_tied_to(folder: Path, layout: str) -> None:
    """The same matrix twice is written once; of two different ones transformers 4 takes one, transformers 5 both."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    weights = load_file(folder / "model.safetensors")
    if layout == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(clex_convert.ConvertError, match=r"ties lm_head\.weight .* they differ: transformers 4"):
        converted(folder)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    if layout == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors")
    assert "output.weight" not in tensors(converted(folder))


# tokenizers


def test_a_sentencepiece_vocabulary_may_come_as_json(folder: Path) -> None:
    from transformers import LlamaTokenizerFast

    keys = ("tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.token_type")
    made = []
    for _ in range(2):
        with GGUFFile(converted(folder)) as file:
            made.append([np.array(file.get(key)).tolist() for key in keys])
        LlamaTokenizerFast.from_pretrained(folder).save_pretrained(folder)
        (folder / "tokenizer.model").unlink(missing_ok=True)
    assert (folder / "tokenizer.json").exists()
    assert made[0][:3] == made[1][:3]
    assert made[0][3][1:] == made[1][3][1:]  # llama.cpp has two types for <unk>


def templates(folder: Path) -> dict[str, Any]:
    with GGUFFile(converted(folder)) as file:
        return {
            key.removeprefix("tokenizer.chat_template"): file.get(key)
            for key in file.keys()  # noqa: SIM118
            if key.startswith("tokenizer.chat_template")
        }


def test_chat_templates_are_kept_wherever_they_are(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != "chat_template"}
    named = [{"name": "default", "template": "{{ old }}"}, {"name": "tool_use", "template": "{{ tools }}"}]
    path.write_text(json.dumps({**config, "chat_template": named}))
    assert templates(folder) == {"": "{{ old }}", ".tool_use": "{{ tools }}", "s": ["tool_use"]}
    # Files of their own win, as in transformers.
    (folder / "chat_template.jinja").write_text("{{ 'ü' }}", encoding="utf-8")
    assert templates(folder) == {"": "{{ 'ü' }}"}
    more = folder / "additional_chat_templates"
    more.mkdir()
    names = ["b", "a", "d", "c", "rag", "tool_use"]
    for name in names:
        (more / f"{name}.jinja").write_text(f"{{{{ {name} }}}}")
    wanted = {f".{name}": f"{{{{ {name} }}}}" for name in names}
    assert templates(folder) == {"": "{{ 'ü' }}", **wanted, "s": sorted(names)}
