"""The wording of what llama.cpp's conversion scripts raise."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from clex_convert.checkpoint import Checkpoint
from clex_convert.errors import ConvertError, NotFiniteError
from clex_convert.model_files import read_tensor
from clex_convert.tensor_chunks import NotFiniteWeights
from clex_local.errors import one_line


@contextlib.contextmanager
def reading(checkpoint: Checkpoint, part: str, stage: Path) -> Iterator[None]:
    """Words what the scripts raise while they read a part of a model.

    Args:
        checkpoint: the model.
        part: what is read, such as "the tokenizer".
        stage: the folder that the scripts read it from.

    Raises:
        ConvertError: they raised something.
    """
    try:
        yield
    except ConvertError:
        raise
    except NotFiniteWeights:
        raise _not_finite(checkpoint) from None
    except FloatingPointError:
        raise ConvertError(f'{checkpoint.path}: some weights are too large for f16; use `outtype="bf16"`') from None
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
