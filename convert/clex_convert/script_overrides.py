"""What this project changes in the classes by which llama.cpp's conversion scripts read a model.

The scripts have a class for each architecture. `overridden` derives one from it that leaves the CLEX layer out, merges
an adapter, writes the tables, and mends what the scripts get wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from clex_convert.checkpoint import CLEX_LAYER, Checkpoint
from clex_convert.errors import ConvertError
from clex_convert.model_files import read_tensor
from clex_convert.rope_metadata import RopeMetadata
from clex_convert.script_errors import reading
from clex_convert.tensor_chunks import chunks_of

if TYPE_CHECKING:
    _ScriptClass: Any = object  # super() is the scripts' class of an architecture
else:
    _ScriptClass = object

Loader = Callable[[], Any]
NamedTensor = tuple[str, Any]


@dataclass(frozen=True)
class _Inputs:
    """What the overrides go by.

    Attributes:
        conversion, gguf: the scripts' packages.
        checkpoint: what is converted.
        metadata: what the file says of the rotary embedding.
        pre_tokenizer: name of a byte-level BPE pre-tokenizer that the scripts do not recognise.
        loaders: what gives each tensor of the checkpoint, by its name there; filled as they are found.
    """

    conversion: ModuleType
    gguf: ModuleType
    checkpoint: Checkpoint
    metadata: RopeMetadata
    pre_tokenizer: str | None
    loaders: dict[str, Loader] = field(default_factory=dict)


class _Overrides(_ScriptClass):
    inputs: _Inputs


class _Tensors(_Overrides):
    """Which tensors there are, and what they hold."""

    no_mtp = True  # heads that guess tokens ahead are left out

    def index_tensors(self, remote_hf_model_id: str | None = None) -> dict[str, Any]:
        # The scripts would take every file of the folder whose name begins like that of one.
        found = (self.filter_tensors(item) for part in self.inputs.checkpoint.parts for item in self._loaders_of(part))
        tensors = dict(item for item in found if item is not None)
        if self.inputs.checkpoint.needs_output:
            assert self.inputs.checkpoint.tied is not None
            embedding, output = self.inputs.checkpoint.tied
            self.inputs.loaders[output] = self.inputs.loaders[embedding]
            tensors[output] = self._merged(output)
        return tensors

    @classmethod
    def _loaders_of(cls, part: Path) -> Iterator[tuple[str, Loader]]:
        lazy = cls.inputs.conversion.base.LazyTorchTensor
        if part.suffix != ".bin":
            with cls.inputs.gguf.utility.SafetensorsLocal(part) as found:
                for name in found.keys():  # noqa: SIM118
                    yield name, lambda data=found[name]: lazy.from_local_tensor(data)
            return
        import torch

        # One tensor at a time: a whole file stays mapped, and with it in memory what was read of it.
        for name, meta in torch.load(part, map_location="meta", mmap=True, weights_only=True).items():
            yield name, lambda name=name, meta=meta: lazy(meta=meta, args=(part, name), func=read_tensor)

    @classmethod
    def _merged(cls, name: str) -> Loader:
        """What gives a tensor with what the adapter changes in it."""
        loader, merge = cls.inputs.loaders[name], cls.inputs.checkpoint.merges.get(name)
        if merge is None:
            return loader
        lazy = cls.inputs.conversion.base.LazyTorchTensor
        meta = lazy.meta_with_dtype_and_shape(lazy._dtype_str_map["F32"], merge.shape)
        return lambda: lazy(meta=meta, args=(loader(),), func=merge.apply)

    @classmethod
    def filter_tensors(cls, item: NamedTensor) -> NamedTensor | None:
        name, cls.inputs.loaders[item[0]] = item
        tied = cls.inputs.checkpoint.tied
        # transformers does not look at the output matrix of a model whose config ties it to the embedding
        if (
            CLEX_LAYER in name
            or (tied is not None and name == tied[1])
            or cls.inputs.checkpoint.model.is_left_out(name)
        ):
            return None
        return super().filter_tensors((name, cls._merged(name)))

    # The scripts return StableLM's stacked norms of heads out of a generator, where they are lost.
    def _stack_qk_norm(self, *arguments: Any) -> Iterator[NamedTensor]:
        self._stacked += super()._stack_qk_norm(*arguments)
        return iter(())

    # They would make a classifier, without the output matrix, of what is named as one.
    def _is_qwen3_reranker(self) -> bool:
        return False

    def modify_tensors(self, data_torch: Any, name: str, bid: int | None) -> Iterator[NamedTensor]:
        self._stacked: list[NamedTensor] = []
        for new_name, tensor in itertools.chain(super().modify_tensors(data_torch, name, bid), self._stacked):
            if isinstance(tensor, self.inputs.gguf.LazyBase) and len(tensor.shape) > 1:
                tensor = self.inputs.gguf.LazyChunkedTensor(chunks_of(tensor), tensor.shape, np.float32)
            yield new_name, tensor

    def generate_extra_tensors(self) -> Iterator[NamedTensor]:
        import torch

        yield from (item for item in super().generate_extra_tensors() if not self.inputs.metadata.replaces(item[0]))
        yield from ((name, torch.tensor(values)) for name, values in self.inputs.metadata.tensors.items())


class _Vocabulary(_Overrides):
    """The vocabulary and the chat templates."""

    # Where a pre-tokenizer is named the vocabulary is a byte-level BPE, whatever its files make of it: the scripts try
    # the other kinds first and would take a folder that transformers saved from a GGUF for one.
    def _set_vocab_sentencepiece(self, add_to_gguf: bool = True) -> None:
        self._refuse_other_kinds()
        super()._set_vocab_sentencepiece(add_to_gguf)

    def _set_vocab_llama_hf(self) -> None:
        self._refuse_other_kinds()
        super()._set_vocab_llama_hf()

    def _refuse_other_kinds(self) -> None:
        if self.inputs.pre_tokenizer is not None:
            raise FileNotFoundError("the vocabulary is a byte-level BPE")  # what the scripts go on from

    def get_vocab_base_pre(self, tokenizer: Any) -> str:
        if self.inputs.pre_tokenizer is not None:
            return self.inputs.pre_tokenizer
        try:
            return super().get_vocab_base_pre(tokenizer)
        except NotImplementedError:
            raise ConvertError(
                f"{self.inputs.checkpoint.path}: llama.cpp does not recognise the model's BPE pre-tokenizer; "
                "pass its name with `pre_tokenizer` (such as llama-bpe, gpt-2 or qwen2)"
            ) from None

    def set_vocab(self) -> None:
        _check_tokenizer(self.inputs.checkpoint.path)
        with reading(self.inputs.checkpoint, "the tokenizer", self.dir_model):
            super().set_vocab()
        writer, keys = self.gguf_writer, self.inputs.gguf.Keys.Tokenizer
        templates = _chat_templates(self.dir_model)
        if templates is not None:
            for key in [key for key in writer.kv_data[0] if key.startswith("tokenizer.chat_template")]:
                writer.remove_key(key)
            writer.add_chat_template(templates)
        names = writer.kv_data[0].get(keys.CHAT_TEMPLATES)
        if names is not None:
            names.value.sort()  # out of a set, in another order each time


class _Keys(_Overrides):
    """The numbers of the model, and the tables."""

    def set_gguf_parameters(self) -> None:
        super().set_gguf_parameters()
        for key, value in itertools.chain(self._corrected().items(), self.inputs.metadata.keys.items()):
            self.gguf_writer.remove_key(key)
            _add_key(self.gguf_writer, key, value)

    def _corrected(self) -> dict[str, Any]:
        """Keys that the scripts leave out for some architectures, or write with a fixed value for others."""
        keys, model = self.inputs.gguf.Keys, self.inputs.checkpoint.model
        values, rope, architecture = model.values, self.inputs.checkpoint.rope, self.gguf_writer.arch
        width = values.get("ffn_hidden_size", values.get("intermediate_size"))
        corrected = {
            keys.LLM.CONTEXT_LENGTH: np.uint32(self.inputs.metadata.context_length),
            keys.LLM.FEED_FORWARD_LENGTH: np.uint32(width),
            keys.Rope.FREQ_BASE: np.float32(rope.base),
        }
        # The scripts multiply and round in another order than transformers.
        if keys.Rope.DIMENSION_COUNT.format(arch=architecture) in self.gguf_writer.kv_data[0]:
            corrected[keys.Rope.DIMENSION_COUNT] = np.uint32(rope.dim)
        heads = self.gguf_writer.kv_data[0].get(keys.Attention.HEAD_COUNT_KV.format(arch=architecture))
        of_layers = heads is not None and isinstance(heads.value, list)
        if "num_key_value_heads" in model.model_class.defaults and not of_layers:
            corrected[keys.Attention.HEAD_COUNT_KV] = np.uint32(values["num_key_value_heads"])
        corrected |= {f"{{arch}}.{key}": value for key, value in model.window_keys().items()}
        return {key.format(arch=architecture): value for key, value in corrected.items()}


def overridden(
    conversion: ModuleType, gguf: ModuleType, checkpoint: Checkpoint, metadata: RopeMetadata, pre_tokenizer: str | None
) -> Any:
    """The scripts' class for the checkpoint's architecture, with these overrides.

    Args:
        conversion: the scripts.
        gguf: their package gguf.
        checkpoint: what is converted.
        metadata: what the file says of the rotary embedding.
        pre_tokenizer: name of a byte-level BPE pre-tokenizer that the scripts do not recognise.
    """
    base = conversion.get_model_class(checkpoint.architecture)
    inputs = _Inputs(conversion, gguf, checkpoint, metadata, pre_tokenizer)
    # Where some classes begin to look for the tensors of a head that guesses tokens ahead.
    layers = dict.fromkeys(("_n_main_layers", "_original_block_count"), checkpoint.model.values["num_hidden_layers"])
    facts = {"model_arch": base.model_arch, "inputs": inputs, **layers}
    return type("ClexModel", (_Tensors, _Vocabulary, _Keys, base), facts)


def _chat_templates(folder: Path) -> str | list[dict[str, str]] | None:
    """The templates that lie in files of their own, which for transformers win over the one in a tokenizer's config."""
    files = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    default = folder / "chat_template.jinja"
    if default.is_file():
        if not files:
            return default.read_text(encoding="utf-8")
        files = {"default": default, **files}
    return [{"name": name, "template": path.read_text(encoding="utf-8")} for name, path in files.items()] or None


def _add_key(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif value.ndim:
        writer.add_array(key, value.tolist())  # float arrays are float32 in GGUF
    elif value.dtype == np.bool_:
        writer.add_bool(key, bool(value))
    elif value.dtype == np.float32:
        writer.add_float32(key, float(value))
    else:
        writer.add_uint32(key, int(value))


def _check_tokenizer(folder: Path) -> None:
    # transformers makes a tokenizer without a vocabulary, since release 5, where it finds none.
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
    if not any((folder / name).is_file() for name in names) and not any(folder.glob("*.tiktoken")):
        raise ConvertError(
            f"{folder}: holds no tokenizer (tokenizer.json or tokenizer.model); copy the one that the model was "
            "trained with into the folder"
        )
