"""The checkpoints of a training, in a folder beside its output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from clex_convert.model_files import read_config
from clex_train import TrainError
from clex_train.saving import writing_folder

_OPTIONS = "arguments.json"


class Checkpoints:
    """The folder ``OUT.checkpoints``, with the options that they belong to.

    Attributes:
        folder: may not be there yet.
    """

    def __init__(self, output: Path, identity: dict[str, Any]) -> None:
        """Those of a training into `output`; `identity` is that of its options (``TrainOptions.identity``)."""
        self.output, self._identity = output, identity
        self.folder = output.parent / f"{output.name}.checkpoints"

    def find(self, resume: bool) -> Path | None:
        """The last complete checkpoint to resume from; None to begin at the beginning.

        Raises:
            TrainError: the output is there already, or its checkpoints do not fit what is asked for.
        """
        if self.output.exists() or self.output.is_symlink():
            raise TrainError(f"{self.output}: already exists; choose another name or remove it")
        if not self.output.parent.is_dir():
            raise TrainError(f"{self.output}: the folder {self.output.parent} does not exist; create it first")
        # The trainer writes its state last.
        found = [path.parent for path in self.folder.glob("checkpoint-*/trainer_state.json")]
        last = max(found, key=lambda path: int(path.name.partition("-")[2]), default=None)
        if last is not None and not resume:
            raise TrainError(
                f"{self.folder}: holds an unfinished training; pass `resume=True` to continue it, or remove it"
            )
        if not resume:
            return None
        if not self.folder.is_dir():
            raise TrainError(f"{self.folder}: is not there; no training of {self.output} was begun")
        if last is None:
            return None  # it was killed before the first
        said = read_config(self.folder / _OPTIONS)
        for name, value in self._identity.items():
            if said.get(name) != value:
                raise TrainError(
                    f"{self.folder}: the training was begun with {name} = {said.get(name)}, not {value}; "
                    "continue it with the same arguments"
                )
        return last

    def begin(self) -> None:
        """Makes the folder."""
        with writing_folder(self.folder):
            self.folder.mkdir(exist_ok=True)
            (self.folder / _OPTIONS).write_text(json.dumps(self._identity, indent=1), encoding="utf-8")

    @property
    def exist(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return any(self.folder.glob("checkpoint-*"))

    def end(self, *, complete: bool) -> None:
        """Removes the folder, unless there is a checkpoint in it that is still of use."""
        if complete or not self.exist:
            shutil.rmtree(self.folder, ignore_errors=True)
