"""Models in training as folders: written completely or not at all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from clex_convert.errors import disk_full, writing
from clex_convert.transformers_folder import name_rope_as_before_5
from clex_train.layer import ClexLayer


@contextlib.contextmanager
def writing_folder(folder: Path) -> Iterator[None]:
    """Words the refusal of the system, or of the library that writes there, to write in a folder."""
    try:
        with writing(folder):
            yield
    except (SafetensorError, RuntimeError) as error:
        # They tell of a full disk in words alone; torch's do not even say that.
        if any(word in str(error) for word in ("os error 27", "os error 28", "unexpected pos", "PytorchStreamWriter")):
            raise disk_full(folder) from None
        raise


def save_model(
    model: PreTrainedModel | peft.PeftModel,
    layer: ClexLayer | None,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    state: Any,
    *,
    bf16: bool = False,
) -> None:
    """Saves a model, or an adapter with its CLEX layer, and the tokenizer in a folder that both transformers read.

    Args:
        model: that of transformers, or peft's around it.
        layer: its CLEX layer, if it has one.
        tokenizer: the model's.
        output: the folder, which is not there yet.
        state: the model's weights gathered from all processes; None takes the model's own.
        bf16: whether an adapter is saved in bfloat16, see `save_adapter_in_bfloat16`; whole models have their own type.

    Raises:
        ConvertError: it cannot be written.
    """
    temporary = output.parent / f".{output.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of a training that was killed
    try:
        with writing_folder(output):
            model.save_pretrained(str(temporary), state_dict=state)
            tokenizer.save_pretrained(temporary)
            config = temporary / "config.json"
            if isinstance(model, peft.PeftModel):
                (temporary / "README.md").unlink(missing_ok=True)  # peft's form of a model card, with nothing filled in
                model.base_model.model.config.save_pretrained(temporary)  # pyright: ignore
                if bf16:
                    save_adapter_in_bfloat16(temporary)
                if layer is not None:
                    prefix = f"base_model.model.{model.base_model.model.base_model_prefix}.clex_layer."  # pyright: ignore
                    own = {prefix + name: tensor for name, tensor in layer.state_dict().items()}
                    # in a group of processes each may hold a part alone
                    gathered = own if state is None else {name: state[name] for name in own}
                    _add_layer(temporary / "adapter_model.safetensors", gathered)
            name_rope_as_before_5(config)
            temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_adapter_in_bfloat16(folder: Path) -> None:
    """Rewrites an adapter's matrices in bfloat16, half the size; those of a CLEX layer stay as they are.

    Where a training computed in bfloat16, these are the values that it multiplied by: nothing is lost.
    """
    path = folder / "adapter_model.safetensors"
    save_file(in_bfloat16(load_file(path)), path, metadata={"format": "pt"})


def in_bfloat16(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights in bfloat16, those of a CLEX layer as they are."""
    return {
        name: tensor if "clex_layer" in name.split(".") else tensor.to(torch.bfloat16)
        for name, tensor in tensors.items()
    }


def _add_layer(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    tensors = load_file(path)
    tensors |= {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, path, metadata={"format": "pt"})
