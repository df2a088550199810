"""The integrated dynamics of a CLEX layer with the gradient of its weights, computed apart from autograd.

One training step integrates over up to max_factor / time_dt steps of four stages, tiny products each, of which autograd
would record every one: more than a second for t = 16 in steps of 0.01. Here the steps run in NumPy on the CPU, in
float64, and the derivative of exactly these steps is taken backwards through them; the products that make up the
gradients of the two matrices are one each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clex_convert.ode import Dynamics, plain_frequencies

_Array = npt.NDArray[np.float64]
# Of the Runge-Kutta method of fourth order that torchdiffeq has (the 3/8 rule): where its stages are within a step,
# what each adds of those before it, and what the step takes of them.
_PLACES = np.array([0, 1 / 3, 2 / 3, 1])
_BEFORE = np.array([[0, 0, 0, 0], [1 / 3, 0, 0, 0], [-1 / 3, 1, 0, 0], [1, -1, 1, 0]])
_TAKEN = np.array([1, 3, 3, 1]) / 8


def trained_states(dynamics: Dynamics, base: float, last: int, time_dt: float) -> torch.Tensor:
    """What `clex_convert.ode.whole_states` gives, but for its rounding, at a fraction of the time of its gradient.

    Args:
        dynamics: those of the model.
        base: the model's rope_theta.
        last: the largest t, at least 2.
        time_dt: step in units of t.

    Returns:
        [last, d/2] in the type of the weights.
    """
    up, down = dynamics.ode_up_proj, dynamics.ode_down_proj
    states = _Solution.apply(up, down, dynamics, base, last, time_dt)
    assert isinstance(states, torch.Tensor)
    return states


class _Solution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        up: torch.Tensor,
        down: torch.Tensor,
        dynamics: Dynamics,
        base: float,
        last: int,
        time_dt: float,
    ) -> torch.Tensor:
        ctx.steps = steps = _Steps.plan(dynamics, last, time_dt)
        start = dynamics.closed_form.start(plain_frequencies(dynamics, base))
        with np.errstate(all="ignore"):  # whoever asks looks whether it diverged
            states = steps.run(_numbers(up), _numbers(down), _numbers(start))
        return torch.from_numpy(states).to(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        with np.errstate(all="ignore"):
            up, down = ctx.steps.run_back(_numbers(gradient))
        return torch.from_numpy(up).to(gradient), torch.from_numpy(down).to(gradient), None, None, None, None


@dataclass
class _Steps:
    """The steps of one integration, and what they leave for the way back.

    Attributes:
        activation: and its derivative, by what goes into it.
        sizes: [S] of the steps.
        shifts: [S, 4, d/2], what the form adds to the state before the first matrix, at each stage.
        drifts: [S, 4, d/2], what it adds after the second.
        parts: for each of t = 2, 3, ...: the step that reaches it, and how far into the step it is, 0 to 1.
    """

    activation: tuple[Callable[[_Array], _Array], Callable[[_Array], _Array]]
    sizes: _Array
    shifts: _Array
    drifts: _Array
    parts: list[tuple[int, float]]
    up: _Array = field(init=False)
    down: _Array = field(init=False)
    inputs: _Array = field(init=False)
    hidden: _Array = field(init=False)

    @classmethod
    def plan(cls, dynamics: Dynamics, last: int, time_dt: float) -> _Steps:
        # torchdiffeq's grid: whole steps from 1, the last one as short as it must be
        grid = np.arange(np.ceil((last - 1) / time_dt + 1)) * time_dt + 1
        grid[-1] = last
        sizes = np.diff(grid)
        reached = np.searchsorted(grid[1:], np.arange(2, last + 1) - 1e-9)
        parts = [(int(k), float((t - grid[k]) / sizes[k])) for t, k in zip(range(2, last + 1), reached, strict=True)]
        times = torch.from_numpy((grid[:-1, None] + sizes[:, None] * _PLACES).reshape(-1, 1))
        form = dynamics.closed_form
        device = dynamics.ode_up_proj.device
        shape = len(sizes), 4, dynamics.dim // 2
        shifts, drifts = (_numbers(part(times.to(device))).reshape(shape) for part in (form.shift, form.drift))
        silu = dynamics.activation is torch.nn.functional.silu
        activation = (_silu, _silu_slope) if silu else (np.tanh, _tanh_slope)
        return cls(activation, sizes, shifts, drifts, parts)

    def run(self, up: _Array, down: _Array, state: _Array) -> _Array:
        """The states [last, d/2] at t = 1, 2, ..."""
        self.up, self.down, act = up, down, self.activation[0]
        self.inputs, self.hidden = np.empty(self.shifts.shape), np.empty((*self.shifts.shape[:2], up.shape[1]))
        states, slopes = np.empty((len(self.sizes) + 1, len(state))), np.empty((4, len(state)))
        states[0] = state
        for step, size in enumerate(self.sizes):
            for stage in range(4):
                entered = state + size * (_BEFORE[stage, :stage] @ slopes[:stage]) if stage else state
                self.inputs[step, stage] = entered = entered + self.shifts[step, stage]
                self.hidden[step, stage] = hidden = entered @ up
                slopes[stage] = act(hidden) @ down + self.drifts[step, stage]
            state = state + size * (_TAKEN @ slopes)
            states[step + 1] = state
        found = [states[step] + part * (states[step + 1] - states[step]) for step, part in self.parts]
        return np.stack([states[0], *found])

    def run_back(self, gradient: _Array) -> tuple[_Array, _Array]:
        """Gradients of the matrices, of that of the states [last, d/2]."""
        slopes = self.activation[1](self.hidden)
        hidden, outputs = np.empty(self.hidden.shape), np.empty(self.shifts.shape)
        entering = np.zeros((4, self.shifts.shape[-1]))
        at = np.zeros((len(self.sizes) + 1, self.shifts.shape[-1]))
        for (step, part), row in zip(self.parts, gradient[1:], strict=True):
            at[step] += (1 - part) * row
            at[step + 1] += part * row
        state = np.zeros(self.shifts.shape[-1])
        for step in range(len(self.sizes) - 1, -1, -1):
            state, size = state + at[step + 1], self.sizes[step]
            for stage in (3, 2, 1, 0):
                out = size * _TAKEN[stage] * state
                if stage < 3:
                    out = out + size * (_BEFORE[stage + 1 :, stage] @ entering[stage + 1 :])
                outputs[step, stage] = out
                hidden[step, stage] = through = slopes[step, stage] * (self.down @ out)
                entering[stage] = self.up @ through
            state = state + entering.sum(axis=0)
        width, half = self.up.shape[1], self.up.shape[0]
        hidden, outputs = hidden.reshape(-1, width), outputs.reshape(-1, half)
        active = self.activation[0](self.hidden).reshape(-1, width)
        return self.inputs.reshape(-1, half).T @ hidden, active.T @ outputs


def _numbers(tensor: torch.Tensor) -> _Array:
    return tensor.detach().cpu().double().numpy()


def _silu(x: _Array) -> _Array:
    return x / (1 + np.exp(-x))


def _silu_slope(x: _Array) -> _Array:
    part = 1 / (1 + np.exp(-x))
    return part * (1 + x * (1 - part))


def _tanh_slope(x: _Array) -> _Array:
    return 1 - np.tanh(x) ** 2
