"""The RoPE scaling that a model names: read from transformers' ``rope_scaling`` or from the keys of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clex_convert import frequencies
from clex_convert.errors import ConvertError
from clex_local.model_file.tables import Tables

# Keys of each kind, those it cannot do without first.
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ("original_max_position_embeddings",)),
    "dynamic": (("factor",), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "longrope": (
        ("short_factor", "long_factor"),
        ("factor", "original_max_position_embeddings", "attention_factor"),
    ),
}
# They say nothing about the frequencies, or are read elsewhere.
_OTHER_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
# Other names of a kind.
_ALIASES = {"su": "longrope", "none": "default"}


@dataclass(frozen=True)
class Scaling:
    """The scaling of one model; fields have the names of transformers' keys where there is one.

    Attributes:
        kind: ``default`` (none), ``linear``, ``dynamic``, ``yarn``, ``llama3``, ``longrope``, or ``rope_freqs``: the
            frequency factors of a GGUF file.
        factor: by how much the context is extended.
        original: original_max_position_embeddings in tokens, 0 where it is not known.
        reach: tokens that the model is made for with this scaling, 0 if that is the context length it names.
        freq_factors: [d/2], for ``rope_freqs``.
    """

    kind: str = "default"
    factor: float = 1.0
    original: int = 0
    reach: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    freq_factors: tuple[float, ...] = ()

    @property
    def fixed(self) -> bool:
        """Whether the model has one set of scaled frequencies for every length."""
        return self.kind in ("linear", "yarn", "llama3", "rope_freqs")

    def attention(self, factor: float) -> float:
        """Factor on cosine and sine when the context is extended by `factor`."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "longrope":
            return frequencies.longrope_attention(self.factor, self.original)
        if self.kind not in ("yarn", "default", "dynamic"):
            return 1.0
        if self.mscale and self.mscale_all_dim:
            above, below = (frequencies.yarn_attention(factor, value) for value in (self.mscale, self.mscale_all_dim))
            return above / below
        return frequencies.yarn_attention(factor)

    def yarn(self, dim: int, base: float, original: int, factor: float) -> frequencies.Array:
        """`frequencies.yarn` with the parameters of this scaling."""
        return frequencies.yarn(
            dim,
            base,
            original,
            factor,
            beta_fast=self.beta_fast,
            beta_slow=self.beta_slow,
            truncate=self.truncate,
        )

    def first(self, dim: int, base: float) -> tuple[frequencies.Array, float]:
        """What the model does with this scaling, at its shortest where that depends on the length.

        Returns:
            Inverse frequencies [d/2] and the attention factor.
        """
        start = frequencies.plain(dim, base)
        if self.kind == "linear":
            return start / self.factor, self.attention(self.factor)
        if self.kind == "yarn":
            return self.yarn(dim, base, self.original, self.factor), self.attention(self.factor)
        if self.kind == "llama3":
            turns = {"low_freq_factor": self.low_freq_factor, "high_freq_factor": self.high_freq_factor}
            return frequencies.llama3(start, self.original, self.factor, **turns), 1.0
        if self.kind == "longrope":
            return frequencies.divided(start, self.short_factor), self.attention(self.factor)
        if self.kind == "rope_freqs":
            return frequencies.divided(start, self.freq_factors) / self.factor, self.attention(self.factor)
        return start, 1.0

    def gguf_keys(self) -> dict[str, Any]:
        """The keys, without the architecture, by which llama.cpp does the same; together with `gguf_tensors`."""
        keys: dict[str, Any] = {}
        usual = 1.0
        if self.kind in ("linear", "yarn") or (self.kind == "rope_freqs" and self.factor != 1):
            keys = {"type": "yarn" if self.kind == "yarn" else "linear", "factor": np.float32(self.factor)}
        if self.kind == "yarn":
            usual = frequencies.yarn_attention(self.factor)
            if (self.beta_fast, self.beta_slow) != (Scaling.beta_fast, Scaling.beta_slow):
                keys |= {"yarn_beta_fast": np.float32(self.beta_fast), "yarn_beta_slow": np.float32(self.beta_slow)}
        if self.kind in ("yarn", "longrope"):
            keys["original_context_length"] = np.uint32(self.original)
        attention = self.attention(self.factor) / usual if self.fixed or self.kind == "longrope" else 1.0
        if self.kind == "longrope" or not math.isclose(attention, 1, rel_tol=1e-6):
            keys["attn_factor"] = np.float32(attention)
        return {f"rope.scaling.{key}": value for key, value in keys.items()}

    def gguf_tensors(self, dim: int, base: float) -> dict[str, npt.NDArray[np.float32]]:
        """The float32 tensors [d/2] by which llama.cpp does the same, in architectures that have them."""
        freqs, short, long = FREQUENCY_TENSORS
        tensors: dict[str, Any] = {}
        if self.kind == "llama3":
            tensors = {freqs: frequencies.plain(dim, base) / self.first(dim, base)[0]}
        elif self.kind == "rope_freqs":
            tensors = {freqs: self.freq_factors}
        elif self.kind == "longrope":
            tensors = {long: self.long_factor, short: self.short_factor}
        return {name: np.array(values, np.float32) for name, values in tensors.items()}

    def is_first_of(self, tables: Tables, dim: int, base: float) -> bool:
        """Whether the first bucket of the tables does what this scaling does.

        If so the model's own keys and tensors may stay in the file: llama.cpp without tables then runs the first
        bucket.
        """
        row, attention = self.first(dim, base)
        scale = 1.0 if tables.attn_scale is None else tables.attn_scale[0]
        same = np.allclose(tables.inv_freq[0], row, rtol=1e-5, atol=0) and np.isclose(scale, attention**2, rtol=1e-5)
        return bool(same)


def kind_of(values: Mapping[str, Any]) -> str:
    """The kind that transformers' ``rope_scaling`` names, ``default`` where it names none."""
    kind = values.get("rope_type", values.get("type"))
    return _ALIASES.get(kind, kind) if isinstance(kind, str) else "default" if kind is None else str(kind)


def read_scaling(
    values: Mapping[str, Any], where: str, *, context: int, dim: int, longrope_original: int = 0
) -> Scaling:
    """Reads and checks what transformers' ``rope_scaling`` or ``rope_parameters`` says.

    Args:
        values: the mapping.
        where: file and key, for messages.
        context: max_position_embeddings.
        dim: rotary dimension.
        longrope_original: original_max_position_embeddings outside of the mapping, which goes before the one inside.

    Raises:
        ConvertError: an unknown kind, a key that the kind does not have, or a value that cannot be used.
    """
    kind = kind_of(values)
    if kind == "default":
        return Scaling()
    if kind not in _KEYS:
        raise ConvertError(f"{where}: the RoPE scaling {kind!r} is unknown; known: {', '.join(_KEYS)}")
    values = {key: value for key, value in values.items() if value is not None and key not in _OTHER_KEYS}
    needed, optional = _KEYS[kind]
    for key in values:
        if key not in (*needed, *optional):
            raise ConvertError(f"{where}: the key {key} is unknown for {kind!r} and may change the frequencies")
    for key in needed:
        if key not in values:
            raise ConvertError(f"{where}: {kind!r} needs the key {key}")

    def number(key: str, at_least: float = 0.0) -> float:
        return _number(values[key], f"{where}: {key}", at_least)

    fields: dict[str, Any] = {"kind": kind}
    for key in values:
        if key == "factor":
            fields[key] = number(key, 1.0)
        elif key == "original_max_position_embeddings":
            if number(key, 1.0) != int(values[key]):
                raise ConvertError(f"{where}: {key} must be a number of tokens, not {values[key]!r}")
            fields["original"] = int(values[key])
        elif key == "truncate":
            if not isinstance(values[key], bool):
                raise ConvertError(f"{where}: truncate must be true or false, not {values[key]!r}")
            fields[key] = values[key]
        elif key in ("short_factor", "long_factor"):
            fields[key] = _numbers(values[key], f"{where}: {key}", dim)
        elif number(key) or not key.startswith(("beta_", "mscale")):
            fields[key] = number(key)  # a beta or mscale of 0 is the default in transformers
    scaling = Scaling(**fields)
    if kind == "longrope":
        return _longrope(scaling, where, context, longrope_original, "factor" in values)
    return finished(scaling, where, context)


def _number(value: Any, what: str, at_least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < at_least:
        raise ConvertError(f"{what} must be a number of at least {at_least:g}, not {value!r}")
    return float(value)


def _numbers(values: Any, what: str, dim: int) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or len(values) != dim // 2:
        count = len(values) if isinstance(values, (list, tuple)) else "none"
        raise ConvertError(f"{what} must hold {dim // 2} numbers, one for each frequency, it holds {count}")
    numbers = tuple(_number(value, what, 0.0) for value in values)
    if not all(numbers):
        raise ConvertError(f"{what} must hold numbers above 0")
    return numbers


def finished(scaling: Scaling, where: str, context: int) -> Scaling:
    """The scaling with what follows from the model's context length; checked.

    Raises:
        ConvertError: values that contradict each other.
    """
    if scaling.attention_factor is not None and not scaling.attention_factor > 0:
        raise ConvertError(f"{where}: the attention factor must be above 0, not {scaling.attention_factor:g}")
    if scaling.kind == "yarn" and not scaling.beta_fast > scaling.beta_slow:
        raise ConvertError(f"{where}: beta_fast must be above beta_slow")
    if scaling.kind == "llama3" and not scaling.high_freq_factor > scaling.low_freq_factor:
        raise ConvertError(f"{where}: high_freq_factor must be above low_freq_factor")
    if scaling.kind == "linear" and scaling.factor == 1:
        return Scaling()
    changes: dict[str, Any] = {}
    # transformers takes max_position_embeddings for the length before YaRN where the config does not say.
    if scaling.kind == "yarn" and not scaling.original:
        changes["original"] = context
    if scaling.kind in ("linear", "yarn"):
        original = changes.get("original", scaling.original)
        changes["reach"] = max(context, int(original * scaling.factor))
    return Scaling(**{**vars(scaling), **changes})


def _longrope(scaling: Scaling, where: str, context: int, original: int, has_factor: bool) -> Scaling:
    # Phi-3 has the original length beside the mapping, and its factor is what the two lengths say.
    changes: dict[str, Any] = {"original": original or scaling.original or context}
    if original or (scaling.original and not has_factor):
        changes["factor"] = context / changes["original"]
    elif not has_factor:
        raise ConvertError(f"{where}: 'longrope' needs the key factor or original_max_position_embeddings")
    if changes["original"] < 2:
        raise ConvertError(f"{where}: original_max_position_embeddings must be above 1")
    longer = context > changes["original"]
    changes["reach"] = context if longer else int(context * changes.get("factor", scaling.factor))
    return finished(Scaling(**{**vars(scaling), **changes}), where, context)


_GGUF_KINDS = ("none", "linear", "yarn", "longrope")
_GGUF_KEYS = {
    "type",
    "factor",
    "original_context_length",
    "attn_factor",
    "finetuned",
    "yarn_log_multiplier",
    "yarn_attn_factor",
    "yarn_ext_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "alpha",
}
FREQUENCY_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


def read_gguf_scaling(
    keys: Mapping[str, Any], tensor: Callable[[str], tuple[float, ...] | None], where: str, *, context: int
) -> Scaling:
    """Reads what a GGUF file says.

    Args:
        keys: the architecture's keys that start with ``rope.scal``, without the architecture.
        tensor: gives the values of one of the small tensors by its name, None if the file has none.
        where: the file, for messages.
        context: context length that the file names.

    Raises:
        ConvertError: a scaling that is unknown, incomplete, or cannot be combined with tables.

    Source: ``llama_model_base::load_hparams`` and ``llama_context`` of llama.cpp.
    """
    for key in keys:
        if key != "rope.scale_linear" and key.removeprefix("rope.scaling.") not in _GGUF_KEYS:
            raise ConvertError(f"{where}: the key {key} is unknown and may change the frequencies")
    named = {key.removeprefix("rope.scaling."): value for key, value in keys.items()}
    kind = named.get("type", "linear")
    if not isinstance(kind, str) or kind not in _GGUF_KINDS:
        raise ConvertError(
            f"{where}: the RoPE scaling {kind!r} (rope.scaling.type) is unknown; known: {', '.join(_GGUF_KINDS)}"
        )

    def number(key: str, default: float) -> float:
        return _number(named[key], f"{where}: rope.scaling.{key}", 0.0) if key in named else default

    for key, plain in (("alpha", 0.0), ("yarn_ext_factor", 1.0)):
        if number(key, plain) not in (plain, 0.0):
            raise ConvertError(f"{where}: rope.scaling.{key} is {number(key, plain):g}, which tables cannot do yet")
    factor = number("factor", number("rope.scale_linear", 0.0)) or 1.0  # llama.cpp takes 0 for "none"
    if factor < 1:
        raise ConvertError(f"{where}: rope.scaling.factor is {factor:g}, it must be at least 1")
    attention, original = number("attn_factor", 1.0), int(number("original_context_length", 0.0))
    freqs, short, long = (tensor(name) for name in FREQUENCY_TENSORS)
    fields: dict[str, Any] = {"factor": 1.0 if kind == "none" else factor, "original": original}

    if short or long:
        if not (short and long) or freqs or kind not in ("none", "longrope", "linear") or fields["factor"] != 1:
            raise ConvertError(f"{where}: has LongRoPE factors that are incomplete or combined with another scaling")
        original = original or context
        factor = max(context / original, 1.0)
        return Scaling("longrope", factor, original, context, attention, short_factor=short, long_factor=long)
    if kind == "longrope":
        raise ConvertError(f"{where}: names LongRoPE, but has no tensors with its factors")
    if freqs:
        if kind == "yarn":
            raise ConvertError(
                f"{where}: combines YaRN with the tensor {FREQUENCY_TENSORS[0]}; tables cannot do both yet"
            )
        return Scaling("rope_freqs", **fields, attention_factor=attention, freq_factors=freqs)
    if kind == "yarn":
        for key in ("beta_fast", "beta_slow"):
            fields[key] = number(f"yarn_{key}", 0.0) or getattr(Scaling, key)
        # For llama.cpp mscale is 1 where mscale_all_dim is said.
        if number("yarn_log_multiplier", 0.0):
            fields.update(mscale=1.0, mscale_all_dim=number("yarn_log_multiplier", 0.0))
        scaling = finished(Scaling("yarn", **fields), where, context)
        said = number("yarn_attn_factor", scaling.attention(factor)) * attention
        if not math.isclose(said, scaling.attention(factor), rel_tol=1e-6):
            scaling = finished(Scaling(**{**vars(scaling), "attention_factor": said}), where, context)
        return scaling
    if attention != 1:
        raise ConvertError(f"{where}: rope.scaling.attn_factor is {attention:g} without a scaling that it belongs to")
    return finished(Scaling("linear", **fields), where, context)
