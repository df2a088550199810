"""A model folder's checkpoint as a GGUF file, made by llama.cpp's own conversion scripts."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from clex_convert.checkpoint import Checkpoint
from clex_convert.errors import writing
from clex_convert.hub_client import offline
from clex_convert.layout import Layout
from clex_convert.llama_cpp_scripts import conversion_scripts, quiet_scripts
from clex_convert.rope_metadata import RopeMetadata
from clex_convert.script_errors import reading
from clex_convert.script_overrides import overridden
from clex_convert.staging import staged
from clex_convert.tensor_chunks import NotFiniteWeights, write_chunks

# Types of the matrices, in the scripts' words.
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}


@contextlib.contextmanager
def checkpoint_layout(
    checkpoint: Checkpoint, metadata: RopeMetadata, outtype: str, *, pre_tokenizer: str | None, verbose: bool
) -> Iterator[Layout]:
    """A checkpoint, and what is said of its rotary embedding, as a GGUF file.

    Args:
        checkpoint: the source.
        metadata: the tables, or one of them baked.
        outtype: type of the matrices: f32, f16 or bf16.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer of a byte-level BPE that it does not recognise.
        verbose: let the scripts log.

    Raises:
        ConvertError: something that llama.cpp's scripts cannot read.

    Source: ``ModelBase.write`` of llama.cpp's conversion/base.py.
    """
    with conversion_scripts() as (conversion, gguf), quiet_scripts(verbose), offline(), contextlib.ExitStack() as stack:
        stage = stack.enter_context(staged(checkpoint.path))
        stage.check_metadata(gguf)
        with reading(checkpoint, "the config", stage.folder):
            model = overridden(conversion, gguf, checkpoint, metadata, pre_tokenizer)(
                stage.folder,
                gguf.LlamaFileType[_FILE_TYPES[outtype]],
                stage.folder / "unused.gguf",  # they would take braces in a name for fields to fill in
                hparams=checkpoint.model.for_scripts(metadata.context_length),
            )
        with reading(checkpoint, "the weights", stage.folder):
            model.prepare_tensors()
        with reading(checkpoint, "the description", stage.folder):
            model.prepare_metadata(vocab_only=False)
        writer = model.gguf_writer
        infos = [info for shard in writer.tensors for info in shard.values()]
        with reading(checkpoint, "the weights", stage.folder):
            header = _header(writer)

        def write_tensors(file: BinaryIO, written: Callable[[int], None]) -> None:
            with reading(checkpoint, "the weights", stage.folder), writing(file.name), np.errstate(over="raise"):
                for info in infos:
                    for count in _write(file, info.tensor):
                        written(count)
                    written(file.write(bytes(-info.nbytes % writer.data_alignment)))
                    info.tensor = None  # what was read of it goes

        size = len(header) + sum(writer.ggml_pad(info.nbytes, writer.data_alignment) for info in infos)
        yield Layout(header, size, write_tensors, "writing", new_vocabulary=True, notes=tuple(stage.notes))


def _header(writer: Any) -> bytes:
    """All of the file before the first tensor."""
    file = io.BytesIO()
    writer.fout, writer.state = [file], type(writer.state).EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(file, file.tell())
    return file.getvalue()


def _write(file: BinaryIO, tensor: Any) -> Iterator[int]:
    """Writes a tensor of the scripts; yields the bytes of each part."""
    if hasattr(tensor, "_chunks"):
        yield from write_chunks(tensor, file)
        return
    # numpy's own tofile does not notice when the disk has no room for the last bytes.
    array = type(tensor).to_eager(tensor) if hasattr(tensor, "_meta") else tensor
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise NotFiniteWeights
    file.write(np.ascontiguousarray(array).data)
    yield tensor.nbytes
