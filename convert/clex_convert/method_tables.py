"""Tables by a method: which one a model's scaling asks for, how far they reach, and what is said of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt

from clex_convert.errors import ConvertError
from clex_convert.methods import METHODS, Request, ScaledFrequencies, fixed
from clex_convert.scaling import Scaling, read_scaling
from clex_convert.weights import DYNAMICS, NAMES, OdeSettings, OdeWeights
from clex_local.commands.options import about, documented, option, takes_options
from clex_local.model_file.tables import Tables, TablesError

_MAX_FACTOR = 65536


class ScalingError(ConvertError):
    """A method and a scaling that do not go together; the message does not name the model."""


def original_context(method: str | None, scaling: Scaling, context: int) -> int:
    """Tokens that scaling factor 1 covers, by default.

    Args:
        method: None for what the model's scaling asks for.
        scaling: of the model.
        context: context length that the model names.
    """
    if method == scaling.kind == "linear" and not scaling.original:
        return max(int(context / scaling.factor), 1)
    if scaling.kind == "longrope" or (method == scaling.kind and scaling.fixed):
        return scaling.original
    return max(context, scaling.reach)


def default_method(dim: int, head_dim: int | None = None) -> str:
    """The method for a model that has neither a CLEX layer nor a scaling of its own.

    YaRN reads long contexts best without training (docs/evaluation.md). Its attention factor cannot be expressed where
    only a part of each head is rotated; there NTK-aware scaling takes its place.

    Args:
        dim: rotary dimension d of a head.
        head_dim: size of a head; None for d.
    """
    return "yarn" if head_dim in (None, dim) else "ntk"


def _factors(
    name: str, scaling: Scaling, context: int, given: Sequence[float] | None, max_factor: float | None
) -> npt.NDArray[np.float64]:
    if given is not None:
        factors = np.array(given, dtype=np.float64)
        rising = factors.ndim == 1 and factors.size and np.isfinite(factors).all() and (np.diff(factors) > 0).all()
        if not rising or factors[0] != 1:
            shown = ", ".join(f"{factor:g}" for factor in factors.ravel()[:8])
            raise ConvertError(f"the scaling factors must begin with 1 and ascend, not {shown or 'be none'}")
        last = factors[-1]
    elif max_factor is not None:
        last = max_factor
    elif name == "longrope":
        last = scaling.reach / context if scaling.reach > context else None
    elif scaling.factor > 1 and scaling.kind in ("dynamic", name):
        last = scaling.factor
    else:
        last = METHODS[name].default_max_factor
    if last is None:
        raise ConvertError(f"the method {name} must know the largest scaling factor: pass `max_factor` or `factors`")
    if not 1 <= last <= _MAX_FACTOR:
        raise ConvertError(f"the largest scaling factor must be from 1 to {_MAX_FACTOR}, not {last:g}")
    if given is None:
        between = [] if name == "longrope" else range(2, math.ceil(last))
        factors = np.array([1, *between, *([last] if last > 1 else [])], dtype=np.float64)
    # The nearest float32 may cover one token less than the factor does.
    single = factors.astype(np.float32)
    less = np.floor(single.astype(np.float64) * context) < np.floor(factors * context)
    return np.where(less, np.nextafter(single, np.float32(np.inf)), single).astype(np.float64)


def converter_version() -> str:
    """Version of the installed package, for the provenance."""
    try:
        return metadata.version("clex-local")
    except metadata.PackageNotFoundError:
        return "unknown"


@documented
@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """What the tables of a model are made from."""

    dim: int = field(metadata=about("Rotary dimension d of a head, even, at least 4."))
    base: float = field(metadata=about("RoPE base of the model (rope_theta)."))
    original_context: int = field(metadata=about("L, tokens that scaling factor 1 covers."))
    trained_context: int | None = option(
        None,
        "Tokens of the context that the model was trained on, in which YaRN counts how often a dimension turns.",
        default_text="`original_context`",
    )
    factors: Sequence[float] | None = option(
        None, "Scaling factor t of each bucket, ascending from 1; any numbers, not only whole ones."
    )
    max_factor: float | None = option(
        None,
        "In place of `factors`: 1, 2, ... up to this one, for longrope 1 and this one.",
        default_text="what `scaling` says, or 4; clex must be told",
    )
    scaling: Scaling | Mapping[str, Any] | None = option(
        None,
        "The model's own scaling as transformers' rope_scaling has it. yarn and ntk take their parameters from it (ntk "
        "the factor of dynamic as its growth a: the frequencies are stretched by 1 + a (t - 1), with a = 2 where "
        "nothing is said); ntk and linear begin at the frequencies of a model that has another scaling.",
    )
    head_dim: int | None = option(
        None, "Size of a head where only part of it is rotated; there no attention factor can be expressed."
    )
    weights: OdeWeights | Mapping[str, npt.ArrayLike] | None = option(
        None,
        "For clex: the layer, or a mapping with ode_up_proj [d/2, p * d] and ode_down_proj [p * d, d/2].",
    )
    act: str | None = option(None, "Activation of the layer, silu or tanh.", default_text="silu")
    time_dt: float | None = option(None, "Step of the integration in units of t.", default_text="0.01")
    dynamics: str | None = option(
        None,
        "Closed form that the layer was trained around.",
        choices=DYNAMICS,
        default_text="ntk",
    )
    log_scale: bool = option(False, "Whether queries are scaled by log(tokens) / log(L) at run time.")
    source: Mapping[str, Any] | None = option(None, "Settings of the source, for the provenance.")

    def __post_init__(self) -> None:
        if self.dim < 4 or self.dim % 2:
            raise ConvertError(f"the rotary dimension must be even and at least 4, not {self.dim}")
        if not (np.isfinite(self.base) and self.base > 1):
            raise ConvertError(f"the RoPE base (rope_theta) must be above 1, not {self.base}")
        if self.original_context < 1:
            raise ConvertError(f"the original context must be at least 1 token, not {self.original_context}")
        if self.factors is not None and self.max_factor is not None:
            raise ConvertError("`factors` and `max_factor` exclude each other: pass one of them")
        self.ode_settings.check("conversion")

    @property
    def ode_settings(self) -> OdeSettings:
        """How the dynamics of a CLEX layer are integrated."""
        return OdeSettings(self.act, self.time_dt, None, self.log_scale, self.dynamics)

    def read_scaling(self) -> Scaling:
        """The model's own scaling.

        Raises:
            ConvertError: it is not understood.
        """
        if isinstance(self.scaling, Scaling):
            return self.scaling
        return read_scaling(self.scaling or {}, "scaling", context=self.original_context, dim=self.dim)

    def read_weights(self) -> OdeWeights | None:
        """The CLEX layer."""
        if not isinstance(self.weights, Mapping):
            return self.weights
        up, down = (np.asarray(self.weights[name], np.float32) for name in NAMES)
        return OdeWeights(up, down)


@takes_options(TableOptions)
def tables(method: str | None, options: TableOptions) -> Tables:
    """Makes the tables of one model.

    Args:
        method: a key of `METHODS`; None for what `scaling` asks for: one table for ``llama3``, ``linear`` and
            ``yarn``, the method ``ntk`` for ``dynamic``, ``longrope`` for itself; for a model without scaling ``clex``
            with `weights`, otherwise `default_method`.
        {options}

    Returns:
        Tables with one bucket for each scaling factor, checked against every rule.

    Raises:
        ConvertError: weights that are missing, of the wrong shape or not finite; dynamics that diverge; a number
            out of range; a method that does not go with the scaling.

    Source: CLEX (arXiv 2310.16450), `clex_convert.ode`; ``ntk`` is its untrained layer in closed form,
    f_i(t) = base^(-2i/d) * (2t - 1)^(-2i/(d-2)); the others: `clex_convert.frequencies`.
    """
    if method not in (None, *METHODS):
        raise ConvertError(f"the method must be one of {', '.join(METHODS)}, not {method!r}")
    scaling, weights = options.read_scaling(), options.read_weights()
    if method is None and scaling.kind == "default":
        method = "clex" if weights is not None else default_method(options.dim, options.head_dim)
    name, make = _chosen(method, scaling, fixed_only=options.factors is None and options.max_factor is None)
    if name == "clex" and weights is None:
        raise ConvertError(
            'the method clex needs the weights of a CLEX layer: pass them with `clex_weights`, or use `method="yarn"`'
        )
    context = options.original_context
    t = _factors(name, scaling, context, [1] if make is fixed else options.factors, options.max_factor)
    trained = options.trained_context or context
    made = make(Request(options.dim, options.base, trained, t, weights, options.ode_settings, scaling))
    return _checked(name, made, t, scaling, options)


def _checked(
    name: str, made: ScaledFrequencies, factors: npt.NDArray[np.float64], scaling: Scaling, options: TableOptions
) -> Tables:
    """What a method made, as tables that follow every rule."""
    attention = None if made.attention is None else np.array(made.attention)
    if attention is not None and (attention == 1).all():
        attention = None
    if attention is not None and options.head_dim not in (None, options.dim):
        raise ScalingError(_partial(name, scaling, attention[-1], options.dim, options.head_dim))
    facts = {"converter": f"clex-local {converter_version()}", "rope_base": options.base}
    facts |= {**made.facts, "source": dict(options.source or {})}
    result = Tables(
        method=name,
        original_context_length=options.original_context,
        scaling_factors=factors.astype(np.float32),
        inv_freq=made.inv_freq.astype(np.float32),
        attn_scale=None if attention is None else (attention**2).astype(np.float32),
        log_scale=options.log_scale,
        provenance=json.dumps(facts, sort_keys=True),
    )
    try:
        result.validate()
    except TablesError as error:
        raise ConvertError(f"the tables cannot be used: {error}") from None
    return result


def _chosen(
    method: str | None, scaling: Scaling, *, fixed_only: bool
) -> tuple[str, Callable[[Request], ScaledFrequencies]]:
    """Name of the tables' method, and what makes them."""
    kind = scaling.kind
    if method is None:
        if scaling.fixed:
            if not fixed_only:
                able = ", ".join(name for name in METHODS if kind in METHODS[name].on)
                raise ScalingError(
                    f"the model's own scaling, {kind}, is one table for every length: pass `method` ({able}) for "
                    "tables by length, or leave `factors` and `max_factor` out"
                )
            return kind, fixed
        method = {"dynamic": "ntk", "longrope": "longrope"}[kind]
    elif kind not in METHODS[method].on:
        able = ", ".join(name for name in METHODS if kind in METHODS[name].on)
        own = "no scaling of its own" if kind == "default" else f"the scaling {kind} of its own"
        hint = f"use `method` {able}" + ("" if kind == "default" else ", or leave it out")
        if method == "longrope":
            hint = "pass its short_factor and long_factor with `rope_scaling`, or " + hint
        raise ScalingError(f"the method {method} cannot be combined with a model that has {own}; {hint}")
    return method, METHODS[method].make


def _partial(name: str, scaling: Scaling, attention: float, dim: int, head_dim: int | None) -> str:
    line = (
        f"{name} has an attention factor ({attention:.4g}), which here acts on {dim} of the {head_dim} dimensions of a "
        "head; tables cannot do that: "
    )
    if scaling.kind == "longrope":
        return line + "a file of llama.cpp's own converter needs none, the library chooses its factors by length"
    if name == "clex":
        return line + "train the layer around ntk instead"
    return line + "pass `rope_scaling` with an attention_factor of 1 to leave it out"
