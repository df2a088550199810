"""The closed forms that a CLEX layer's dynamics go around: what an untrained layer gives, by the scaling factor t.

A form n(t) takes part in the dynamics twice, dx/dt = act((x + log n(t)) @ up) @ down + d/dt log n(t), and says which
state is integrated: x itself, or what x is beyond log n(t), which needs no drift and stays zero until something is
learned.
"""

from __future__ import annotations

import abc

import numpy as np
import torch

from clex_convert import frequencies

# Quirk: the base inside n(t) is 10000 in the authors' code, whatever the model's rope_theta is.
_NTK_BASE = 10000.0


class ClosedForm(torch.nn.Module, abc.ABC):
    """One form; t is a scalar or [m, 1], and what is returned [d/2] or [m, d/2]."""

    def __init__(self, dim: int) -> None:
        """Takes the rotary dimension d."""
        super().__init__()
        self.dim = dim

    @abc.abstractmethod
    def start(self, plain: torch.Tensor) -> torch.Tensor:
        """The state at t = 1, where the frequencies are the plain ones [d/2]."""

    @abc.abstractmethod
    def shift(self, t: torch.Tensor) -> torch.Tensor:
        """x + log n(t), less the state."""

    @abc.abstractmethod
    def drift(self, t: torch.Tensor) -> torch.Tensor:
        """What the state moves by where nothing is learned."""

    @abc.abstractmethod
    def frequencies(self, t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """f(t) in rad/position, of a state."""

    def attention(self, t: float) -> float:
        """Factor on queries and keys alike that goes with the frequencies; attention's logits get its square."""
        return 1.0


class Ntk(ClosedForm):
    """NTK-aware frequencies at a stretch of a = 2t - 1 (1 below t = 1), as CLEX's authors have it; the state is x."""

    def __init__(self, dim: int) -> None:
        """Takes the rotary dimension d."""
        super().__init__(dim)
        self.register_buffer("even", torch.arange(0, dim, 2, dtype=torch.float32), persistent=False)

    def start(self, plain: torch.Tensor) -> torch.Tensor:
        """log f(1)."""
        return torch.log(plain)

    def shift(self, t: torch.Tensor) -> torch.Tensor:
        """log n(t)."""
        even, dim = self.get_buffer("even"), self.dim
        return torch.log(1 / (_NTK_BASE * _stretch(t) ** (dim / (dim - 2))) ** (even / dim))

    def drift(self, t: torch.Tensor) -> torch.Tensor:
        """e(t) = d/dt log n(t)."""
        return -(self.get_buffer("even") / (self.dim - 2)) * 2 / _stretch(t)

    def frequencies(self, t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """exp(x)."""
        return torch.exp(state)


class Yarn(ClosedForm):
    """YaRN with the factor t (arXiv 2309.00071); the state is x - log n(t), so that n(t) is met at every t exactly.

    n_i(t) = f_i (1 - r_i + r_i / t): the ramp r is a matter of how often a dimension turns in the original context,
    and does not depend on t. Its drift -r_i / (t (t (1 - r_i) + r_i)) is integrated by taking logarithms.
    """

    def __init__(self, dim: int, base: float, context: int) -> None:
        """YaRN with its usual parameters.

        Args:
            dim: rotary dimension d.
            base: the model's rope_theta.
            context: L, the original context length in tokens.
        """
        super().__init__(dim)
        ramp, plain = frequencies.yarn_ramp(dim, base, context), frequencies.plain(dim, base)
        self.register_buffer("ramp", torch.from_numpy(ramp.astype(np.float32)), persistent=False)
        self.register_buffer("plain", torch.from_numpy(plain.astype(np.float32)), persistent=False)

    def start(self, plain: torch.Tensor) -> torch.Tensor:
        """Zero: YaRN at t = 1 is plain RoPE."""
        return torch.zeros_like(plain)

    def shift(self, t: torch.Tensor) -> torch.Tensor:
        """2 log n(t), one for x, one as it is."""
        return 2 * torch.log(self._form(t))

    def drift(self, t: torch.Tensor) -> torch.Tensor:
        """Zero."""
        return torch.zeros_like(t * self.get_buffer("plain"))

    def frequencies(self, t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """n(t) exp(state)."""
        return self._form(t) * torch.exp(state)

    def attention(self, t: float) -> float:
        """YaRN's attention factor, 0.1 ln(t) + 1."""
        return frequencies.yarn_attention(t)

    def _form(self, t: torch.Tensor) -> torch.Tensor:
        ramp, plain = self.get_buffer("ramp"), self.get_buffer("plain")
        return plain * (1 - ramp) + plain * ramp / t


def closed_form(dynamics: str, dim: int, base: float, context: int) -> ClosedForm:
    """The form of a layer whose config names its dynamics ``ntk`` or ``yarn``.

    Args:
        dynamics: the name.
        dim: rotary dimension d.
        base: the model's rope_theta.
        context: L, the original context length in tokens.
    """
    return Yarn(dim, base, context) if dynamics == "yarn" else Ntk(dim)


def _stretch(t: torch.Tensor) -> torch.Tensor:
    return (2 * t - 1).clamp(min=1)
