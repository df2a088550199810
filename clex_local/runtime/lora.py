"""Adapters (LoRA) as GGUF files, which llama.cpp applies while it computes."""

from __future__ import annotations

from clex_local.errors import ModelError
from clex_local.model_file.gguf_file import GGUFFile

# llama.cpp asks for these keys without looking at their types, and aborts where they are others.
_KINDS = {"general.type": "string", "general.architecture": "string", "adapter.type": "string"}
_ALPHA = "adapter.lora.alpha"


def check_adapter(path: str) -> str:
    """The path, if there is an adapter.

    Raises:
        ModelError: the file is missing, is no GGUF, is truncated, or is no adapter.
    """
    with GGUFFile(path) as file:
        for key, kind in _KINDS.items():
            if file.kind(key) != kind:
                raise ModelError(f"{path}: not a LoRA adapter (the key {key} is missing, or no {kind})")
        if file.kind(_ALPHA) not in (None, "f32"):
            raise ModelError(f"{path}: damaged LoRA adapter (the key {_ALPHA} is no f32); convert it again")
        if (file.get("general.type"), file.get("adapter.type")) != ("adapter", "lora"):
            raise ModelError(f"{path}: not a LoRA adapter; it is given as lora_path, a model as model_path")
    return path
