"""The ways to make tables: one function per method, and a registry of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt

from clex_convert.errors import ConvertError, extra_packages
from clex_convert.weights import DEFAULT_ACTIVATION, DEFAULT_TIME_DT, NAMES, OdeSettings, OdeWeights
from clex_local.tables import Tables, TablesError

_MAX_STEPS = 1_000_000


@dataclass(frozen=True)
class Request:
    """What a method makes tables from.

    Attributes:
        dim: rotary dimension d of a head, even and at least 4.
        base: RoPE base of the model (rope_theta).
        max_factor: last scaling factor; one bucket for each of 1, 2, ..., max_factor.
        weights: the CLEX layer, for the methods that have one.
        settings: how its dynamics are integrated.
    """

    dim: int
    base: float
    max_factor: int
    weights: OdeWeights | None
    settings: OdeSettings


@dataclass(frozen=True)
class Method:
    """One way to make tables.

    Attributes:
        summary: half a sentence for the help text.
        make: gives the inverse frequencies, [max_factor, d/2], and what to say of them in the provenance.
        needs_weights: whether it integrates a CLEX layer.
        default_max_factor: where neither the user nor the checkpoint says; None if it must be said.
    """

    summary: str
    make: Callable[[Request], tuple[npt.NDArray[Any], dict[str, Any]]]
    needs_weights: bool = False
    default_max_factor: int | None = None


def _clex(request: Request) -> tuple[npt.NDArray[Any], dict[str, Any]]:
    weights, settings = request.weights, request.settings
    assert weights is not None
    act, time_dt = settings.act or DEFAULT_ACTIVATION, settings.time_dt or DEFAULT_TIME_DT
    param_factor = weights.check(request.dim)
    if (request.max_factor - 1) / time_dt > _MAX_STEPS:
        raise ConvertError(f"{weights.where}: time_dt {time_dt} takes more than {_MAX_STEPS} steps; use a larger one")
    with extra_packages():
        import torch

        from clex_convert.ode import ClexLayer, integrate
    # Copies: numpy may share memory that torch would have to treat as read-only.
    layer = ClexLayer(torch.tensor(weights.up), torch.tensor(weights.down), act)
    inv_freq = integrate(layer, request.base, request.max_factor, time_dt)
    wrong = ~(np.isfinite(inv_freq) & (inv_freq > 0)).all(axis=1)
    if wrong.any():
        factor = int(np.argmax(wrong)) + 1
        raise ConvertError(
            f"{weights.where}: the dynamics diverge, at t = {factor} the frequencies are not finite and above 0; "
            f"check act ({act}) and time_dt ({time_dt}), or pass --max-factor {max(factor - 1, 1)}"
        )
    facts = {
        "activation": act,
        "param_factor": param_factor,
        "solver": "torchdiffeq rk4",
        "step": time_dt,
        "weights_sha256": weights.sha256,
    }
    return inv_freq, facts


def _ntk(request: Request) -> tuple[npt.NDArray[Any], dict[str, Any]]:
    even = np.arange(0, request.dim, 2, dtype=np.float64)
    stretch = 2 * np.arange(1, request.max_factor + 1, dtype=np.float64)[:, None] - 1
    inv_freq = request.base ** (-even / request.dim) * stretch ** (-even / (request.dim - 2))
    return inv_freq, {"stretch": "2t - 1"}


METHODS: dict[str, Method] = {
    "clex": Method("integrate the learned dynamics of a CLEX layer", _clex, needs_weights=True),
    "ntk": Method(
        "closed form of the untrained CLEX layer, NTK-aware scaling by 2t - 1; no weights needed",
        _ntk,
        default_max_factor=4,
    ),
}


def converter_version() -> str:
    """Version of the installed package, for the provenance."""
    try:
        return metadata.version("clex-local")
    except metadata.PackageNotFoundError:
        return "unknown"


def tables(
    method: str,
    *,
    dim: int,
    base: float,
    original_context: int,
    max_factor: int | None = None,
    weights: OdeWeights | Mapping[str, npt.ArrayLike] | None = None,
    act: str | None = None,
    time_dt: float | None = None,
    log_scale: bool = False,
    source: Mapping[str, Any] | None = None,
) -> Tables:
    """Makes the tables of one model.

    Args:
        method: ``clex`` or ``ntk``.
        dim: rotary dimension d of a head, even, at least 4.
        base: RoPE base of the model (rope_theta).
        original_context: L, tokens that scaling factor 1 covers.
        max_factor: last scaling factor; by default 4 for ``ntk``, and for ``clex`` it must be given.
        weights: for ``clex``: the layer, or a mapping with ``ode_up_proj`` [d/2, p * d] and ``ode_down_proj``
            [p * d, d/2].
        act: activation of the layer, ``silu`` (default) or ``tanh``.
        time_dt: step of the integration in units of t, 0.01 by default.
        log_scale: whether queries are scaled by log(tokens) / log(L) at run time.
        source: settings of the source, for the provenance.

    Returns:
        Tables with one bucket for each scaling factor 1, 2, ..., max_factor, checked against every rule.

    Raises:
        ConvertError: weights that are missing, of the wrong shape or not finite; dynamics that diverge; a number
            out of range.

    Source: CLEX (arXiv 2310.16450), `clex_convert.ode`; ``ntk`` is its untrained layer in closed form,
    f_i(t) = base^(-2i/d) * (2t - 1)^(-2i/(d-2)).
    """
    if method not in METHODS:
        raise ConvertError(f"the method must be one of {', '.join(METHODS)}, not {method!r}")
    if dim < 4 or dim % 2:
        raise ConvertError(f"the rotary dimension must be even and at least 4, not {dim}")
    if not (np.isfinite(base) and base > 1):
        raise ConvertError(f"the RoPE base (rope_theta) must be above 1, not {base}")
    if isinstance(weights, Mapping):
        up, down = (np.asarray(weights[name], np.float32) for name in NAMES)
        weights = OdeWeights(up, down)
    settings = OdeSettings(act, time_dt, max_factor or METHODS[method].default_max_factor, log_scale)
    settings.check("conversion")
    if METHODS[method].needs_weights and weights is None:
        raise ConvertError(
            f"the method {method} needs the weights of a CLEX layer: pass them with --clex-weights, or use --method ntk"
        )
    if settings.max_factor is None:
        raise ConvertError(f"the method {method} needs to know the largest scaling factor: pass --max-factor")

    inv_freq, facts = METHODS[method].make(Request(dim, base, settings.max_factor, weights, settings))
    facts = {"converter": f"clex-local {converter_version()}", "rope_base": base, **facts, "source": dict(source or {})}
    made = Tables(
        method=method,
        original_context_length=original_context,
        scaling_factors=np.arange(1, settings.max_factor + 1, dtype=np.float32),
        inv_freq=inv_freq.astype(np.float32),
        log_scale=log_scale,
        provenance=json.dumps(facts, sort_keys=True),
    )
    try:
        made.validate()
    except TablesError as error:
        raise ConvertError(f"the tables cannot be used: {error}") from None
    return made
