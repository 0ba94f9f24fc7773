"""From the logits of both models on a small set S to D and its gradient: C × K numbers, no ranks.

Shape suffixes: C tokens · K entries of S, of which `valid_CK` are in it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Measure(NamedTuple):
    """log p and log q of the entries of S; one column more for the tail, where it is compared."""

    s_CK: Tensor
    t_CK: Tensor
    valid_CK: Tensor
    tail: bool = False  # the last column is everything outside of S
    over_C: Tensor | None = None
    """log Σ exp z of the student, over the vocabulary or (tail) outside of S; None: S is all."""


def on_support(z_CK: Tensor, t_CK: Tensor, valid_CK: Tensor) -> Measure:
    """Renormalise both on S: no normaliser of the vocabulary is needed."""
    return Measure(log_softmax(z_CK, valid_CK), log_softmax(t_CK, valid_CK), valid_CK)


def on_vocabulary(
    z_CK: Tensor, t_CK: Tensor, valid_CK: Tensor, rest_C: Tensor, teacher_rest_C: Tensor, tail: bool
) -> Measure:
    """Normalise both over the vocabulary, given log Σ exp of their logits outside of S.

    The tail, all mass outside of S, comes from those logits themselves: 1 − Σp would have lost it
    to rounding where S holds nearly everything. It plays no part where S is the
    vocabulary, or empty.
    """
    (s_CK, s_rest_C1, lse_C1), (t_CK, t_rest_C1, _) = (
        _normalise(x_CK, valid_CK, x_rest_C)
        for x_CK, x_rest_C in ((z_CK, rest_C), (t_CK, teacher_rest_C))
    )
    over_C = lse_C1[:, 0]
    if tail:
        s_CK, t_CK = torch.cat([s_CK, s_rest_C1], -1), torch.cat([t_CK, t_rest_C1], -1)
        there_C = rest_C.isfinite() & valid_CK.any(-1)  # an empty S is worth nothing
        valid_CK = torch.cat([valid_CK, there_C.unsqueeze(-1)], -1)
        over_C = rest_C.where(there_C, 0.0)
    s_CK, t_CK = (x.masked_fill(~valid_CK, 0.0) for x in (s_CK, t_CK))
    return Measure(s_CK, t_CK, valid_CK, tail, over_C)


def log_softmax(x_CK: Tensor, valid_CK: Tensor) -> Tensor:
    """Return x renormalised on the entries that are valid, 0 at the others."""
    hidden_CK = x_CK.masked_fill(~valid_CK, -math.inf)
    return (x_CK - hidden_CK.logsumexp(-1, keepdim=True)).masked_fill(~valid_CK, 0.0)


def _normalise(x_CK: Tensor, valid_CK: Tensor, rest_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inside_C1 = x_CK.masked_fill(~valid_CK, -math.inf).logsumexp(-1, keepdim=True)
    lse_C1 = torch.logaddexp(inside_C1, rest_C.unsqueeze(-1))
    return x_CK - lse_C1, rest_C.unsqueeze(-1) - lse_C1, lse_C1


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 − e^x) for x ≤ 0, in float64: near 0 by expm1, far from it by log1p."""
    x = x.double()
    return torch.where(x > -math.log(2), (-x.expm1()).log(), (-x.exp()).log1p())


@dataclass(frozen=True)
class PolicyGradient:
    """c = w·cost with everything detached: a candidate's cost, its weight, and what is cut off."""

    cost: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # its value; the slope is not used
    weight: str
    normalize_weight: bool
    center: bool
    floor: float | None
    cap: float | None

    def costs(self, s: Tensor, t: Tensor, baseline: Tensor | float = 0.0) -> Tensor:
        """Return −(reward cut to [floor, cap]) − baseline, elementwise."""
        cost = self.cost(s, t)[0]
        if self.floor is not None or self.cap is not None:
            cost = -(-cost).clamp(self.floor, self.cap)
        return cost - baseline

    def weights(self, s_CK: Tensor, t_CK: Tensor, valid_CK: Tensor) -> Tensor:
        """Return w on S."""
        x_CK = {"student_p": s_CK, "teacher_p": t_CK, "none": torch.zeros_like(s_CK)}[self.weight]
        if self.normalize_weight:
            x_CK = log_softmax(x_CK, valid_CK)
        return torch.where(valid_CK, x_CK.exp(), 0.0)

    def coefficients(self, seen: Measure, cost_CK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the surrogate's value Σ c, and c."""
        s_CK, t_CK, valid_CK = seen[:3]
        w_CK = self.weights(s_CK, t_CK, valid_CK)
        c_CK = torch.where(valid_CK, w_CK * cost_CK, 0.0)
        if self.center:
            total_C1 = w_CK.sum(-1, keepdim=True)
            mean_C1 = c_CK.sum(-1, keepdim=True) / total_C1.where(total_C1 > 0, 1.0)
            c_CK = c_CK - w_CK * mean_C1
        return c_CK.sum(-1), c_CK


@dataclass(frozen=True)
class Clip:
    """PPO's surrogate of a drawn token with advantage A = −cost and ratio ρ = π/μ:

        D = −min(ρA, clip(ρ, 1 − low, 1 + high)·A), and where A < 0 at most dual·|A|

    (Schulman et al. 1707.06347; dual clip, Ye et al. 1912.09729). None: no such bound.
    """

    low: float | None
    high: float | None
    dual: float | None

    def coefficients(self, ratio_C: Tensor, cost_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return D, c = −ρA (0 where D is flat), and where it is, [C] each."""
        least = -math.inf if self.low is None else 1 - self.low
        most = math.inf if self.high is None else 1 + self.high
        moving_C = ratio_C * cost_C
        value_C = torch.maximum(moving_C, ratio_C.clamp(least, most) * cost_C)
        if self.dual is not None:
            value_C = torch.where(cost_C > 0, value_C.minimum(cost_C * self.dual), value_C)
        flat_C = value_C != moving_C
        return value_C, moving_C.masked_fill(flat_C, 0.0), flat_C


def divergence(
    f: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], seen: Measure
) -> tuple[Tensor, Tensor]:
    """Return Σ f(s, t) over S and c = ∂f/∂s."""
    value_CK, slope_CK = f(seen.s_CK, seen.t_CK)
    value_C = torch.where(seen.valid_CK, value_CK, 0.0).sum(-1)
    return value_C, torch.where(seen.valid_CK, slope_CK, 0.0)


def logit_gradient(
    seen: Measure, coefficient_CK: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Turn ∇D = Σ c·∇log p into ∂D/∂z: on S, and as (a, b) with a·exp(z − b) elsewhere.

    Without a tail that is −Σc·p. With one, the gradient of the tail category, spread over the
    logits outside of S as they share its mass: exp(z − log Σ exp z), over those outside.
    """
    p_CK = torch.where(seen.valid_CK, seen.s_CK.exp(), 0.0)
    mass_C1 = coefficient_CK.sum(-1, keepdim=True)
    gradient_CK = coefficient_CK - p_CK * mass_C1
    if seen.over_C is None:
        return gradient_CK, None, None
    if not seen.tail:
        return gradient_CK, -mass_C1[:, 0], seen.over_C
    return gradient_CK[:, :-1], gradient_CK[:, -1], seen.over_C
