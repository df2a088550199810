"""Writes a checkpoint as GGUF with llama.cpp's own conversion scripts, and the tables with it.

The scripts and their gguf package come from the same source as the runtime's library. They lie in
``_llama_cpp`` beside this module, outside the import path, because other packages are named gguf too.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import clex_convert
from clex_convert import pieces
from clex_convert.checkpoint import CLEX_LAYER, Checkpoint
from clex_convert.contents import Contents
from clex_convert.errors import ConvertError, NotFiniteError, extra_packages, one_line, writing
from clex_convert.hub_client import offline
from clex_convert.model_files import read_tensor
from clex_convert.staging import staged

PRECISIONS = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}

_lock = threading.Lock()
_loaded: dict[str, ModuleType] = {}


def _ours(name: str) -> bool:
    return name.partition(".")[0] in ("conversion", "gguf")


def _scripts() -> Path:
    # An editable install has two folders in the package's path: the sources and what the build installed.
    for folder in clex_convert.__path__:
        scripts = Path(folder) / "_llama_cpp"
        if (scripts / "conversion").is_dir() and (scripts / "gguf").is_dir():
            return scripts
    raise ConvertError("llama.cpp's conversion scripts are not installed; install clex-local again")


@contextlib.contextmanager
def conversion_scripts() -> Iterator[tuple[ModuleType, ModuleType]]:
    """Lends llama.cpp's packages ``conversion`` and ``gguf``, and leaves others of that name as they were."""
    scripts = str(_scripts())
    with _lock:
        others = {name: sys.modules.pop(name) for name in list(sys.modules) if _ours(name)}
        variable = os.environ.get("NO_LOCAL_GGUF")
        sys.modules.update(_loaded)
        sys.path.insert(0, scripts)
        os.environ["NO_LOCAL_GGUF"] = "1"  # else they look for the gguf package in llama.cpp's source tree
        try:
            with extra_packages():
                modules = importlib.import_module("conversion"), importlib.import_module("gguf")
            yield modules
        finally:
            _loaded.update({name: sys.modules.pop(name) for name in list(sys.modules) if _ours(name)})
            sys.modules.update(others)
            sys.path.remove(scripts)
            if variable is None:
                del os.environ["NO_LOCAL_GGUF"]
            else:
                os.environ["NO_LOCAL_GGUF"] = variable


@contextlib.contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Keeps the scripts' and transformers' messages off the terminal, unless they are wanted."""
    import transformers

    loggers = [logging.getLogger(name) for name in ("hf-to-gguf", "gguf", "transformers")]
    before = [logger.level for logger in loggers]
    shown = transformers.logging.get_verbosity()
    for logger in loggers:
        logger.setLevel(logging.INFO if verbose else logging.CRITICAL)
    if not verbose:
        transformers.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
        transformers.logging.set_verbosity(shown)


class _Hole:
    """A tensor for the writer that leaves its place empty, to be filled later."""

    def __init__(self, tensor: Any) -> None:
        self.tensor, self.nbytes, self.offset = tensor, tensor.nbytes, 0

    def tofile(self, file: Any) -> None:
        self.offset = file.tell()
        file.seek(self.nbytes, os.SEEK_CUR)


def _model_class(
    conversion: ModuleType, gguf: ModuleType, checkpoint: Checkpoint, contents: Contents, pre_tokenizer: str | None
) -> Any:
    """The scripts' class for an architecture: less the CLEX layer, with what an adapter changes and the contents."""
    keys = gguf.Keys
    base = conversion.get_model_class(checkpoint.architecture)
    loaders: dict[str, Callable[[], Any]] = {}

    def merged(name: str) -> Callable[[], Any]:
        merge = checkpoint.merges.get(name)
        if merge is None:
            return loaders[name]
        lazy = conversion.base.LazyTorchTensor
        meta = lazy.meta_with_dtype_and_shape(lazy._dtype_str_map["F32"], merge.shape)
        return lambda: lazy(meta=meta, args=(loaders[name](),), func=merge.apply)

    def tensors_of(part: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
        lazy = conversion.base.LazyTorchTensor
        if part.suffix != ".bin":
            with gguf.utility.SafetensorsLocal(part) as found:
                for name in found.keys():  # noqa: SIM118
                    yield name, lambda data=found[name]: lazy.from_local_tensor(data)
            return
        import torch

        # One tensor at a time: a whole file stays mapped, and with it in memory what was read of it.
        for name, meta in torch.load(part, map_location="meta", mmap=True, weights_only=True).items():
            yield name, lambda name=name, meta=meta: lazy(meta=meta, args=(part, name), func=read_tensor)

    class ClexModel(base):
        model_arch = base.model_arch

        def index_tensors(self, remote_hf_model_id: str | None = None) -> dict[str, Any]:
            # The scripts would take every file of the folder whose name begins like that of one.
            found = (self.filter_tensors(item) for part in checkpoint.parts for item in tensors_of(part))
            tensors = dict(item for item in found if item is not None)
            if checkpoint.needs_output:
                assert checkpoint.tied is not None
                embedding, output = checkpoint.tied
                loaders[output] = loaders[embedding]
                tensors[output] = merged(output)
            return tensors

        @classmethod
        def filter_tensors(cls, item: tuple[str, Any]) -> tuple[str, Any] | None:
            name, loaders[item[0]] = item
            # transformers does not look at the output matrix of a model whose config ties it to the embedding
            if CLEX_LAYER in name or (checkpoint.tied is not None and name == checkpoint.tied[1]):
                return None
            return super().filter_tensors((name, merged(name)))

        # The scripts return StableLM's stacked norms of heads out of a generator, where they are lost.
        def _stack_qk_norm(self, *arguments: Any) -> Iterator[tuple[str, Any]]:
            self._stacked += super()._stack_qk_norm(*arguments)
            return iter(())

        # They would make a classifier, without the output matrix, of what is named as one.
        def _is_qwen3_reranker(self) -> bool:
            return False

        def modify_tensors(self, data_torch: Any, name: str, bid: int | None) -> Iterator[tuple[str, Any]]:
            self._stacked: list[tuple[str, Any]] = []
            for new_name, tensor in itertools.chain(super().modify_tensors(data_torch, name, bid), self._stacked):
                if isinstance(tensor, gguf.LazyBase) and len(tensor.shape) > 1:
                    tensor = gguf.LazyChunkedTensor(pieces.pieces(tensor), tensor.shape, np.float32)
                yield new_name, tensor

        # Where a pre-tokenizer is named the vocabulary is a byte-level BPE, whatever its files make of it: the
        # scripts try the other kinds first and would take a folder that transformers saved from a GGUF for one.
        def _set_vocab_sentencepiece(self, add_to_gguf: bool = True) -> None:
            self._refuse_other_kinds()
            super()._set_vocab_sentencepiece(add_to_gguf)

        def _set_vocab_llama_hf(self) -> None:
            self._refuse_other_kinds()
            super()._set_vocab_llama_hf()

        def _refuse_other_kinds(self) -> None:
            if pre_tokenizer is not None:
                raise FileNotFoundError("the vocabulary is a byte-level BPE")  # what the scripts go on from

        def set_vocab(self) -> None:
            _check_tokenizer(checkpoint.path)
            with _step(checkpoint, "the tokenizer", self.dir_model):
                super().set_vocab()
            templates = _chat_templates(self.dir_model)
            if templates is not None:
                for key in [key for key in self.gguf_writer.kv_data[0] if key.startswith("tokenizer.chat_template")]:
                    self.gguf_writer.remove_key(key)
                self.gguf_writer.add_chat_template(templates)
            names = self.gguf_writer.kv_data[0].get(keys.Tokenizer.CHAT_TEMPLATES)
            if names is not None:
                names.value.sort()  # out of a set, in another order each time

        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            if pre_tokenizer is not None:
                return pre_tokenizer
            try:
                return super().get_vocab_base_pre(tokenizer)
            except NotImplementedError:
                raise ConvertError(
                    f"{checkpoint.path}: llama.cpp does not recognise the model's BPE pre-tokenizer; "
                    "pass its name with --pre-tokenizer (such as llama-bpe, gpt-2 or qwen2)"
                ) from None

        def generate_extra_tensors(self) -> Iterator[tuple[str, Any]]:
            import torch

            yield from (item for item in super().generate_extra_tensors() if not contents.replaces(item[0]))
            yield from ((name, torch.tensor(values)) for name, values in contents.tensors.items())

        def set_gguf_parameters(self) -> None:
            super().set_gguf_parameters()
            # The scripts leave the base out for some architectures, and write a fixed context, width or number of heads
            # for others.
            values, rope = checkpoint.model.values, checkpoint.rope
            width = values.get("ffn_hidden_size", values.get("intermediate_size"))
            replaced = {
                keys.LLM.CONTEXT_LENGTH: np.uint32(contents.context_length),
                keys.LLM.FEED_FORWARD_LENGTH: np.uint32(width),
                keys.Rope.FREQ_BASE: np.float32(rope.base),
            }
            # The scripts multiply and round in another order than transformers.
            if keys.Rope.DIMENSION_COUNT.format(arch=self.gguf_writer.arch) in self.gguf_writer.kv_data[0]:
                replaced[keys.Rope.DIMENSION_COUNT] = np.uint32(rope.dim)
            if "num_key_value_heads" in checkpoint.model.model_class.defaults:
                replaced[keys.Attention.HEAD_COUNT_KV] = np.uint32(values["num_key_value_heads"])
            for key, value in replaced.items():
                name = key.format(arch=self.gguf_writer.arch)
                self.gguf_writer.remove_key(name)
                _add_key(self.gguf_writer, name, value)
            for key, value in contents.keys.items():
                self.gguf_writer.remove_key(key)
                _add_key(self.gguf_writer, key, value)

    return ClexModel


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
        writer.add_array(key, [float(number) for number in value])  # float arrays are float32 in GGUF
    elif value.dtype == np.bool_:
        writer.add_bool(key, bool(value))
    elif value.dtype == np.float32:
        writer.add_float32(key, float(value))
    else:
        writer.add_uint32(key, int(value))


def write_checkpoint(
    checkpoint: Checkpoint,
    contents: Contents,
    target: Path,
    shown: Path,
    *,
    precision: str,
    pre_tokenizer: str | None,
    verbose: bool,
    progress: Callable[[float], None],
    planned: Callable[[], bool],
) -> list[str]:
    """Writes a checkpoint, and what is said of its rotary embedding, to a GGUF file.

    Args:
        checkpoint: the source.
        contents: the tables, or one of them baked.
        target: file to write.
        shown: the file that messages speak of.
        precision: type of the matrices, a key of `PRECISIONS`.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer of a byte-level BPE that it does not recognise.
        verbose: let the scripts log.
        progress: called with the part of the tensors written, 0 to 1.
        planned: called when the header is written and the tensors are a hole; whether to fill it.

    Returns:
        What the user should know, a sentence each.

    Raises:
        ConvertError: something that llama.cpp's scripts cannot read or the disk cannot hold.

    Source: ``ModelBase.write`` of llama.cpp's conversion/base.py.
    """
    with conversion_scripts() as (conversion, gguf), _quiet(verbose), offline(), contextlib.ExitStack() as stack:
        stage = stack.enter_context(staged(checkpoint.path))
        stage.check_metadata(gguf)
        with _step(checkpoint, "the config", stage.folder):
            model = _model_class(conversion, gguf, checkpoint, contents, pre_tokenizer)(
                stage.folder,
                gguf.LlamaFileType[PRECISIONS[precision]],
                target.with_name("unused.gguf"),  # they would take braces in a name for fields to fill in
                hparams=checkpoint.model.for_scripts(contents.context_length),
            )
        stack.callback(_close, model.gguf_writer)
        with _step(checkpoint, "the weights", stage.folder):
            model.prepare_tensors()
        with _step(checkpoint, "the description", stage.folder):
            model.prepare_metadata(vocab_only=False)
        with _step(checkpoint, "the weights", stage.folder):
            _write(model.gguf_writer, target, shown, progress, planned)
        return stage.notes


@contextlib.contextmanager
def _step(checkpoint: Checkpoint, part: str, stage: Path) -> Iterator[None]:
    """Words what llama.cpp's scripts raise while they read a part of the model."""
    try:
        yield
    except ConvertError:
        raise
    except pieces.NotFinite:
        raise _not_finite(checkpoint) from None
    except FloatingPointError:
        raise ConvertError(f"{checkpoint.path}: some weights are too large for f16; use --outtype bf16") from None
    except Exception as error:
        # Whatever meets an odd file: KeyError, AssertionError, ValueError ...
        name, folder = type(error).__name__, checkpoint.path
        said = one_line(str(error).replace(str(stage), str(folder)))
        if not said:  # an assertion says no more than where it is
            frame = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{Path(frame.filename).name}, line {frame.lineno}: {one_line(frame.line)}"
        hint = "; its files are damaged or those of another model" if part == "the tokenizer" else ""
        raise ConvertError(
            f"{folder}: llama.cpp's conversion of {checkpoint.architecture} cannot read {part} ({name}: {said}){hint}"
        ) from None


def _not_finite(checkpoint: Checkpoint) -> NotFiniteError:
    import torch

    for name, (path, kind, _) in checkpoint.tensors.items():
        if "f" in kind and not bool(torch.isfinite(read_tensor(path, name).float()).all()):
            return NotFiniteError(
                f"{path}: {name} holds values that are not finite (NaN or infinite); the weights are of no use"
            )
    return NotFiniteError(f"{checkpoint.path}: the weights give values that are not finite; they are of no use")


def _check_tokenizer(folder: Path) -> None:
    # transformers makes a tokenizer without a vocabulary, since release 5, where it finds none.
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
    if not any((folder / name).is_file() for name in names) and not any(folder.glob("*.tiktoken")):
        raise ConvertError(
            f"{folder}: holds no tokenizer (tokenizer.json or tokenizer.model); copy the one that the model was "
            "trained with into the folder"
        )


def _close(writer: Any) -> None:
    with contextlib.suppress(OSError):
        writer.close()


def _write(
    writer: Any, target: Path, shown: Path, progress: Callable[[float], None], planned: Callable[[], bool]
) -> None:
    infos = [info for shard in writer.tensors for info in shard.values()]
    holes = [_Hole(info.tensor) for info in infos]
    for info, hole in zip(infos, holes, strict=True):
        info.tensor = hole
    with writing(shown), np.errstate(over="raise"):
        writer.write_header_to_file(path=target)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        size = max((hole.offset + hole.nbytes for hole in holes), default=0)
        if target.stat().st_size < size:
            os.truncate(target, size)
        if not planned():
            return
        total, done = max(sum(hole.nbytes for hole in holes), 1), 0
        with target.open("rb+") as file:
            for hole in holes:
                file.seek(hole.offset)
                for count in _fill(file, hole.tensor):
                    done += count
                    progress(done / total)
                hole.tensor = None


def _fill(file: Any, tensor: Any) -> Iterator[int]:
    """Writes a tensor of the scripts; yields the bytes of each piece."""
    if hasattr(tensor, "_chunks"):
        yield from pieces.write(tensor, file)
        return
    # numpy's own tofile does not notice when the disk has no room for the last bytes.
    array = type(tensor).to_eager(tensor) if hasattr(tensor, "_meta") else tensor
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise pieces.NotFinite
    file.write(np.ascontiguousarray(array).data)
    yield tensor.nbytes
