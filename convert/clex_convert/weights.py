"""The two matrices of a CLEX layer, and the settings they were trained with."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clex_convert.errors import ConvertError
from clex_convert.safetensors_file import DamagedFileError, read_floats, read_safetensors
from clex_local.errors import one_line

NAMES = ("ode_up_proj", "ode_down_proj")
ACTIVATIONS = ("silu", "tanh")
DYNAMICS = ("ntk", "yarn")  # the closed forms that a layer may go around
# of the authors' code where a config lacks them
DEFAULT_ACTIVATION, DEFAULT_TIME_DT, DEFAULT_DYNAMICS = "silu", 0.01, "ntk"


@dataclass(frozen=True)
class OdeSettings:
    """How the dynamics are integrated; None is "not said here"."""

    act: str | None = None
    time_dt: float | None = None
    max_factor: int | None = None
    log_scale: bool | None = None
    dynamics: str | None = None

    def over(self, other: OdeSettings) -> OdeSettings:
        """These settings, and the other ones where these say nothing."""
        mine, theirs = vars(self), vars(other)
        return OdeSettings(**{name: theirs[name] if value is None else value for name, value in mine.items()})

    def check(self, where: str) -> None:
        """Raises ConvertError, naming `where`, for a value that no conversion can use."""
        if self.act is not None and self.act not in ACTIVATIONS:
            raise ConvertError(f"{where}: act must be one of {', '.join(ACTIVATIONS)}, not {self.act!r}")
        if self.dynamics is not None and self.dynamics not in DYNAMICS:
            raise ConvertError(f"{where}: dynamics must be one of {', '.join(DYNAMICS)}, not {self.dynamics!r}")
        if self.time_dt is not None and not (math.isfinite(self.time_dt) and 0 < self.time_dt <= 1):
            raise ConvertError(f"{where}: time_dt must be above 0 and at most 1, not {self.time_dt}")
        if self.max_factor is not None and not 1 <= self.max_factor <= 65536:
            raise ConvertError(f"{where}: max_factor must be a whole number from 1 to 65536, not {self.max_factor}")


def settings_from(values: Mapping[str, Any], where: str) -> OdeSettings:
    """Settings out of a config or out of a safetensors file's metadata (where every value is text).

    Raises:
        ConvertError: a value that cannot be used; names `where` and the key.
    """

    def number(key: str, kind: type[int] | type[float]) -> Any:
        value = values.get(key)
        if value is None:
            return None
        try:
            if isinstance(value, bool) or float(value) != kind(float(value)):
                raise ValueError
            return kind(float(value))
        except (TypeError, ValueError, OverflowError):
            raise ConvertError(f"{where}: {key} must be a number, not {value!r}") from None

    log_scale = values.get("log_scale")
    if isinstance(log_scale, str):
        log_scale = {"true": True, "false": False}.get(log_scale.lower(), log_scale)
    if not isinstance(log_scale, (bool, type(None))):
        raise ConvertError(f"{where}: log_scale must be true or false, not {log_scale!r}")
    numbers = number("time_dt", float), number("max_factor", int)
    settings = OdeSettings(values.get("act"), *numbers, log_scale, values.get("dynamics"))
    settings.check(where)
    return settings


@dataclass(frozen=True)
class OdeWeights:
    """The matrices of one CLEX layer in float32.

    Attributes:
        up: [d/2, p * d].
        down: [p * d, d/2].
        where: what they were read from, for messages.
        settings: what their file says about their use.
    """

    up: npt.NDArray[np.float32]
    down: npt.NDArray[np.float32]
    where: str = "ODE weights"
    settings: OdeSettings = OdeSettings()

    def check(self, dim: int) -> int:
        """Checks the matrices against the rotary dimension d.

        Returns:
            The parameter factor p.

        Raises:
            ConvertError: wrong shapes, or values that are not finite.
        """
        up, down = self.up.shape, self.down.shape
        if len(up) != 2 or up[0] != dim // 2 or up[1] == 0 or up[1] % dim:
            raise ConvertError(
                f"{self.where}: ode_up_proj must be [{dim // 2}, p * {dim}] for a rotary dimension of {dim}, "
                f"not {list(up)}; these weights belong to another model"
            )
        if down != (up[1], up[0]):
            raise ConvertError(f"{self.where}: ode_down_proj must be {[up[1], up[0]]}, not {list(down)}")
        for name, matrix in zip(NAMES, (self.up, self.down), strict=True):
            if not np.isfinite(matrix).all():
                raise ConvertError(f"{self.where}: {name} holds values that are not finite; the file is of no use")
        return up[1] // dim

    @property
    def sha256(self) -> str:
        """SHA-256 of both matrices, up first, as little-endian float32."""
        digest = hashlib.sha256()
        for matrix in (self.up, self.down):
            digest.update(np.ascontiguousarray(matrix, dtype="<f4").tobytes())
        return digest.hexdigest()


def find_names(names: list[str], where: str) -> tuple[str, str] | None:
    """Full names of the two matrices among the tensors of a checkpoint; None if it has neither.

    Raises:
        ConvertError: only one of them is there, or one is there more than once.
    """
    found = [[name for name in names if name.split(".")[-1] == wanted] for wanted in NAMES]
    if not any(found):
        return None
    for wanted, matches in zip(NAMES, found, strict=True):
        if len(matches) != 1:
            raise ConvertError(f"{where}: holds {len(matches)} tensors named {wanted}, it must hold one")
    return found[0][0], found[1][0]


def read_weights(path: Path) -> OdeWeights:
    """Reads the two matrices from a safetensors file, with what its metadata says about their use.

    Raises:
        ConvertError: the file is missing, damaged, or lacks a matrix.
    """
    if not path.is_file():
        raise ConvertError(f"{path}: no such file")
    try:
        tensors, metadata = read_safetensors(path)
    except (DamagedFileError, OSError) as error:
        raise ConvertError(f"{path}: not a readable safetensors file ({one_line(error)})") from None
    names = find_names(list(tensors), str(path))
    if names is None:
        raise ConvertError(f"{path}: holds no {NAMES[0]} and {NAMES[1]}; it has no CLEX layer")
    up, down = (read_floats(path, tensors[name]) for name in names)
    return OdeWeights(up, down, str(path), settings_from(metadata, str(path)))
