"""The ways to make tables: one function per method, and a registry of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from clex_convert import frequencies
from clex_convert.errors import ConvertError, extra_packages
from clex_convert.scaling import Scaling
from clex_convert.weights import (
    DEFAULT_ACTIVATION,
    DEFAULT_DYNAMICS,
    DEFAULT_TIME_DT,
    OdeSettings,
    OdeWeights,
)

_MAX_STEPS = 1_000_000


@dataclass(frozen=True)
class Request:
    """What a method makes tables from.

    Attributes:
        dim: rotary dimension d of a head, even and at least 4.
        base: RoPE base of the model (rope_theta).
        trained: tokens of the context in which YaRN counts turns.
        factors: [n] scaling factors t, ascending from 1.
        weights: the CLEX layer, for the method that has one.
        settings: how its dynamics are integrated.
        scaling: what the model names, or what takes its place.
    """

    dim: int
    base: float
    trained: int
    factors: npt.NDArray[np.float64]
    weights: OdeWeights | None
    settings: OdeSettings
    scaling: Scaling


@dataclass(frozen=True)
class ScaledFrequencies:
    """What a method makes.

    Attributes:
        inv_freq: inverse frequencies [n, d/2] in rad/position.
        attention: [n] factors on cosine and sine, the logits get their squares; None means 1.
        facts: what to say of them in the provenance.
    """

    inv_freq: npt.NDArray[Any]
    attention: list[float] | None
    facts: dict[str, Any]


@dataclass(frozen=True)
class Method:
    """One way to make tables.

    Attributes:
        summary: half a sentence for the help text.
        make: makes them.
        on: kinds of scaling of a source that the method goes with.
        needs_weights: whether it integrates a CLEX layer.
        default_max_factor: where nothing else says; None if it must be said.
    """

    summary: str
    make: Callable[[Request], ScaledFrequencies]
    on: tuple[str, ...] = ("default", "dynamic")
    needs_weights: bool = False
    default_max_factor: int | None = 4


def _clex(request: Request) -> ScaledFrequencies:
    weights, settings, factors = request.weights, request.settings, request.factors
    assert weights is not None
    act, time_dt = settings.act or DEFAULT_ACTIVATION, settings.time_dt or DEFAULT_TIME_DT
    param_factor = weights.check(request.dim)
    if (factors[-1] - 1) / time_dt > _MAX_STEPS:
        raise ConvertError(f"{weights.where}: time_dt {time_dt} takes more than {_MAX_STEPS} steps; use a larger one")
    around = settings.dynamics or DEFAULT_DYNAMICS
    if around == "yarn" and not weights.down.any():
        # Its state stays zero, which needs no torch. Around ntk it moves, and the authors' rounding with it.
        facts = {"param_factor": param_factor, "weights_sha256": weights.sha256}
        return replace(_yarn(request), facts={**facts, "solver": "closed form", "dynamics": around})
    with extra_packages():
        import torch

        from clex_convert.closed_forms import closed_form
        from clex_convert.ode import Dynamics, integrate
    form = closed_form(around, request.dim, request.base, request.trained)
    # Copies: numpy may share memory that torch would have to treat as read-only.
    dynamics = Dynamics(torch.tensor(weights.up), torch.tensor(weights.down), act, form)
    inv_freq = integrate(dynamics, request.base, factors, time_dt)
    wrong = ~(np.isfinite(inv_freq) & (inv_freq > 0)).all(axis=1)
    if wrong.any():
        index = int(np.argmax(wrong))
        raise ConvertError(
            f"{weights.where}: the dynamics diverge, at t = {factors[index]:g} the frequencies are not finite and "
            f"above 0; check act ({act}) and time_dt ({time_dt}), or stop at a factor of {factors[max(index - 1, 0)]:g}"
        )
    facts = {
        "activation": act,
        "param_factor": param_factor,
        "solver": "torchdiffeq rk4",
        "step": time_dt,
        "weights_sha256": weights.sha256,
    }
    if around != DEFAULT_DYNAMICS:
        facts["dynamics"] = around
    return ScaledFrequencies(inv_freq, [form.attention(float(t)) for t in factors], facts)


def _extended(request: Request, row: Callable[[frequencies.Array, float], frequencies.Array]) -> ScaledFrequencies:
    """Extends what the model does with its own scaling, row by row; its attention factor stays."""
    start, attention = request.scaling.first(request.dim, request.base)
    rows = np.stack([row(start, t) for t in request.factors])
    return ScaledFrequencies(rows, [attention] * len(rows), {})


def _ntk(request: Request) -> ScaledFrequencies:
    # transformers calls the growth of its dynamic scaling "factor".
    growth = request.scaling.factor if request.scaling.kind == "dynamic" else _NTK_GROWTH
    made = _extended(request, lambda start, t: frequencies.ntk(start, 1 + growth * (t - 1)))
    return replace(made, facts={"growth": growth})


def _linear(request: Request) -> ScaledFrequencies:
    if request.scaling.kind == "linear":
        request = replace(request, scaling=Scaling())
    return _extended(request, lambda start, t: start / t)


def _yarn(request: Request) -> ScaledFrequencies:
    scaling, factors = request.scaling, request.factors
    rows = [scaling.yarn(request.dim, request.base, request.trained, float(t)) for t in factors]
    facts = {name: getattr(scaling, name) for name in ("beta_fast", "beta_slow", "truncate")}
    return ScaledFrequencies(np.stack(rows), [scaling.attention(float(t)) for t in factors], facts)


def _longrope(request: Request) -> ScaledFrequencies:
    scaling, start = request.scaling, frequencies.plain(request.dim, request.base)
    rows = [
        frequencies.divided(start, scaling.short_factor if t == 1 else scaling.long_factor) for t in request.factors
    ]
    return ScaledFrequencies(np.stack(rows), [scaling.attention(scaling.factor)] * len(rows), {})


_NTK_GROWTH = 2.0
_FIXED = ("llama3", "linear", "yarn", "rope_freqs")
METHODS: dict[str, Method] = {
    "clex": Method(
        "integrate the learned dynamics of a CLEX layer",
        _clex,
        on=("default",),
        needs_weights=True,
        default_max_factor=None,
    ),
    "ntk": Method(
        "closed form of the untrained CLEX layer, NTK-aware scaling by 2t - 1; no weights needed",
        _ntk,
        on=("default", "dynamic", *_FIXED),
    ),
    "linear": Method(
        "position interpolation, all frequencies divided by t", _linear, on=("default", "dynamic", *_FIXED)
    ),
    "yarn": Method(
        "YaRN with factor t, which divides the slow frequencies and scales attention",
        _yarn,
        on=("default", "dynamic", "yarn"),
    ),
    "longrope": Method(
        "the short and the long factors that the source names", _longrope, on=("longrope",), default_max_factor=None
    ),
}


def fixed(request: Request) -> ScaledFrequencies:
    """The one table of a model whose scaling is the same at every length."""
    return _extended(request, lambda start, t: start)
