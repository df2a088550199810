"""The learned dynamics of CLEX: d log f / dt, and its integration with torchdiffeq.

Source: CLEX (arXiv 2310.16450) and the authors' public code, whose behaviour the released weights were trained
with. Its quirks are kept and marked.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torchdiffeq import odeint

from clex_convert.closed_forms import ClosedForm, Ntk

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
}


class Dynamics(torch.nn.Module):
    """d/dt of the state of log f(t), f the d/2 inverse frequencies in rad/position.

    dx/dt = act((x + log n(t)) @ up) @ down + d/dt log n(t), where n(t) is a closed form and x(t) = log f(t); the form
    says which part of x is the state.
    """

    def __init__(
        self, up: torch.Tensor, down: torch.Tensor, activation: str, closed_form: ClosedForm | None = None
    ) -> None:
        """Takes the weights.

        Args:
            up: float32 [d/2, p * d], p the parameter factor.
            down: float32 [p * d, d/2].
            activation: ``silu`` or ``tanh``.
            closed_form: n(t); None for that of CLEX's authors.
        """
        super().__init__()
        self.ode_up_proj = torch.nn.Parameter(up)
        self.ode_down_proj = torch.nn.Parameter(down)
        self.activation = ACTIVATIONS[activation]
        dim = 2 * up.shape[0]
        self.dim = dim
        self.closed_form = Ntk(dim) if closed_form is None else closed_form
        self.register_buffer("even", torch.arange(0, dim, 2, dtype=torch.float32), persistent=False)

    def forward(self, t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """d/dt of the state, float32 [d/2], at scaling factor t (a scalar)."""
        form = self.closed_form
        hidden = self.activation((state + form.shift(t)) @ self.ode_up_proj)
        return hidden @ self.ode_down_proj + form.drift(t)


def plain_frequencies(dynamics: Dynamics, base: float) -> torch.Tensor:
    """f(1) = base^(-2i/d), float32 [d/2]."""
    return 1 / base ** (dynamics.get_buffer("even") / dynamics.dim)


def whole_states(dynamics: Dynamics, base: float, last: int, time_dt: float) -> torch.Tensor:
    """The state at t = 1, 2, ... last, which can be differentiated by the weights.

    Args:
        dynamics: those of the model.
        base: the model's rope_theta; f(1) is base^(-2i/d).
        last: the largest t.
        time_dt: step in units of t.

    Returns:
        [last, d/2] in the type of the weights.
    """
    start = dynamics.closed_form.start(plain_frequencies(dynamics, base))
    if last == 1:
        return start[None]
    return _solve(dynamics, start, torch.arange(1, last + 1, dtype=start.dtype, device=start.device), time_dt)


def _solve(dynamics: Dynamics, x: torch.Tensor, times: torch.Tensor, time_dt: float) -> torch.Tensor:
    solution = odeint(dynamics, x, times, method="rk4", options={"step_size": time_dt})
    assert isinstance(solution, torch.Tensor)  # a tensor in, a tensor out
    return solution


def integrate(
    dynamics: Dynamics, base: float, factors: npt.NDArray[np.float64], time_dt: float
) -> npt.NDArray[np.float32]:
    """Inverse frequencies at every scaling factor.

    Runge-Kutta of fourth order in float32 with a fixed step, as the authors do it: over the whole factors in one go,
    and from each of them on to the others before the next, so that these change nothing in the rows of the whole ones.

    Args:
        dynamics: those of the model.
        base: the model's rope_theta; f(1) is base^(-2i/d).
        factors: [n] scaling factors t, ascending from 1.
        time_dt: step in units of t.

    Returns:
        float32 [n, d/2]; may hold values that are not finite when the dynamics diverge.
    """

    with torch.no_grad():
        start = plain_frequencies(dynamics, base)
        states = whole_states(dynamics, base, int(factors[-1]), time_dt)
        rows, t, x = [], torch.tensor(1.0), states[0]
        wanted = torch.tensor(factors, dtype=torch.float32)
        for factor in wanted:
            below = factor.floor()
            if below > t or factor == below:
                t, x = below, states[int(below) - 1]
            if factor > t:
                t, x = factor, _solve(dynamics, x, torch.stack((t, factor)), time_dt)[1]
            rows.append(x)
        frequencies = dynamics.closed_form.frequencies(wanted[:, None], torch.stack(rows))
        frequencies[0] = start  # f(1) itself, without the rounding of exp(log(f))
        return frequencies.numpy()
