"""What a conversion says of the rotary embedding in a GGUF file: tables, or one of them baked for stock llama.cpp."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from clex_convert.errors import ConvertError
from clex_convert.scaling import FREQUENCY_TENSORS
from clex_convert.source_rope import SourceRope
from clex_local.model_file import architectures
from clex_local.model_file.baked import Baked
from clex_local.model_file.tables import Tables

_UNROTATED = (
    "the layers of this model that see every token have no RoPE, and those with a sliding window keep their own: the "
    "tables change nothing but how many tokens are let in"
)
_EXACT = 1e-6  # relative; some roundings to float32


@dataclass(frozen=True)
class RopeMetadata:
    """Keys and tensors that a conversion puts into a GGUF file.

    Attributes:
        context_length: tokens, for the architecture's key of that name.
        keys: other keys, each a str, a numpy scalar or a 1-D numpy array of the type that the file must have.
        tensors: float32 tensors of one dimension.
        replaced: how the names of the source's keys and tensors begin that are left out.
        notes: what the user should know, a sentence each.
    """

    context_length: int
    keys: dict[str, Any]
    tensors: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    replaced: tuple[str, ...] = ("clex.",)
    notes: tuple[str, ...] = ()

    def replaces(self, name: str) -> bool:
        """Whether a key or tensor of the source is left out."""
        return name.startswith(self.replaced)


def with_tables(tables: Tables, architecture: str, rope: SourceRope) -> RopeMetadata:
    """All tables, for the runtime of this project.

    The model's own scaling stays beside them where the first bucket does the same: so stock llama.cpp runs that. It
    stays too where layers with a sliding window go by it, which have no tables. Otherwise it goes.

    Args:
        tables: what is written.
        architecture: the model's, in GGUF's words.
        rope: the model's rotary embedding.
    """
    scaling = f"{architecture}.rope.scaling."
    # Not the original context length: Mistral 3 counts from it, and by itself it scales nothing.
    keys = [f"{scaling}{name}" for name in ("type", "factor", "attn_factor", "yarn_")]
    replaced = ("clex.", *keys, f"{architecture}.rope.scale_linear", *FREQUENCY_TENSORS)
    own, tensors = {}, {}
    row = architectures.find(architecture)
    if rope.is_scaled_in(tables) or (rope.windowed and row.scales_windows):
        tensors = rope.scaling.gguf_tensors(rope.dim, rope.base)
        if set(tensors) <= set(row.factor_tensors):
            own = {f"{architecture}.{key}": value for key, value in rope.scaling.gguf_keys().items()}
        else:
            tensors = {}
    notes = (_UNROTATED,) if rope.windowed and row.unrotated else ()
    return RopeMetadata(tables.original_context_length, {**own, **tables.metadata()}, tensors, replaced, notes)


def baked(tables: Tables, context: int, architecture: str, rope: SourceRope) -> RopeMetadata:
    """The one table of a context length, in the words of stock llama.cpp.

    The table becomes frequency factors base^(-2i/n_rot) / f_i, by which llama.cpp divides its own angles, where the
    architecture's graph takes them. Elsewhere it can be carried only if it is a geometric series, as those of NTK-aware
    and linear scaling are: the RoPE base and the linear factor give it.

    Args:
        tables: where it comes from.
        context: tokens; the bucket that holds them gives the table.
        architecture: the model's, in GGUF's words.
        rope: the model's rotary embedding.

    Raises:
        ConvertError: no table covers the context, or stock llama.cpp cannot do what the tables ask for.
    """
    if not 1 <= context <= tables.max_context_length:
        raise ConvertError(
            f"`bake={context}`: the tables cover 1 to {tables.max_context_length} tokens; "
            "choose a length among them, or make more tables with `max_factor`"
        )
    if rope.windowed:
        raise ConvertError(
            "`bake`: layers with a sliding window keep the model's own frequencies, but stock llama.cpp would give "
            "them the table's"
        )
    if tables.log_scale:
        raise ConvertError(
            "`bake`: attention scaled by log(tokens) changes with every token, which stock llama.cpp cannot do; "
            "pass `log_scale=False` to leave it out"
        )
    bucket = tables.bucket(context)
    keys: dict[str, Any] = {}
    scale = 1.0 if tables.attn_scale is None else float(tables.attn_scale[bucket])
    if scale != 1:
        if rope.dim != rope.head_dim:
            raise ConvertError(
                f"`bake`: the tables scale attention by {scale:g}, which stock llama.cpp does to rotated dimensions "
                f"only, and this model rotates {rope.dim} of {rope.head_dim}"
            )
        # It multiplies the sines and cosines of queries and of keys.
        keys[f"{architecture}.rope.scaling.attn_factor"] = np.float32(math.sqrt(scale))
    inv_freq = tables.inv_freq[bucket].astype(np.float64)
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    plain = rope.base ** (-2 * np.arange(inv_freq.size) / rope.dim)
    if not np.allclose(inv_freq, plain, rtol=_EXACT, atol=0):
        if names := architectures.find(architecture).factor_tensors:
            with np.errstate(over="ignore"):
                factors = (plain / inv_freq).astype(np.float32)
            if not (np.isfinite(factors) & (factors > 0)).all():
                raise ConvertError("`bake`: the frequencies are too far from the model's for factors in float32")
            tensors = {name: factors for name in names}
        else:
            keys |= _series(inv_freq, architecture, tables.method)
    scaling = (f"{architecture}.rope.scaling.", f"{architecture}.rope.scale_linear")
    covered = tables.context_lengths[bucket]
    if bucket == 0:
        note = f"{context} tokens lie within the original context of {covered}: this is the model without extension"
    else:
        note = f"every prompt, short ones too, gets the frequencies made for up to {covered} tokens"
    keys |= Baked(tables.method, tables.original_context_length, context).metadata()
    return RopeMetadata(context, keys, tensors, ("clex.", *scaling, *FREQUENCY_TENSORS), (note,))


def _series(inv_freq: npt.NDArray[np.float64], architecture: str, method: str) -> dict[str, Any]:
    """The keys that give f_i = base^(-2i/n_rot) / factor in every architecture."""
    steps, logs = np.arange(inv_freq.size), np.log(inv_freq)
    slope, start = np.polyfit(steps, logs, 1) if inv_freq.size > 1 else (math.nan, math.nan)
    if not np.allclose(np.exp(start + slope * steps), inv_freq, rtol=_EXACT, atol=0):
        able = [row.name for row in architectures.with_tables() if row.factor_tensors]
        # On top of a scaling of the model's own these have no series either.
        advice = "" if method in ("ntk", "linear") else "; pass `method='ntk'` or `method='linear'`, which need none"
        raise ConvertError(
            f"`bake`: stock llama.cpp takes no frequency factors for the architecture {architecture}, only for "
            f"{architectures.shortened(able)}; of the tables of {method}, this one cannot be had without them{advice}"
        )
    keys: dict[str, Any] = {f"{architecture}.rope.freq_base": np.float32(math.exp(-slope * inv_freq.size))}
    if abs(start) > _EXACT:
        keys[f"{architecture}.rope.scaling.type"] = "linear"
        keys[f"{architecture}.rope.scaling.factor"] = np.float32(math.exp(-start))
    return keys
