"""The CLEX layer of a model in training: its tables of inverse frequencies, differentiable by the ODE's weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from clex_convert.closed_forms import closed_form
from clex_convert.ode import Dynamics, plain_frequencies, whole_states
from clex_convert.transformers_folder import set_rope_scaling
from clex_convert.weights import DEFAULT_DYNAMICS
from clex_train import TrainError
from clex_train.solution import trained_states


@dataclass(frozen=True)
class ClexSettings:
    """What a config says of a CLEX layer, in the paper's words.

    Attributes:
        max_factor: largest scaling factor t.
        param_factor: p; the ODE's hidden size is p times the rotary dimension.
        act: ``tanh`` or ``silu``.
        time_dt: step of the integration in units of t.
        log_scale: whether queries are multiplied by log(n) / log(L), n the tokens of the pass.
        dynamics: the closed form that the ODE goes around, and that an untrained layer is: ``ntk`` or ``yarn``.
    """

    max_factor: int = 16
    param_factor: int = 1
    act: str = "tanh"
    time_dt: float = 0.01
    log_scale: bool = False
    dynamics: str = DEFAULT_DYNAMICS

    def put_into(self, config: PretrainedConfig) -> None:
        """Writes the entries of config.json that the authors' code reads, and dynamics that are not theirs."""
        values = {key: value for key, value in vars(self).items() if key not in ("log_scale", "dynamics")}
        if self.dynamics != DEFAULT_DYNAMICS:
            values["dynamics"] = self.dynamics
        set_rope_scaling(config, {"type": "clex", **values, "factor": 1})
        config.log_scale = self.log_scale


class ClexLayer(torch.nn.Module):
    """Inverse frequencies f(t) of a model; its weights stay in float32 whatever becomes of the model's."""

    def __init__(self, dim: int, base: float, context: int, settings: ClexSettings) -> None:
        """An untrained layer, which gives the closed form: NTK-aware frequencies at a stretch of 2t - 1, or YaRN's.

        Args:
            dim: rotary dimension d of a head.
            base: the model's rope_theta.
            context: L, the original context length in tokens.
            settings: of the ODE.
        """
        super().__init__()
        self.base, self.context, self.settings = base, context, settings
        up = torch.empty(dim // 2, settings.param_factor * dim)
        torch.nn.init.kaiming_uniform_(up)
        form = closed_form(settings.dynamics, dim, base, context)
        self.proj_func = Dynamics(up, torch.zeros(up.shape[1], up.shape[0]), settings.act, form)
        self._cached: tuple[Any, torch.Tensor] | None = None

    def move_to(self, context: int) -> None:
        """Make a layer that is still its closed form that of another original context.

        Args:
            context: L in tokens.

        Raises:
            TrainError: it has learned something, which is of its own context.
        """
        if context != self.context and bool(self.proj_func.ode_down_proj.any()):
            raise TrainError(f"the model's CLEX layer was trained for an original context of {self.context} tokens")
        self.context, self._cached = context, None
        self.proj_func.closed_form = closed_form(self.settings.dynamics, self.proj_func.dim, self.base, context)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ClexLayer:
        def kept(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            halved = result.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(device=result.device) if halved and result.dtype != tensor.dtype else result

        return super()._apply(kept, recurse)

    def frequencies(self, factors: Sequence[int]) -> torch.Tensor:
        """Inverse frequencies in rad/position for each of the scaling factors t.

        While gradients are recorded they are computed anew, up to the largest t that is asked for; otherwise once for
        all t up to max_factor, as the authors' inference does it.

        Returns:
            [len(factors), d/2] in the type of the weights.

        Raises:
            TrainError: the dynamics diverge.
        """
        weights = self.proj_func.ode_up_proj, self.proj_func.ode_down_proj
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            # Row 1 does not depend on the weights, but they need a gradient in every process at every step.
            last = max(2, *factors)
            states = trained_states(self.proj_func, self.base, last, self.settings.time_dt)
            return self._table(states)[[t - 1 for t in factors]]
        key = [(weight.data_ptr(), weight._version, weight.dtype) for weight in weights]
        if self._cached is None or self._cached[0] != key:
            # autocast would round the weights
            with torch.no_grad(), torch.autocast(weights[0].device.type, enabled=False):
                states = whole_states(self.proj_func, self.base, self.settings.max_factor, self.settings.time_dt)
                self._cached = key, self._table(states)
        return self._cached[1][[t - 1 for t in factors]]

    def attention(self, factors: Sequence[int]) -> list[float] | None:
        """What queries and keys are multiplied by at each of the scaling factors; None where it is 1 at all."""
        scales = [self.proj_func.closed_form.attention(t) for t in factors]
        return None if all(scale == 1 for scale in scales) else scales

    def _table(self, states: torch.Tensor) -> torch.Tensor:
        finite = torch.isfinite(states).all(dim=-1)
        if not bool(finite.all()):
            raise TrainError(
                f"the CLEX layer's dynamics diverge: the frequencies at t = {int(finite.int().argmin()) + 1} are "
                "not finite; a smaller `ode_learning_rate` or `time_dt` may help"
            )
        times = torch.arange(2, len(states) + 1, dtype=states.dtype, device=states.device)[:, None]
        # f(1) itself, without the rounding of exp(log(f)); nothing is learned there
        first = plain_frequencies(self.proj_func, self.base)[None]
        return torch.cat((first, self.proj_func.closed_form.frequencies(times, states[1:])))
