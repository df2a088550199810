"""The small files of a model folder as llama.cpp's scripts and the installed transformers can read them.

The scripts read a folder of ours with links to the model's files. Those are copies instead where the original could
not be read: a byte order mark goes, and a tokenizer saved by transformers 5 is described in the words of the releases
before. What a model does without is left out where it is broken, with a note; other broken files are named.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clex_convert.errors import ConvertError
from clex_convert.model_files import refuse_pointer
from clex_convert.transformers_folder import since_release_5, tokenizer_config_before_5
from clex_local.errors import one_line

# What the scripts, and transformers' tokenizers for them, may look at beside the weights.
_SMALL = (".json", ".jsonl", ".jinja", ".md", ".model", ".tiktoken", ".txt")
_CARD, _GENERATION = "README.md", "generation_config.json"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
_OPTIONAL = ("added_tokens.json", "chat_template.json", "special_tokens_map.json")


@dataclass
class Stage:
    """A folder that the scripts read.

    Attributes:
        folder: it, under the model's name.
        source: the model's folder.
        notes: what was left out of it, a sentence each.
    """

    folder: Path
    source: Path
    notes: list[str] = field(default_factory=list)

    def drop(self, name: str, reason: object) -> None:
        """Leaves a file out."""
        (self.folder / name).unlink(missing_ok=True)
        self.notes.append(f"{self.source / name} cannot be used and was left out ({one_line(reason, 120)})")

    def check_metadata(self, gguf: Any) -> None:
        """Leaves out a model card or a generation config that the scripts cannot make metadata of."""
        for name in (_CARD, _GENERATION):
            if not (self.folder / name).exists():
                continue
            with tempfile.TemporaryDirectory() as temporary:
                trial = Path(temporary) / self.folder.name
                trial.mkdir()
                for part in ("config.json", name):
                    shutil.copy(self.folder / part, trial)
                try:
                    _try_metadata(gguf, trial)
                except Exception as error:  # of YAML, and of whatever meets values of the wrong kind
                    self.drop(name, error)


def _try_metadata(gguf: Any, folder: Path) -> None:
    metadata = gguf.Metadata.load(None, folder, None, 0)
    metadata.name = metadata.name or "model"
    writer = gguf.GGUFWriter(path=None, arch="llama")
    metadata.set_gguf_meta_model(writer)
    for value in writer.kv_data[0].values():
        writer._pack_val(value.value, value.type, add_vtype=True, sub_type=value.sub_type)


@contextlib.contextmanager
def staged(source: Path) -> Iterator[Stage]:
    """A stage for a model folder.

    llama.cpp's conversion takes a model's name and size out of the name of its folder. In the hub's cache that is a
    commit, so the stage has the repository's name.

    Raises:
        ConvertError: a file that the model needs is broken.
    """
    repo = re.fullmatch(r"models--.+?--(.+)", source.parent.parent.name)
    name = repo[1] if repo is not None and source.parent.name == "snapshots" else source.name
    with tempfile.TemporaryDirectory() as temporary:
        stage = Stage(Path(temporary) / (name or source.resolve().name or "model"), source)
        stage.folder.mkdir()
        templates = source / "additional_chat_templates"
        for path in [*source.iterdir(), *(templates.iterdir() if templates.is_dir() else ())]:
            if path.suffix in _SMALL and not path.name.endswith(".index.json") and path.is_file():
                _place(stage, path)
        yield stage


def _place(stage: Stage, path: Path) -> None:
    target = stage.folder / path.relative_to(stage.source)
    target.parent.mkdir(exist_ok=True)
    try:
        data = _rewritten(path)
    except ConvertError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        reason = one_line(error, 120)
        if path.name == _GENERATION:
            stage.drop(path.name, reason)
            return
        mend = "download it again"
        if path.name not in _TOKENIZER:
            mend += ", or remove it"
        raise ConvertError(f"{path}: cannot be read ({reason}); {mend}") from None
    if data is not None:
        target.write_bytes(data)
        return
    try:
        target.symlink_to(path.resolve())
    except OSError:  # a system without links
        shutil.copy(path, target)


def _rewritten(path: Path) -> bytes | None:
    """What takes the place of a file; None if it is good as it is.

    Raises:
        ValueError: it is no JSON object, or no UTF-8 text.
    """
    refuse_pointer(path)
    if path.name == "tokenizer.model" and not os.path.getsize(path):
        raise ConvertError(f"{path}: is empty; download it again")
    known = path.name in (*_TOKENIZER, *_OPTIONAL, _GENERATION)
    if not known and path.suffix != ".jinja":
        return None
    data = path.read_bytes()
    text = data.decode("utf-8-sig")
    if known:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
        if path.name == "tokenizer_config.json" and not since_release_5():
            translated = tokenizer_config_before_5(values)
            if translated != values:
                return json.dumps(translated).encode()
    return None if len(text.encode()) == len(data) else text.encode()
