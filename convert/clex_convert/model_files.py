"""Files of models and adapters: configs, and weights in safetensors' or PyTorch's format, a tensor at a time."""

from __future__ import annotations

import functools
import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clex_convert.errors import ConvertError, extra_packages
from clex_convert.safetensors_file import DamagedFileError, StoredTensor, read_floats, read_safetensors
from clex_local.errors import one_line

if TYPE_CHECKING:
    import torch


_POINTER = b"version https://git-lfs.github.com/spec/"


def read_config(path: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        ConvertError: the file cannot be read, or holds something else.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConvertError(f"{path}: cannot be read ({one_line(error)})") from None
    if not isinstance(config, dict):
        raise ConvertError(f"{path}: must hold a JSON object")
    return config


def refuse_pointer(path: Path) -> None:
    """Refuses what git leaves in the place of a large file.

    Raises:
        ConvertError: it is that.
    """
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ConvertError(f"{path}: is a pointer of git-lfs, not the file; get the file with: git lfs pull")


def read_headers(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor of a file; nothing that a pickle names is run.

    Raises:
        ConvertError: the file is damaged or truncated, cannot be read, or holds more than plain weights.
    """
    if path.suffix != ".bin" and any("\udc80" <= letter <= "\udcff" for letter in str(path)):  # bytes of no character
        raise ConvertError(f"{path}: its path is not valid UTF-8, so safetensors cannot open it; rename it")
    try:
        refuse_pointer(path)
        if path.suffix == ".bin":
            return _read_pickle(path)
        return {name: (_type(tensor.type), tensor.shape) for name, tensor in read_safetensors(path)[0].items()}
    except ConvertError:
        raise
    except DamagedFileError as error:
        raise ConvertError(f"{path}: damaged or truncated ({one_line(error)}); download it again") from None
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read ({one_line(error.strerror or error)})") from None
    except Exception as error:  # torch.load raises what the pickle makes it raise
        raise ConvertError(f"{path}: damaged, truncated or not plain weights ({one_line(error)})") from None


def _read_pickle(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with extra_packages():
        import torch
    if _is_pickle(path):
        raise ConvertError(
            f"{path}: is in the format of torch before 1.6, which cannot be read a tensor at a time; "
            "save it again as safetensors"
        )
    tensors = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    return {name: (_type(str(tensor.dtype)), tuple(tensor.shape)) for name, tensor in tensors.items()}


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor of a file whose headers were read."""
    import torch
    from safetensors import safe_open

    if path.suffix == ".bin":
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)[name]
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def read_array(path: Path, name: str) -> npt.NDArray[np.float32]:
    """One tensor of floats, of a file whose headers were read, as float32; of safetensors without torch.

    Raises:
        ConvertError: it is not of floats, or the file changed.
    """
    if path.suffix == ".bin":
        return read_tensor(path, name).float().numpy()
    try:
        status = path.stat()
        return read_floats(path, _tensors(path, status.st_mtime_ns, status.st_size)[name])
    except (OSError, KeyError, DamagedFileError):
        raise ConvertError(f"{path}: changed while it was read; try again") from None


@functools.lru_cache(maxsize=2)
def _tensors(path: Path, modified: int, size: int) -> dict[str, StoredTensor]:
    """What `read_safetensors` finds in a file, once for each state that the file is in."""
    return read_safetensors(path)[0]


def _type(name: str) -> str:
    """``f32``, ``bf16`` ..., of the words of torch and of safetensors."""
    name = name.removeprefix("torch.").lower()
    return name.replace("bfloat", "bf").replace("float", "f") if "float" in name else name


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"\x80" and not zipfile.is_zipfile(path)
