"""The source of a conversion by its path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clex_convert.errors import ConvertError
from clex_convert.folder_source import FolderSource
from clex_convert.gguf_source import GGUFSource
from clex_convert.lora import Adapter
from clex_convert.options import ConvertOptions
from clex_convert.source import Source


@contextmanager
def open_source(path: Path, options: ConvertOptions) -> Iterator[Source]:
    """The model in a folder or in a GGUF file.

    Raises:
        ConvertError: it cannot be converted, or options do not go with it.
    """
    if path.is_dir():
        yield FolderSource(
            path,
            lora=options.lora,
            rope_scaling=options.rope_scaling,
            pre_tokenizer=options.pre_tokenizer,
            verbose=options.verbose,
        )
        return
    if options.pre_tokenizer is not None:
        raise ConvertError("`pre_tokenizer` is for model folders; a GGUF file keeps its own")
    adapter = None if options.lora is None else Adapter(Path(options.lora))
    with GGUFSource(path, options.rope_scaling, adapter) as model:
        yield model
