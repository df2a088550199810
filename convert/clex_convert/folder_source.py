"""A model folder as a source."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clex_convert.checkpoint import Checkpoint
from clex_convert.file_types import UNQUANTIZED
from clex_convert.layout import Layout
from clex_convert.lora import Adapter
from clex_convert.rope_metadata import RopeMetadata
from clex_convert.source_rope import SourceRope
from clex_convert.weights import OdeWeights
from clex_local.model_file.tables import Tables


class FolderSource:
    """A Hugging Face model folder, perhaps with an adapter; see `Source`."""

    default_outtype = "q4_k_m"
    layout_types = UNQUANTIZED
    quantized = False

    def __init__(
        self,
        path: Path,
        *,
        lora: str | os.PathLike[str] | None,
        rope_scaling: Mapping[str, Any] | None,
        pre_tokenizer: str | None,
        verbose: bool,
    ) -> None:
        """Reads the config and the headers of the weights.

        Args:
            path: the model folder.
            lora: folder of an adapter, which is merged into it.
            rope_scaling: takes the place of what the config names.
            pre_tokenizer: llama.cpp's name of a BPE pre-tokenizer that it does not recognise.
            verbose: let llama.cpp's scripts log.

        Raises:
            ConvertError: as `Checkpoint` and `Adapter`.
        """
        self.path = path
        adapter = None if lora is None else Adapter(Path(lora))
        self._checkpoint = Checkpoint(path, adapter, rope_scaling)
        self._pre_tokenizer, self._verbose = pre_tokenizer, verbose

    @property
    def rope(self) -> SourceRope:
        """That of the config."""
        return self._checkpoint.rope

    @property
    def gguf_architecture(self) -> str:
        """Name of the model's architecture in GGUF."""
        return self._checkpoint.gguf_architecture

    @property
    def precision(self) -> str:
        """Smallest of the types that holds every matrix without loss."""
        return self._checkpoint.precision

    def files(self) -> list[Path]:
        """All files in the folder and in the adapter's; GGUF files, which are results perhaps, excepted."""
        adapter = self._checkpoint.adapter
        folders = [self.path] if adapter is None else [self.path, adapter.path]
        return [path for folder in folders for path in folder.iterdir() if path.suffix != ".gguf"]

    def own_tables(self) -> Tables | None:
        """None: a folder has no tables."""
        return None

    def ode_weights(self) -> OdeWeights | None:
        """Those of the adapter, or else of the folder; see `Checkpoint.ode_weights`."""
        return self._checkpoint.ode_weights()

    def check_window(self, context: int) -> None:
        """See `ModelConfig.check_window`."""
        self._checkpoint.check_window(context)

    def not_finite(self) -> str | None:
        """None: `Layout.write` looks at every tensor."""
        return None

    @contextmanager
    def layout(self, metadata: RopeMetadata, outtype: str) -> Iterator[Layout]:
        """See `checkpoint_layout`."""
        from clex_convert.checkpoint_layout import checkpoint_layout  # imports torch

        with checkpoint_layout(
            self._checkpoint, metadata, outtype, pre_tokenizer=self._pre_tokenizer, verbose=self._verbose
        ) as layout:
            yield layout
