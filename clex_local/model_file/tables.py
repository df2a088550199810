"""The tables of inverse frequencies that a model file carries in its ``clex.*`` keys."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clex_local.errors import ClexError, ModelError
from clex_local.model_file import architectures
from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.keys import ModelKeys

VERSION = 1
# Far more than there is a use for; they bound what a hostile file can ask for.
MAX_BUCKETS = 4096
MAX_DIMENSION = 2**16  # rotary dimension of a head
_MAX_TOKENS = 2**31 - 1  # positions are 32-bit numbers

# Beyond these a value has no use, and angles, factors or scores overflow somewhere. llama-clex-tables.cpp has the
# same. The smallest frequency is the smallest whose inverse is a number; trained tables of the authors' code reach 8.5.
INV_FREQ_RANGE = (np.finfo(np.float32).tiny, np.float32(1e3))
ATTN_SCALE_RANGE = (np.float32(1e-3), np.float32(1e3))

FloatArray = npt.NDArray[np.float32]

_KINDS = {
    "clex.version": "u32",
    "clex.method": "string",
    "clex.original_context_length": "u32",
    "clex.scaling_factors": "f32[]",
    "clex.inv_freq": "f32[]",
    "clex.attn_scale": "f32[]",
    "clex.log_scale": "bool",
    "clex.provenance": "string",
}
_OPTIONAL = {"clex.attn_scale", "clex.log_scale", "clex.provenance"}


class TablesError(ModelError):
    """Tables that break a rule of the metadata; the message names the key and the rule."""


class NewerVersionError(TablesError):
    """Tables of a version that only a newer clex-local reads."""


class ContextError(ClexError, ValueError):
    """More tokens than the last table covers, or the context holds; a ValueError too, as llama-cpp-python raises."""


@dataclass(frozen=True, eq=False)
class Tables:
    """One table of inverse frequencies per bucket of context lengths; fields are named as the metadata keys.

    Attributes:
        method: what made the tables: ``clex``, ``ntk``, ...; for people.
        original_context_length: L, tokens covered at scaling factor 1.
        scaling_factors: float32 [n], scaling factor t of each bucket, ascending from 1.0.
        inv_freq: float32 [n, n_rot / 2], inverse frequencies of each bucket in rad/position.
        attn_scale: float32 [n], factor on the attention logits of each bucket; None means 1.
        log_scale: whether queries are multiplied by log(tokens) / log(L).
        provenance: JSON text about how the tables were made; for people.
    """

    method: str
    original_context_length: int
    scaling_factors: FloatArray
    inv_freq: FloatArray
    attn_scale: FloatArray | None = None
    log_scale: bool = False
    provenance: str = ""

    def __post_init__(self) -> None:
        for name in ("scaling_factors", "inv_freq", "attn_scale"):
            value = getattr(self, name)
            if value is not None:
                with np.errstate(over="ignore"):  # what becomes infinite is for validate() to refuse
                    array = np.array(value, dtype=np.float32)
                array.setflags(write=False)
                object.__setattr__(self, name, array)

    def validate(self) -> None:
        """Checks every rule of the metadata.

        Raises:
            TablesError: the first rule that is broken, with the name of the key.
        """
        length, factors, inv_freq = self.original_context_length, self.scaling_factors, self.inv_freq
        if isinstance(length, bool) or not isinstance(length, (int, np.integer)) or not 0 < length < 2**32:
            raise TablesError(f"clex.original_context_length must be a number of tokens above 0, not {length!r}")
        if factors.ndim != 1 or factors.size == 0:
            raise TablesError("clex.scaling_factors must hold at least one scaling factor")
        if factors.size > MAX_BUCKETS:
            raise TablesError(f"clex.scaling_factors must not hold more than {MAX_BUCKETS} factors, not {factors.size}")
        if not np.isfinite(factors).all():
            raise TablesError(f"clex.scaling_factors must be finite, not {_first(factors, ~np.isfinite(factors))}")
        if factors[0] != 1:
            raise TablesError(f"clex.scaling_factors must start with 1.0, not {factors[0]}")
        falling = np.diff(factors) <= 0
        if falling.any():
            raise TablesError(f"clex.scaling_factors must ascend strictly, but {_first(factors[1:], falling)} does not")
        if float(factors[-1]) * length > _MAX_TOKENS:
            raise TablesError(f"clex.scaling_factors must not cover more than {_MAX_TOKENS} tokens")
        if inv_freq.ndim != 2 or inv_freq.shape[0] != factors.size or inv_freq.shape[1] == 0:
            raise TablesError(f"clex.inv_freq must hold {factors.size} rows of equal length, not {inv_freq.shape}")
        _check_range("clex.inv_freq", inv_freq, INV_FREQ_RANGE)
        if self.attn_scale is not None:
            if self.attn_scale.shape != factors.shape:
                raise TablesError(f"clex.attn_scale must hold {factors.size} values, not {self.attn_scale.size}")
            _check_range("clex.attn_scale", self.attn_scale, ATTN_SCALE_RANGE)
        if self.log_scale and length == 1:
            raise TablesError("clex.log_scale needs a clex.original_context_length above 1")

    @property
    def context_lengths(self) -> list[int]:
        """Tokens that each bucket covers: the integer part of t * L, ascending."""
        return [math.floor(float(t) * self.original_context_length) for t in self.scaling_factors]

    @property
    def max_context_length(self) -> int:
        """Tokens that the last bucket covers."""
        return math.floor(float(self.scaling_factors[-1]) * self.original_context_length)

    def bucket(self, n_tokens: int, *, clamp: bool = False) -> int:
        """Index of the first bucket with t * L >= n_tokens.

        Args:
            n_tokens: length of the whole sequence, cached and new tokens together; 0 counts as 1.
            clamp: use the last bucket for longer sequences, as the authors' code does, instead of raising.

        Raises:
            ContextError: n_tokens is beyond the last bucket, or below 0.
        """
        if n_tokens < 0:
            raise ContextError(f"a sequence cannot have {n_tokens} tokens")
        lengths = self.context_lengths
        index = int(np.searchsorted(np.array(lengths), n_tokens))
        if index < len(lengths):
            return index
        if clamp:
            return len(lengths) - 1
        raise ContextError(f"{n_tokens} tokens do not fit: the model's last table covers {lengths[-1]}")

    def metadata(self) -> dict[str, Any]:
        """The GGUF keys, each a str, a numpy scalar or a 1-D numpy array of the type that the file must have."""
        keys: dict[str, Any] = {
            "clex.version": np.uint32(VERSION),
            "clex.method": self.method,
            "clex.original_context_length": np.uint32(self.original_context_length),
            "clex.scaling_factors": self.scaling_factors,
            "clex.inv_freq": self.inv_freq.reshape(-1),
        }
        if self.attn_scale is not None:
            keys["clex.attn_scale"] = self.attn_scale
        if self.log_scale:
            keys["clex.log_scale"] = np.bool_(True)
        if self.provenance:
            keys["clex.provenance"] = self.provenance
        return keys


def _first(values: np.ndarray[Any, Any], wrong: np.ndarray[Any, Any]) -> Any:
    return values[wrong][0]


def _check_range(key: str, values: FloatArray, limits: tuple[np.float32, np.float32]) -> None:
    least, most = limits
    wrong = ~((values >= least) & (values <= most))
    if wrong.any():
        row, value = int(np.argwhere(wrong)[0][0]), _first(values, wrong)
        rule = f"from {least:.3g} to {most:.3g}" if np.isfinite(value) and value > 0 else "finite and above 0"
        raise TablesError(f"{key} must be {rule}, but bucket {row} holds {value}")


def read_tables(path: str | os.PathLike[str]) -> Tables | None:
    """Reads and checks the tables of a GGUF file; only its header is read.

    Returns:
        The tables, or None if the file has no ``clex.*`` keys.

    Raises:
        GGUFError: the file is missing, not GGUF, or damaged.
        TablesError: a ``clex.*`` key is missing, has the wrong type, or breaks a rule.
    """
    with GGUFFile(path) as file:
        return named_tables(file, path)


def named_tables(file: GGUFFile, path: str | os.PathLike[str]) -> Tables | None:
    """As `read_tables`, of a file already open."""
    try:
        return tables_of(file)
    except NewerVersionError as error:
        raise NewerVersionError(f"{path}: {error}") from None
    except TablesError as error:
        raise TablesError(f"{path}: {error}; convert the model again with clex-convert") from None


def tables_of(file: GGUFFile) -> Tables | None:
    """As `read_tables`, of a file already open; messages do not name it."""
    if not any(key.startswith("clex.") for key in file.keys()):  # noqa: SIM118
        return None
    # The version first: a later one may have other keys and types, and the answer to it is another one.
    for key, wanted in _KINDS.items():
        kind = file.kind(key)
        if kind is None and key not in _OPTIONAL:
            raise TablesError(f"{key} is missing")
        if kind not in (None, wanted):
            raise TablesError(f"{key} must have the type {wanted}, not {kind}")
        if key == "clex.version":
            _check_version(file.get(key))

    architecture = file.get("general.architecture")
    if not architectures.find(architecture).tables:
        raise TablesError(
            f"clex.* tables cannot be used with the architecture {str(architecture)[:40]!r}, only with "
            f"{architectures.names_with_tables()}"
        )
    factors, inv_freq = file.get("clex.scaling_factors"), file.get("clex.inv_freq")
    n_rot = ModelKeys(file).rope_dimension
    row = n_rot // 2 if n_rot is not None else inv_freq.size // max(factors.size, 1)
    if factors.size and inv_freq.size != factors.size * row:
        wanted = f"{factors.size} buckets of {row}" if n_rot is not None else f"a multiple of {factors.size}"
        raise TablesError(f"clex.inv_freq must hold {wanted} values, not {inv_freq.size}")
    tables = Tables(
        method=file.get("clex.method"),
        original_context_length=file.get("clex.original_context_length"),
        scaling_factors=factors,
        inv_freq=inv_freq.reshape(factors.size, -1) if factors.size else inv_freq,
        attn_scale=file.get("clex.attn_scale"),
        log_scale=file.get("clex.log_scale", False),
        provenance=file.get("clex.provenance", ""),
    )
    tables.validate()
    return tables


def _check_version(version: int) -> None:
    if version > VERSION:
        raise NewerVersionError(
            f"clex.version is {version}, this clex-local reads {VERSION}: install a newer clex-local"
        )
    if version != VERSION:
        raise TablesError(f"clex.version must be {VERSION}, not {version}")
